"""Embedding a corpus: against the plain embedder, through kills of what can be killed, from every kind of corpus."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vladva.core.errors import FingerprintMismatch
from vladva.core.hashing import digest
from vladva.core.item_content import ItemContent
from vladva.core.progress import Progress
from vladva.embed.actor import EmbeddingActor
from vladva.embed.batching import PreparedBatch
from vladva.embed.corpus import open_corpus, read_item_images
from vladva.embed.known_items import Partition, as_digests, contains, known_in_all, partition_of
from vladva.embed.layers_actor import LayersEmbeddingActor
from vladva.embed.pipeline import encode, read_embeddings
from vladva.embed.table import embedding_matrix, find_manifest, keys_of, open_table
from vladva.embed.table_parts import write_part, write_rejected_items, write_repeats
from vladva.embed.table_writer import TableTarget, TableWriter
from vladva.models.batch import BATCH_TOKENS, cut
from vladva.models.embedder import load_embedder
from vladva.models.resolve import describe

ROOT = Path(__file__).parents[2]
MODEL = {"fingerprint": "0123456789abcdef", "dimension": 4}
WORDS = "red green blue yellow big small circle square triangle star above below left right of the a and".split()  # noqa: SIM905


def image(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """An image of noise, PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG")
    return body.getvalue()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of 3 to 30 words."""
    random = np.random.default_rng(seed)
    return [f"{number} " + " ".join(random.choice(WORDS, random.integers(2, 30))) for number in range(count)]


def item_table(texts: list[str | None], images: list[bytes | None]) -> pa.Table:
    """Items t0, t1, ... and p0, p1, ..., with a column to be carried."""
    return pa.table(
        {
            "id": [f"t{i}" for i in range(len(texts))] + [f"p{i}" for i in range(len(images))],
            "kind": ["text"] * len(texts) + ["image"] * len(images),
            "text": pa.array([*texts, *[None] * len(images)], pa.string()),
            "image": pa.array([*[None] * len(texts), *images], pa.binary()),
            "number": list(range(len(texts) + len(images))),
        }
    )


def quarantine(uri: Path) -> dict[str, str]:
    """id -> reason."""
    rows = pq.read_table(uri / "_quarantine.parquet").to_pylist()
    return {row["id"]: row["reason"] for row in rows}


# --- the job ---------------------------------------------------------------------------------------------------------


def test_images_with_words_and_instructions_are_items_too(tmp_path: Path, ray_cluster: None, tiny: str) -> None:
    import ray.data

    rows = [
        ("plain", "text", "in blue", None, None),
        ("asked", "text", "in blue", None, "Find it."),
        ("image", "image", None, image(0), None),
        ("image asked", "image", "no part of it", image(0), "Find it."),
        ("both", "image+text", "in blue", image(0), None),
        ("both again", "image+text", "in blue", image(0), None),
        ("both asked", "image+text", "in blue", image(0), "Find it."),
        ("no words", "image+text", " ", image(0), None),
        ("no image", "image+text", "in blue", None, None),
        ("strange", "audio", "in blue", None, None),
    ]
    names = ("id", "kind", "text", "image", "instruction")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    items = pa.table(
        {name: pa.array(c, pa.binary() if name == "image" else pa.string()) for name, c in columns.items()}
    )
    summary = encode(
        ray.data.from_arrow(items), tiny, str(tmp_path / "table"), batch_size=2, actors=1, max_bad_fraction=1.0
    )
    assert (summary.embedded, summary.repeated, summary.quarantined) == (6, 1, 3)
    assert quarantine(tmp_path / "table") == {
        "no words": "the text is empty",
        "no image": "there are no bytes",
        "strange": "kind is neither image nor text nor image+text",
    }
    table = read_embeddings(str(tmp_path / "table"))
    found = dict(zip(table["id"].to_pylist(), embedding_matrix(table), strict=True))
    drawn = Image.open(io.BytesIO(image(0)))
    contents = {
        "plain": ItemContent("in blue"),
        "asked": ItemContent("in blue", instruction="Find it."),
        "image": ItemContent(image=drawn),
        "image asked": ItemContent(image=drawn, instruction="Find it."),
        "both": ItemContent("in blue", drawn),
        "both again": ItemContent("in blue", drawn),
        "both asked": ItemContent("in blue", drawn, "Find it."),
    }
    expected = load_embedder(tiny).embed_items(list(contents.values()))
    np.testing.assert_allclose([found[name] for name in contents], expected, atol=1e-5)
    cosines = expected @ expected.T
    assert np.triu(cosines > 1 - 1e-5, 1).sum() == 1  # the repeat alone


def test_the_table_holds_what_the_embedder_gives(tmp_path: Path, ray_cluster: None, tiny: str) -> None:
    import ray.data

    from vladva.models.embedder import load_embedder

    texts = [*sentences(150), *sentences(20), "\0 ", "word " * 600]  # 20 repeats, 2 bad
    small = Image.new("RGB", (1, 1), "red")
    body = io.BytesIO()
    small.save(body, "PNG")
    images = [image(i, (60 + i, 64)) for i in range(30)]
    images += [images[3], body.getvalue(), b"no image", images[0][:500], b"no image", None]
    items = item_table(texts, images)
    summary = encode(ray.data.from_arrow(items), tiny, str(tmp_path / "table"), batch_size=16, actors=1)

    bad = {"t170", "t171", "p32", "p33", "p34", "p35"}
    assert set(quarantine(tmp_path / "table")) == bad
    assert quarantine(tmp_path / "table")["t170"] == "the text is empty"
    assert quarantine(tmp_path / "table")["t171"].endswith("tokens with its prompt; the model takes 512")
    assert quarantine(tmp_path / "table")["p34"] == quarantine(tmp_path / "table")["p32"]
    assert (summary.items, summary.embedded, summary.skipped, summary.quarantined) == (208, 181, 0, 6)
    assert (summary.repeated, summary.rows) == (21, 202)
    assert summary.tokens > 0

    table = read_embeddings(str(tmp_path / "table"))
    assert sorted(table["id"].to_pylist()) == sorted(set(items["id"].to_pylist()) - bad)
    assert dict(zip(table["id"].to_pylist(), table["number"].to_pylist(), strict=True))["p4"] == 176
    embedder = load_embedder(tiny)
    assert json.loads(table.schema.metadata[b"vladva"]) == embedder.description()
    assert open_table(str(tmp_path / "table")).fingerprint == embedder.fingerprint == summary.fingerprint
    row = {one: i for i, one in enumerate(table["id"].to_pylist())}
    embeddings_ND = embedding_matrix(table)
    np.testing.assert_allclose(np.linalg.norm(embeddings_ND, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        embeddings_ND[[row[f"t{i}"] for i in range(170)]], embedder.embed_texts(texts[:170]), atol=1e-5
    )
    good = [Image.open(io.BytesIO(images[i])) for i in range(32)]
    np.testing.assert_allclose(embeddings_ND[[row[f"p{i}"] for i in range(32)]], embedder.embed_images(good), atol=1e-5)
    assert not np.allclose(embeddings_ND[row["p0"]], embeddings_ND[row["p1"]], atol=1e-3)  # what equality is worth

    # A second run embeds what is new, and nothing else; another model is refused.
    more = item_table([*texts[:170], "a new one", texts[0]], [])
    again = encode(ray.data.from_arrow(more), tiny, str(tmp_path / "table"), actors=1)
    assert (again.embedded, again.repeated, again.skipped, again.rows) == (1, 1, 170, 204)
    same = encode(ray.data.from_arrow(more), tiny, str(tmp_path / "table"), actors=1)
    assert (same.embedded, same.skipped, same.rows) == (0, 172, 204)
    refuse_another_model(tmp_path / "table", items, tiny)


def refuse_another_model(uri: Path, items: pa.Table, tiny: str) -> None:
    """The table says that another model made it: the job names both, and changes nothing."""
    import ray.data

    note = json.loads((uri / "_table.json").read_text())
    ours = note["model"]["fingerprint"]
    note["model"]["fingerprint"] = "another"
    (uri / "_table.json").write_text(json.dumps(note))
    with pytest.raises(FingerprintMismatch, match=f"model another, not of model {ours}"):
        encode(ray.data.from_arrow(items), tiny, str(uri))
    assert len(read_embeddings(str(uri))) == 204


DRIVER = """
import sys, ray, pyarrow as pa, pyarrow.feather as feather
ray.init(address=sys.argv[1], logging_level="ERROR")
import ray.data
from vladva.embed.pipeline import encode
encode(ray.data.from_arrow(feather.read_table(sys.argv[2])), sys.argv[3], sys.argv[4], batch_size=4, actors=2)
"""


def test_kills_of_driver_and_actors_cost_nothing_but_time(tmp_path: Path, ray_cluster: None, tiny: str) -> None:
    import pyarrow.feather as feather
    import ray
    import ray.data

    from vladva.models.embedder import load_embedder

    texts = sentences(700)
    items = item_table(texts, [])
    feather.write_feather(items, str(tmp_path / "items"))
    uri = tmp_path / "table"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path / "items"), tiny, str(uri)]
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    wait_until(lambda: num_parts(uri) >= 5 or driver.poll() is not None)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "the driver had ended before it could be killed"
    with pytest.raises(ValueError, match="not complete"):
        read_embeddings(str(uri))

    killed: list[int] = []
    begun = num_parts(uri)
    killer = threading.Thread(target=kill_an_actor, args=(lambda: num_parts(uri) >= begun + 5, killed))
    killer.start()
    summary = encode(ray.data.from_arrow(items), tiny, str(uri), batch_size=4, actors=2)
    killer.join()
    assert killed
    assert summary.skipped >= 20
    assert (summary.items, summary.quarantined, summary.rows) == (700, 0, 700)
    table = read_embeddings(str(uri))
    assert sorted(table["id"].to_pylist()) == sorted(items["id"].to_pylist())
    row = {one: i for i, one in enumerate(table["id"].to_pylist())}
    undisturbed = load_embedder(tiny).embed_texts(texts)
    np.testing.assert_allclose(embedding_matrix(table)[[row[f"t{i}"] for i in range(700)]], undisturbed, atol=1e-5)


def num_parts(uri: Path) -> int:
    """Batches that have been written and not yet been merged."""
    return len(list((uri / "_parts").rglob("*.parquet")))


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Returns when the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def kill_an_actor(when: Callable[[], bool], killed: list[int]) -> None:
    """SIGKILL one of the processes of this test's own Ray that hold the model."""
    wait_until(when)
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    processes = {int(pid): (int(parent), args) for pid, parent, args in (x.split(None, 2) for x in lines.splitlines())}

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in processes and is_ours(processes[pid][0]))

    pid = next(pid for pid, (_, args) in processes.items() if "MapBatches(EmbeddingActor)" in args and is_ours(pid))
    os.kill(pid, signal.SIGKILL)
    killed.append(pid)


