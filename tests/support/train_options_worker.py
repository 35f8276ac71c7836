"""Two optimizer steps under every option of losses and engine, and the same in plain PyTorch, saved for comparison.

python -m tests.support.train_options_worker.py CHECKPOINT OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, normalize, softplus

from tests.support import ranks
from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core.item_content import ItemContent
from vladva.data.examples import Example
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.losses.pairs import Pairs, to_teacher_numbers
from vladva.models.adapter import add_adapter
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.embedding_model import EmbeddingModel, caption_labels, checkpoint_activations
from vladva.train import global_batch, grad_cache
from vladva.train.collectives import gather_ragged
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import Engine
from vladva.train.setup import make_backward

CHUNKS, PAIRS, STEPS, RATE = 4, 3, 2, 1e-2


@dataclass(frozen=True)
class Case:
    """Options of a run, and the reference that it must equal."""

    world: int = 2
    kind: str = "plain"  # of examples: plain, negatives, teacher, texts, mixed
    loss: LossConfig = LossConfig(next_token_weight=0.5)  # noqa: RUF009  (frozen)
    train: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()
    reference: str | None = None  # another case's, whose options it must equal; its own otherwise
    shares: bool = False  # each worker computes its own rows and columns of the loss, as three and more do anyway


E5_V = LossConfig(options=("directions=one-way",), temperature=0.05, learn_temperature=False, next_token_weight=0.0)
SIGLIP = LossConfig(contrastive="sigmoid", temperature=0.1, options=("bias=-3.0",), next_token_weight=0.5)
WEIGHTED = LossConfig(contrastive="hardness_weighted", options=("hardness=4",), next_token_weight=0.5)
TAUGHT = LossConfig(false_negatives_above=0.5, next_token_weight=0.5)
TEACHER = to_teacher_numbers(
    torch.eye(3)[[0, 0, 1, 2, 1, 2, 0, 1, 2, 2, 1, 0]]
).numpy()  # of each pair: pair 0 is as pair 1
NESTED = LossConfig(matryoshka=(8, 16), next_token_weight=0.5)
DROPOUT = (("lora_dropout", 0.3),)
HARD = "matryoshka and hard negatives"
CASES = {
    "info_nce": Case(),
    "matryoshka and hard negatives": Case(kind="negatives", loss=NESTED),
    "matryoshka and hard negatives, single pass": Case(
        kind="negatives", loss=NESTED, train=(("gradient_cache", False),), reference="matryoshka and hard negatives"
    ),
    "texts, one-way, fixed temperature": Case(kind="texts", loss=E5_V),
    "texts, one worker, ZeRO-0": Case(
        world=1, kind="texts", loss=E5_V, train=(("zero_stage", 0),), reference="texts, one-way, fixed temperature"
    ),
    "sigmoid": Case(kind="negatives", loss=SIGLIP),
    "hardness": Case(kind="negatives", loss=WEIGHTED),
    "hardness, one worker": Case(world=1, kind="negatives", loss=WEIGHTED, reference="hardness"),
    "hardness, three workers": Case(world=3, kind="negatives", loss=WEIGHTED, reference="hardness"),
    "false negatives": Case(kind="teacher", loss=TAUGHT),
    "false negatives, one worker": Case(world=1, kind="teacher", loss=TAUGHT, reference="false negatives"),
    "false negatives, three workers": Case(world=3, kind="teacher", loss=TAUGHT, reference="false negatives"),
    "false negatives, single pass": Case(
        kind="teacher", loss=TAUGHT, train=(("gradient_cache", False),), reference="false negatives"
    ),
    "mixed": Case(kind="mixed"),
    "mixed, one worker": Case(world=1, kind="mixed", reference="mixed"),
    "mixed, three workers": Case(world=3, kind="mixed", reference="mixed"),
    "mixed, single pass": Case(kind="mixed", train=(("gradient_cache", False),), reference="mixed"),
    "offload, ZeRO-1": Case(train=(("offload", True), ("zero_stage", 1)), reference="info_nce"),
    "offload, ZeRO-2": Case(train=(("offload", True), ("zero_stage", 2)), reference="info_nce"),
    "offload, ZeRO-3": Case(train=(("offload", True), ("zero_stage", 3)), reference="info_nce"),
    "activation checkpointing, ZeRO-0": Case(
        train=(("activation_checkpointing", True), ("zero_stage", 0)), reference="info_nce"
    ),
    "activation checkpointing, ZeRO-3, offload": Case(
        train=(("activation_checkpointing", True), ("offload", True), ("zero_stage", 3)), reference="info_nce"
    ),
    "shares, one worker": Case(world=1, shares=True, reference="info_nce"),
    "shares, two workers": Case(shares=True, reference="info_nce"),
    "shares, three workers": Case(world=3, reference="info_nce"),
    "shares, single pass": Case(
        kind="negatives", loss=NESTED, train=(("gradient_cache", False),), shares=True, reference=HARD
    ),
    "shares, three workers, hard negatives": Case(world=3, kind="negatives", loss=NESTED, reference=HARD),
    "shares, one-way": Case(kind="texts", loss=E5_V, shares=True, reference="texts, one-way, fixed temperature"),
    "shares, sigmoid": Case(kind="negatives", loss=SIGLIP, shares=True, reference="sigmoid"),
    "shares, sigmoid, three workers": Case(world=3, kind="negatives", loss=SIGLIP, reference="sigmoid"),
    "dropout": Case(world=1, model=DROPOUT),
    "dropout, activation checkpointing, ZeRO-3": Case(
        world=1,
        model=DROPOUT,
        train=(("activation_checkpointing", True), ("zero_stage", 3)),
        reference="dropout",
    ),
    "bfloat16, ZeRO-0": Case(model=(("dtype", "bfloat16"),), train=(("zero_stage", 0),), reference="info_nce"),
    "bfloat16, ZeRO-2": Case(model=(("dtype", "bfloat16"),), reference="info_nce"),
    "bfloat16, ZeRO-3": Case(model=(("dtype", "bfloat16"),), train=(("zero_stage", 3),), reference="info_nce"),
}


def config_of(checkpoint: str, case: Case) -> RunConfig:
    """Four chunks of three pairs, with the options of the case."""
    return RunConfig(
        name="test",
        storage="unused",
        model=ModelConfig(checkpoint=checkpoint, lora_rank=4, **dict(case.model)),
        data=DataConfig(uri="unused", run_length=1),
        loss=case.loss,
        train=TrainConfig(
            steps=STEPS,
            global_batch=CHUNKS * PAIRS,
            chunk_size=PAIRS,
            **({"gradient_cache": True} | dict(case.train)),
        ),
        cluster=ClusterConfig(workers=case.world, min_workers=1),
    )


def scene_pairs() -> list[Example]:
    """Twelve scenes; pair 5 has no long caption, pair 7 no short one, pair 9 repeats the caption of pair 8."""
    pairs: list[Example] = []
    for number, (scene, random) in zip(range(CHUNKS * PAIRS), scenes("train"), strict=False):
        worded = captions(scene, random)
        short = None if number == 7 else pairs[8].short if number == 9 else worded[0]
        pairs.append(Example(str(number), render(scene), short, None if number == 5 else worded[-1]))
    return pairs


def examples(kind: str) -> list[Example]:
    """The pairs; with hard negatives of some; with texts instead of images; with mixed queries and positives."""
    plain = scene_pairs()
    if kind == "plain":
        return plain
    # Pair 7 has no short caption: its negatives go with it. Pair 1's is the caption of pair 2, which it must not meet.
    negatives = {0: ("a red ring", "a blue star"), 1: (plain[2].short,), 7: ("two crosses",), 11: ("a green cross",)}
    found = [replace(pair, negatives=negatives.get(i, ())) for i, pair in enumerate(plain)]
    if kind == "teacher":
        found = [replace(pair, teacher=vector) for pair, vector in zip(found, TEACHER, strict=True)]
    if kind == "mixed":
        # Positives that are images: of pairs 0 to 4, and so none in the last two chunks. Queries 1 and 2 are one image
        # with other words; pair 10 has an instruction on both sides, pair 4 words beside its positive, too.
        found[2] = replace(found[2], image=found[1].image)
        for i in range(5):
            other = plain[i + 6].image
            assert not isinstance(other, str)
            positive = ItemContent("as it is now" if i == 4 else None, other, "Find the same." if i == 3 else None)
            found[i] = replace(found[i], short=None, positive=positive, words=f"but as scene {i + 6}")
        asked = ItemContent(found[10].short, None, "Find the image.")
        found[10] = replace(found[10], instruction="Find the caption.", positive=asked)
    if kind == "texts":
        found = [replace(pair, image=f"{pair.short or 'nothing'} in an image", long=None) for pair in found]
    return found


def build(config: RunConfig, kind: str) -> tuple[EmbeddingModel, list[MicroBatch]]:
    torch.manual_seed(0)
    preprocessor = run_preprocessor(config)
    sigmoid = config.loss.contrastive == "sigmoid"
    model = EmbeddingModel(config.model, preprocessor, scalars={"log_scale": 2.0} | ({"bias": -3.0} if sigmoid else {}))
    model.requires_grad_(False)
    model.log_scale.requires_grad_(config.loss.learn_temperature)
    if sigmoid:
        model.bias.requires_grad_(True)
    add_adapter(model, config.model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    rows = examples(kind)
    chunks = [preprocessor.collate(i, rows[i * PAIRS : (i + 1) * PAIRS]) for i in range(CHUNKS)]
    return model.train(), chunks


# ---------------------------------------------------------------------------------------------------- plain PyTorch


def plain_contrastive(loss: LossConfig, images: Tensor, texts: Tensor, model: EmbeddingModel, mask: Tensor) -> Tensor:
    """images [P, D], texts [P + H, D]; mask bool [P, P + H], True where a text is a negative or the positive."""
    values = []
    for width in (images.shape[1], *loss.matryoshka):
        logits = normalize(images[:, :width], dim=-1) @ normalize(texts[:, :width], dim=-1).T
        logits = logits / loss.temperature if not loss.learn_temperature else logits * model.log_scale.exp()
        target = torch.arange(len(logits))
        if loss.contrastive == "sigmoid":
            sign = -torch.ones_like(logits)
            sign[target, target] = 1
            values.append((softplus(-sign * (logits + model.bias)) * mask).sum() / len(logits))
            continue
        logits = logits.masked_fill(~mask, -torch.inf)
        if loss.contrastive == "hardness_weighted":
            values.append((plain_weighted(logits, model) + plain_weighted(logits[:, : len(logits)].T, model)) / 2)
            continue
        value = cross_entropy(logits, target)
        if "directions=one-way" not in loss.options:
            value = (value + cross_entropy(logits[:, : len(logits)].T, target)) / 2
        values.append(value)
    return torch.stack(values).mean()


def plain_weighted(logits: Tensor, model: EmbeddingModel) -> Tensor:
    """Rows whose negatives count 4 times their similarity, of mean 1, more or less; logits -inf where there is none."""
    with torch.no_grad():
        weights = (4 * logits / model.log_scale.exp()).exp()
        weights.fill_diagonal_(0)
        weights *= (logits.isfinite().sum(1, keepdim=True) - 1) / weights.sum(1, keepdim=True)
        weights.fill_diagonal_(1)
    return ((weights * logits.exp()).sum(1).log() - logits.diagonal()).mean()


def candidates(rows: list[Example]) -> tuple[list[int], list[int], Tensor]:
    """The pairs that take part, the hard negatives (numbered in order of appearance), and the mask of both."""
    part = [i for i, row in enumerate(rows) if row.short is not None or row.positive is not None]
    named = [row.short or f"image {row.id}" for row in rows]
    listed = [(i, text) for i, row in enumerate(rows) for text in row.negatives]
    hard = [h for h, (i, _) in enumerate(listed) if i in part]
    others = [named[j] for j in part] + [listed[h][1] for h in hard]
    mask = torch.tensor([[named[i] != text for text in others] for i in part])
    mask[torch.arange(len(part)), torch.arange(len(part))] = True
    return part, hard, mask


def plain_steps(config: RunConfig, kind: str) -> dict[str, Any]:
    """One process, one graph over all chunks; transformers' own caption loss, in a forward of its own."""
    model, chunks = build(config, kind)
    rows = examples(kind)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    part, hard, mask = candidates(rows)
    if kind == "teacher":
        says_the_same = torch.tensor([[bool((TEACHER[i] == TEACHER[j]).all()) and i != j for j in part] for i in part])
        mask[:, : len(part)] &= ~says_the_same
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        images, captions, negatives, caption_sum, count = [], [], [], 0.0, 0
        for chunk in chunks:
            tokens = as_tensors(chunk.image, "cpu")
            hidden = model.base.model(
                **model.inputs(tokens, as_tensors(chunk.pixels, "cpu") if chunk.pixels else None)
            ).last_hidden_state
            images.append(normalize(hidden[torch.arange(PAIRS), tokens["prompt_lengths"] - 1], dim=-1))
            labels = caption_labels(tokens)[:, 1:].flatten()
            if config.loss.next_token_weight and (labels != -100).any():
                logits = model.base.lm_head(hidden[:, :-1]).flatten(0, 1)
                caption_sum = caption_sum + cross_entropy(logits, labels, reduction="sum")
                count += int((labels != -100).sum())
            tokens = as_tensors(chunk.text, "cpu")
            shown = as_tensors(chunk.text_pixels, "cpu") if chunk.text_pixels else None
            hidden = model.base.model(**model.inputs(tokens, shown)).last_hidden_state
            texts = normalize(hidden[torch.arange(len(hidden)), tokens["lengths"] - 1], dim=-1)
            captions.append(texts[:PAIRS])
            negatives.append(texts[PAIRS:])
        texts = torch.cat([torch.cat(captions)[part], torch.cat(negatives)[hard]])
        contrastive = plain_contrastive(config.loss, torch.cat(images)[part], texts, model, mask)
        caption = caption_sum / max(count, 1)
        (contrastive + config.loss.next_token_weight * caption).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(contrastive), float(caption)))
    return {
        "losses": losses,
        "weights": {name: p.detach().clone() for name, p in trainable.items()},
        "moments": {f"{n}.{m}": optimizer.state[p][m] for n, p in trainable.items() for m in ("exp_avg", "exp_avg_sq")},
    }


