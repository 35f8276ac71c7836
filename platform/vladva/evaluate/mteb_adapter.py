"""mteb: our embedders as models of the mteb package, and our scores in the form of its result files.

    import mteb
    from vladva.evaluate.mteb_adapter import model_meta

    mteb.evaluate(model_meta("RUN_OR_MODEL"), mteb.get_tasks(tasks=["Winoground"]))

needs `pip install 'vladva[mteb]'`, and torchvision, without which mteb loads no model for images; `MtebEncoder(MODEL)`
in the place of `model_meta(MODEL)` needs none. mteb over HTTP (its `OpenAIAPIEncodeWrapper` and
`OpenAIAPIRerankWrapper`) against our server gives the same scores, as does `jobs/evaluate.py`.

The result files need nothing: `jobs/evaluate.py` leaves them beside `scores.json`, for mteb's `TaskResult.from_disk`.
Winoground and SugarCrepe have the names that mteb gives them, and the same protocol but for ties (which mteb counts as
hits). What mteb scores otherwise (retrieval by nDCG over merged captions, ImageNet with one template) or not at all
keeps our title, so that nobody takes one for the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vladva.benchmarks.metrics import cosines, unit_rows
from vladva.core.storage import join, write_json
from vladva.evaluate.scores import BenchmarkFacts, Scores
from vladva.models.backbones import without_weights
from vladva.models.resolve import describe, pin, preprocessor_of

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta


class Counterpart(NamedTuple):
    """The mteb task that measures what a benchmark does, the revision of its data, and its metrics, the main first."""

    task: str
    revision: str
    metrics: dict[str, str]  # mteb's name -> ours


COUNTERPARTS = {
    "winoground": Counterpart(
        "Winoground",
        "b400e173549071916ad1b3d449293bc8d8b4b763",
        {"accuracy": "group", "text_acc": "text", "image_acc": "image"},
    ),
    "sugar_crepe": Counterpart("SugarCrepe", "e9e0e3ce40c94023c819d3413edb5d090ec9f0d8", {"text_acc": "average_micro"}),
}


def write_results(scores: Scores, out_uri: str) -> None:
    """Write `mteb/<label>/<fingerprint>/<task>.json` for every model and benchmark of `scores` (see `evaluate`)."""
    for label, model in scores["models"].items():
        for name, metrics in model["scores"].items():
            result = task_result(name, scores["benchmarks"][name], metrics)
            folder = join(out_uri, "mteb", label.replace("/", "-"), model["fingerprint"])
            write_json(join(folder, f"{result['task_name'].replace(' ', '')}.json"), result)


def task_result(benchmark: str, about: BenchmarkFacts, metrics: dict[str, float]) -> dict[str, Any]:
    """What mteb's TaskResult reads: one split, one subset, all our metrics and a main score."""
    counterpart = COUNTERPARTS.get(benchmark)
    theirs = {name: metrics[ours] for name, ours in counterpart.metrics.items()} if counterpart else {}
    subset = {
        "hf_subset": "default",
        "languages": ["eng-Latn"],
        "main_score": next(iter((theirs or metrics).values())),
        **metrics,
        **theirs,
    }
    return {
        "task_name": counterpart.task if counterpart else about["title"],
        "dataset_revision": counterpart.revision if counterpart else "/".join(h[:16] for h in about["files"].values()),
        "mteb_version": None,
        "evaluation_time": None,
        "scores": {"test": [subset]},
    }


class MtebEncoder:
    """mteb's EncoderProtocol: texts and images of its data loaders -> embeddings.

    An item of an image and a text gets the sum of its two unit vectors, as mteb's own dual encoders do it.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, path: str = "", **_: Any
    ) -> None:
        """Load a run, checkpoint or model name: `path`, where mteb calls it something else.

        Raises ValueError for BLIP-2, whose images have several vectors.
        """
        from vladva.models.embedder import load_embedder

        model_name = path or model_name
        self.embedder = load_embedder(model_name, merge=True, device=device or "cpu")
        self.mteb_model_meta = model_meta(model_name, revision=revision or self.embedder.fingerprint)
        if self.embedder.description().get("vectors_per_image", 1) > 1:
            raise ValueError(f"{model_name} gives an image several vectors, and mteb takes one; jobs/evaluate.py does")

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """Embeddings [N, D] of a data loader of batches with `text`, `image` or both."""
        texts: list[str] = []
        images: list[np.ndarray] = []
        for batch in inputs:
            texts += batch.get("text", [])
            if "image" in batch:
                images.append(self.embedder.embed_images([image.convert("RGB") for image in batch["image"]]))
        sides = [self.embedder.embed_texts(texts)] if texts else []  # together: equal texts get equal vectors
        sides += [np.concatenate(images)] if images else []
        return np.sum(sides, axis=0)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N, M]."""
        import torch

        return torch.from_numpy(_rows(embeddings1) @ _rows(embeddings2).T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N] of rows with the same number."""
        import torch

        return torch.from_numpy(cosines(_rows(embeddings1), _rows(embeddings2)))


def model_meta(model: str, **known: Any) -> ModelMeta:
    """What mteb wants to know of a run, checkpoint or model name, from its files; loading it loads our embedder.

    known: fields of mteb's ModelMeta that no file tells, or tells otherwise: `license`, `release_date`,
        `training_datasets`, `public_training_data`, `name` (by default `vladva/` and the last part of the path).
    """
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    model = pin(model)
    config, description = describe(model, adapter=True, dtype="float32")
    dual = description["layer"] is None
    network = preprocessor_of(config).config
    parameters = None if dual else sum(each.numel() for each in without_weights(network).parameters())
    trained, base = description["adapter"] is not None, description["base_model"]
    found = {
        "loader": MtebEncoder,
        "loader_kwargs": {"path": model},
        "name": f"vladva/{_short_name(model)}",
        "revision": description["fingerprint"],
        "embed_dim": description["dimension"],
        "n_parameters": parameters,
        "memory_usage_mb": parameters and parameters * 4 / 2**20,
        "max_tokens": getattr(network.get_text_config(), "max_position_embeddings", None),
        "languages": ["eng-Latn"],
        "modalities": ["image", "text"],
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": not dual,  # as mteb means it: every input stands in a prompt, of all tasks the same
        "adapted_from": base if trained else None,
    }
    return ModelMeta.create_empty(found | known)


def _short_name(model: str) -> str:
    """The name of a run for its checkpoints; of any other model the last part of its name."""
    run = model.rstrip("/").partition("/checkpoints/")[0]
    return run.rpartition("/")[2].partition("@")[0]


def _rows(embeddings: Any) -> np.ndarray:
    return unit_rows(np.atleast_2d(np.asarray(embeddings)))
