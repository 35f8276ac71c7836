"""The index: one contract for Lance and its exact numpy twin, recall against brute force, versions, writers, builds."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from tests.index.exact_store import ExactStore
from tests.support.s3_server import BUCKET, s3_server
from vladva.core.hashing import digest
from vladva.embed.table import read_embeddings
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index import build, ivf, searcher
from vladva.index.build import build_index
from vladva.index.ivf import VECTORS, training_sample
from vladva.index.memory_index import Effort, MemoryIndex
from vladva.index.qdrant import fill
from vladva.index.store import Hit, VectorStore
from vladva.index.tuning import (
    Queries,
    RecallEstimate,
    best_scores,
    cheapest_settings,
    exact_thresholds,
    measure_recall,
    nprobes_grid,
)
from vladva.index.vector_index import FingerprintMismatch, VectorIndex, open_index

MODEL = {"fingerprint": "0123456789abcdef", "dimension": 8}
OTHER = MODEL | {"fingerprint": "fedcba9876543210"}


def write_table(uri: Path, vectors_ND: np.ndarray, *, kinds: list[str] | None = None, model: dict | None = None) -> str:
    """A complete embeddings table: ids r0, r1, ..., a carried column `number`, and one that is always null."""
    model = (model or MODEL) | {"dimension": vectors_ND.shape[1]}
    ids = [f"r{i}" for i in range(len(vectors_ND))]
    items = pa.table(
        {
            "id": ids,
            "kind": kinds or ["image"] * len(ids),
            "content": pa.array([digest(one) for one in ids], pa.binary(16)),
            "number": pa.array(range(len(ids)), pa.int64()),
            "nothing": pa.nulls(len(ids)),
        }
    )
    table = TableWriter(str(uri), model, "a corpus")
    for first in range(0, len(ids), 1000):
        write_part(str(uri), items.slice(first, 1000), vectors_ND[first : first + 1000], model)
    table.commit()
    return str(uri)


def rows_of(vectors_ND: np.ndarray, numbers: list[int], model: dict | None = None) -> pa.Table:
    """Rows to upsert, with the ids r<number>."""
    import json

    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.astype(np.float32).ravel()), vectors_ND.shape[1])
    columns = {"id": [f"r{n}" for n in numbers], "kind": ["image"] * len(numbers), "embedding": embedding}
    table = pa.table(columns | {"number": pa.array(numbers, pa.int64())})
    return table.replace_schema_metadata({"vladva": json.dumps(model or MODEL)})


def fan(count: int) -> np.ndarray:
    """Unit vectors [count, 8] in one plane, a degree apart: the cosine of rows i and j is that of |i - j| degrees."""
    angles = np.radians(np.arange(count))
    vectors_ND = np.zeros((count, 8), np.float32)
    vectors_ND[:, 0], vectors_ND[:, 1] = np.cos(angles), np.sin(angles)
    return vectors_ND


def clustered(count: int, dimension: int = 32, seed: int = 0) -> np.ndarray:
    """Unit vectors [count, dimension] in clusters of about thirty, as embeddings of like images are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(100, dimension))
    vectors_ND = centres[random.integers(0, 100, count)] + 0.5 * random.normal(size=(count, dimension))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


# --- the contract ----------------------------------------------------------------------------------------------------


def exact_twin(vectors_ND: np.ndarray, folder: Path) -> VectorStore:
    return ExactStore(rows_of(vectors_ND, list(range(len(vectors_ND)))), MODEL["fingerprint"])


def lance_exact(vectors_ND: np.ndarray, folder: Path) -> VectorStore:
    build_index(write_table(folder / "table", vectors_ND), str(folder / "index"))
    return open_index(str(folder / "index"))


def lance_partitioned(vectors_ND: np.ndarray, folder: Path) -> VectorIndex:
    build_index(write_table(folder / "table", vectors_ND), str(folder / "index"), exact_below=10)
    return open_index(str(folder / "index"))


def lance_in_memory(vectors_ND: np.ndarray, folder: Path) -> VectorStore:
    index = lance_partitioned(vectors_ND, folder)
    index.warm()
    return index


