"""Soup: several checkpoints of one model averaged into one, which costs no more to use (arXiv 2203.05482).

What is averaged is what was learned, number by number: LoRA's factors, soft prompts, the scalars of the loss. That
makes sense of checkpoints of one run, or of runs that began with the same weights (`--init-from`): factors that began
at random, each for itself, are not on the same footing, and their mean is near nothing.

    uniform   the mean of all
    greedy    the best first; then each in the order of its own score, kept if the mean with it scores no worse
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.losses.contrastive import find_loss
from vladva.models import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"

CheckpointScore = Callable[[str], float]
"""A checkpoint's score, higher for better."""


@dataclass(frozen=True)
class Soup:
    """What was averaged, with the scores that decided it: of each by itself, and of the mean (None: nobody asked)."""

    uri: str
    members: list[str]
    scores: dict[str, float]
    score: float | None


def uniform_soup(uris: Sequence[str], out_uri: str) -> Soup:
    """The mean of checkpoints (or of the newest of runs), as a run at `out_uri`. Raises ValueError."""
    members = [newest_checkpoint(uri) for uri in uris]
    write_soup(members, out_uri)
    return Soup(out_uri, members, {}, None)


def greedy_soup(uris: Sequence[str], out_uri: str, score: CheckpointScore) -> Soup:
    """The mean of those checkpoints that make it better, or no worse, taken in the order of their own scores."""
    candidates = [newest_checkpoint(uri) for uri in uris]
    scores = {uri: score(uri) for uri in candidates}
    ranked = sorted(candidates, key=lambda uri: -scores[uri])  # of equal ones the first named comes first
    members, best = ranked[:1], scores[ranked[0]]
    with tempfile.TemporaryDirectory(prefix="vladva-soup-") as folder:
        for number, uri in enumerate(ranked[1:]):
            trial = write_soup([*members, uri], f"{folder}/{number}")
            if (found := score(trial)) >= best:
                members, best = [*members, uri], found
    write_soup(members, out_uri)
    return Soup(out_uri, members, scores, best)


def newest_checkpoint(uri: str) -> str:
    """The checkpoint that a run or a checkpoint stands for. Raises ValueError where there is none."""
    if "/checkpoints/" in uri:
        return uri
    found = checkpoint.latest(storage.absolute(uri))
    if found is None:
        raise ValueError(f"{uri} has no complete checkpoint")
    return found


def write_soup(members: Sequence[str], out_uri: str) -> str:
    """Write the mean of checkpoints as the only checkpoint of a run at `out_uri`; returns that checkpoint."""
    from safetensors.torch import load_file, save_file

    out_uri = storage.absolute(out_uri)
    if storage.exists(storage.join(out_uri, "config.json")) and not storage.exists(storage.join(out_uri, "soup.json")):
        raise ValueError(f"{out_uri} holds a run that is no soup; give another --out")
    found = [checkpoint.read_checkpoint(uri) for uri in members]
    check_alike(members, [each.state for each in found])
    adapters = [load_file(each.adapter / ADAPTER_WEIGHTS) for each in found]
    config = RunConfig.from_json(found[0].state["config"])
    weights = [{name: t for name, t in each.optimizer.items() if name.endswith(".weight")} for each in found]
    state: dict[str, Any] = {
        **{name: found[0].state[name] for name in ("config", "seed", "data_fingerprint", "next_chunk")},
        **{name: sum(each.state[name] for each in found) / len(found) for name in find_loss(config.loss).scalars()},
        "soup": list(members),
        "metrics": {},
    }
    with tempfile.TemporaryDirectory(prefix="vladva-soup-") as folder:
        shutil.copytree(found[0].adapter, folder, dirs_exist_ok=True)
        save_file(mean_of(adapters, members), Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        step = max(int(each.state["step"]) for each in found)
        mean = mean_of(weights, members)
        written = checkpoint.save(out_uri, step, adapter_files=Path(folder), optimizer=mean, state=state)
    checkpoint.prune(out_uri, keep_last=1)
    storage.write_json(storage.join(out_uri, "soup.json"), {"members": list(members)})
    storage.write_json(storage.join(out_uri, "config.json"), found[0].state["config"])
    return written


def check_alike(members: Sequence[str], states: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError for checkpoints of different models."""
    first = states[0]["config"]["model"]
    for uri, state in zip(members, states, strict=True):
        model = state["config"]["model"]
        changed = [
            f"model.{name} is {model.get(name)} there, {first[name]} here"
            for name in first
            if model.get(name) != first[name]
        ]
        if changed:
            raise ValueError(f"{uri} cannot be averaged with {members[0]}: {'; '.join(changed)}")


def mean_of(tensors: Sequence[dict[str, Tensor]], members: Sequence[str]) -> dict[str, Tensor]:
    """The mean of tensors of the same names, added up in float64. Raises ValueError where names or shapes differ."""
    import torch

    for uri, each in zip(members, tensors, strict=True):
        if {n: t.shape for n, t in each.items()} != {n: t.shape for n, t in tensors[0].items()}:
            raise ValueError(f"{uri} has other weights than {members[0]}: they cannot be averaged")
    return {
        name: torch.stack([each[name].double() for each in tensors]).mean(0).to(first.dtype)
        for name, first in tensors[0].items()
    }


def benchmark_score(benchmark: str, data_uri: str, metric: str) -> CheckpointScore:
    """The score of a checkpoint on a benchmark, embedded in this process. Raises ValueError for an unknown metric."""
    from vladva.benchmarks.benchmark import find_benchmark

    task = find_benchmark(benchmark).read(data_uri)

    def score(uri: str) -> float:
        from vladva.core.images import decode_image
        from vladva.data.image_refs import read_images
        from vladva.models.embedder import load_embedder

        embedder = load_embedder(uri)
        images = [decode_image(data) for data in read_images(task.images)]
        scores = task.score(embedder.embed_texts(task.texts), embedder.embed_images(images)).scores
        if metric not in scores:
            raise ValueError(f"--metric {metric!r} is none of {benchmark}; it has {', '.join(sorted(scores))}")
        return float(scores[metric])

    return score
