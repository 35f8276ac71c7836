"""Models + benchmarks -> scores.

    read the benchmarks -> embed what they need, once -> score in float32 -> scores.json, outcomes/*.parquet

Embeddings stay where they are made (`embeddings.py`): a second evaluation embeds only what is new, one that was
interrupted goes on where it stopped, and a model that has changed starts afresh.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations
from typing import Any

import pyarrow as pa

from vladva.benchmarks.benchmark import Result, Task, benchmark_names, find_benchmark
from vladva.benchmarks.bootstrap import compare_outcomes, interval, resample
from vladva.core.storage import join, write_json
from vladva.embed.table import read_rows, write_rows
from vladva.evaluate.benchmark_embeddings import embed, open_embeddings

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
    dtype: str = "float32",
    layers: Sequence[int] = (),
    bootstrap: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Score models (label -> run, checkpoint or model name) in the benchmarks of `data_uri`; needs a Ray cluster.

    tasks: what `read_benchmarks` returned.
    layers: embed from these too, beside each model's own layer, in the same pass.
    bootstrap: resamples for the intervals of the scores, and for comparing every two models; 0 does neither.
    command: noted in the scores, for whoever wants to run it again.

    Writes `scores.json` and `outcomes/<label>/<benchmark>.parquet` under `out_uri` and returns what is in the former:

        {"created", "command", "data", "protocol", "bootstrap",
         "benchmarks": {name: {"title", "ties", "source", "licence", "counts", "files", "chance"}},
         "models": {label: {"model", "fingerprint", "description", "num_items", "num_embedded",
                            "seconds": {"embed", "score"}, "scores": {benchmark: {metric: fraction}},
                            "tie_rates": {benchmark: {metric: fraction}},
                            "intervals": {benchmark: {metric: [low, high]}},
                            "layers": {layer: {"fingerprint", "scores", "tie_rates", "intervals"}}}},
         "comparisons": [{"model", "against", "benchmarks": {name: {metric: {"difference", "low", "high", "p"}}}}]}

    Raises ValueError where a text or image could not be embedded: leaving it out would change the denominators.
    """
    scores: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "data": data_uri,
        "protocol": PROTOCOL,
        "bootstrap": bootstrap,
        "benchmarks": {name: _about(name, task) for name, task in tasks.items()},
        "models": {},
    }
    resources = {"actors": actors, "gpus_per_actor": gpus_per_actor, "batch_size": batch_size, "dtype": dtype}
    results: dict[str, dict[str, Result]] = {}
    for label, model in models.items():
        started = time.monotonic()
        embedded = embed(model, tasks, out_uri, layers=layers, **resources)
        embedding_ended = time.monotonic()
        by_layer = {}
        for layer, table_uri in embedded.tables.items():
            own = layer == embedded.layer
            embeddings = open_embeddings(table_uri)
            found = {name: embeddings.score(task) for name, task in tasks.items()}
            for name, result in found.items():
                write_rows(outcomes_uri(out_uri, label if own else f"{label}, layer {layer}", name), result.outcomes)
            by_layer[layer] = {"fingerprint": embeddings.description["fingerprint"], **_summary(found, bootstrap)}
            if own:
                results[label], description = found, embeddings.description
        scores["models"][label] = {
            "model": model,
            **by_layer[embedded.layer],
            "description": description,
            "num_items": embedded.num_items,
            "num_embedded": embedded.num_embedded,
            "layers": by_layer if layers else {},
            "seconds": {"embed": embedding_ended - started, "score": time.monotonic() - embedding_ended},
        }
    scores["comparisons"] = _comparisons(results, bootstrap) if bootstrap else []
    # Keys are texts in JSON: what is returned is what a reader of the file gets.
    scores = json.loads(json.dumps(scores))
    write_json(join(out_uri, "scores.json"), scores)
    return scores


def _summary(results: Mapping[str, Result], bootstrap: int) -> dict[str, Any]:
    """What the scores hold of one model's results."""
    return {
        "scores": {name: result.scores for name, result in results.items()},
        "tie_rates": {name: result.tie_rates for name, result in results.items()},
        "intervals": {
            name: {m: interval(drawn) for m, drawn in resample(result.samples, result.averages, bootstrap).items()}
            for name, result in results.items()
            if bootstrap
        },
    }


def _comparisons(results: Mapping[str, Mapping[str, Result]], bootstrap: int) -> list[dict[str, Any]]:
    """Every two models, the later one against the earlier one."""
    return [
        {
            "model": later,
            "against": earlier,
            "benchmarks": {
                name: {
                    metric: difference._asdict()
                    for metric, difference in compare_outcomes(
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
    return name, replace(declared, max_captions_per_image=int(cap)).read(data_uri)


def _read_if_there(name: str, data_uri: str) -> Task | None:
    try:
        return find_benchmark(name).read(data_uri)
    except FileNotFoundError:
        return None


def _about(name: str, task: Task) -> dict[str, Any]:
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