def test_too_many_bad_items_stop_the_job(tmp_path: Path, ray_cluster: None, tiny: str) -> None:
    import ray.data

    items = item_table(["word " * 600 + str(i) for i in range(150)], [])
    with pytest.raises(ValueError, match=r"150 of 150 items cannot be embedded.*the model takes 512"):
        encode(ray.data.from_arrow(items), tiny, str(tmp_path / "many"), actors=1)
    with pytest.raises(ValueError, match="nothing was embedded: the text is empty"):
        encode(ray.data.from_arrow(item_table([""], [])), tiny, str(tmp_path / "few"), actors=1)
    with pytest.raises(ValueError, match="actors is 0"):
        encode(ray.data.from_arrow(item_table(["a"], [])), tiny, str(tmp_path / "none"), actors=0)


def test_the_description_needs_no_weights(tiny: str) -> None:
    from vladva.models.embedder import load_embedder

    assert describe(tiny, adapter=True, dtype="float32")[1] == load_embedder(tiny).description()


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "at_once"), [(EmbeddingActor, 2), (LayersEmbeddingActor, 1)])
def test_batches_are_written_while_others_are_computed(
    tmp_path: Path, tiny: str, kind: type[EmbeddingActor], at_once: int
) -> None:
    lock, inside, most = threading.Lock(), 0, 0
    computed, together = threading.Barrier(3, timeout=60), threading.Barrier(at_once, timeout=60)
    calls = count()

    class Watched(kind):
        """As it is, but that the first wait until as many are computed as may be, and writers until all are."""

        def forward(self, prompts: list[list[int]], pixels: None) -> np.ndarray:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            if next(calls) < at_once:
                together.wait()
            found = super().forward(prompts, pixels)
            with lock:
                inside -= 1
            return found

        def write(self, items: pa.Table, embeddings: np.ndarray) -> None:
            computed.wait()  # were they computed and written in turn, it would wait in vain
            super().write(items, embeddings)

    one = TableTarget(str(tmp_path / "table"), describe(tiny, adapter=True, dtype="float32", layer=2)[1])
    encoder = (
        Watched({"model": tiny, "layer": 2}, one) if kind is EmbeddingActor else Watched({"model": tiny}, {2: one})
    )
    assert encoder.computed_at_once() == at_once
    table = TableWriter(one.uri, one.model, "")
    preprocessor, batches = encoder.embedder.preprocessor, []
    for number in range(3):
        texts = [f"{number} {text}" for text in sentences(40, number)]
        items = item_table(texts, []).append_column("content", [[digest("text", text) for text in texts]])
        items = items.set_column(0, "id", [texts]).drop_columns(["image"])
        batches.append(PreparedBatch(items, [preprocessor.text_prompt(text) for text in texts], None))
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda batch: encoder.encode(batch, {}), batches))
    assert most == at_once
    table.commit()
    found = read_embeddings(one.uri)
    alone = load_embedder(tiny, layer=2).embed_texts(found["text"].to_pylist())
    assert len(found) == 120
    np.testing.assert_allclose(embedding_matrix(found), alone, atol=1e-5)
    assert np.abs(embedding_matrix(found) - np.roll(alone, 1, axis=0)).max(axis=1).min() > 1e-2


