"""Tables and indexes as the first version wrote them are read, searched and gone on with.

`support/stored/first_version.tar.gz` was written by commit ca691fe (November 2026, before the rooms): 48 images and 16
texts of 8 numbers, and `repeat`, which has the content of image3; a complete table, the same one interrupted before it
was completed, an exact index of its images and one with partitions.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.index.exact_store import ExactStore
from vladva.core.errors import FingerprintMismatch
from vladva.core.hashing import digest
from vladva.embed.table import embedding_matrix, open_table, read_embeddings, read_rows
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.index.vector_index import open_index

STORED = Path(__file__).parents[1] / "support/stored/first_version.tar.gz"
FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def unit_vectors(count: int, seed: int) -> np.ndarray:
    vectors_ND = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def expected() -> dict[tuple[str, str], np.ndarray]:
    """(id, kind) -> embedding, as the stored files were made."""
    images, texts = unit_vectors(48, 0), unit_vectors(16, 1)
    found = {(f"image{i}", "image"): images[i] for i in range(48)} | {(f"text{i}", "text"): texts[i] for i in range(16)}
    return found | {("repeat", "image"): images[3]}


def contents(rows: pa.Table) -> dict[tuple[str, str], np.ndarray]:
    keys = zip(rows["id"].to_pylist(), rows["kind"].to_pylist(), strict=True)
    return dict(zip(keys, embedding_matrix(rows), strict=True))


def assert_same(found: dict[tuple[str, str], np.ndarray], wanted: dict[tuple[str, str], np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for key, embedding in wanted.items():
        np.testing.assert_array_equal(found[key], embedding, err_msg=str(key))


def test_a_table_is_read_and_indexed(stored: Path) -> None:
    manifest = open_table(str(stored / "table"))
    assert (manifest.fingerprint, manifest.dimension, manifest.num_rows) == (FINGERPRINT, 8, 65)
    assert_same(contents(read_embeddings(str(stored / "table"))), expected())
    [bad] = read_rows(str(stored / "table/_quarantine.parquet")).to_pylist()
    assert bad == {"id": "bad", "kind": "text", "content": None, "reason": "the text is empty"}
    assert build_index(str(stored / "table"), str(stored / "new"), kind="all").num_rows == 65


@pytest.mark.parametrize("name", ["table", "interrupted"])
def test_a_table_is_gone_on_with(stored: Path, name: str) -> None:
    manifest = open_table(str(stored / "table"))
    with pytest.raises(FingerprintMismatch):
        TableWriter(str(stored / name), manifest.model | {"fingerprint": "another"}, "/corpus")
    writer = TableWriter(str(stored / name), manifest.model, "/corpus")
    row = {"id": ["new"], "kind": ["text"], "content": pa.array([digest("text", "new")], pa.binary(16)), "number": [7]}
    write_part(str(stored / name), pa.table(row), unit_vectors(1, 2), manifest.model)
    writer.commit()
    wanted = expected() | {("new", "text"): unit_vectors(1, 2)[0]}
    if name == "interrupted":
        del wanted["repeat", "image"]  # repeats are found again by the run that goes on: here there is none
    assert_same(contents(read_embeddings(str(stored / name))), wanted)


@pytest.mark.parametrize("name", ["exact", "ivf"])
def test_an_index_is_searched_and_changed(stored: Path, name: str) -> None:
    index = open_index(str(stored / name), version="v4" if name == "exact" else "v6", fingerprint=FINGERPRINT)
    assert (index.num_rows, index.dimension, index.corpus) == (49, 8, "/corpus")
    assert index.settings.index_type == ("exact" if name == "exact" else "IVF_SQ")
    assert index.settings.refine_factor == (0 if name == "exact" else 3)  # what the first version called effort
    table = read_embeddings(str(stored / "table"))
    images = ExactStore(table.filter(pa.compute.equal(table["kind"], "image")), FINGERPRINT)
    for query_D in unit_vectors(10, 3):
        for where in (None, "number < 20"):
            found, wanted = index.search(query_D, 10, where), images.search(query_D, 10, where)
            np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-5)
            assert {hit.id for hit in found} - {"image3", "repeat"} == {hit.id for hit in wanted} - {"image3", "repeat"}
    index.upsert(table.filter(pa.compute.equal(table["kind"], "text")))
    assert index.num_rows == 65
    assert index.delete(["image0"]) == 1
    index.optimize()
    assert index.search(unit_vectors(16, 1)[4], 1)[0].id == "text4"
