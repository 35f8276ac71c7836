"""Files that are easily read in two ways: training, the jobs and Serve give the model the same, byte for byte."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from serve.protocol.items import EmbedItem, ItemOptions, Limits, only_items, parse_items
from tests.support.shards import tar_of
from tests.support.without_ray import leave_ray_out
from vladva.benchmarks.benchmark import find_benchmark
from vladva.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.data.source import SourceOptions, open_source
from vladva.embed.batching import BatchingConfig, PreparedBatch, make_batches
from vladva.embed.corpus import ITEM, open_corpus, read_item_images
from vladva.embed.known_items import KnownItems
from vladva.embed.pipeline import encode, read_embeddings
from vladva.embed.source_items import source_items
from vladva.embed.table import embedding_matrix
from vladva.evaluate.benchmark_embeddings import embed, items, open_embeddings, read_image_bytes
from vladva.models.embedder import load_lvlm
from vladva.models.preprocessor import Preprocessor
from vladva.prepare.pipeline import prepare
from vladva.train.data_loader import ChunkReader

if TYPE_CHECKING:
    from collections.abc import Iterator

Inputs = dict[str, tuple[list[int], bytes]]  # caption -> token ids and pixels of its image; "text of ..." -> of itself
BATCH = 16


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    body = io.BytesIO()
    image.save(body, kind, **options)
    return body.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    made = Image.new(mode, size)
    made.frombytes(np.random.default_rng(seed).bytes(len(made.tobytes())))
    return made


MESSY: dict[str, tuple[bytes, bytes, str]] = {  # name -> file, the text beside it, and that text as it is meant
    "turned.jpg": (encoded(noise("RGB", (48, 32), 1), "JPEG", exif=turned(6)), b"lies on its side", "lies on its side"),
    "clear.png": (encoded(noise("RGBA", (32, 32), 2), "PNG"), b"\xef\xbb\xbfwith a mark\r\n", "with a mark"),
    "grey.png": (encoded(noise("I;16", (32, 24), 3), "PNG"), b"zero\0 and bell\x07", "zero and bell"),
    "ink.jpg": (encoded(noise("CMYK", (40, 32), 4), "JPEG"), b"an end </s> and <pad>", "an end </s> and <pad>"),
    "palette.gif": (encoded(noise("P", (32, 40), 5), "GIF"), b"<image> <|vladva_text_0|> <s>",
                    "<image> <|vladva_text_0|> <s>"),
    "end.jpg": (encoded(noise("RGB", (32, 32), 6), "JPEG")[:-2], "e\N{COMBINING ACUTE ACCENT}\N{LINE SEPARATOR}two "
                "lines".encode(), "e\N{COMBINING ACUTE ACCENT}\ntwo lines"),
}  # fmt: skip
MEANT = [meant for _, _, meant in MESSY.values()]


@pytest.fixture
def messy(tmp_path: Path) -> str:
    folder = tmp_path / "messy"
    folder.mkdir()
    for name, (image, text, _) in MESSY.items():
        (folder / name).write_bytes(image)
        (folder / name).with_suffix(".txt").write_bytes(text)
    return str(folder)


class NothingKnown(KnownItems):
    """A new table, without actors: every item is to be embedded, and is the first with its content."""

    def _ask(self, method: str, digests_N: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return np.full(len(digests_N), method == "claim")


def of_training(uri: str, model: ModelConfig) -> Inputs:
    """What a chunk of prepared shards holds."""
    train = TrainConfig(steps=1, global_batch=len(MESSY), chunk_size=len(MESSY))
    reader = ChunkReader(RunConfig("messy", "", model, DataConfig(uri, run_length=1), train))
    samples = reader.fetch(0)
    captions = [sample.ref.captions[0] for sample in samples]
    batch = reader.collate(0, samples)
    assert batch.replaced == "[]"
    assert batch.pixels is not None
    found = {}
    for row, caption in enumerate(captions):
        found[caption] = batch.image.ids[row, : batch.image.prompt_lengths[row]].tolist(), batch.pixels.values[row]
        found[f"text of {caption}"] = batch.text.ids[row, : batch.text.lengths[row]].tolist(), np.array([])
    return {name: (ids, pixels.tobytes()) for name, (ids, pixels) in found.items()}


def of_job(rows: pa.Table, read_images: Any, model: ModelConfig, names: dict[str, str]) -> Inputs:
    """What the batch job makes of items; `names`: id of an image -> its caption."""
    settings = BatchingConfig(model, (), BATCH, read_images, NothingKnown((), ()))
    found: Inputs = {}
    cleaned = 0
    for row in (row for table in make_batches(rows, settings=settings) for row in table.to_pylist()):
        report = json.loads(row["report"])
        assert "bad" not in report
        cleaned += report["cleaned"]
        batch = PreparedBatch(pa.table({}), [], None) if row["batch"] is None else pickle.loads(row["batch"])
        for number, (item, prompt) in enumerate(zip(batch.items.to_pylist(), batch.prompts, strict=True)):
            name = names[item["id"]] if item["kind"] == "image" else f"text of {item['text']}"
            found[name] = prompt, batch.pixels[number].values.tobytes() if batch.pixels else b""
    assert cleaned == (2 if "cleaned" in rows.column_names else 0)
    return found


def of_embedding(uri: str, model: ModelConfig) -> Inputs:
    source = open_source(uri, SourceOptions(), needs_images=False)
    found = [item for part in source.split() for some in source_items(("image", "text"), part) for item in some]
    names = {item["id"]: item["caption"] for item in found if item["kind"] == "image"}
    places = ["shard", "offset", "length", "crc32"]
    rows = pa.Table.from_pylist(found, ITEM)
    return of_job(rows, lambda rows: read_item_images(source.uri, rows.select(places).to_pylist()), model, names)


def of_evaluation(uri: str, model: ModelConfig) -> Inputs:
    task = find_benchmark("retrieval").read(uri)
    names = {image.id: MESSY[Path(image.uri).name][2] for image in task.images}
    return of_job(items([task]), read_image_bytes, model, names)


def sent_items() -> list[EmbedItem]:
    """Images and texts as a client sends the very files."""
    uris = ["data:image/png;base64," + base64.b64encode(image).decode() for image, _, _ in MESSY.values()]
    texts: list[Any] = [{"text": text.decode()} for _, text, _ in MESSY.values()]
    return only_items(parse_items([*uris, *texts], "input", Limits(99, 1 << 20, 1 << 20), ItemOptions()))


def of_serving(replica: Any) -> Inputs:
    names = [*MEANT, *(f"text of {meant}" for meant in MEANT)]

    async def prepared() -> list[Any]:
        turns = replica.preparing.turns()
        return [await replica.encoded(work, turns) for work in await replica.counted(sent_items())]

    found = zip(names, asyncio.run(prepared()), strict=True)
    return {name: (one.ids, one.pixels.values.tobytes() if one.pixels else b"") for name, one in found}


@pytest.fixture
def replica(tiny: str) -> Iterator[Any]:
    """What Serve runs in a process of its own."""
    import torch

    from serve.config import ServeArgs
    from serve.deployments.colocated import Colocated

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor of one CPU: with two, sums are rounded differently
    one = Colocated(ServeArgs(model=tiny))
    yield one
    one.engine.close()
    torch.set_num_threads(threads)


def test_training_jobs_and_server_give_the_model_the_same(
    messy: str, tiny: str, replica: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_ray_out(monkeypatch)
    model = ModelConfig(tiny, soft_prompts=False)
    preprocessor = Preprocessor.of(model)
    prepared = prepare(messy, str(tmp_path / "shards"), preprocessor.count_tokens)
    assert prepared.notes["caption cleaned of marks and control characters"] == 2
    inputs = of_training(prepared.uri, model)
    assert inputs.keys() == {*MEANT, *(f"text of {meant}" for meant in MEANT)}
    assert of_embedding(messy, model) == inputs
    assert of_evaluation(messy, model) == inputs
    assert of_serving(replica) == inputs
    # What equality is worth: read in the other way, the model would be given something else.
    lying = Image.open(io.BytesIO(MESSY["turned.jpg"][0]))
    assert preprocessor.pixels([lying]).values.tobytes() != inputs["lies on its side"][1]
    black = Image.open(io.BytesIO(MESSY["clear.png"][0])).convert("RGB")
    assert preprocessor.pixels([black]).values.tobytes() != inputs["with a mark"][1]
    special = {*preprocessor.tokenizer.all_special_ids, preprocessor.config.image_token_id}
    plain = special.intersection(preprocessor.text_prompt("nothing special"))
    assert all(special.intersection(inputs[f"text of {meant}"][0]) == plain for meant in MEANT)


@pytest.mark.slow
def test_jobs_and_server_give_the_same_embeddings_to_the_bit(
    messy: str, tiny: str, replica: Any, ray_cluster: None, tmp_path: Path
) -> None:
    """Item by item: in batches that are put together differently, sums are rounded differently (1e-8)."""
    count_tokens = Preprocessor(tiny).count_tokens
    alone = {"actors": 1, "batch_size": 1}
    prepared = prepare(messy, str(tmp_path / "shards"), count_tokens)
    (tmp_path / "tars").mkdir()
    members = {name: image for name, (image, _, _) in MESSY.items()}
    members |= {f"{Path(name).stem}.txt": text for name, (_, text, _) in MESSY.items()}
    (tmp_path / "tars/0.tar").write_bytes(tar_of([*members.items()]))
    found: list[dict[str, bytes]] = []
    told: list[tuple[int, list[str]]] = []
    for name, uri in (("raw", messy), ("prepared", prepared.uri), ("tar", str(tmp_path / "tars"))):
        corpus = open_corpus(uri, count_tokens=count_tokens)
        out = str(tmp_path / name)
        summary = encode(corpus.items, tiny, out, read_images=corpus.read_images, corpus=corpus.uri, **alone)
        told.append((summary.cleaned, [remark for remark in corpus.remarks if "cleaned" in remark]))
        table = read_embeddings(str(tmp_path / name))
        rows = table.select(["kind", "text", "caption"]).to_pylist()
        names = [f"text of {row['text']}" if row["kind"] == "text" else row["caption"] for row in rows]
        found.append(dict(zip(names, map(bytes, embedding_matrix(table).astype(np.float32)), strict=True)))
    assert found[0] == found[1] == found[2]
    # Once: in the job, or in the scan.
    in_shards = "in the shards: 2 x caption cleaned of marks and control characters"
    assert told == [(2, []), (0, []), (0, [in_shards])]
    assert len(set(found[0].values())) == 2 * len(MESSY)

    task = find_benchmark("retrieval").read(messy)
    embedded = embed(tiny, {"retrieval": task}, str(tmp_path / "evaluation"), dtype="float32", **alone)
    evaluated = open_embeddings(embedded.tables[embedded.layer])
    meant = [MESSY[Path(image.uri).name][2] for image in task.images]
    vectors = dict(zip(meant, map(bytes, evaluated.of_images(task.images).astype(np.float32)), strict=True))
    texts = map(bytes, evaluated.of_texts(task.texts).astype(np.float32))
    vectors |= {f"text of {text}": vector for text, vector in zip(task.texts, texts, strict=True)}
    assert vectors == found[0]

    async def answers() -> list[Any]:
        return [one for item in sent_items() for one in await replica.embed([item])]

    served = asyncio.run(answers())
    names = [*MEANT, *(f"text of {text}" for text in MEANT)]
    assert {name: bytes(one.vector) for name, one in zip(names, served, strict=True)} == found[0]
    # The model in this process, fed with what training is fed with.
    inputs, lvlm = of_training(prepared.uri, ModelConfig(tiny, soft_prompts=False)), load_lvlm(tiny)
    trained = {name: bytes(lvlm.embed([inputs[name][0]])[0]) for name in names if name.startswith("text of ")}
    assert trained == {name: vector for name, vector in found[0].items() if name in trained}
