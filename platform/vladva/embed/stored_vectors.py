"""Stored vectors: embeddings as columns of a table, in float32, float16 or int8, and back.

    float32   4 bytes a number, as the model gives them
    float16   2 bytes; a number is off by at most 2^-11 of itself
    int8      1 byte, and a scale of 4 bytes a row (column `embedding_scale`), the row's largest number / 127: a
              number is off by at most half the scale

N rows, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pyarrow as pa

StoredAs = Literal["float32", "float16", "int8"]
SCALE = "embedding_scale"  # column of the scales of int8


def check_stored_as(stored_as: str) -> StoredAs:
    """The name of a type that embeddings are stored in. Raises ValueError for another."""
    for known in get_args(StoredAs):
        if stored_as == known:
            return known
    raise ValueError(f"stored_as is {stored_as!r}; use one of {', '.join(get_args(StoredAs))}")


def to_columns(embeddings_ND: np.ndarray, stored_as: StoredAs) -> dict[str, pa.Array]:
    """Column name -> values, in the order in which they stand in a table."""
    embeddings_ND = np.ascontiguousarray(embeddings_ND, np.float32)
    width = embeddings_ND.shape[1]
    if stored_as != "int8":
        return {"embedding": _rows_of(embeddings_ND.astype(stored_as, copy=False), width)}
    scale_N = np.abs(embeddings_ND).max(axis=1, initial=0) / np.float32(127)
    rounded_ND = np.rint(embeddings_ND / np.where(scale_N > 0, scale_N, 1)[:, None])
    data = pa.py_buffer(np.ascontiguousarray(rounded_ND, np.int8).tobytes())
    # Bytes, for Parquet has no integers of one byte.
    embedding = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(embeddings_ND), [None, data])
    return {"embedding": embedding, SCALE: pa.array(scale_N, pa.float32())}


def as_float32(rows: pa.Table) -> pa.Table:
    """The rows with `embedding` in float32, whatever it is stored in; those without the column as they are."""
    if "embedding" not in rows.column_names:
        return rows
    place = rows.schema.get_field_index("embedding")
    kind = rows.schema.field("embedding").type
    if kind == float32_type(kind):
        return rows
    embedding = rows["embedding"].combine_chunks()
    if pa.types.is_fixed_size_binary(kind):
        data = b"".join(embedding.to_pylist())
        values_ND = np.frombuffer(data, np.int8).reshape(len(rows), kind.byte_width).astype(np.float32)
        values_ND *= rows[SCALE].to_numpy()[:, None]
        rows = rows.drop_columns([SCALE])
    else:
        values = embedding.flatten().to_numpy(zero_copy_only=False)
        values_ND = values.reshape(len(rows), kind.list_size).astype(np.float32)
    return rows.set_column(place, "embedding", _rows_of(values_ND, values_ND.shape[1]))


def float32_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column of embeddings as it is read, given the one that it is stored in."""
    return pa.list_(pa.float32(), kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.list_size)


def _rows_of(values_ND: np.ndarray, width: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_ND.ravel()), width)