def qdrant(vectors_ND: np.ndarray, folder: Path) -> VectorStore:
    from qdrant_client import QdrantClient

    return fill(QdrantClient(":memory:"), "rows", rows_of(vectors_ND, list(range(len(vectors_ND)))))


STORES = [exact_twin, lance_exact, lance_partitioned, lance_in_memory, qdrant]


@pytest.fixture(params=STORES, ids=lambda maker: maker.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> VectorStore:
    """Each kind of store, with 60 rows a degree apart."""
    make: Callable[[np.ndarray, Path], VectorStore] = request.param
    return make(fan(60), tmp_path)


def test_nearest_rows_come_first_with_their_cosines(store: VectorStore) -> None:
    assert store.search(np.float32(3e38) * fan(60)[0], 4) == store.search(fan(60)[0], 4)  # length does not matter
    hits = store.search(3 * fan(60)[0], 4)
    assert [hit.id for hit in hits] == ["r0", "r1", "r2", "r3"]
    assert [hit.score for hit in hits] == pytest.approx([math.cos(math.radians(d)) for d in range(4)], abs=1e-5)
    assert hits[1].columns == {"kind": "image", "number": 1}
    assert (store.num_rows, store.dimension, store.fingerprint) == (60, 8, MODEL["fingerprint"])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("number >= 20 AND number < 40", [20, 21, 22]),
        ("number IN (50, 7) OR id = 'r9'", [7, 9, 50]),
        ("kind = 'text'", []),
        ("number > 57", [58, 59]),
        ("NOT (number < 50 OR id IN ('r50', 'r51')) AND number <> 53", [52, 54, 55]),
        ("number NOT BETWEEN 1 AND 57 AND kind IS NOT NULL", [0, 58, 59]),
        ("id = 'it''s' OR NOT number NOT IN (4, 5)", [4, 5]),
    ],
)
def test_a_condition_holds_for_every_hit(store: VectorStore, condition: str, expected: list[int]) -> None:
    assert [hit.columns["number"] for hit in store.search(fan(60)[0], 3, filter=condition)] == expected


def test_null_is_neither_equal_nor_unequal(store: VectorStore) -> None:
    row = rows_of(fan(1), [70])
    store.upsert(row.set_column(row.schema.get_field_index("number"), "number", pa.nulls(1, pa.int64())))
    for condition in "number <> 3", "NOT number = 3", "number NOT IN (3)", "number = 3 OR number > 3", "number < 3":
        assert "r70" not in {hit.id for hit in store.search(fan(60)[0], 100, filter=condition)}
    assert [hit.id for hit in store.search(fan(60)[0], 100, filter="number IS NULL AND NOT kind = 'text'")] == ["r70"]


def test_upserts_add_and_replace(store: VectorStore) -> None:
    before = store.version
    axis = np.eye(8, dtype=np.float32)
    store.upsert(rows_of(axis[[5, 6]], [3, 1000]))  # r3 moves, r1000 is new
    assert store.num_rows == 61
    assert [hit.id for hit in store.search(axis[6], 1)] == ["r1000"]
    assert [hit.id for hit in store.search(axis[5], 1)] == ["r3"]
    assert {hit.id for hit in store.search(fan(60)[3], 2)} == {"r2", "r4"}  # equally near
    assert store.version > before


def test_deleted_rows_are_gone(store: VectorStore) -> None:
    assert store.delete(["r0", "r2", "nobody", "it's"]) == 2
    assert [hit.id for hit in store.search(fan(60)[0], 3)] == ["r1", "r3", "r4"]
    assert store.num_rows == 58


def test_optimizing_changes_no_answer(store: VectorStore) -> None:
    store.upsert(rows_of(np.eye(8, dtype=np.float32)[[5]], [7]))
    store.delete(["r5"])
    before = store.search(fan(60)[6], 10)
    store.optimize()
    after = store.search(fan(60)[6], 10)
    assert [hit.id for hit in after] == [hit.id for hit in before]
    assert store.num_rows == 59


