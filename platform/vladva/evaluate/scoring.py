"""Models + benchmarks -> scores.

    read the benchmarks -> embed what they need, once -> score in float32 -> scores.json, outcomes/*.parquet

Embeddings stay where they are made (`benchmark_embeddings.py`): a second evaluation embeds only what is new, one that
was interrupted goes on where it stopped, and a model that has changed starts afresh.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from vladva.benchmarks.benchmark import Benchmark, Result, Task, benchmark_names, find_benchmark
from vladva.benchmarks.bootstrap import compare_outcomes, interval, resample
from vladva.core.storage import join, write_json
from vladva.embed.table import read_rows, write_rows
from vladva.evaluate.benchmark_embeddings import embed, open_embeddings
from vladva.evaluate.reranking import can_answer, rerank
from vladva.evaluate.scores import BenchmarkFacts, Comparison, LayerScores, ScoreChange, Scores
from vladva.models.resolve import dtype_for

if TYPE_CHECKING:
    from vladva.core.model_description import ModelDescription

PROTOCOL = {
    "texts": "as written, without the space around them",
    "similarity": "cosine of embeddings raised to float32",
}


def read_benchmarks(benchmarks: Sequence[str], data_uri: str) -> dict[str, Task]:
    """Read the benchmarks called for, or with `["all"]` those whose files are under `data_uri`.

    `coco:5` keeps the first five captions of each image, as some papers do; the cap is in the benchmark's counts.

    Raises ValueError for an unknown name and, with "all", where there is none; FileNotFoundError for missing files.
    """
    if list(benchmarks) != ["all"]:
        return dict(_read(benchmark, data_uri) for benchmark in benchmarks)
    names = [name for name in benchmark_names() if not find_benchmark(name).only_by_name]
    tasks = {name: task for name in names if (task := _read_if_there(name, data_uri))}
    if not tasks:
        raise ValueError(
            f"benchmarks: none of {', '.join(names)} has its files under {data_uri}; images and captions of your own, "
            "in a table, shards or a folder, are scored with --benchmarks retrieval"
        )
    return tasks


def evaluate(
    models: Mapping[str, str],
    tasks: Mapping[str, Task],
    data_uri: str,
    out_uri: str,
    *,
    actors: int = 2,
    gpus_per_actor: float = 0,
    batch_size: int = 64,
    dtype: str | None = None,
    layers: Sequence[int] = (),
    bootstrap: int = 0,
    rerank_top: int = 0,
    command: str = "",
) -> Scores:
    """Score models (label -> run, checkpoint or model name) in the benchmarks of `data_uri`; needs a Ray cluster.

    tasks: what `read_benchmarks` returned.
    dtype: of the models; None: as `dtype_for` says.
    layers: embed from these too, beside each model's own layer, in the same pass.
    bootstrap: resamples for the intervals of the scores, and for comparing every two models; 0 does neither.
    rerank_top: score each model that can answer once more, with this many of the nearest in the order that its
        generator gives them (reranking.py); 0 does not.
    command: noted in the scores, for whoever wants to run it again.

    Writes `scores.json` and `outcomes/<label>/<benchmark>.parquet` under `out_uri`, and returns what is in the former.

    Raises ValueError where a text or image could not be embedded: leaving it out would change the denominators.
    """
    scores: Scores = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "data": data_uri,
        "protocol": PROTOCOL,
        "bootstrap": bootstrap,
        "benchmarks": {name: _about(name, task) for name, task in tasks.items()},
        "models": {},
        "comparisons": [],
    }
    results: dict[str, dict[str, Result]] = {}
    for label, model in models.items():
        started = time.monotonic()
        embedded = embed(
            model,
            tasks,
            out_uri,
            layers=layers,
            actors=actors,
            gpus_per_actor=gpus_per_actor,
            batch_size=batch_size,
            dtype=dtype or dtype_for(model, gpus_per_actor),
        )
        embedding_ended = time.monotonic()
        by_layer: dict[int | None, LayerScores] = {}
        descriptions: dict[int | None, ModelDescription] = {}
        for layer, table_uri in embedded.tables.items():
            own = layer == embedded.layer
            embeddings = open_embeddings(table_uri)
            found = {name: embeddings.score(task) for name, task in tasks.items()}
            for name, result in found.items():
                write_rows(outcomes_uri(out_uri, label if own else f"{label}, layer {layer}", name), result.outcomes)
            by_layer[layer] = _layer_scores(embeddings.description["fingerprint"], found, bootstrap)
            descriptions[layer] = embeddings.description
            if own:
                results[label], own_embeddings = found, embeddings
        scores["models"][label] = {
            "model": model,
            **by_layer[embedded.layer],
            "description": descriptions[embedded.layer],
            "num_items": embedded.num_items,
            "num_embedded": embedded.num_embedded,
            "layers": {str(layer): found for layer, found in by_layer.items()} if layers else {},
            "seconds": {"embed": embedding_ended - started, "score": time.monotonic() - embedding_ended},
        }
        if rerank_top and can_answer(model):
            began = time.monotonic()
            again = f"{label}, top {rerank_top} re-ranked"
            asked = rerank(
                model,
                tasks,
                own_embeddings,
                rerank_top,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                dtype=dtype or dtype_for(model, gpus_per_actor),
            )
            results[again] = results[label] | asked
            for name, result in results[again].items():
                write_rows(outcomes_uri(out_uri, again, name), result.outcomes)
            scores["models"][again] = {
                **scores["models"][label],
                **_layer_scores(scores["models"][label]["fingerprint"], results[again], bootstrap),
                "num_embedded": 0,
                "layers": {},
                "seconds": {"ask": time.monotonic() - began},
            }
    scores["comparisons"] = _comparisons(results, bootstrap) if bootstrap else []
    write_json(join(out_uri, "scores.json"), scores)
    return cast("Scores", json.loads(json.dumps(scores)))  # intervals are lists in JSON: what a reader of the file gets


def _layer_scores(fingerprint: str, results: Mapping[str, Result], bootstrap: int) -> LayerScores:
    """What the scores hold of one model's results."""
    return {
        "fingerprint": fingerprint,
        "scores": {name: result.scores for name, result in results.items()},
        "tie_rates": {name: result.tie_rates for name, result in results.items()},
        "intervals": {
            name: {m: interval(drawn) for m, drawn in resample(result.samples, result.averages, bootstrap).items()}
            for name, result in results.items()
            if bootstrap
        },
    }


