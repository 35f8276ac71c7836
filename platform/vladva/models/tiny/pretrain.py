"""The tiny LVLM: a real LLaVA of 4.8M parameters, trained here as a generator of captions and answers, nothing else.

It is the embedded default: demo and tests turn it into a retriever. Its weights ship with the package (`weights/`,
float16) and come from `jobs/pretrain_tiny.py`, which trains on scenes of the training split only, in two stages:

1. the vision tower alone learns to name, patch by patch, the object whose centre is there (real LVLMs, too, begin with
   a trained tower);
2. the whole model learns to write captions of varied length and detail, to answer questions about pictures, and to
   answer the same questions about captions.

No loss ever compares two examples, so nothing contrastive is learned.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from vladva import scenes

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

TINY = Path(__file__).parent / "weights"  # the packaged checkpoint

DETAILED = ("Give a detailed description of the image.", "Describe the image in detail.")
BRIEF = ("Describe the image briefly.", "Provide a concise description of this image.")
VERY_BRIEF = ("Describe the image very briefly.", "List the objects in the image.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Turn = tuple[str, str]  # what the user says, what the assistant answers
Dialogue = tuple["Image.Image | None", list[Turn]]


# ---------------------------------------------------------------------------------------------------------- dialogues


def questions(scene: scenes.Scene, random: Random) -> list[Turn]:
    """Three questions about a scene, with answers of a few words."""
    a, b = random.sample(scene.objects, 2)
    named = f"the {a.colour} {a.shape}"
    stated = scenes.relation(a, b)
    asked = random.choice((stated, scenes.OPPOSITE[stated]))
    other = random.choice([c for c in scenes.COLOURS if c != a.colour])
    present = any((o.colour, o.shape) == (other, a.shape) for o in scene.objects)
    turns = [
        ("How many objects are there?", scenes.NUMBER_WORDS[len(scene.objects)]),
        (f"How large is {named}?", a.size),
        (
            f"Is {named} {random.choice(scenes.RELATION_WORDS[asked])} the {b.colour} {b.shape}?",
            "yes" if asked == stated else "no",
        ),
        (f"Is there a {other} {a.shape}?", "yes" if present else "no"),
        (f"Where is {named}, seen from the {b.colour} {b.shape}?", scenes.RELATION_WORDS[stated][0]),
    ]
    if sum(o.shape == a.shape for o in scene.objects) == 1:
        turns.append((f"What color is the {a.shape}?", a.colour))
    if sum(o.colour == b.colour for o in scene.objects) == 1:
        turns.append((f"What shape is the {b.colour} object?", b.shape))
    return random.sample(turns, 3)


def picture_questions(scene: scenes.Scene, random: Random) -> Dialogue:
    """Questions about a picture."""
    return scenes.render(scene), questions(scene, random)


def caption_questions(scene: scenes.Scene, random: Random) -> Dialogue:
    """The same questions about a complete short caption: reading, without a picture."""
    caption = scenes.short_caption(scenes.claim_of(scene, random), random)
    (first, answer), *rest = (turn for turn in questions(scene, random))
    return None, [(f"{caption}. {first}", answer), *rest]


def detailed_caption(scene: scenes.Scene, random: Random) -> Dialogue:
    """A long caption."""
    return scenes.render(scene), [(random.choice(DETAILED), scenes.long_caption(scene, random))]


def brief_caption(scene: scenes.Scene, random: Random) -> Dialogue:
    """A short caption, with or without relations as the prompt asks."""
    brief = random.random() < 0.7
    claim = scenes.claim_of(scene, random, sizes=brief, relations=brief)
    return scenes.render(scene), [(random.choice(BRIEF if brief else VERY_BRIEF), scenes.short_caption(claim, random))]


# Kinds of dialogue and how many of each make one optimizer step.
MIXTURE: tuple[tuple[Callable[[scenes.Scene, Random], Dialogue], int], ...] = (
    (detailed_caption, 22),
    (brief_caption, 8),
    (picture_questions, 10),
    (caption_questions, 8),
)


# -------------------------------------------------------------------------------------------------------------- model


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from dialogues: scene words are single tokens, any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from vladva.prompts import IMAGE_PROMPT, TEXT_PROMPT

    def texts() -> Iterator[str]:
        for _ in range(50):
            yield from (*DETAILED, *BRIEF, *VERY_BRIEF, IMAGE_PROMPT, TEXT_PROMPT)
        for _, (scene, random) in zip(range(4000), scenes.scenes("train", seed), strict=False):
            for kind, _ in MIXTURE[1:]:
                yield from (text for turn in kind(scene, random)[1] for text in turn)
            yield scenes.long_caption(scene, random)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=20,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
        model_max_length=512,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained tiny LLaVA: a ViT of 4 x 192 on 16 patches, a Llama of 6 x 192, 576 embedding rows, some spare."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=scenes.PICTURE_SIZE,
        patch_size=16,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


# ----------------------------------------------------------------------------------------------------------- training


def collate(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels` [B, T] (answers, else -100), `pixel_values` [B, 3, H, W]."""
    import numpy as np
    import torch

    encoded = []
    for picture, turns in dialogues:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, (asked, answer) in enumerate(turns):
            image = "<image>" * 16 if picture is not None and number == 0 else ""
            prompt = tokenizer(f"<|user|>{image}{asked}<|assistant|>", add_special_tokens=False).input_ids
            reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
        encoded.append((ids, labels))
    width = max(len(ids) for ids, _ in encoded)
    batch = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in encoded]),
    }
    pictures = [np.asarray(picture) for picture, _ in dialogues if picture is not None]
    if pictures:
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        batch["pixel_values"] = pixels / 127.5 - 1
    return batch