def test_more_than_there_is_gives_all(store: VectorStore) -> None:
    assert len(store.search(fan(60)[0], 100)) == 60


def test_what_cannot_be_searched_is_said(store: VectorStore) -> None:
    with pytest.raises(ValueError, match="vectors of 8 numbers"):
        store.search(np.ones(9), 3)
    with pytest.raises(ValueError, match="k is 0"):
        store.search(np.ones(8), 0)
    with pytest.raises(ValueError, match="zero or not finite"):
        store.search(np.zeros(8), 3)
    for condition in (
        "colour = 3",
        "number >",
        "1; DROP TABLE rows",
        "number = 1; number = 2",
        "number = 1 or so",
        "number = 1) OR (number = 2",
        "caption = ')' ) OR (number = 2",
    ):
        with pytest.raises(ValueError, match="filter") as caught:
            store.search(np.ones(8), 3, filter=condition)
        assert "\n" not in str(caught.value)
        assert ".rs:" not in str(caught.value)


def test_rows_of_another_model_are_refused(store: VectorStore) -> None:
    with pytest.raises(FingerprintMismatch) as caught:
        store.upsert(rows_of(fan(1), [1], OTHER))
    assert MODEL["fingerprint"] in str(caught.value)
    assert OTHER["fingerprint"] in str(caught.value)
    with pytest.raises(ValueError, match="do not say which model"):
        store.upsert(rows_of(fan(1), [1]).replace_schema_metadata(None))


# --- recall ----------------------------------------------------------------------------------------------------------


def test_thresholds_are_those_of_a_sort_without_the_query_itself() -> None:
    vectors_ND = clustered(300)
    keys = [(f"r{i}", "image") for i in range(300)]
    queries = Queries(vectors_ND[:20], keys[:20])
    blocks = ((vectors_ND[first : first + 70], keys[first : first + 70]) for first in range(0, 300, 70))
    scores = np.sort(vectors_ND[:20] @ vectors_ND.T, axis=1)[:, ::-1]
    np.testing.assert_allclose(best_scores(blocks, queries, 10).min(axis=1), scores[:, 10], atol=1e-6)


def test_recall_is_the_fraction_found() -> None:
    vectors_ND = clustered(300)
    keys = [(f"r{i}", "image") for i in range(300)]
    queries = Queries(vectors_ND[:20], keys[:20])
    thresholds = best_scores([(vectors_ND, keys)], queries, 10).min(axis=1)
    twin = ExactStore(rows_of(vectors_ND, list(range(300))), MODEL["fingerprint"])
    assert measure_recall(twin.search, queries, thresholds, 10).recall == 1.0
    # One that misses the best six and gives worse ones instead has four of ten right.
    asked = []

    def worse(vector_D: np.ndarray, k: int) -> list[Hit]:
        asked.append(k)
        return twin.search(vector_D, k + 6)[7:]

    assert measure_recall(worse, queries, thresholds, 10).recall == pytest.approx(0.4)
    assert len(asked) == 20
    # 0.9 of twenty queries allows for two misses in all: after the fourth query it is out of reach.
    assert measure_recall(worse, queries, thresholds, 10, 0.9).recall == pytest.approx(0.4)
    assert len(asked) == 24


def test_the_least_that_suffices_is_chosen() -> None:
    tried: list[tuple[int, int]] = []

    def recall(nprobes: int, candidates: int) -> RecallEstimate:
        tried.append((nprobes, candidates))
        return RecallEstimate(min(nprobes / 40, candidates / 10), 0.0, 1.0, 2.0)

    steps = nprobes_grid(195)
    assert (steps[0], steps[-1]) == (1, 195)
    nprobes, candidates, found = cheapest_settings(195, (3, 10), recall, 0.9)
    assert (nprobes, candidates) == (next(step for step in steps if step >= 36), 10)
    assert found.recall >= 0.9
    assert len(tried) < 12
    assert max(tried)[0] <= 4 * nprobes  # nobody looks through all 195 to learn that 39 are enough
    assert cheapest_settings(195, (3, 5), recall, 0.9)[:2] == (195, 5)  # nothing suffices: the most there is


