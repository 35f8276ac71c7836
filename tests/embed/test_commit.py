"""Tables by tasks over partitions of the keys, against a dictionary that does the same at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vladva.core.hashing import digest
from vladva.embed import commit, known_items, table_parts
from vladva.embed.known_items import as_digests, contains, known_in_all, partition_of, partitions_for
from vladva.embed.table import embedding_matrix, keys_of, read_embeddings
from vladva.embed.table_parts import write_part, write_rejected_items, write_repeats
from vladva.embed.table_writer import TableWriter

MODEL = {"fingerprint": "0123456789abcdef", "dimension": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many groups, files and partitions of a few rows."""
    monkeypatch.setattr(table_parts, "GROUP_BYTES", 4000)
    monkeypatch.setattr(commit, "FILE_BYTES", 100)
    monkeypatch.setattr(known_items, "ITEMS_PER_PARTITION", 7)


def items(ids: list[str], contents: list[str]) -> pa.Table:
    digests = [digest(content) for content in contents]
    return pa.table({"id": ids, "kind": ["text"] * len(ids), "content": pa.array(digests, pa.binary(16))})


def value_of(content: str) -> float:
    return float(int(content[1:]) + 1)


def vectors(contents: list[str]) -> np.ndarray:
    return np.array([value_of(content) for content in contents], np.float32)[:, None] * np.ones(4, np.float32)


class Twin:
    """What a table should hold: the first embedding of each id, and those of others with the same content."""

    def __init__(self) -> None:
        self.rows: dict[str, float] = {}
        self.contents: set[str] = set()

    def commit(
        self, parts: list[tuple[list[str], list[str]]], repeats: list[tuple[str, str]], bad: dict[str, str]
    ) -> dict[str, str]:
        """Returns id -> reason of what is rejected."""
        for ids, contents in parts:
            for one, content in zip(ids, contents, strict=True):
                self.rows.setdefault(one, value_of(content))
                self.contents.add(content)
        rejected = {one: f"reason of {content}" for one, content in bad.items()}
        for one, content in repeats:
            if one in self.rows:
                continue
            if content in self.contents:
                self.rows[one] = value_of(content)
            else:
                rejected[one] = f"reason of {content}" if content in bad.values() else commit.LOST_TWIN
        return rejected


@pytest.mark.parametrize("seed", range(6))
def test_tables_are_those_of_the_twin(tmp_path: Path, small: None, seed: int) -> None:
    random, uri, twin = np.random.default_rng(seed), str(tmp_path / "table"), Twin()
    content_of = {f"i{i}": f"c{random.integers(40)}" for i in range(200)}
    for _ in range(3):  # a table that grows
        table = TableWriter(uri, MODEL, "")
        ids = [f"i{i}" for i in random.integers(0, 200, 60)]
        parts = []
        for first in range(0, 40, 8):
            some = list(dict.fromkeys(ids[first : first + 8]))
            parts.append((some, [content_of[one] for one in some]))
        parts.append(parts[0])  # a batch that was run again
        done = {content_of[one] for some, _ in parts for one in some} | twin.contents
        repeats = [(one, content_of[one]) for one in dict.fromkeys(ids[40:55])]
        bad = {one: content_of[one] for one in ids[55:] if content_of[one] not in done and one not in twin.rows}
        repeats = [(one, content) for one, content in repeats if one not in bad]
        for some, contents in parts:
            write_part(uri, items(some, contents), vectors(contents), MODEL)
        for first in range(0, len(repeats), 4):
            some, contents = (list(of) for of in zip(*repeats[first : first + 4], strict=True))
            write_repeats(uri, items(some, contents))
        for one, content in bad.items():
            write_rejected_items(
                uri, [{"id": one, "kind": "text", "content": digest(content), "reason": f"reason of {content}"}]
            )
        committed = table.commit()
        rejected = twin.commit(parts, repeats, bad)
        rows = read_embeddings(uri)
        found = dict(zip(rows["id"].to_pylist(), embedding_matrix(rows)[:, 0].tolist(), strict=True))
        assert len(rows) == len(found) == table.manifest.num_rows
        assert found == twin.rows
        noted = pq.read_table(tmp_path / "table/_quarantine.parquet").to_pylist()
        assert {row["id"]: row["reason"] for row in noted} == rejected
        assert committed.num_rejected == len(rejected)
    assert len(table.manifest.files) > 5
    assert not list((tmp_path / "table").rglob("_parts/*/*.parquet"))


def test_what_is_known_is_dealt_to_partitions(tmp_path: Path, small: None) -> None:
    uris = [str(tmp_path / name) for name in ("one", "other")]
    names = [f"i{i}" for i in range(60)]
    tables = []
    for uri, some in zip(uris, (names[:40], names[20:]), strict=True):
        tables.append(TableWriter(uri, MODEL, ""))
        for first in range(0, len(some), 10):
            ids = some[first : first + 10]
            write_part(uri, items(ids, [f"c{one[1:]}" for one in ids]), vectors([f"c{one[1:]}" for one in ids]), MODEL)
    partitions = partitions_for(60)
    assert partitions == 9
    known = known_in_all([table.groups() for table in tables], partitions)
    keys = as_digests(keys_of(items(names, ["c0"] * 60)))
    contents = as_digests([digest(f"c{i}") for i in range(60)])
    for side, digests in enumerate((keys, contents)):
        of = partition_of(digests, partitions)
        assert len(set(of.tolist())) > 3
        found = [bool(contains(known[p][side], digests[i : i + 1])[0]) for i, p in enumerate(of)]
        assert found == [20 <= i < 40 for i in range(60)]  # what both tables have
        away = [bool(contains(known[(p + 1) % partitions][side], digests[i : i + 1])[0]) for i, p in enumerate(of)]
        assert not any(away)  # and no partition has what is another's


def test_partitions_are_even_and_bounded() -> None:
    digests = as_digests([digest(str(i)) for i in range(20_000)])
    counts = np.bincount(partition_of(digests, 8), minlength=8)
    assert counts.min() > 2200
    assert counts.max() < 2800
    assert [partitions_for(n) for n in (None, 0, 1, 500_000, 500_001, 10**9)] == [1, 1, 1, 1, 2, 256]
