"""Staging: the entries of a source put together into samples, on this machine's disk, then cut into shard tasks.

Rows of one image are joined into one sample, second images of one id are refused, captions of another table are
looked up. A source may have them in any order and in any number, so this is done in an SQLite file and not in memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from vladva.data.source import Entry, LeftOut, Rejected
from vladva.prepare.join import Join
from vladva.prepare.shard_tasks import TaskSample

TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE samples (number INTEGER PRIMARY KEY, id TEXT UNIQUE, key TEXT, file TEXT, offset INTEGER, entry TEXT);
CREATE TABLE captions (seq INTEGER PRIMARY KEY, sample INTEGER, text TEXT);
CREATE TABLE joined (seq INTEGER PRIMARY KEY, key TEXT, location TEXT, texts TEXT);
"""
INDEXES = """
CREATE INDEX captions_of ON captions (sample);
CREATE INDEX joined_by ON joined (key);
CREATE INDEX samples_by ON samples (key);
"""
OF_ITSELF = "SELECT sample, text FROM captions WHERE sample BETWEEN ? AND ? ORDER BY seq"
JOINED = (
    "SELECT number, texts FROM samples JOIN joined ON joined.key = samples.key "
    "WHERE number BETWEEN ? AND ? ORDER BY joined.seq"
)


class Unmatched(NamedTuple):
    """What a join found no partner for: a "sample" of the source or a row of the "table"."""

    side: str
    id: str
    source_location: str


class Staging:
    """Samples have numbers 0 .. N-1, in the order in which the source first names them.

    counts: `found` is what the source named: `samples`, `merged` (more captions of a sample), `left_out` and
    `rejected` make it up. Of the `rows` of the captions' table `joined_rows` found a sample, and `joined_samples` found
    one of them.
    """

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path)
        self.database.executescript(TABLES)
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def add(self, found: Entry | Rejected | LeftOut, join: Join | None) -> None:
        """Take what the source named next."""
        self.counts["found"] += 1
        if isinstance(found, LeftOut):
            self.left_out[found.reason] += 1
        elif isinstance(found, Rejected):
            self.rejected.append(found)
        elif not _is_utf8(found.id) or not _is_utf8(found.file):
            self.rejected.append(Rejected(readable(found.id), readable(found.source_location), "name is not UTF-8"))
        else:
            self._add_entry(found, join)

    def _add_entry(self, entry: Entry, join: Join | None) -> None:
        number = self.counts["samples"]
        key = join.key_of(entry) if join else ""
        content = json.dumps(
            [entry.source_location, entry.length, entry.column, list(entry.caption_files), list(entry.hard_negatives)]
        )
        row = (number, entry.id, key, entry.file, entry.offset, content)
        added = self.database.execute("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?)", row)
        if added.rowcount:
            self.counts["samples"] += 1
        else:
            query = "SELECT number, file, offset, entry FROM samples WHERE id = ?"
            number, file, offset, first = self.database.execute(query, (entry.id,)).fetchone()
            if (file, offset) != (entry.file, entry.offset):
                detail = f"the first one, at {json.loads(first)[0]}, is kept"
                self.rejected.append(Rejected(entry.id, entry.source_location, "duplicate key", detail))
                return
            self.counts["merged"] += 1
        rows = [(number, text) for text in entry.captions]
        self.database.executemany("INSERT INTO captions (sample, text) VALUES (?, ?)", rows)

    def add_captions(self, join: Join) -> list[Rejected]:
        """Take the rows of another table; gives those that cannot be read."""
        rejected = []
        for row in join.rows():
            self.counts["rows"] += 1
            if isinstance(row, Rejected):
                rejected.append(row)
            else:
                key, location, texts = row
                insert = "INSERT INTO joined (key, location, texts) VALUES (?, ?, ?)"
                self.database.execute(insert, (key, location, json.dumps(texts)))
        return rejected

    def finish(self) -> None:
        """To be called between the last `add` and what follows."""
        self.database.executescript(INDEXES)
        for name, table, other in (("joined_samples", "samples", "joined"), ("joined_rows", "joined", "samples")):
            count = f"SELECT COUNT(*) FROM {table} WHERE key IN (SELECT key FROM {other})"
            self.counts[name] = self.database.execute(count).fetchone()[0]

    def unmatched(self) -> Iterator[Unmatched]:
        """Samples without a row in the other table, then its rows without a sample."""
        samples = "SELECT id, entry FROM samples WHERE key NOT IN (SELECT key FROM joined) ORDER BY number"
        for name, entry in self.database.execute(samples):
            yield Unmatched("sample", name, json.loads(entry)[0])
        rows = "SELECT key, location FROM joined WHERE key NOT IN (SELECT key FROM samples) ORDER BY seq"
        for key, location in self.database.execute(rows):
            yield Unmatched("table", key, location)

    def tasks(self, size: int) -> Iterator[list[TaskSample]]:
        """The samples in order, `size` at a time, with all of their captions."""
        query = "SELECT number, id, file, offset, entry FROM samples WHERE number BETWEEN ? AND ? ORDER BY number"
        for first in range(0, self.counts["samples"], size):
            span = (first, first + size - 1)
            captions: dict[int, list[str]] = {number: [] for number in range(first, first + size)}
            for number, text in self.database.execute(OF_ITSELF, span):
                captions[number].append(text)
            for number, texts in self.database.execute(JOINED, span):
                captions[number] += json.loads(texts)
            samples = []
            for number, name, file, offset, content in self.database.execute(query, span):
                location, length, column, files, negatives = json.loads(content)
                entry = Entry(name, location, file, captions[number], offset, length, column, files, negatives)
                samples.append(TaskSample(number, entry))
            yield samples


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeError:
        return False
    return True


def readable(name: str) -> str:
    """What of a name is not UTF-8, as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
