"""Validation: the workers of a run score what they have, on a benchmark, between two steps.

Each worker embeds every W-th text and image, all as many (under ZeRO-3 they must take every forward together); the
embeddings are gathered, and rank 0 scores them as `evaluate.py` would. N items, W workers, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from vladva.benchmarks.benchmark import AsksMixed, Task, find_benchmark
from vladva.core.images import decode_image
from vladva.models.batch import as_tensors
from vladva.train.collectives import gather, rank_and_world

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.data.image_refs import ImageRef
    from vladva.train.engine import Engine

T = TypeVar("T")


class Validation:
    """The benchmark of a run, read once."""

    def __init__(self, config: RunConfig) -> None:
        """Raises ValueError or FileNotFoundError where there is no such benchmark, or not its files."""
        self.name = config.train.validate_on
        self.task: Task = find_benchmark(self.name).read(config.data.validation_uri)
        self.batch_size = config.train.chunk_size

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Scores of the model as it is, by `validation/BENCHMARK/METRIC`, and the seconds they took; {} but on rank 0.

        Every rank must call it.
        """
        began = time.perf_counter()
        was_training = engine.model.training
        engine.model.eval()
        with torch.no_grad():
            texts_ND = self.embed(self.task.texts, lambda texts: self.texts(engine, texts))
            images_ND = self.embed(self.task.images, lambda images: self.images(engine, images))
            mixed_QD = None
            if isinstance(self.task, AsksMixed):
                asked = [(self.task.images[image], self.task.texts[text]) for image, text in self.task.mixed]
                mixed_QD = self.embed(asked, lambda queries: self.mixed(engine, queries))
        engine.model.train(was_training)
        if rank_and_world()[0]:
            return {}
        texts, images = texts_ND.cpu().numpy(), images_ND.cpu().numpy()
        if isinstance(self.task, AsksMixed) and mixed_QD is not None:
            scores = self.task.score_mixed(texts, images, mixed_QD.cpu().numpy()).scores
        else:
            scores = self.task.score(texts, images).scores
        named = {f"validation/{self.name}/{metric}": score for metric, score in scores.items()}
        return named | {"validation_s": time.perf_counter() - began}

    def embed(self, items: Sequence[T], forward: Callable[[list[T]], Tensor]) -> Tensor:
        """Embeddings [N, D] of all items, on every rank. The last item stands in where the ranks' shares differ."""
        rank, world = rank_and_world()
        share = [items[min(i, len(items) - 1)] for i in range(rank, -(-len(items) // world) * world, world)]
        batches = [share[i : i + self.batch_size] for i in range(0, len(share), self.batch_size)]
        local_KD = torch.cat([forward(batch) for batch in batches])
        return gather(local_KD).view(world, *local_KD.shape).transpose(0, 1).flatten(0, 1)[: len(items)]

    def texts(self, engine: Engine, texts: list[str]) -> Tensor:
        """Embeddings of texts."""
        return engine(as_tensors(engine.model.preprocessor.texts(texts), engine.device))[0]

    def images(self, engine: Engine, refs: list[ImageRef]) -> Tensor:
        """Embeddings of images."""
        from vladva.data.image_refs import read_images

        preprocessor = engine.model.preprocessor
        images = [decode_image(data) for data in read_images(refs)]
        tokens = preprocessor.images([image.size for image in images], [None] * len(images))
        return engine(as_tensors(tokens, engine.device), as_tensors(preprocessor.pixels(images), engine.device))[0]

    def mixed(self, engine: Engine, queries: list[tuple[ImageRef, str]]) -> Tensor:
        """Embeddings of images with words."""
        from vladva.data.image_refs import read_images

        preprocessor = engine.model.preprocessor
        images = [decode_image(data) for data in read_images([image for image, _ in queries])]
        prompts = [preprocessor.item_prompt(text, i.size) for (_, text), i in zip(queries, images, strict=True)]
        tokens = preprocessor.pad([(prompt, []) for prompt in prompts])
        return engine(as_tensors(tokens, engine.device), as_tensors(preprocessor.pixels(images), engine.device))[0]
