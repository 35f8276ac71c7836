"""Re-ranking: the best few that a retriever finds, put in order by what the generator says of each.

    top k by cosine --the unadapted generator is asked about each (yes_probability.py)--> a new order of these k

What is below the k keeps its place, so recall at k and beyond stays what it is. Where a benchmark sets single pairs
against each other (compositionality, Winoground's form) the answer takes the place of the cosine.

Q queries, k candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import PairScores, Result, Task
from vladva.benchmarks.metrics import Ranks
from vladva.benchmarks.protocols.caption_choice import CaptionChoiceTask
from vladva.benchmarks.protocols.matching import MatchingTask
from vladva.benchmarks.protocols.retrieval import RetrievalTask
from vladva.benchmarks.protocols.two_captions import TwoCaptionsTask
from vladva.core.devices import assigned_device
from vladva.core.hashing import digest
from vladva.core.progress import Progress
from vladva.data.image_refs import ImageRef, read_images
from vladva.evaluate.benchmark_embeddings import Embeddings
from vladva.models.yes_probability import yes_probabilities

PAIRS_PER_TASK = 64
Pair = tuple[ImageRef, str]


class YesActor:
    """Ray Data stage: rows of (image: JSON of an ImageRef, text) -> the same with the column `yes`."""

    def __init__(self, load: dict[str, Any], batch_size: int) -> None:
        device = assigned_device()

        from vladva.models.embedder import Embedder, load_embedder

        embedder = load_embedder(**load, device=device)
        assert isinstance(embedder, Embedder), "`rerank` refuses dual encoders"
        self.embedder, self.batch_size = embedder, batch_size

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Ask about every pair."""
        from vladva.core.images import decode_image

        refs = [ImageRef(**json.loads(image)) for image in rows["image"].to_pylist()]
        images = [decode_image(data) for data in read_images(refs)]
        found_N = yes_probabilities(self.embedder, images, rows["text"].to_pylist(), self.batch_size)
        return rows.append_column("yes", pa.array(found_N))


def ask_about(
    model: str,
    pairs: Sequence[Pair],
    *,
    actors: int = 2,
    gpus_per_actor: float = 0,
    dtype: str = "float32",
    batch_size: int = 16,
) -> dict[bytes, float]:
    """P("yes") of every distinct pair, by its key; needs a Ray cluster. Raises ValueError for a dual encoder."""
    import ray.data

    from vladva.core.ray_tasks import actor_cpus, actor_pool
    from vladva.models.resolve import pin

    model = pin(model)
    if not can_answer(model):
        raise ValueError(f"rerank: {model} only embeds; name a model that can answer")
    unique = {key_of_pair(pair): pair for pair in pairs}
    keys = list(unique)
    columns = [(json.dumps(image._asdict()), text) for image, text in unique.values()]
    rows = pa.table(
        {
            "key": pa.array(keys, pa.binary(16)),
            "image": pa.array([image for image, _ in columns], pa.string()),
            "text": pa.array([text for _, text in columns], pa.string()),
        }
    )
    blocks = [rows.slice(first, PAIRS_PER_TASK) for first in range(0, len(rows), PAIRS_PER_TASK)]
    items = ray.data.from_arrow(blocks)
    items.context.enable_progress_bars = False
    answered = items.map_batches(
        YesActor,
        fn_constructor_args=({"model": model, "dtype": dtype}, batch_size),
        batch_size=PAIRS_PER_TASK,
        batch_format="pyarrow",
        compute=actor_pool(min(actors, len(blocks)), 1, gpus_per_actor),
        num_cpus=actor_cpus(1),
        num_gpus=gpus_per_actor,
    )
    found: dict[bytes, float] = {}
    with Progress("asking", len(rows)) as progress:
        for row in answered.iter_rows():
            found[row["key"]] = row["yes"]
            progress.advance(1)
    return found


def can_answer(model: str) -> bool:
    """Whether a model can be asked: dual encoders only embed."""
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.resolve import find_model

    return not is_dual_encoder(find_model(model).checkpoint)


def key_of_pair(pair: Pair) -> bytes:
    """Equal for the same image with the same text."""
    image, text = pair
    return digest(image.id, text)


def rerank(
    model: str, tasks: Mapping[str, Task], embeddings: Embeddings, k: int, **resources: Any
) -> dict[str, Result]:
    """Results of a model in those of the benchmarks that compare images with texts; needs a Ray cluster.

    Retrieval: the generator's order of the k nearest. Compositionality and Winoground's form: its answers in place of
    cosines. resources: arguments of `ask_about`. Raises ValueError for k below 2, and for a dual encoder.
    """
    if k < 2:
        raise ValueError(f"rerank is {k}; give how many of the nearest are to be put in order, e.g. 10")
    wanted: list[Pair] = []
    for task in tasks.values():

        def note(image: np.ndarray, text: np.ndarray, task: Task = task) -> np.ndarray:
            wanted.extend((task.images[i], task.texts[t]) for i, t in zip(image.flat, text.flat, strict=True))
            return np.zeros(image.shape)

        rescored(task, embeddings, k, note)
    answers = ask_about(model, wanted, **resources)
    results = {}
    for name, task in tasks.items():

        def look_up(image: np.ndarray, text: np.ndarray, task: Task = task) -> np.ndarray:
            pairs = ((task.images[i], task.texts[t]) for i, t in zip(image.flat, text.flat, strict=True))
            return np.array([answers[key_of_pair(pair)] for pair in pairs]).reshape(image.shape)

        if (result := rescored(task, embeddings, k, look_up)) is not None:
            results[name] = result
    return results


def rescored(task: Task, embeddings: Embeddings, k: int, of_pairs: PairScores) -> Result | None:
    """A benchmark's result with another measure of pairs where it matters; None where it compares no such pairs."""
    if isinstance(task, RetrievalTask):
        found = task.rank(embeddings.of_texts(task.texts), embeddings.of_images(task.images), k)
        reordered = {}
        for direction, ranks in found.items():
            image, text, right = task.nearest_pairs(direction, ranks)
            reordered[direction] = in_order_of(ranks, of_pairs(image, text), right)
        return task.result(reordered)
    if isinstance(task, (CaptionChoiceTask, MatchingTask)):
        return task.score_pairs(of_pairs)
    if isinstance(task, TwoCaptionsTask):
        return task.score_pairs(of_pairs, embeddings.of_texts(task.texts))
    return None


def in_order_of(ranks: Ranks, scores_Qk: np.ndarray, right_Qk: np.ndarray) -> Ranks:
    """The ranks with the nearest k in the order of other scores; queries with nothing right among them stay put."""
    best_Q = np.where(right_Qk, scores_Qk, -np.inf).max(axis=1)
    found_Q = right_Qk.any(axis=1)
    level_Qk = scores_Qk == best_Q[:, None]
    order_Qk = np.argsort(-scores_Qk, axis=1, kind="stable")
    return Ranks(
        above=np.where(found_Q, (scores_Qk > best_Q[:, None]).sum(axis=1), ranks.above),
        tied=np.where(found_Q, (level_Qk & ~right_Qk).sum(axis=1), ranks.tied),
        tied_positives=np.where(found_Q, (level_Qk & right_Qk).sum(axis=1), ranks.tied_positives),
        nearest=np.take_along_axis(ranks.nearest, order_Qk, axis=1),
        similarity=np.take_along_axis(scores_Qk, order_Qk, axis=1).astype(np.float32),
    )
