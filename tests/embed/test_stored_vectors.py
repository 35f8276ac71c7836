"""Embeddings stored in fewer bytes: within the bounds that arithmetic gives, and float32 for whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vladva.core.hashing import digest
from vladva.embed.stored_vectors import StoredAs, as_float32, check_stored_as, to_columns
from vladva.embed.table import embedding_matrix, open_table, read_embeddings, read_rows, sample_rows, stream_rows
from vladva.embed.table_parts import write_part, write_repeats
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.index.vector_index import open_index

MODEL = {"fingerprint": "0123456789abcdef", "dimension": 16}


def vectors(count: int = 40) -> np.ndarray:
    rows_ND = np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def bound(rows_ND: np.ndarray, stored_as: StoredAs) -> np.ndarray:
    """How far a number may be off."""
    if stored_as == "float32":
        return np.zeros_like(rows_ND)
    if stored_as == "float16":
        return np.abs(rows_ND) * 2.0**-11 + 2.0**-25
    return np.abs(rows_ND).max(axis=1, keepdims=True) / 127 / 2 * np.ones_like(rows_ND) + 1e-7


@pytest.mark.parametrize("stored_as", ["float32", "float16", "int8"])
def test_a_number_is_off_by_no_more_than_arithmetic_says(stored_as: StoredAs) -> None:
    rows_ND = np.concatenate([vectors(), np.zeros((1, 16), np.float32)])
    table = pa.table({"id": [str(i) for i in range(41)], **to_columns(rows_ND, stored_as)})
    found = embedding_matrix(as_float32(table))
    assert (np.abs(found - rows_ND) <= bound(rows_ND, stored_as)).all()
    if stored_as != "float32":  # the bound is no wider than it must be
        assert (np.abs(found - rows_ND) > bound(rows_ND, stored_as) / 4).any()


@pytest.mark.parametrize("stored_as", ["float32", "float16", "int8"])
def test_a_table_is_float32_for_whoever_reads_it(tmp_path: Path, stored_as: StoredAs) -> None:
    uri, rows_ND = str(tmp_path / "table"), vectors()
    ids = [f"i{number:02}" for number in range(40)]
    items = pa.table(
        {"id": ids, "kind": ["image"] * 40, "content": pa.array([digest(name) for name in ids], pa.binary(16))}
    )
    table = TableWriter(uri, MODEL, "", stored_as)
    write_part(uri, items.slice(0, 25), rows_ND[:25], MODEL, table.target.stored_as)
    write_part(uri, items.slice(25), rows_ND[25:], MODEL, table.target.stored_as)
    write_repeats(uri, items.slice(30, 1).set_column(0, "id", pa.array(["again"])))
    table.commit()
    assert open_table(uri).stored_as == stored_as
    found = read_embeddings(uri)
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert "embedding_scale" not in found.column_names
    assert found["id"].to_pylist() == ["again", *ids]
    matrix = embedding_matrix(found)
    assert (np.abs(matrix[1:] - rows_ND) <= bound(rows_ND, stored_as)).all()
    np.testing.assert_array_equal(matrix[0], matrix[31])
    assert embedding_matrix(sample_rows(uri, 10, seed=0)).dtype == np.float32
    streamed = stream_rows(uri, "image").read_all()
    assert streamed.schema.names == ["id", "kind", "embedding"]
    assert sorted(embedding_matrix(streamed).tolist()) == sorted(matrix.tolist())

    assert build_index(uri, str(tmp_path / "index")).num_rows == 41
    hits = open_index(str(tmp_path / "index")).search(rows_ND[3], 5)
    best = np.argsort(-(matrix @ rows_ND[3]))[:5]
    assert [hit.id for hit in hits] == [found["id"][int(row)].as_py() for row in best]

    for other in {"float32", "float16", "int8"} - {stored_as}:
        with pytest.raises(ValueError, match=f"is stored as {stored_as}: leave it out"):
            TableWriter(uri, MODEL, "", other)
    assert TableWriter(uri, MODEL, "").target.stored_as == stored_as


def test_the_file_takes_a_quarter(tmp_path: Path) -> None:
    rows_ND = np.random.default_rng(0).standard_normal((2000, 256)).astype(np.float32)
    ids = [str(number) for number in range(2000)]
    items = pa.table({"id": ids, "kind": ["text"] * 2000, "content": pa.array([digest(i) for i in ids], pa.binary(16))})
    sizes = {}
    for stored_as in ("float32", "float16", "int8"):
        uri = tmp_path / stored_as
        write_part(str(uri), items, rows_ND, MODEL, check_stored_as(stored_as))
        [file] = uri.rglob("*.parquet")
        sizes[stored_as] = file.stat().st_size
        assert len(read_rows(str(file))) == 2000
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.35 * sizes["float32"]
    with pytest.raises(ValueError, match="stored_as is 'int4'; use one of float32, float16, int8"):
        check_stored_as("int4")
