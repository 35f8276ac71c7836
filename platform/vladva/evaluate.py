"""Models + benchmarks -> scores.

    read the benchmarks -> embed what they need, once -> score in float32 -> scores.json, outcomes/*.parquet

Every text and picture is embedded once per model, whatever number of benchmarks asks for it, by the batch job of
`encode.py`. The embeddings stay in a folder named after the model's exact contents: a second evaluation embeds only
what is new, one that was interrupted goes on where it stopped, and a model that has changed starts afresh.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from hashlib import sha1
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vladva.benchmarks import Result, Task, find, names
from vladva.benchmarks.readers.images import ImageRef, read_images
from vladva.bootstrap import compare, interval, resample
from vladva.storage import exists, join, write_json
from vladva.tables import read_embeddings, read_rows, write_rows

PROTOCOL = {
    "texts": "as written, without the space around them",
    "similarity": "cosine of embeddings raised to float32",
}
KINDS = ("text", "image")
BLOCK_ROWS = 1024  # items per Ray Data block
ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("image", pa.binary()),
        ("text", pa.string()),
        ("name", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("column", pa.string()),
    ]
)


def read_benchmarks(benchmarks: Sequence[str], data_uri: str) -> dict[str, Task]:
    """Read the benchmarks called for, or with `["all"]` those whose files are under `data_uri`.

    `coco:5` keeps the first five captions of each picture, as some papers do; the cap is in the benchmark's counts.

    Raises ValueError for an unknown name and, with "all", where there is none; FileNotFoundError for missing files.
    """
    if list(benchmarks) != ["all"]:
        return dict(_read(benchmark, data_uri) for benchmark in benchmarks)
    tasks = {name: task for name in names() if (task := _read_if_there(name, data_uri))}
    if not tasks:
        raise ValueError(f"benchmarks: none of {', '.join(names())} has its files under {data_uri}")
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

    Raises ValueError where a text or picture could not be embedded: leaving it out would change the denominators.
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
                    for metric, difference in compare(
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


class Embeddings:
    """The embeddings of one model, by text and picture."""

    def __init__(self, table: pa.Table, quarantine: Mapping[str, str]) -> None:
        self.row = {item: row for row, item in enumerate(table["id"].to_pylist())}
        values = table["embedding"].combine_chunks()
        self.matrix = values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
        self.quarantine = quarantine
        self.description: dict[str, Any] = json.loads(table.schema.metadata[b"vladva"])

    def score(self, task: Task) -> Result:
        """The model's result in a benchmark."""
        return task.score(self.of_texts(task.texts), self.of_images(task.images))

    def of_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Rows [T, D] of the texts, in their order."""
        return self._rows([text_id(text) for text in texts])

    def of_images(self, images: Iterable[ImageRef]) -> np.ndarray:
        """Rows [I, D] of the pictures, in their order."""
        return self._rows([image.id for image in images])

    def _rows(self, ids: list[str]) -> np.ndarray:
        missing = [item for item in ids if item not in self.row]
        if missing:
            reason = self.quarantine.get(missing[0], "no reason recorded")
            raise ValueError(
                f"{len(missing)} of {len(ids)} items of a benchmark could not be embedded; the first is {missing[0]} "
                f"({reason}). Scores on the others would not be comparable: repair the data and run again"
            )
        return self.matrix[[self.row[item] for item in ids]]


class SeveralVectors(Embeddings):
    """The embeddings of a model whose pictures have P vectors each (BLIP-2): longer rows, in a table of their own."""

    def __init__(self, texts: Embeddings, images: Embeddings) -> None:
        self.texts, self.images, self.description = texts, images, texts.description

    def of_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Rows [T, D] of the texts, in their order."""
        return self.texts.of_texts(texts)

    def of_images(self, images: Iterable[ImageRef]) -> np.ndarray:
        """Rows [I, P, D] of the pictures, in their order."""
        rows = self.images.of_images(images)
        return rows.reshape(len(rows), self.description["vectors_per_image"], -1)


