"""The tiny LVLM: a real LLaVA of 4.8M parameters, trained here as a generator of captions and answers, nothing else.

It is the embedded default: demo and tests turn it into a retriever. Its weights ship with the package (`weights/`,
float16) and come from `jobs/pretrain_tiny.py`, which trains on scenes of the training split only, in two stages:

1. the vision tower alone learns to name, patch by patch, the object whose centre is there (real LVLMs, too, begin with
   a trained tower);
2. the whole model learns to write captions of varied length and detail, to answer questions about images, and to
   answer the same questions about captions.

No loss ever compares two examples, so nothing contrastive is learned.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from vladva.core.ranks import rank_and_world
from vladva.data.scenes.scene import COLOURS, IMAGE_SIZE, RADII, SHAPES, Scene, random_scene, render
from vladva.models.tiny.dialogues import MIXTURE, Dialogue
from vladva.models.tiny.model import build_model, build_tokenizer, save_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast


def collate(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels` [B, T] (answers, else -100), `pixel_values` [B, 3, H, W]."""
    import numpy as np
    import torch

    encoded = []
    for shown, turns in dialogues:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, (asked, answer) in enumerate(turns):
            image = "<image>" * 16 if shown is not None and number == 0 else ""
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
    images = [np.asarray(shown) for shown, _ in dialogues if shown is not None]
    if images:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
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


def pretraining_rate(step: int, steps: int, peak: float = 6e-4, warmup: int = 300) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def patch_labels(scene: Scene) -> list[list[int]]:
    """Colour, shape and size of the object whose centre is in each of the 16 patches, as class numbers; 0: none."""
    labels = [[0, 0, 0] for _ in range(16)]
    patch = IMAGE_SIZE // 4
    for thing in scene.objects:
        labels[4 * int(thing.y // patch) + int(thing.x // patch)] = [
            1 + tuple(COLOURS).index(thing.colour),
            1 + SHAPES.index(thing.shape),
            1 + tuple(RADII).index(thing.size),
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
    """Stage 1: the vision tower learns to label its patches, `steps` steps of 128 images. The head is thrown away."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    rank, world = rank_and_world()
    tower = model.model.vision_tower
    classes = [1 + len(COLOURS), 1 + len(SHAPES), 1 + len(RADII)]
    torch.manual_seed(seed)
    labeller = torch.nn.ModuleList([tower, torch.nn.Linear(tower.config.hidden_size, sum(classes))])
    optimizer = torch.optim.AdamW(labeller.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        random = Random(f"{seed}/tower/{step}/{rank}")
        drawn = [random_scene(random, "train") for _ in range(128 // world)]
        pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in drawn]))
        labels = torch.tensor([patch_labels(scene) for scene in drawn]).flatten(0, 1)
        features = tower(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, output_hidden_states=True).hidden_states[-1]
        logits = labeller[1](features[:, 1:]).flatten(0, 1).split(classes, dim=-1)
        # Four patches in five are empty: they count less, not to drown the others.
        weights = [torch.tensor([0.2] + [1.0] * (n - 1)) for n in classes]
        parts = zip(logits, labels.unbind(1), weights, strict=True)
        losses = [cross_entropy(logit, label, weight) for logit, label, weight in parts]
        loss = torch.stack(losses).sum() / world
        loss.backward()
        value = average_gradients(labeller, loss.detach())
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
                for logit, label in zip(logits, labels.T, strict=True)
            ]
            seen = "  ".join(
                f"{name} {share:.2f}" for name, share in zip(("colour", "shape", "size"), right, strict=True)
            )
            say(f"tower step {step + 1}/{steps}  loss {running:.4f}  {seen}  {rate:.2f} steps/s")


def step_batches(step: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """The dialogues of one optimizer step, sorted by length into micro-batches of 12 so that little is padded."""
    random = Random(f"{seed}/pretrain/{step}")
    dialogues = [kind(random_scene(random, "train"), random) for kind, count in MIXTURE for _ in range(count)]
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

    rank, world = rank_and_world()
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
            # Batches grow longer: dealt 0 1 1 0 0 1 1 0, every process has about as many tokens.
            turn = number % (2 * world)
            if min(turn, 2 * world - 1 - turn) == rank:
                part = next_token_sum(model, batch) / tokens
                part.backward()
                loss += part.detach()
        loss = average_gradients(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pretraining_rate(step, steps)
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
