"""Conditions of searches: what is understood, what is refused, and that no condition costs more than its rows."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from vladva.index.filters import MAX_LENGTH, lance_sql, parse_condition
from vladva.index.searcher import Searcher, SearchSettings

COLUMNS = ["id", "number", "Colour", "odd name"]
ROWS = [("a", 1, "red", 1), ("b'c", 2, "Blue", 2), ("%", None, "re_d", 3), ("\\", -4, None, 4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    """The rows, for Lance to evaluate conditions on."""
    table = pa.table(dict(zip(COLUMNS, map(list, zip(*ROWS, strict=True)), strict=True)))
    return lance.write_dataset(table, str(tmp_path_factory.mktemp("rows") / "lance"))


def by_sqlite(condition: str) -> list[str]:
    """The ids for which SQLite says that the condition, as it was written, holds."""
    with sqlite3.connect(":memory:") as database:
        database.execute("PRAGMA case_sensitive_like = ON")  # SQL's LIKE is, SQLite's by itself is not
        database.execute('CREATE TABLE rows (id, number, Colour, "odd name")')
        database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", ROWS)
        return [one for (one,) in database.execute(f"SELECT id FROM rows WHERE ({condition}\n) ORDER BY rowid")]


@pytest.mark.parametrize(
    "condition",
    [
        "number = 1 OR colour = 'Blue'",
        "NOT (number < 0) AND Colour <> 'red'",
        '"odd name" BETWEEN 2 AND 3',
        "`odd name` NOT BETWEEN 2 AND 3 OR number IS NULL",
        "id = 'b''c' OR id = '\\'",
        "id NOT IN ('a', '%') AND number IS NOT NULL",
        "Colour LIKE 're%'",
        "NOT Colour LIKE 're_d' OR number % 2 = 0",
        "number + 1 = 2 -- a comment",
        "number = -4 /* ) */",
        "1 < number",
        "number IN (1, 2, -4) AND (Colour IS NULL OR number * 2 >= 4)",
    ],
)
def test_a_condition_means_what_it_means_in_sql(dataset: lance.LanceDataset, condition: str) -> None:
    found = dataset.to_table(columns=["id"], filter=lance_sql(parse_condition(condition, COLUMNS)))
    assert found["id"].to_pylist() == by_sqlite(condition)
    assert 0 < len(found) < len(ROWS)  # one that holds for all or for none shows nothing


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("regexp_like(id, '(a+)+$')", "the function regexp_like"),
        ("lower(id) = 'a'", "the function lower"),
        ("id = version()", "the function version"),
        ("number IN (SELECT 1)", "IN takes a list"),
        ("EXISTS (SELECT 1)", "EXISTS|Exists|exists"),
        ("CAST(number AS text) = '1'", "the function cast"),
        ("number = 1; number = 2", "one condition"),
        ("number = 1) OR (number = 2", "cannot be parsed"),
        ("number >", "cannot be parsed"),
        ("", "one condition"),
        ("number", None),
        ("1", "a value and not a condition"),
        ("size = 1", "no column 'size'; there are id, number, Colour, odd name"),
        ("number.id = 1", "no column 'number.id'"),
        ("*", "STAR"),
        ("id = ?", "PLACEHOLDER"),
        ("(" * 60 + "number = 1" + ")" * 60, "within one another"),
        ("NOT " * 4000 + "number = 1", "within one another"),
        ("NOT " * 90 + "number = 1", "within one another"),
        ("number = " + "- " * 4000 + "1", "within one another"),
        (f"id = '{'x' * MAX_LENGTH}'", "at most 20,000"),
    ],
)
def test_what_is_not_allowed_is_named(condition: str, reason: str | None) -> None:
    if reason is None:  # a column of truth values is a condition
        assert lance_sql(parse_condition(condition, COLUMNS)) == "`number`"
        return
    with pytest.raises(ValueError, match=reason) as caught:
        parse_condition(condition, COLUMNS)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_long_lists_and_chains_are_fine() -> None:
    parse_condition(" OR ".join(f"number = {i}" for i in range(1000)), COLUMNS)
    parse_condition(f"number IN ({', '.join(map(str, range(3000)))})", COLUMNS)


def test_a_filter_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(50_000, 4)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), 4)
    ids = [f"r{i}" for i in range(len(vectors_ND))]
    rows = pa.table({"id": ids, "kind": ["image"] * len(ids), "embedding": embedding})
    searcher = Searcher(lance.write_dataset(rows, str(tmp_path / "rows")), SearchSettings())
    searcher.warm()
    with pytest.raises(TimeoutError, match="filter takes too long"):
        searcher.search(vectors_ND[0], 3, "id LIKE '%9'", timeout_s=0.0)
    began = time.monotonic()
    hits = searcher.search(vectors_ND[0], 3, "id LIKE '%9'", timeout_s=60)
    assert time.monotonic() - began < 60
    assert all(hit.id.endswith("9") for hit in hits)
    assert len(searcher.search(vectors_ND[0], 3, timeout_s=0.0)) == 3  # nothing to evaluate


def test_old_settings_are_read() -> None:
    """An index of version 0.1 says `effort`, whatever that is for its type."""

    class Old:
        def __init__(self, kept: str) -> None:
            self.schema = pa.schema([], {b"vladva.search": kept.encode()})

    for index_type, expected in ("IVF_SQ", (10, 0)), ("IVF_PQ", (10, 0)), ("IVF_HNSW_SQ", (3, 10)):
        kept = (
            f'{{"index_type": "{index_type}", "planned": "{index_type}", "partitions": 9, "nprobes": 4, "effort": 10}}'
        )
        settings = SearchSettings.of(Old(kept))  # type: ignore[arg-type]
        assert (settings.refine_factor, settings.ef) == expected
        assert (settings.partitions, settings.nprobes) == (9, 4)
        again = SearchSettings.of(Old('{"index_type": "IVF_SQ", "refine_factor": 7}'))  # type: ignore[arg-type]
        assert again.refine_factor == 7
