"""The tiny LVLM: a real LLaVA of 4.8M parameters, trained here as a generator of captions and answers, nothing else.

It is the embedded default: demo and tests turn it into a retriever. Its weights ship with the package (`weights/`,
float16) and come from `jobs/pretrain_tiny.py`, which trains on scenes of the training split only, in two stages:

1. the vision tower alone learns to name, patch by patch, the object whose centre is there, and where that centre is
   (real LVLMs, too, begin with a trained tower);
2. the whole model learns to write captions of varied length and detail, to answer questions about images, and to
   answer the same questions about captions. Answers alone teach a model of this size to look things up only after
   very many of them, so it is helped: of a token that has just named an object one attention head learns to look at
   its colour, and a later one at the patch of the image where it is; in long captions one learns to look ahead, at the
   patch of the object that comes next; two learn to look from a question about two
   objects at their names; and linear readers, thrown away afterwards, ask the image's tokens for the labels of stage
   1, so that the tower goes on learning them, and hidden states where the one object is and how far apart the two are.

No loss ever compares two examples, so nothing contrastive is learned.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from vladva.core.ranks import rank_and_world
from vladva.data.scenes.captions import RELATION_WORDS
from vladva.data.scenes.corpus import held_out_scenes
from vladva.data.scenes.scene import (
    COLOURS,
    IMAGE_SIZE,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    random_scene,
    relation,
    render,
)
from vladva.models.tiny.dialogues import DETAILED, MIXTURE, Dialogue
from vladva.models.tiny.model import build_model, build_tokenizer, save_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast


# Hidden states and attention heads of stage 2. State n is what layer n of the language model reads, from 0.
PLACE_STATE = 3  # the token that names an object knows where it is
APART_STATE = 5  # the last token of a question knows how far apart the two objects are
# Layer and head; which tokens look, at which.
POINTERS = (
    (0, 0, "named", "colours"),
    (2, 0, "named", "patches"),
    (3, 0, "announced", "next_patches"),
    (4, 0, "compared", "firsts"),
    (4, 1, "compared", "seconds"),
)
PLACE_WEIGHT = 2.0  # of the losses of places and distances, beside the next token's
PATCH_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(RADII))  # what a patch is labelled with; 0: no object
EMPTY_WEIGHT = 0.2  # four patches in five are empty: they count less, not to drown the others


def coordinates(thing: SceneObject) -> tuple[float, float]:
    """The centre of an object, from -1 (left, top) to 1 (right, bottom)."""
    return 2 * thing.x / IMAGE_SIZE - 1, 2 * thing.y / IMAGE_SIZE - 1


def patch_of(thing: SceneObject) -> int:
    """Which of the 16 patches, row by row, holds the centre of an object."""
    return 4 * int(thing.y * 4 // IMAGE_SIZE) + int(thing.x * 4 // IMAGE_SIZE)


def named_objects(ids: list[int], scene: Scene, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, SceneObject]]:
    """Where tokens name an object of the scene, colour and shape: the shape's place in `ids`, and the object."""
    kinds = {tuple(tokenizer(f"{o.colour} {o.shape}", add_special_tokens=False).input_ids): o for o in scene.objects}
    return [(place, kinds[pair]) for place, pair in enumerate(pairwise(ids), start=1) if pair in kinds]


