"""A retrieval task of mteb's on scenes and captions that are made here, and its scores under our names.

python small_mteb_task.py MODEL     scores a model of ours that mteb loads itself; prints JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.tasks.retrieval.eng.flickr30k_i2t_retrieval import Flickr30kI2TRetrieval
from mteb.tasks.retrieval.eng.flickr30k_t2i_retrieval import Flickr30kT2IRetrieval
from PIL import Image

COUNT = 16


def small_pairs() -> list[tuple[str, Image.Image]]:
    """COUNT captions, all different, and their images."""
    return list(islice(_pairs(), COUNT))


def _pairs() -> Iterator[tuple[str, Image.Image]]:
    from vladva.data.scenes.captions import captions
    from vladva.data.scenes.corpus import scenes
    from vladva.data.scenes.scene import render

    seen: set[str] = set()
    for scene, random in scenes("test"):
        caption = captions(scene, random)[0]
        if caption not in seen:
            seen.add(caption)
            yield caption, render(scene)


class SmallTask(AbsTaskRetrieval):
    """mteb's own retrieval, with what `small_pairs` makes in place of a data set from the hub."""

    images_are_queries = False
    every_document_is_a_candidate = False  # for rerankers, which are asked about candidates only
    k_values = (1, 5, 10, COUNT)

    def load_data(self, **_: object) -> None:
        made = small_pairs()
        names = [str(i) for i in range(COUNT)]
        texts = datasets.Dataset.from_dict({"id": names, "text": [caption for caption, _ in made]})
        images = datasets.Dataset.from_dict({"id": names, "image": [image for _, image in made]})
        queries, corpus = (images, texts) if self.images_are_queries else (texts, images)
        relevant = {name: {name: 1} for name in names}
        split: Any = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
        if self.every_document_is_a_candidate:
            split["top_ranked"] = dict.fromkeys(names, names)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def renamed(metadata: TaskMetadata, name: str) -> TaskMetadata:
    return metadata.model_copy(update={"name": name, "prompt": None})


class TextToImage(SmallTask):
    metadata = renamed(Flickr30kT2IRetrieval.metadata, "SmallT2I")


class ImageToText(SmallTask):
    images_are_queries = True
    metadata = renamed(Flickr30kI2TRetrieval.metadata, "SmallI2T")


def scores_of(model: Any, *, candidates: bool = False) -> dict[str, float]:
    """mteb's scores, under our names: the share of queries with their match among the first k, and mean nDCG."""
    found = {}
    for way, kind in (("t2i", TextToImage), ("i2t", ImageToText)):
        task = kind()
        task.every_document_is_a_candidate = candidates
        results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        assert not results.exceptions
        [scores] = results[0].scores["test"]
        found |= {f"{way}_r{k}": scores[f"recall_at_{k}"] for k in (1, 5, 10)}
        found[f"{way}_ndcg10"] = scores["ndcg_at_10"]
    return found


if __name__ == "__main__":
    from vladva.evaluate.mteb_adapter import model_meta

    print(json.dumps(scores_of(model_meta(sys.argv[1]))))