def test_an_item_that_the_model_fails_on_costs_no_other_of_its_batch(tmp_path: Path, tiny: str) -> None:
    description = describe(tiny, adapter=True, dtype="float32")[1]
    encoder = EmbeddingActor({"model": tiny}, TableTarget(str(tmp_path), description))
    table = TableWriter(str(tmp_path), description, "")
    texts = sentences(5)
    items = item_table(texts, []).append_column("content", [[digest("text", text) for text in texts]])
    prompts = [encoder.embedder.preprocessor.text_prompt(text) for text in texts]
    prompts[3] = [*prompts[3], 10**6]  # there is no such token
    report: dict = {}
    encoder.encode(PreparedBatch(items.drop_columns(["image"]), prompts, None), report)
    assert report["embedded"] == 4
    assert report["bad"] == 1
    assert report["last_bad"].startswith("t3: the model failed on it: IndexError")
    table.commit()
    assert list(quarantine(tmp_path)) == ["t3"]
    found = read_embeddings(str(tmp_path))
    assert found["id"].to_pylist() == ["t0", "t1", "t2", "t4"]
    alone = encoder.embedder.embed_texts(found["text"].to_pylist())
    np.testing.assert_allclose(embedding_matrix(found), alone, atol=1e-5)


def test_batches_hold_like_lengths_and_everything_once() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).gamma(4, 8, 2000) + 3]
    batches = list(cut(lengths, 64))
    assert sorted(position for batch in batches for position in batch) == list(range(2000))
    computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert 1 - sum(lengths) / computed < 0.05
    unsorted = sum(max(lengths[i : i + 64]) * len(lengths[i : i + 64]) for i in range(0, 2000, 64))
    assert 1 - sum(lengths) / unsorted > 0.4  # what sorting is worth