def next_token_sum(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy over the answers' tokens; logits are computed for those tokens only."""
    from torch.nn.functional import cross_entropy

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    answered = labels != -100
    return cross_entropy(model.lm_head(hidden[answered]), labels[answered], reduction="sum")


def learning_rate(step: int, steps: int, peak: float = 6e-4, warmup: int = 300) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def patch_labels(scene: scenes.Scene) -> list[list[int]]:
    """Colour, shape and size of the object whose centre is in each of the 16 patches, as class numbers; 0: none."""
    labels = [[0, 0, 0] for _ in range(16)]
    patch = scenes.PICTURE_SIZE // 4
    for thing in scene.objects:
        labels[4 * int(thing.y // patch) + int(thing.x // patch)] = [
            1 + tuple(scenes.COLOURS).index(thing.colour),
            1 + scenes.SHAPES.index(thing.shape),
            1 + tuple(scenes.RADII).index(thing.size),
        ]
    return labels


def average_gradients(model: torch.nn.Module, extra: torch.Tensor) -> torch.Tensor:
    """Sum the gradients, and one more value, over the processes of a torchrun; returns the summed value."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return extra
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [extra[None]])
    distributed.all_reduce(flat)
    for gradient, value in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(value.view_as(gradient))
    return flat[-1]


def pretrain_tower(
    model: LlavaForConditionalGeneration, *, steps: int, seed: int = 0, say: Callable[[str], None] = print
) -> None:
    """Stage 1: the vision tower learns to label its patches, `steps` steps of 128 pictures. The head is thrown away."""
    import numpy as np
    import torch
    from torch import distributed
    from torch.nn.functional import cross_entropy

    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    tower = model.model.vision_tower
    classes = [1 + len(scenes.COLOURS), 1 + len(scenes.SHAPES), 1 + len(scenes.RADII)]
    torch.manual_seed(seed)
    labeller = torch.nn.ModuleList([tower, torch.nn.Linear(tower.config.hidden_size, sum(classes))])
    optimizer = torch.optim.AdamW(labeller.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        random = Random(f"{seed}/tower/{step}/{rank}")
        drawn = [scenes.random_scene(random, "train") for _ in range(128 // world)]
        pixels = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in drawn]))
        labels = torch.tensor([patch_labels(scene) for scene in drawn]).flatten(0, 1)
        features = tower(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, output_hidden_states=True).hidden_states[-1]
        logits = labeller[1](features[:, 1:]).flatten(0, 1).split(classes, dim=-1)
        # Four patches in five are empty: they count less, not to drown the others.
        weights = [torch.tensor([0.2] + [1.0] * (n - 1)) for n in classes]
        parts = zip(logits, labels.unbind(1), weights, strict=True)
        loss = sum(cross_entropy(logit, label, weight) for logit, label, weight in parts) / world
        loss.backward()
        value = average_gradients(labeller, loss.detach())
        torch.nn.utils.clip_grad_norm_(labeller.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak=1e-3, warmup=100)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = value.item() if step == 0 else 0.95 * running + 0.05 * value.item()
        if rank == 0 and (step + 1) % 50 == 0:
            rate = (step + 1) / (time.monotonic() - started)
            right = [
                (logit.argmax(1) == label)[label > 0].float().mean()
                for logit, label in zip(logits, labels.T, strict=True)
            ]
            seen = "  ".join(
                f"{name} {share:.2f}" for name, share in zip(("colour", "shape", "size"), right, strict=True)
            )
            say(f"tower step {step + 1}/{steps}  loss {running:.4f}  {seen}  {rate:.2f} steps/s")


def step_batches(step: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """The dialogues of one optimizer step, sorted by length into micro-batches of 12 so that little is padded."""
    random = Random(f"{seed}/pretrain/{step}")
    dialogues = [kind(scenes.random_scene(random, "train"), random) for kind, count in MIXTURE for _ in range(count)]
    dialogues.sort(key=lambda dialogue: sum(len(text) for turn in dialogue[1] for text in turn))
    return [collate(dialogues[first : first + 12], tokenizer) for first in range(0, len(dialogues), 12)]


def pretrain(
    out: Path, *, tower_steps: int, steps: int, seed: int = 0, save_every: int = 250, say: Callable[[str], None] = print
) -> None:
    """Both stages, the second for `steps` optimizer steps of 48 dialogues; resumes from `out/state.pt` if there is one.

    Under torchrun the micro-batches of a step are dealt to the processes and the gradients summed, so the model is the
    same (up to rounding) for one, two or four processes.
    """
    import torch
    from torch import distributed

    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed)
    model = build_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    else:
        pretrain_tower(model, steps=tower_steps, seed=seed, say=say)

    started, running = time.monotonic(), 0.0
    for step in range(start, steps):
        batches = step_batches(step, seed, tokenizer)
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = torch.zeros(())
        for number, batch in enumerate(batches):
            if min(number % (2 * world), 2 * world - 1 - number % (2 * world)) == rank:  # dealt to and fro: 0 1 1 0
                part = next_token_sum(model, batch) / tokens
                part.backward()
                loss += part.detach()
        loss = average_gradients(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        running = loss.item() if step == start else 0.95 * running + 0.05 * loss.item()
        if rank == 0 and (step + 1) % 25 == 0:
            rate = (step + 1 - start) / (time.monotonic() - started)
            left = (steps - step - 1) / rate / 60
            say(f"step {step + 1}/{steps}  loss {running:.4f}  {rate:.2f} steps/s  {left:.0f} min left")
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, out / "state.pt.part")
            os.replace(out / "state.pt.part", out / "state.pt")
            save_checkpoint(model, tokenizer, out / "weights")


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (float16), tokenizer and image processor settings as an ordinary Hugging Face checkpoint."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(torch.float16).save_pretrained(folder)
    model.float().load_state_dict(kept)
    tokenizer.save_pretrained(folder)
    size = scenes.PICTURE_SIZE
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    llava = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 16,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(llava, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ checking


def objects_named(caption: str) -> set[tuple[str, str]]:
    """The (colour, shape) combinations that a caption names."""
    words = caption.replace(",", " ").replace(".", " ").split()
    return {(first, second) for first, second in pairwise(words) if first in scenes.COLOURS and second in scenes.SHAPES}


def caption_accuracy(model: str, count: int, *, adapter: bool = False, seed: int = 0) -> float:
    """Share of held-out scenes whose generated long caption names every object, and no other, with colour and shape."""
    from vladva.embedder import load_embedder

    embedder = load_embedder(model)
    content = [{"type": "image"}, {"type": "text", "text": DETAILED[0]}]
    right = 0
    for scene, _, _ in scenes.held_out_scenes(count, seed):
        pieces = embedder.generate(
            [{"role": "user", "content": content}], [scenes.render(scene)], max_tokens=96, adapter=adapter
        )
        right += objects_named("".join(pieces)) == {(o.colour, o.shape) for o in scene.objects}
    return right / count