def _comparisons(results: Mapping[str, Mapping[str, Result]], bootstrap: int) -> list[Comparison]:
    """Every two models, the later one against the earlier one."""
    return [
        {
            "model": later,
            "against": earlier,
            "benchmarks": {
                name: {
                    metric: ScoreChange(difference=change.difference, low=change.low, high=change.high, p=change.p)
                    for metric, change in compare_outcomes(
                        ours.samples, results[earlier][name].samples, ours.averages, bootstrap
                    ).items()
                }
                for name, ours in results[later].items()
            },
        }
        for earlier, later in combinations(results, 2)
    ]


def outcomes_uri(out_uri: str, label: str, benchmark: str) -> str:
    """Where `evaluate` leaves the outcomes of every sample."""
    return join(out_uri, "outcomes", label.replace("/", "-"), f"{benchmark}.parquet")


def read_outcomes(out_uri: str, label: str, benchmark: str) -> pa.Table:
    """Outcomes of every sample, as `evaluate` left them."""
    return read_rows(outcomes_uri(out_uri, label, benchmark))


def _read(benchmark: str, data_uri: str) -> tuple[str, Task]:
    name, colon, cap = benchmark.partition(":")
    if not colon:
        return name, find_benchmark(name).read(data_uri)
    declared = find_benchmark(name)
    if not cap.isdecimal() or not hasattr(declared, "max_captions_per_image"):
        raise ValueError(
            f"benchmarks: {benchmark!r} is not a retrieval benchmark with a number of captions, like coco:5"
        )
    capped: Benchmark = replace(declared, max_captions_per_image=int(cap))  # type: ignore[type-var]  # a dataclass
    return name, capped.read(data_uri)


def _read_if_there(name: str, data_uri: str) -> Task | None:
    try:
        return find_benchmark(name).read(data_uri)
    except FileNotFoundError:
        return None


def _about(name: str, task: Task) -> BenchmarkFacts:
    benchmark = find_benchmark(name)
    return {
        "title": benchmark.title,
        "ties": benchmark.ties,
        "source": benchmark.source,
        "licence": benchmark.licence,
        "counts": task.counts,
        "files": task.files,
        "chance": task.chance,
    }
