"""Parquet columns -> rows of plain values, whatever way Arrow stores texts and lists of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain_rows(table: pa.Table, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows with text as bytes: of text that is no UTF-8, one bad cell would make the others unreadable."""
    columns = {name: _as_bytes(table[name]).to_pylist() for name in table.column_names}
    return ({name: column[number] for name, column in columns.items()} for number in range(num_rows))


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if is_text_type(kind):
        return column.cast(pa.large_binary())
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(kind) for test in is_list) and is_text_type(kind.value_type):
        chunks = [_list_as_bytes(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks, pa.large_list(pa.large_binary()))
    return column


def _list_as_bytes(lists: pa.Array) -> pa.Array:
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.large_list(lists.type.value_type))
    if pa.types.is_dictionary(lists.type.value_type):
        lists = lists.cast(pa.large_list(lists.type.value_type.value_type))
    return lists.cast(pa.large_list(pa.large_binary()))
