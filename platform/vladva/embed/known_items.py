"""Known items: which (id, kind) and which contents have an embedding, divided among actors by their hash.

Digests are 16 random bytes, so their first two say evenly to which of P partitions one belongs. Tasks read the keys of
what is in a table and deal them to the partitions; an actor for each partition answers for it. No process holds all
keys, and none of the driver's memory grows with them.

N items, P partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa

from vladva.core.ray_tasks import collect, scatter, submit
from vladva.embed.table import keys_of, read_each
from vladva.embed.table_parts import FileGroup

ITEMS_PER_PARTITION = 500_000
MAX_PARTITIONS = 256
RECENT = 1 << 16  # claims that a partition holds in a dictionary, before they join its ordered arrays

Known = tuple[np.ndarray, np.ndarray]  # ordered digests of (id, kind), and of contents


def partitions_for(items: int | None) -> int:
    """Partitions for so many items (None: nobody knows)."""
    return max(1, min(MAX_PARTITIONS, -(-(items or ITEMS_PER_PARTITION) // ITEMS_PER_PARTITION)))


def as_digests(values: Sequence[bytes]) -> np.ndarray:
    """Digests as an array that can be ordered and searched. (Numpy leaves out zeros at their end, on both sides.)"""
    return np.array(values, "S16")


def partition_of(digests_N: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each digest, int [N]."""
    first_two = np.frombuffer(digests_N.astype("S16").tobytes(), ">u2")[::8].astype(np.int64)
    return first_two * partitions >> 16


def contains(ordered: np.ndarray, digests: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Which of the digests are in an ordered array of digests, bool [N]."""
    wanted = np.asarray(digests, "S16")
    places = np.searchsorted(ordered, wanted)
    found = np.zeros(len(wanted), bool)
    inside = places < len(ordered)
    found[inside] = ordered[places[inside]] == wanted[inside]
    return found


# --- what a table has already ----------------------------------------------------------------------------------------


def known_in_all(tables: Sequence[Sequence[FileGroup]], partitions: int) -> list[Any]:
    """For each partition a reference to what every one of the tables, given as groups of files, has: Known."""
    per_table = []
    for groups in tables:
        dealt = [scatter(_known_in, partitions, group.listing, group.number, partitions) for group in groups]
        per_table.append([submit(_merged, *(of_group[p] for of_group in dealt)) for p in range(partitions)])
    if len(per_table) == 1:
        return per_table[0]
    return [submit(_in_all, *(of_table[p] for of_table in per_table)) for p in range(partitions)]


def _known_in(listing: list[list[str]], number: int, partitions: int) -> list[Known]:
    """What a group of files has, for each partition."""
    keys, contents = [np.zeros(0, "S16")], [np.zeros(0, "S16")]
    for rows in read_each(listing[number], ["id", "kind", "content"]):
        keys.append(as_digests(keys_of(rows)))
        contents.append(as_digests(rows["content"].to_pylist()))
    return list(zip(deal(np.concatenate(keys), partitions), deal(np.concatenate(contents), partitions), strict=True))


def deal(digests_N: np.ndarray, partitions: int) -> list[np.ndarray]:
    """The digests of each partition."""
    partition_N = partition_of(digests_N, partitions)
    return [digests_N[partition_N == partition] for partition in range(partitions)]


def _merged(*known: Known) -> Known:
    keys, contents = ([np.zeros(0, "S16"), *(one[side] for one in known)] for side in (0, 1))
    return np.unique(np.concatenate(keys)), np.unique(np.concatenate(contents))


def _in_all(*known: Known) -> Known:
    keys, contents = zip(*known, strict=True)
    return reduce(np.intersect1d, keys), reduce(np.intersect1d, contents)


# --- while a table is made -------------------------------------------------------------------------------------------


class Partition:
    """Actor: what is known of the digests of one partition, and which item embeds a content for all that have the same.

    One that had to be started again asks for what the table had, and has forgotten which item embeds what; then some
    contents are embedded twice, and the table is the same.
    """

    def __init__(self) -> None:
        self.known: Known | None = None
        self.recent: dict[bytes, bytes] = {}
        self.contents, self.owners = np.zeros(0, "S16"), np.zeros(0, "S16")  # ordered by content

    def has(self, keys: np.ndarray, known: Sequence[Any]) -> np.ndarray:
        """Which of the (id, kind) have an embedding, bool [N]. `known`: the reference to what the table had."""
        return contains(self._known(known)[0], keys)

    def claim(self, contents: np.ndarray, keys: np.ndarray, known: Sequence[Any]) -> np.ndarray:
        """Which items are the first with their content, which has no embedding yet, bool [N].

        An item is known by the key of its (id, kind). Asking again is harmless.
        """
        first_N = ~contains(self._known(known)[1], contents)
        places_N = np.searchsorted(self.contents, contents)
        for i in np.flatnonzero(first_N):
            content, key, place = contents[i], keys[i], places_N[i]
            if place < len(self.contents) and self.contents[place] == content:
                first_N[i] = self.owners[place] == key
            else:
                first_N[i] = self.recent.setdefault(content, key) == key
        if len(self.recent) > max(RECENT, len(self.contents) // 4):
            self._order()
        return first_N

    def _known(self, known: Sequence[Any]) -> Known:
        if self.known is None:
            (self.known,) = collect(known)
        return self.known

    def _order(self) -> None:
        """Move recent claims into the ordered arrays: 32 bytes each, where a dictionary takes some 200."""
        contents = np.concatenate([self.contents, as_digests(list(self.recent))])
        owners = np.concatenate([self.owners, as_digests(list(self.recent.values()))])
        order = np.argsort(contents, kind="stable")
        self.contents, self.owners = contents[order], owners[order]
        self.recent = {}


@dataclass(frozen=True)
class KnownItems:
    """What tasks ask: the actors, and for each of them the reference to what the table had."""

    actors: tuple[Any, ...]
    known: tuple[Any, ...]

    @classmethod
    def start(cls, known: Sequence[Any]) -> KnownItems:
        """With an actor for each partition; `known` is what `known_in_all` gives. Needs a Ray cluster."""
        import ray

        # They wait, mostly, and need no CPU of their own.
        options: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(**options)(Partition)
        return cls(tuple(actor.remote() for _ in known), tuple(known))

    def stop(self) -> None:
        """End the actors."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def are_done(self, items: pa.Table) -> np.ndarray:
        """Which of the items, by (id, kind), have an embedding, bool [N]."""
        return self._ask("has", as_digests(keys_of(items)))

    def claim(self, contents: Sequence[bytes], items: pa.Table) -> np.ndarray:
        """Which of the items are to be embedded, as the first with their content, bool [N]."""
        return self._ask("claim", as_digests(contents), as_digests(keys_of(items)))

    def _ask(self, method: str, digests_N: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """The answers of the actors to which the digests belong, put together."""
        import ray

        answers_N = np.zeros(len(digests_N), bool)
        partition_N = partition_of(digests_N, len(self.actors))
        asked = []
        for partition, (actor, known) in enumerate(zip(self.actors, self.known, strict=True)):
            chosen = np.flatnonzero(partition_N == partition)
            if len(chosen):
                arguments = [array[chosen] for array in (digests_N, *others)]
                # In a list, so that the reference comes as it is: what it stands for is fetched once.
                asked.append((chosen, getattr(actor, method).remote(*arguments, [known])))
        for (chosen, _), answer in zip(asked, ray.get([reference for _, reference in asked]), strict=True):
            answers_N[chosen] = answer
        return answers_N