def test_partitions_that_find_no_more_are_not_searched() -> None:
    """What the codes cannot tell apart is not found in any number of partitions, and a large index has many."""
    tried: list[int] = []

    def recall(nprobes: int, candidates: int) -> RecallEstimate:
        tried.append(nprobes)
        found = tuple([min(nprobes / 50, 0.9)] * 100)
        return RecallEstimate(found[0], 0.0, 1.0, 2.0, found)

    nprobes, candidates, found = cheapest_settings(39_062, (10, 30), recall, 0.95)
    assert (candidates, found.recall) == (30, 0.9)
    assert 45 <= nprobes <= 45 * 3.5
    assert max(tried) <= 45 * 3.5**2


@pytest.mark.parametrize(("three_need", "chosen"), [(30, (30, 3)), (100, (12, 10))])
def test_fewer_candidates_are_taken_where_they_need_few_more_partitions(
    three_need: int, chosen: tuple[int, int]
) -> None:
    """Ten candidates need 12 partitions; three are worth 30, and not 100."""
    need = {3: three_need, 10: 12}

    def recall(nprobes: int, candidates: int) -> RecallEstimate:
        return RecallEstimate(1.0 if nprobes >= need[candidates] else 0.5, 0.0, 1.0, 2.0)

    nprobes, candidates, _ = cheapest_settings(195, (3, 10), recall, 0.9)
    assert (nprobes, candidates) == (next(step for step in nprobes_grid(195) if step >= chosen[0]), chosen[1])


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["IVF_SQ", "IVF_PQ", "IVF_HNSW_SQ"])
def test_built_indexes_find_what_brute_force_finds(
    tmp_path: Path, index_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors_ND = clustered(3200)
    table = write_table(tmp_path / "table", vectors_ND[:3000])
    summary = build_index(table, str(tmp_path / "index"), index_type=index_type, exact_below=1000)
    assert summary.settings.index_type == index_type
    assert summary.settings.recall_at_10 >= 0.98
    index = open_index(str(tmp_path / "index"))
    found = 0
    for query_D in vectors_ND[3000:]:  # never seen by the build
        scores = vectors_ND[:3000] @ query_D
        hits = index.search(query_D, 10)
        for hit in hits:
            assert hit.score == pytest.approx(scores[hit.columns["number"]], abs=1e-5)
        found += len({hit.columns["number"] for hit in hits} & set(np.argsort(-scores)[:10].tolist()))
    assert found / 2000 >= 0.97
    # With a condition: exactly where it leaves few rows, else in so many more partitions as it leaves fewer rows.
    for few, least, warm in (1000, 1.0, False), (0, 0.95, False), (0, 0.95, True), (1000, 1.0, True):
        if warm:
            index.warm()
        monkeypatch.setattr(searcher, "EXACT_LEFT", few)
        found = 0
        for query_D in vectors_ND[3000:]:
            scores = np.where(np.arange(3000) % 5 == 0, vectors_ND[:3000] @ query_D, -1)
            hits = index.search(query_D, 10, filter="number % 5 = 0")
            found += len({hit.columns["number"] for hit in hits} & set(np.argsort(-scores)[:10].tolist()))
        assert found / 2000 >= least


# --- building --------------------------------------------------------------------------------------------------------


def test_texts_and_images_can_be_indexed_together_or_apart(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table", fan(60), kinds=["image", "text"] * 30)
    assert build_index(table, str(tmp_path / "images")).num_rows == 30
    summary = build_index(table, str(tmp_path / "all"), kind="all", filter_columns=["number"], tag="first")
    assert (summary.num_rows, summary.dimension, summary.settings.recall_at_10) == (60, 8, 1.0)
    index = open_index(str(tmp_path / "all"), version="first", fingerprint=MODEL["fingerprint"])
    assert index.corpus == "a corpus"
    assert [hit.id for hit in index.search(fan(60)[0], 2, filter="kind = 'text'")] == ["r1", "r3"]


def test_bad_builds_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table", fan(30))
    index = str(tmp_path / "index")
    with pytest.raises(ValueError, match="no rows of kind text"):
        build_index(table, index, kind="text")
    with pytest.raises(ValueError, match=r"filter_columns: colour .* it has id, kind, embedding, number"):
        build_index(table, index, filter_columns=["colour"])
    with pytest.raises(ValueError, match="IVF_SQ, IVF_PQ, IVF_HNSW_SQ"):
        build_index(table, index, index_type="HNSW", exact_below=1)
    with pytest.raises(ValueError, match="holds no embeddings table"):
        build_index(str(tmp_path / "nowhere"), index)
    TableWriter(str(tmp_path / "begun"), MODEL, "")
    with pytest.raises(ValueError, match="not complete"):
        build_index(str(tmp_path / "begun"), index)
    with pytest.raises(ValueError, match="holds no index"):
        open_index(str(tmp_path / "nowhere"))


def test_an_index_of_another_model_is_neither_opened_nor_replaced_unasked(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    build_index(write_table(tmp_path / "table", fan(30)), index)
    other = write_table(tmp_path / "other", fan(20), model=OTHER)
    for refused in (lambda: open_index(index, fingerprint=OTHER["fingerprint"]), lambda: build_index(other, index)):
        with pytest.raises(FingerprintMismatch) as caught:
            refused()
        assert MODEL["fingerprint"] in str(caught.value)
        assert OTHER["fingerprint"] in str(caught.value)
    assert build_index(other, index, replace=True).num_rows == 20
    assert open_index(index, fingerprint=OTHER["fingerprint"]).num_rows == 20


def test_versions_and_tags_stay_as_they_were(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    table = write_table(tmp_path / "table", fan(30))
    first = build_index(table, index)
    pinned, by_number = open_index(index, version=first.tag), open_index(index, version=first.version)
    writer = open_index(index)
    writer.delete([f"r{i}" for i in range(10)])
    assert writer.tag("ten-less") == "ten-less"
    build_index(table, index, tag="again")
    for reader in (pinned, by_number, open_index(index, version=first.tag), open_index(index, version="again")):
        assert [hit.id for hit in reader.search(fan(30)[0], 2)] == ["r0", "r1"]
    assert open_index(index, version="ten-less").search(fan(30)[0], 1)[0].id == "r10"
    with pytest.raises(ValueError, match="nothing"):
        open_index(index, version="nothing")


def test_a_build_that_is_not_done_is_not_the_newest_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, vectors_ND = str(tmp_path / "index"), np.eye(8, dtype=np.float32)
    table = write_table(tmp_path / "table", vectors_ND)
    (tmp_path / "index/_versions").mkdir(parents=True)  # all that is left of a build that has just begun

    def interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(build, "tune", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build_index(table, uri)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        interrupted()
        with pytest.raises(ValueError, match=r"holds an index whose build is not done; run jobs/index\.py again"):
            open_index(uri)
    built = build_index(write_table(tmp_path / "first", vectors_ND[:3]), uri)
    index = open_index(uri)
    interrupted()
    index.refresh()
    assert (index.version, index.num_rows) == (built.version, 3)
    assert open_index(uri).version == built.version
    unfinished = index.dataset.latest_version
    with pytest.raises(ValueError, match=f"holds a version {unfinished} whose build is not done"):
        open_index(uri, version=unfinished)
    with pytest.raises(ValueError, match="is being built anew, or that was interrupted"):
        index.upsert(rows_of(vectors_ND[[0]], [9]))
    with pytest.raises(ValueError, match="is being built anew"):
        index.delete(["r0"])
    assert build_index(table, uri).num_rows == 8
    index.refresh()
    assert index.num_rows == 8
    index.upsert(rows_of(vectors_ND[[0]], [9]))
    assert index.num_rows == 9


@pytest.mark.slow
def test_in_memory_no_less_is_found_and_the_scores_are_the_same(tmp_path: Path) -> None:
    vectors_ND = clustered(4000)
    build_index(write_table(tmp_path / "table", vectors_ND[:3900]), str(tmp_path / "index"), exact_below=1000)
    cold, warm = open_index(str(tmp_path / "index")), open_index(str(tmp_path / "index"))
    warm.warm()
    found = {"cold": 0, "warm": 0}
    for query_D in vectors_ND[3900:]:
        scores = vectors_ND[:3900] @ query_D
        nearest = set(np.argsort(-scores)[:10].tolist())
        for name, index in ("cold", cold), ("warm", warm):
            hits = index.search(query_D, 10)
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            for hit in hits:
                assert hit.score == pytest.approx(scores[hit.columns["number"]], abs=1e-5)
            found[name] += len({hit.columns["number"] for hit in hits} & nearest)
    assert found["warm"] >= found["cold"] >= 960
    # A whole tenth of the rows, spread over all partitions: the index looks further than it otherwise would.
    assert len(warm.search(vectors_ND[0], 390, filter="number % 10 = 0")) == 390


def test_the_lists_of_all_partitions_find_what_comparing_every_row_finds(tmp_path: Path) -> None:
    vectors_ND = clustered(1000)
    dataset = lance.write_dataset(rows_of(vectors_ND, list(range(1000))), str(tmp_path / "rows"))
    centroids_PD = vectors_ND[:: 1000 // 20]
    rows = MemoryIndex.of(dataset, centroids_PD)
    some = dataset.to_table(columns=[], with_row_id=True, filter="number % 3 = 0")["_rowid"].to_numpy()
    missed = 0
    for query_D in clustered(1020)[1000:]:
        for ids in None, some:
            exact = rows.nearest(query_D, 10, None, ids)
            assert rows.nearest(query_D, 10, Effort(20, 5), ids) == exact
            missed += rows.nearest(query_D, 10, Effort(1, 5), ids) != exact
            # Few are asked for and one partition holds fewer: the search goes on to others.
            assert len(rows.nearest(query_D, 300, Effort(1, 1), ids)) == 300
    assert missed  # negative control: one partition is not enough


def test_without_faiss_lance_searches_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND = clustered(1200)
    build_index(write_table(tmp_path / "table", vectors_ND), str(tmp_path / "index"), exact_below=1000)
    with_faiss, without = open_index(str(tmp_path / "index")), open_index(str(tmp_path / "index"))
    with_faiss.warm()
    monkeypatch.setattr(searcher, "has_lists", lambda: False)
    without.warm()
    assert with_faiss.searcher.rows is not None
    assert without.searcher.rows is None
    assert [hit.id for hit in without.search(vectors_ND[7], 5)] == [
        hit.id for hit in with_faiss.search(vectors_ND[7], 5)
    ]


def test_rows_are_read_into_memory_without_a_second_copy_of_the_vectors(tmp_path: Path) -> None:
    vectors_ND = clustered(20_000, dimension=128)
    build_index(write_table(tmp_path / "table", vectors_ND), str(tmp_path / "index"), exact_below=40_000)
    index = open_index(str(tmp_path / "index"))
    tracemalloc.start()
    index.warm()
    taken = tracemalloc.get_traced_memory()[1]  # at most; of numpy's arrays
    tracemalloc.stop()
    assert vectors_ND.nbytes < taken < 1.7 * vectors_ND.nbytes


@pytest.mark.slow
def test_an_index_that_is_too_large_for_memory_is_searched_on_disk(tmp_path: Path) -> None:
    vectors_ND = clustered(3000)
    build_index(write_table(tmp_path / "table", vectors_ND), str(tmp_path / "index"), exact_below=1000)
    index = open_index(str(tmp_path / "index"))
    index.warm(limit=vectors_ND.nbytes - 1)
    assert index.searcher.rows is None
    on_disk = [hit.id for hit in index.search(vectors_ND[7], 5)]
    index.warm(limit=vectors_ND.nbytes)
    assert index.searcher.rows is not None
    assert [hit.id for hit in index.search(vectors_ND[7], 5)] == on_disk


def test_an_index_without_rows_finds_nothing(tmp_path: Path) -> None:
    build_index(write_table(tmp_path / "table", clustered(20)), str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    query_D = clustered(20)[0]
    assert index.delete([hit.id for hit in index.search(query_D, 20)]) == 20
    assert index.search(query_D, 5) == []


@pytest.mark.slow
def test_a_thousand_upserts_are_seen_at_once_and_stay_after_optimizing(tmp_path: Path) -> None:
    vectors_ND = clustered(4000)
    build_index(write_table(tmp_path / "table", vectors_ND[:3000]), str(tmp_path / "index"), exact_below=1000)
    index = open_index(str(tmp_path / "index"))
    partitions = index.settings.partitions
    index.upsert(rows_of(vectors_ND[3000:], list(range(3000, 4000))))
    hits = [index.search(vector, 1)[0] for vector in vectors_ND[3000::4]]
    assert [hit.columns["number"] for hit in hits] == list(range(3000, 4000, 4))
    index.optimize()
    hits = [index.search(vector, 1)[0] for vector in vectors_ND[3000:3100]]
    assert [hit.columns["number"] for hit in hits] == list(range(3000, 3100))
    assert index.settings.recall_at_10 >= 0.98
    assert index.settings.partitions >= partitions > 1


@pytest.mark.slow
def test_an_exact_index_that_has_grown_is_partitioned(tmp_path: Path) -> None:
    vectors_ND = clustered(1200)
    tables = [write_table(tmp_path / name, vectors_ND[:900]) for name in ("planned", "exact")]
    build_index(tables[0], str(tmp_path / "grows"), exact_below=1000)
    build_index(tables[1], str(tmp_path / "stays"), exact_below=1000, index_type="exact")
    grows, stays = (open_index(str(tmp_path / name)) for name in ("grows", "stays"))
    assert (grows.settings.index_type, grows.settings.planned) == ("exact", "IVF_SQ")
    for index in (grows, stays):
        index.optimize()
        assert index.settings.index_type == "exact"  # too few rows
        index.upsert(rows_of(vectors_ND[900:], list(range(900, 1200))))
        index.optimize()
    assert stays.settings.index_type == "exact"
    assert open_index(str(tmp_path / "grows")).settings == grows.settings
    assert grows.settings.index_type == "IVF_SQ"
    assert grows.settings.partitions > 1
    assert grows.settings.recall_at_10 >= 0.98
    assert [grows.search(vectors_ND[i], 1)[0].columns["number"] for i in (3, 1100)] == [3, 1100]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path / "index")
    build_index(write_table(tmp_path / "table", clustered(200)), uri)
    vectors_ND = clustered(300, seed=1)

    def write(worker: int) -> None:
        for first in range(worker * 100, worker * 100 + 100, 20):
            numbers = list(range(1000 + first, 1020 + first))
            open_index(uri).upsert(rows_of(vectors_ND[first : first + 20], numbers))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    index = open_index(uri)
    assert index.num_rows == 500
    assert {index.search(vector, 1)[0].columns["number"] for vector in vectors_ND} == set(range(1000, 1300))


def test_a_build_by_ray_workers_gives_the_same_answers(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # workers have another working directory
    vectors_ND = clustered(3000)
    table = write_table(tmp_path / "table", vectors_ND)
    summary = build_index(table, "index", exact_below=1000, workers=2)
    assert summary.settings.recall_at_10 >= 0.98
    index = open_index("index")
    assert len(index.dataset.get_fragments()) == 2
    # What recall is measured against comes from a task for each fragment.
    queries = Queries(vectors_ND[:20], [(f"r{number}", "image") for number in range(20)])
    for where, left in ((None, slice(0, None)), ("number >= 2000", slice(2000, None))):
        ranked = np.sort(vectors_ND[:20] @ vectors_ND[left].T, axis=1)[:, ::-1]
        tenth = ranked[:, 10 if where is None else 9]  # a query is no neighbour of itself
        np.testing.assert_allclose(exact_thresholds(index.dataset, where, queries, 10), tenth, atol=1e-6)
    assert len(index.dataset.stats.index_stats(VECTORS)["segments"]) == 2  # one for each worker
    for number in range(0, 3000, 150):
        scores = vectors_ND @ vectors_ND[number]
        hits = index.search(vectors_ND[number], 5)
        assert hits[0].columns["number"] == number
        assert hits[4].score == pytest.approx(np.sort(scores)[-5], abs=0.05)
    index.upsert(rows_of(clustered(500, seed=2), list(range(3000, 3500))))
    index.optimize()
    assert index.num_rows == 3500
    assert index.settings.partitions > 1


@pytest.mark.parametrize(
    ("count", "dimension", "expected"),
    [
        (100, 512, (1, 256)),
        (1_000_000, 512, (3906, 256)),  # a million rows, 2 GB
        (10_000_000, 512, (39_062, 53)),  # two million rows, 4 GiB
        (1_000_000_000, 4096, (8192, 32)),
    ],
)
def test_what_centroids_are_learned_from_fits_memory(count: int, dimension: int, expected: tuple[int, int]) -> None:
    partitions, per_centroid = training_sample(count, dimension, 256)
    assert (partitions, per_centroid) == expected
    assert 4 * dimension * partitions * per_centroid <= 4 << 30


def test_an_index_learned_from_a_part_of_its_rows_finds_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three thousand, twelve hundred at a time."""
    monkeypatch.setattr(ivf, "TRAINING_BYTES", 1200 * 4 * 32)
    assert training_sample(3000, 32, ivf.ROWS_IN_MEMORY) == (23, 52)  # fewer than Lance's 256 for each centroid
    vectors_ND = clustered(3000)
    table = write_table(tmp_path / "table", vectors_ND)
    summary = build_index(table, str(tmp_path / "index"), exact_below=1000)
    assert summary.settings.partitions > 1
    assert summary.settings.recall_at_10 >= 0.98


def test_codes_of_few_rows_are_trained_by_one_worker(tmp_path: Path) -> None:
    """Lance refuses to share less than it wants for a code book."""
    vectors_ND = clustered(1500)
    build_index(
        write_table(tmp_path / "table", vectors_ND),
        str(tmp_path / "index"),
        index_type="IVF_PQ",
        exact_below=1000,
        workers=2,
    )
    index = open_index(str(tmp_path / "index"))
    assert len(index.dataset.stats.index_stats(VECTORS)["segments"]) == 1
    assert index.search(vectors_ND[7], 1)[0].columns["number"] == 7


@pytest.mark.slow
def test_an_index_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND = clustered(1500)
    monkeypatch.setattr(build, "NUM_QUERIES", 20)
    with s3_server(tmp_path / "s3") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        table = write_table(f"s3://{BUCKET}/table", vectors_ND[:1400])
        summary = build_index(table, f"s3://{BUCKET}/index", exact_below=1000, filter_columns=["number"], tag="built")
        assert summary.settings.index_type == "IVF_SQ"
        index = open_index(f"s3://{BUCKET}/index")
        index.upsert(rows_of(vectors_ND[1400:], list(range(1400, 1500))))
        assert index.delete(["r7", "r1450"]) == 2
        index.optimize()
        index.tag("changed")
        assert [hit.id for hit in index.search(vectors_ND[1490], 1)] == ["r1490"]
        for version, rows in ("built", 1400), ("changed", 1498):
            pinned = open_index(f"s3://{BUCKET}/index", version=version, fingerprint=MODEL["fingerprint"])
            pinned.warm()
            assert pinned.num_rows == rows
            hits = pinned.search(vectors_ND[7], 5, filter="number < 100")
            scores = vectors_ND[:100] @ vectors_ND[7]
            expected = [int(i) for i in np.argsort(-scores) if version == "built" or i != 7][:5]
            assert [hit.columns["number"] for hit in hits] == expected


def test_the_table_reads_in_order_and_says_which_model(tmp_path: Path) -> None:
    rows = read_embeddings(write_table(tmp_path / "table", fan(12)))
    assert rows["id"].to_pylist() == sorted(f"r{i}" for i in range(12))
    assert b"0123456789abcdef" in rows.schema.metadata[b"vladva"]