def test_long_items_come_in_small_batches() -> None:
    batches = list(cut([BATCH_TOKENS // 4] * 8 + [BATCH_TOKENS * 2, 1], 64))
    assert [len(batch) for batch in batches] == [1, 4, 4, 1]


def test_one_item_owns_a_content_whoever_asks_how_often() -> None:
    known = [(as_digests([b"k"]), as_digests([b"z"]))]
    owners = Partition()

    def claim(contents: list[bytes], keys: list[bytes]) -> list[bool]:
        return owners.claim(as_digests(contents), as_digests(keys), known).tolist()

    for _ in range(2):  # again with the claims in arrays
        assert claim([b"x", b"y", b"x"], [b"1", b"2", b"3"]) == [True, True, False]
        assert claim([b"x", b"y", b"x"], [b"1", b"2", b"3"]) == [True, True, False]  # a task that is run again
        assert claim([b"y", b"z"], [b"1", b"4"]) == [False, False]  # z has an embedding already
        owners._order()
        assert not owners.recent
    assert claim([b"w"], [b"5"]) == [True]
    assert owners.has(as_digests([b"k", b"1"]), known).tolist() == [True, False]


def test_digests_are_found_whatever_bytes_they_end_with() -> None:
    digests = [digest(str(i)) for i in range(1000)] + [b"\0" * 16, b"a" + b"\0" * 15]
    ordered = np.unique(np.array(digests[::2], "S16"))
    assert contains(ordered, digests).tolist() == [True, False] * 501
    assert contains(ordered[:0], digests).sum() == 0
    assert digest("ab", "c") != digest("a", "bc")


# --- the table while it is made --------------------------------------------------------------------------------------


def made(ids: list[str], contents: list[str] | None = None) -> pa.Table:
    """Items as they come out of a window."""
    digests = [digest(content) for content in contents or ids]
    return pa.table({"id": ids, "kind": ["text"] * len(ids), "content": pa.array(digests, pa.binary(16))})


def rows(*numbers: float) -> np.ndarray:
    """One row [4] per number."""
    return np.array(numbers, np.float32)[:, None] * np.ones(4, np.float32)


def test_whatever_was_cut_short_each_id_is_there_once(tmp_path: Path) -> None:
    uri = str(tmp_path)
    TableWriter(uri, MODEL, "")
    write_part(uri, made(["a", "b"]), rows(1, 2), MODEL)
    write_part(uri, made(["a", "b"]), rows(1, 2), MODEL)  # a batch that was run again
    write_part(uri, made(["b", "c"]), rows(2, 3), MODEL)  # what a driver wrote that was thought dead
    (tmp_path / "embeddings-half-merged.parquet").write_bytes(b"a commit that was cut short")
    table = TableWriter(uri, MODEL, "")
    for partitions in (1, 3):
        known = known_in_all([table.groups()], partitions)
        keys = as_digests(keys_of(made(["a", "b", "c", "d"])))
        of_key = partition_of(keys, partitions)
        assert [bool(contains(known[p][0], [key])[0]) for key, p in zip(keys, of_key, strict=True)] == [1, 1, 1, 0]
    assert table.commit().num_rows == 3
    assert read_embeddings(uri)["id"].to_pylist() == ["a", "b", "c"]
    assert {file.name for file in tmp_path.glob("*.parquet")} == {*open_table(uri).files, "_quarantine.parquet"}

    write_part(uri, made(["c", "d"]), rows(9, 4), MODEL)  # too late, and new
    assert len(read_embeddings(uri)) == 3  # readers see the table as it was completed
    table = TableWriter(uri, MODEL, "")
    assert table.commit().num_rows == 1
    assert table.manifest.num_rows == 4
    assert not list(tmp_path.glob("_parts/**/*.parquet"))
    assert embedding_matrix(read_embeddings(uri))[:, 0].tolist() == [1, 2, 3, 4]


def test_repeats_get_the_embedding_or_the_fate_of_their_twin(tmp_path: Path) -> None:
    uri = str(tmp_path)
    table = TableWriter(uri, MODEL, "")
    write_part(uri, made(["a", "b"]), rows(1, 2), MODEL)
    table.commit()
    table = TableWriter(uri, MODEL, "")
    write_part(uri, made(["c"]), rows(3), MODEL)
    write_repeats(uri, made(["d", "e", "f", "a", "h"], contents=["c", "a", "bad", "c", "nobody's"]))
    write_rejected_items(uri, [{"id": "g", "kind": "text", "content": digest("bad"), "reason": "it is bad"}])
    committed = table.commit()
    assert (committed.num_rows, committed.num_rejected, committed.first_reason) == (3, 3, "it is bad")
    assert table.manifest.num_rows == 5
    found = quarantine(tmp_path)
    assert (found["g"], found["f"]) == ("it is bad", "it is bad")
    assert "run the job again" in found["h"]
    assert embedding_matrix(read_embeddings(uri))[:, 0].tolist() == [1, 2, 3, 3, 1]


def test_another_model_cannot_go_on_with_a_table(tmp_path: Path) -> None:
    TableWriter(str(tmp_path), MODEL, "")
    with pytest.raises(FingerprintMismatch, match="model 0123456789abcdef, not of model fedc"):
        TableWriter(str(tmp_path), MODEL | {"fingerprint": "fedc"}, "")
    manifest = find_manifest(str(tmp_path))
    assert manifest is not None
    assert manifest.fingerprint == MODEL["fingerprint"]


# --- corpora ---------------------------------------------------------------------------------------------------------


def items_of(uri: str, kinds: list[str]) -> dict[tuple[str, str], dict]:
    """(id, kind) -> item, as many as were announced."""
    corpus = open_corpus(uri, kinds)
    found = {(item["id"], item["kind"]): item for item in corpus.items.take_all()}
    assert len(found) == corpus.num_items
    return found


def test_a_text_file_has_a_text_per_line(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "captions.txt").write_text("a red circle\n\n  a blue square  \n")
    items = items_of(str(tmp_path / "captions.txt"), ["text"])
    assert {key: item["text"] for key, item in items.items()} == {
        ("captions.txt#0", "text"): "a red circle",
        ("captions.txt#2", "text"): "a blue square",
    }


def test_a_folder_of_images_may_have_captions(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.png").write_bytes(image(1))
    (tmp_path / "deep" / "two.JPG").write_bytes(image(2))
    (tmp_path / "one.txt").write_text("first\nsecond\n")
    (tmp_path / "readme.md").write_text("not an image")
    items = items_of(str(tmp_path), ["image", "text"])
    pictures = [items["one.png", "image"], items["deep/two.JPG", "image"]]
    assert len(items) == 4
    assert items["one.png#1", "text"]["text"] == "second"
    assert [item["caption"] for item in pictures] == ["first", None]
    assert read_item_images(str(tmp_path), pictures) == [image(1), image(2)]


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_files_are_read_by_the_usual_columns(tmp_path: Path, ray_cluster: None, as_struct: bool) -> None:
    bodies = [image(i) for i in range(5)]
    images = [{"bytes": body, "path": "x.png"} for body in bodies] if as_struct else bodies
    table = pa.table({"image": images, "caption": [f"image {i}" for i in range(5)]})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    items = items_of(str(tmp_path), ["image", "text"])
    assert [items[f"part.parquet#{i}", "image"]["image"] for i in range(5)] == bodies
    assert items["part.parquet#3#0", "text"]["text"] == "image 3"
    assert items["part.parquet#3", "image"]["caption"] == "image 3"
    assert read_item_images(str(tmp_path), [items["part.parquet#3", "image"]]) == [bodies[3]]
    assert len(items_of(str(tmp_path), ["text"])) == 5


def test_what_is_no_corpus_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds nothing of a known format. There are: webdataset"):
        open_corpus(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_corpus(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="kinds: audio is unknown"):
        open_corpus(str(tmp_path), ["audio"])
    pq.write_table(pa.table({"colour": ["red"]}), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"odd\.parquet has no column any of image, .*; it has \['colour'\]"):
        open_corpus(str(tmp_path))


# --- the jobs --------------------------------------------------------------------------------------------------------


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a job as a user does."""
    return subprocess.run(arguments, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_shards_are_embedded_indexed_and_searched_by_the_jobs(tmp_path: Path, scenes: Path) -> None:
    table, index, page = str(tmp_path / "table"), str(tmp_path / "index"), tmp_path / "hits.html"
    done = job(sys.executable, "jobs/embed.py", "tiny", "--data", str(scenes / "test"), "--out", table, "--actors", "1")
    assert done.returncode == 0, done.stderr
    assert ", 0 quarantined" in done.stdout
    assert "embedding  " in done.stderr  # the line of progress
    embeddings = read_embeddings(table)
    kinds = embeddings["kind"].to_pylist()
    assert kinds.count("image") == 64
    done = job(sys.executable, "jobs/index.py", table, "--out", index)
    assert done.returncode == 0, done.stderr
    assert "64 rows" in done.stdout
    assert "recall@10 1.000" in done.stdout

    first = kinds.index("image")
    name, shard = embeddings["id"][first].as_py(), embeddings.slice(first, 1).to_pylist()[0]
    (tmp_path / "query.png").write_bytes(read_item_images(open_table(table).corpus, [shard])[0])
    search = [sys.executable, "jobs/search.py", index, "--model", "tiny"]
    done = job(*search, "--image", str(tmp_path / "query.png"), "-k", "3", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "1.0000" in done.stdout.splitlines()[1]
    assert name in done.stdout.splitlines()[1]
    assert page.read_text().count("data:image/png;base64,") == 3
    done = job(*search, "a red circle", "--filter", "colour = 1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "colour" in done.stderr


@pytest.mark.parametrize("name", ["embed", "index", "search"])
def test_jobs_explain_themselves(name: str) -> None:
    assert os.access(ROOT / "jobs" / f"{name}.py", os.X_OK)
    done = job(sys.executable, f"jobs/{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: jobs/{name}.py" in done.stdout


def test_progress_tells_what_is_left() -> None:
    from rich.console import Console

    text = io.StringIO()
    with Progress("embedding", 100, console=Console(file=text)) as progress:
        progress.advance(10)
        time.sleep(0.1)
        progress.advance(40, "7 tokens/s")
    assert text.getvalue().startswith("embedding  50/100  ")
    assert "items/s" in text.getvalue()
    assert text.getvalue().rstrip().endswith("7 tokens/s")