# ------------------------------------------------------------------------------------------------------ vladva's steps


def run_cases(rank: int, checkpoint: str, out: Path, world: int) -> None:
    for name, case in CASES.items():
        if case.world == world:
            engine_steps(rank, checkpoint, out, name, case)
    # A wrong one for each: dropout whose masks are not drawn again, and hard negatives that the loss forgets.
    if world == 1:
        blind = {"false_negatives_above": None}
        engine_steps(
            rank, checkpoint, out, "false negatives, wrong", CASES["false negatives, one worker"], lambda _: blind
        )
        engine_steps(rank, checkpoint, out, "dropout, wrong", CASES["dropout"], lambda options: {"dropout": False})
    elif world == 2:
        engine_steps(rank, checkpoint, out, "mixed, wrong", CASES["mixed"], kind="negatives")
        engine_steps(rank, checkpoint, out, "sigmoid, wrong", CASES["sigmoid"], without_negatives)
        global_batch.gather_ragged = lambda local, summed=False: gather_ragged(local)  # gradients are not exchanged
        engine_steps(rank, checkpoint, out, "shares, two workers, wrong", CASES["shares, two workers"])


def engine_steps(
    rank: int,
    checkpoint: str,
    out: Path,
    name: str,
    case: Case,
    change: Callable[[dict], dict] = lambda options: {},
    kind: str = "",
) -> None:
    config = config_of(checkpoint, case)
    grad_cache.SHARING_RANKS = 1 if case.shares else 3
    model, chunks = build(config, kind or case.kind)
    engine = Engine(model, config)
    backward = make_backward(config)
    backward.keywords.update(change(backward.keywords))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        found = backward(engine, chunks[rank :: distributed.get_world_size()])
        engine.step(RATE)
        losses.append((found.contrastive.loss.item(), found.next_token.item()))
    with engine.gathered():
        weights = {name: p.detach().float().clone() for name, p in engine.trainable.items()}
    moments = engine.optimizer_state()
    if rank == 0:
        torch.save({"losses": losses, "weights": weights, "moments": moments}, out / f"{name}.pt")


def main() -> None:
    checkpoint, out = sys.argv[1], Path(sys.argv[2])
    for world in (1, 2, 3):
        ranks.run(world, run_cases, checkpoint, out, world)
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if case.reference is None:
            torch.save(plain_steps(config_of(checkpoint, case), case.kind), out / f"{name}, plain.pt")


def without_negatives(options: dict[str, Any]) -> dict[str, Any]:
    whole = options["contrastive"]

    def contrastive(pairs: Pairs, scalars: Tensor) -> Any:
        return whole(replace(pairs, texts=pairs.texts[: len(pairs)], negative_keys=None), scalars)

    return {"contrastive": contrastive}


if __name__ == "__main__":
    main()