def open_embeddings(uri: str) -> Embeddings:
    """What `embed` left at `uri`."""
    if exists(join(uri, "text")):
        return SeveralVectors(*(open_embeddings(join(uri, kind)) for kind in KINDS))
    return Embeddings(read_embeddings(uri), _read_quarantine(uri))


class Embedded(NamedTuple):
    """Where the embeddings of one model are, by layer; `layer` is its own."""

    layer: int | None  # None: a dual encoder has no choice
    tables: dict[int | None, str]
    num_items: int
    num_embedded: int  # of them; the others had been embedded before


def embed(
    model: str, tasks: Mapping[str, Task], out_uri: str, *, dtype: str, layers: Sequence[int] = (), **resources: Any
) -> Embedded:
    """Embed all texts and pictures of the tasks that have not been embedded with this model before."""
    import ray

    from vladva.encode import describe, encode, pin

    model = pin(model)
    own = describe(model, adapter=True, dtype=dtype)[1]["layer"]
    tables = {}
    for layer in sorted({own, *layers}, reverse=True):
        _, description = describe(model, adapter=True, dtype=dtype, layer=layer)
        tables[layer] = join(out_uri, "embeddings", f"{description['fingerprint']}-{dtype}")
    rows = items(tasks.values())
    pieces = {tables[own]: rows} if not layers else {None: rows}
    if description.get("vectors_per_image", 1) > 1:
        pieces = {join(tables[own], kind): rows.filter(pc.equal(rows["kind"], kind)) for kind in KINDS}
    num_embedded = 0
    for uri, piece in pieces.items():
        blocks = [piece.slice(first, BLOCK_ROWS) for first in range(0, len(piece), BLOCK_ROWS)]
        summary = encode(
            ray.data.from_arrow(blocks),
            model,
            uri or tables,
            dtype=dtype,
            read_images=picture_bytes,
            total=len(piece),
            **resources,
        )
        num_embedded += summary.embedded
    return Embedded(own, tables, num_items=len(rows), num_embedded=num_embedded)


def items(tasks: Iterable[Task]) -> pa.Table:
    """Every distinct text and picture as a row for `encode`; of pictures, where `picture_bytes` finds them."""
    texts: dict[str, str] = {}
    images: dict[str, ImageRef] = {}
    for task in tasks:
        texts |= {text_id(text): text for text in task.texts}
        images |= {image.id: image for image in task.images}
    rows = [{"id": item, "kind": "text", "text": text} for item, text in texts.items()]
    rows += [{"kind": "image", **image._asdict()} for image in images.values()]
    return pa.Table.from_pylist(rows, schema=ITEMS)


def picture_bytes(rows: pa.Table) -> list[bytes]:
    """Encoded bytes of the pictures in rows of `items`."""
    return read_images([ImageRef(**row) for row in rows.select(ImageRef._fields).to_pylist()])


def text_id(text: str) -> str:
    """A text is known by its contents."""
    return f"text/{sha1(text.encode()).hexdigest()}"


def _read(benchmark: str, data_uri: str) -> tuple[str, Task]:
    name, colon, cap = benchmark.partition(":")
    if not colon:
        return name, find(name).read(data_uri)
    declared = find(name)
    if not cap.isdecimal() or not hasattr(declared, "max_captions_per_image"):
        raise ValueError(
            f"benchmarks: {benchmark!r} is not a retrieval benchmark with a number of captions, like coco:5"
        )
    return name, replace(declared, max_captions_per_image=int(cap)).read(data_uri)


def _read_if_there(name: str, data_uri: str) -> Task | None:
    try:
        return find(name).read(data_uri)
    except FileNotFoundError:
        return None


def _about(name: str, task: Task) -> dict[str, Any]:
    benchmark = find(name)
    return {
        "title": benchmark.title,
        "ties": benchmark.ties,
        "source": benchmark.source,
        "licence": benchmark.licence,
        "counts": task.counts,
        "files": task.files,
        "chance": task.chance,
    }


def _read_quarantine(table_uri: str) -> dict[str, str]:
    uri = join(table_uri, "_quarantine.parquet")
    if not exists(uri):
        return {}
    table = read_rows(uri)
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))