def collate(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels` [B, T] (answers, else -100), `pixel_values` [B, 3, H, W].

    Also where objects are, of dialogues with an image. `named` [N, 2]: row and place of tokens that have just named an
    object; `colours` [N]: the tokens of their colours; `places` [N, 2]: where it is in the image; `patches` [N]: the
    token of that patch. `announced` [K, 2] and `next_patches` [K]: the same of articles in long captions, whose object
    is still to be named. `compared` [M, 2]: row and place of the last tokens of questions about two objects; `firsts`
    and `seconds` [M]: the tokens that name them; `apart` [M, 2]: from the second to the first. `labels_of_patches`
    [16 I, 3], of the I images: `patch_labels`.
    """
    import numpy as np
    import torch

    encoded = []
    named: list[tuple[int, int]] = []
    places: list[tuple[float, float]] = []
    patches: list[int] = []
    compared: list[tuple[int, int]] = []
    announced: list[tuple[int, int]] = []
    next_patches: list[int] = []
    firsts: list[int] = []
    seconds: list[int] = []
    apart: list[tuple[float, float]] = []
    labelled: list[list[int]] = []
    for row, (scene, turns) in enumerate(dialogues):
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, (asked, answer) in enumerate(turns):
            image = "<image>" * 16 if scene is not None and number == 0 else ""
            prompt = tokenizer(f"<|user|>{image}{asked}<|assistant|>", add_special_tokens=False).input_ids
            reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            if scene is not None and len(things := named_objects(prompt, scene, tokenizer)) == 2:
                (first, a), (second, b) = things
                firsts.append(len(ids) + first)
                seconds.append(len(ids) + second)
                apart.append(((a.x - b.x) * 2 / IMAGE_SIZE, (a.y - b.y) * 2 / IMAGE_SIZE))
                compared.append((row, len(ids) + len(prompt) - 1))
            ids += prompt
            ids += reply
            labels += [-100] * len(prompt) + reply
        if scene is not None:
            labelled += patch_labels(scene)
            start = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
            for place, thing in named_objects(ids, scene, tokenizer):
                named.append((row, place))
                places.append(coordinates(thing))
                patches.append(start + patch_of(thing))
            if turns[0][0] in DETAILED:
                # `a small red circle`: the article is three tokens before the shape. Later sentences name no sizes.
                for place, thing in named_objects(ids, scene, tokenizer)[: len(scene.objects)]:
                    announced.append((row, place - 3))
                    next_patches.append(start + patch_of(thing))
        encoded.append((ids, labels))
    width = max(len(ids) for ids, _ in encoded)
    batch = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in encoded]),
        "named": torch.tensor(named, dtype=torch.long).view(-1, 2),
        "places": torch.tensor(places).view(-1, 2),
        "colours": torch.tensor([place - 1 for _, place in named], dtype=torch.long),
        "patches": torch.tensor(patches, dtype=torch.long),
        "announced": torch.tensor(announced, dtype=torch.long).view(-1, 2),
        "next_patches": torch.tensor(next_patches, dtype=torch.long),
        "compared": torch.tensor(compared, dtype=torch.long).view(-1, 2),
        "firsts": torch.tensor(firsts, dtype=torch.long),
        "seconds": torch.tensor(seconds, dtype=torch.long),
        "apart": torch.tensor(apart).view(-1, 2),
        "labels_of_patches": torch.tensor(labelled, dtype=torch.long).view(-1, 3),
    }
    images = [np.asarray(render(scene)) for scene, _ in dialogues if scene is not None]
    if images:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        batch["pixel_values"] = pixels / 127.5 - 1
    return batch


def build_readers(model: LlavaForConditionalGeneration) -> torch.nn.ModuleDict:
    """The linear readers of stage 2: `places` and `apart`, from a hidden state to a point, `patches` to the classes."""
    from torch import nn

    width = model.lm_head.in_features
    sizes = {"places": 2, "apart": 2, "patches": sum(PATCH_CLASSES)}
    return nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})


def patch_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of colour, shape and size [3], summed over patches [P, classes], [P, 3]; empty ones count less."""
    import torch
    from torch.nn.functional import cross_entropy

    weights = [torch.tensor([EMPTY_WEIGHT] + [1.0] * (classes - 1)) for classes in PATCH_CLASSES]
    parts = zip(logits.split(PATCH_CLASSES, dim=-1), labels.unbind(1), weights, strict=True)
    return torch.stack([cross_entropy(logit, label, weight, reduction="sum") for logit, label, weight in parts])


def weight_of_patches(labels: torch.Tensor) -> float:
    """By what the sums of `patch_losses` are divided: occupied patches, and a part of the empty ones."""
    occupied = int((labels[:, 0] > 0).sum())
    return occupied + EMPTY_WEIGHT * (len(labels) - occupied)


def pointer_sum(
    model: LlavaForConditionalGeneration,
    state: torch.Tensor,
    layer: int,
    head: int,
    looking: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Summed -log of the attention that tokens `looking` [N, 2] (row, place) pay to tokens `target` [N] of their row.

    `state` [B, T, H] is what the layer reads; queries and keys are made from it as the layer itself makes them.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder: Any = model.model.language_model
    block = decoder.layers[layer]
    size = block.self_attn.head_dim
    normed = block.input_layernorm(state)
    rows = slice(head * size, (head + 1) * size)
    queries = (normed @ block.self_attn.q_proj.weight[rows].T)[:, None]  # [B, 1, T, D]
    keys = (normed @ block.self_attn.k_proj.weight[rows].T)[:, None]
    places = torch.arange(state.shape[1])
    queries, keys = apply_rotary_pos_emb(queries, keys, *decoder.rotary_emb(state, places[None]))
    row, place = looking.unbind(1)
    scores = torch.einsum("nd,ntd->nt", queries[row, 0, place], keys[row, 0]) / math.sqrt(size)
    later = places[None] > place[:, None]
    return cross_entropy(scores.masked_fill(later, -torch.inf), target, reduction="sum")


def products(precision: str) -> torch.autocast:
    """Matrix products in `bfloat16` or `float32`, the rest in float32: half the time on CPUs that have them."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def loss_sums(
    model: LlavaForConditionalGeneration,
    readers: torch.nn.ModuleDict,
    batch: dict[str, torch.Tensor],
    precision: str = "float32",
) -> torch.Tensor:
    """Sums over the batch [9]: cross-entropy of the answers' tokens, absolute errors of places and distances,
    cross-entropy of the patches' labels, the five pointers.

    Logits are computed for the answers' tokens only.
    """
    import torch
    from torch.nn.functional import cross_entropy, l1_loss

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
    labels = batch["labels"][:, 1:]
    with products(precision):
        outputs = model.model(**inputs, use_cache=False, output_hidden_states=True)
    states = outputs.hidden_states
    hidden = states[-1][:, :-1]
    answered = labels != -100
    tokens = cross_entropy(model.lm_head(hidden[answered]), labels[answered], reduction="sum")
    places = readers["places"](states[PLACE_STATE][tuple(batch["named"].T)])
    apart = readers["apart"](states[APART_STATE][tuple(batch["compared"].T)])
    errors = [l1_loss(places, batch["places"], reduction="sum"), l1_loss(apart, batch["apart"], reduction="sum")]
    patches = batch["labels_of_patches"]
    labelled = hidden.new_zeros(())
    if len(patches):
        labelled = patch_losses(readers["patches"](outputs.image_hidden_states.flatten(0, -2).float()), patches).sum()
    pointers = [
        pointer_sum(model, states[layer], layer, head, batch[looking], batch[target])
        for layer, head, looking, target in POINTERS
    ]
    return torch.stack([tokens, *errors, labelled, *pointers])


def relation_accuracy(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0
) -> float:
    """Share of `count` held-out scenes whose "Where is X, seen from Y?" the model answers rightly; guessing: 1/4."""
    import torch

    right = 0
    for scene, _, random in held_out_scenes(count, seed):
        a, b = random.sample(scene.objects, 2)
        question = f"Where is the {a.colour} {a.shape}, seen from the {b.colour} {b.shape}?"
        batch = collate([(scene, [(question, RELATION_WORDS[relation(a, b)][0])])], tokenizer)
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
        answered = batch["labels"][0, 1:] != -100
        right += bool((logits[0, :-1][answered].argmax(-1) == batch["labels"][0, 1:][answered]).all())
    return right / count


def pretraining_rate(step: int, steps: int, peak: float = 1e-3, warmup: int = 300) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def patch_labels(scene: Scene) -> list[list[int]]:
    """Colour, shape and size of the object whose centre is in each of the 16 patches, as class numbers; 0: none."""
    labels = [[0, 0, 0] for _ in range(16)]
    for thing in scene.objects:
        labels[patch_of(thing)] = [
            1 + tuple(COLOURS).index(thing.colour),
            1 + SHAPES.index(thing.shape),
            1 + tuple(RADII).index(thing.size),
        ]
    return labels


def patch_places(scene: Scene) -> list[list[float]]:
    """Where the centre is of the object whose centre is in each of the 16 patches, by `coordinates`; zeros: none."""
    places = [[0.0, 0.0] for _ in range(16)]
    for thing in scene.objects:
        places[patch_of(thing)] = list(coordinates(thing))
    return places


def average_gradients(model: torch.nn.Module, extra: torch.Tensor) -> torch.Tensor:
    """Sum the gradients, and more numbers [N], over the processes of a torchrun; returns the summed numbers.

    Parameters that a process had no use for in this step count as zero gradients.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return extra
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), extra])
    distributed.all_reduce(flat)
    *summed, extra = flat.split([*(g.numel() for g in gradients), extra.numel()])
    for gradient, values in zip(gradients, summed, strict=True):
        gradient.copy_(values.view_as(gradient))
    return extra


def accumulate(
    trained: torch.nn.ModuleDict, batches: list[dict[str, torch.Tensor]], precision: str = "float32"
) -> torch.Tensor:
    """The gradients of one step, over all processes, and its mean losses [9] in the order of `loss_sums`."""
    import torch

    rank, world = rank_and_world()
    model: Any = trained["model"]
    readers: Any = trained["readers"]
    counts = torch.tensor(
        [
            sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches),
            *(sum(batch[name].numel() for batch in batches) for name in ("places", "apart")),
            sum(weight_of_patches(batch["labels_of_patches"]) for batch in batches),
            *(sum(batch[target].numel() for batch in batches) for *_, target in POINTERS),
        ]
    )
    weights = torch.tensor([1.0, PLACE_WEIGHT, PLACE_WEIGHT, 1.0, *(1.0 for _ in POINTERS)])
    losses = torch.zeros(len(counts))
    for number, batch in enumerate(batches):
        # Batches grow longer: dealt 0 1 1 0 0 1 1 0, every process has about as many tokens.
        turn = number % (2 * world)
        if min(turn, 2 * world - 1 - turn) == rank:
            parts = loss_sums(model, readers, batch, precision) / counts.clamp(min=1)
            (parts @ weights).backward()
            losses += parts.detach()
    return average_gradients(trained, losses)


def pretrain_tower(
    model: LlavaForConditionalGeneration,
    *,
    steps: int,
    seed: int = 0,
    precision: str = "float32",
    say: Callable[[str], None] = print,
) -> None:
    """Stage 1: the vision tower learns to label its patches, `steps` steps of 128 images. The head is thrown away."""
    import numpy as np
    import torch

    rank, world = rank_and_world()
    tower = model.model.vision_tower
    torch.manual_seed(seed)
    labeller = torch.nn.ModuleList([tower, torch.nn.Linear(tower.config.hidden_size, sum(PATCH_CLASSES) + 2)])
    optimizer = torch.optim.AdamW(labeller.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        random = Random(f"{seed}/tower/{step}/{rank}")
        drawn = [random_scene(random, "train") for _ in range(128 // world)]
        pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in drawn]))
        labels = torch.tensor([patch_labels(scene) for scene in drawn]).flatten(0, 1)
        with products(precision):
            seen = tower(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, output_hidden_states=True)
        places = torch.tensor([patch_places(scene) for scene in drawn]).flatten(0, 1)
        logits, points = (
            labeller[1](seen.hidden_states[-1][:, 1:].float()).flatten(0, 1).split([sum(PATCH_CLASSES), 2], dim=-1)
        )
        occupied = labels[:, 0] > 0
        error = (points - places)[occupied].abs().mean()
        loss = (patch_losses(logits, labels).sum() / weight_of_patches(labels) + PLACE_WEIGHT * error) / world
        loss.backward()
        value = average_gradients(labeller, loss.detach()[None])
        torch.nn.utils.clip_grad_norm_(labeller.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pretraining_rate(step, steps, peak=1e-3, warmup=100)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = value.item() if step == 0 else 0.95 * running + 0.05 * value.item()
        if rank == 0 and (step + 1) % 50 == 0:
            rate = (step + 1) / (time.monotonic() - started)
            right = [
                (logit.argmax(1) == label)[label > 0].float().mean()
                for logit, label in zip(logits.split(PATCH_CLASSES, dim=-1), labels.T, strict=True)
            ]
            shares = "  ".join(
                f"{name} {share:.2f}" for name, share in zip(("colour", "shape", "size"), right, strict=True)
            )
            shares += f"  off by {error.item() * IMAGE_SIZE / 2:.1f} px"
            say(f"tower step {step + 1}/{steps}  loss {running:.4f}  {shares}  {rate:.2f} steps/s")


def step_batches(step: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """The dialogues of one optimizer step, sorted by length into micro-batches of 15 so that little is padded."""
    random = Random(f"{seed}/pretrain/{step}")
    dialogues = [kind(random_scene(random, "train"), random) for kind, count in MIXTURE for _ in range(count)]
    dialogues.sort(key=lambda dialogue: sum(len(text) for turn in dialogue[1] for text in turn))
    return [collate(dialogues[first : first + 15], tokenizer) for first in range(0, len(dialogues), 15)]


def pretrain(
    out: Path,
    *,
    tower_steps: int,
    steps: int,
    seed: int = 0,
    precision: str = "float32",
    save_every: int = 250,
    say: Callable[[str], None] = print,
) -> None:
    """Both stages, the second for `steps` optimizer steps of 60 dialogues; resumes from `out/state.pt` if there is one.

    Under torchrun the micro-batches of a step are dealt to the processes and the gradients summed, so the model is the
    same (up to rounding) for one, two or four processes.
    """
    import torch

    rank, _ = rank_and_world()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed)
    model = build_model(seed)
    model.set_attn_implementation("eager")  # at this size faster than the fused one, in bfloat16 many times
    trained = torch.nn.ModuleDict({"model": model, "readers": build_readers(model)})
    optimizer = torch.optim.AdamW(trained.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start = 0

    def save(step: int) -> None:
        """What goes on after this step."""
        state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, out / "state.pt.part")
        os.replace(out / "state.pt.part", out / "state.pt")

    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    else:
        pretrain_tower(model, steps=tower_steps, seed=seed, precision=precision, say=say)
        if rank == 0:
            save(0)

    started, running = time.monotonic(), torch.zeros(4 + len(POINTERS))
    for step in range(start, steps):
        losses = accumulate(trained, step_batches(step, seed, tokenizer), precision)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pretraining_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        running = losses if step == start else 0.95 * running + 0.05 * losses
        if rank == 0 and (step + 1) % 25 == 0:
            rate = (step + 1 - start) / (time.monotonic() - started)
            left = (steps - step - 1) / rate / 60
            say(f"step {step + 1}/{steps}  {told(running)}  {rate:.2f} steps/s  {left:.0f} min left")
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            save(step + 1)
            save_checkpoint(model, tokenizer, out / "weights")
            share = relation_accuracy(model, tokenizer, 150)
            say(f"step {step + 1}/{steps}  {share:.0%} of 150 held-out questions about relations answered rightly")


def told(losses: torch.Tensor) -> str:
    """The losses of `accumulate` in words."""
    tokens, places, apart, labels, *pointers = losses.tolist()
    pixels = f"places off by {places * IMAGE_SIZE / 2:.1f} px  distances {apart * IMAGE_SIZE / 2:.1f} px"
    return f"loss {tokens:.4f}  {pixels}  patches {labels:.2f}  pointers {' '.join(f'{loss:.2f}' for loss in pointers)}"
