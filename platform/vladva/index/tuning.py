"""Tuning: how much of the exact answer an index finds, and the cheapest settings that find enough of it.

A hit counts when it is at least as near as the exact k-th neighbour: rows that are equal may replace each other.

N rows, Q queries, D width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vladva.core.ray_tasks import collect, submit
from vladva.embed.table import embedding_matrix
from vladva.index.searcher import RECALL_AT, Searcher, SearchSettings
from vladva.index.store import Hit

if TYPE_CHECKING:
    import lance

ROUNDING = 1e-5  # between two ways to compute a cosine in float32
TARGET_RECALL = 0.98
NUM_QUERIES = 200  # of each kind
# Of which the first that suffices in few partitions is taken: `refine_factor`, or of graphs `ef` (see SearchSettings).
CANDIDATES_GRID = {"IVF_SQ": (3, 10), "IVF_PQ": (10, 30, 100), "IVF_HNSW_SQ": (64, 128, 256, 512)}
WIDER = 4  # times as many partitions may fewer candidates take: beyond that more candidates are cheaper
COMPARED, FLAT = 20, 0.002  # queries, and recall that is no more
STRIDE = 6  # steps of the grid of partitions at once, until there are enough: three times as many


@dataclass(frozen=True)
class Queries:
    """Vectors [Q, D] to try an index with; `keys` are the (id, kind) of each, for it is not a neighbour of itself."""

    vectors_QD: np.ndarray
    keys: list[tuple[str, str]]


@dataclass(frozen=True)
class RecallEstimate:
    """Recall at k with its standard error, and milliseconds per search; `found`: the recall of each query asked."""

    recall: float
    error: float
    p50_ms: float
    p99_ms: float
    found: tuple[float, ...] = ()

    @property
    def lower_bound(self) -> float:
        """What recall exceeds, the sample being one of many: two standard errors less than was measured."""
        return self.recall - 2 * self.error

    def no_better_than(self, other: RecallEstimate) -> bool:
        """Whether it finds no more for the queries that both asked, if these are enough to tell."""
        both = min(len(self.found), len(other.found))
        return both >= COMPARED and sum(self.found[:both]) - sum(other.found[:both]) < FLAT * both


def best_scores(blocks: Iterable[tuple[np.ndarray, list[tuple[str, str]]]], queries: Queries, k: int) -> np.ndarray:
    """Scores [Q, k] of each query's nearest; `blocks` are embeddings [N, D] and the keys of their rows."""
    best_Qk = np.full((len(queries.keys), k), -np.inf, np.float32)
    position = {key: i for i, key in enumerate(queries.keys)}
    for embeddings_ND, keys in blocks:
        scores_QN = queries.vectors_QD @ embeddings_ND.T
        for column, key in enumerate(keys):
            if key in position:
                scores_QN[position[key], column] = -np.inf
        best_Qk = _best(np.concatenate([best_Qk, scores_QN], axis=1), k)
    return best_Qk


def exact_thresholds(dataset: lance.LanceDataset, where: str | None, queries: Queries, k: int) -> np.ndarray:
    """Score [Q] of each query's exact k-th neighbour: every row is compared, a task for each fragment."""
    fragments = range(len(dataset.get_fragments()))
    found = collect([submit(_best_in_fragment, dataset, number, where, queries, k) for number in fragments])
    nothing_Qk = best_scores([], queries, k)
    return _best(np.concatenate([nothing_Qk, *found], axis=1), k).min(axis=1)


def _best(scores_QN: np.ndarray, k: int) -> np.ndarray:
    return -np.partition(-scores_QN, k - 1, axis=1)[:, :k]


def _best_in_fragment(
    dataset: lance.LanceDataset, number: int, where: str | None, queries: Queries, k: int
) -> np.ndarray:
    fragment = dataset.get_fragments()[number]
    batches = fragment.to_batches(columns=["id", "kind", "embedding"], filter=where, batch_size=8192)
    tables = (pa.Table.from_batches([batch]) for batch in batches)
    return best_scores(((embedding_matrix(table), _keys(table)) for table in tables), queries, k)


def measure_recall(
    search: Callable[[np.ndarray, int], list[Hit]],
    queries: Queries,
    thresholds: np.ndarray,
    k: int,
    target: float = 0.0,
) -> RecallEstimate:
    """Recall at k and latency of a search, one query at a time, until it is certain that recall is below `target`."""
    found, times = [], []
    may_miss = (1 - target) * len(queries.keys)
    for vector, key, threshold in zip(queries.vectors_QD, queries.keys, thresholds, strict=True):
        began = time.perf_counter()
        hits = search(vector, k + 1)
        times.append(1e3 * (time.perf_counter() - began))
        others = [hit for hit in hits if (hit.id, hit.columns["kind"]) != key][:k]
        found.append(sum(hit.score >= float(threshold) - ROUNDING for hit in others) / k)
        may_miss -= 1 - found[-1]
        if may_miss < 0:
            break
    error = float(np.std(found)) / math.sqrt(len(found))
    percentiles = float(np.median(times)), float(np.percentile(times, 99))
    return RecallEstimate(float(np.mean(found)), error, *percentiles, tuple(found))


def nprobes_grid(partitions: int) -> list[int]:
    """Numbers of partitions to search, each a fifth more than the one before, up to all of them."""
    steps = [1]
    while steps[-1] < partitions:
        steps.append(min(partitions, max(steps[-1] + 1, steps[-1] * 6 // 5)))
    return steps


def cheapest_settings(
    partitions: int, candidates_grid: Sequence[int], try_out: Callable[[int, int], RecallEstimate], target: float
) -> tuple[int, int, RecallEstimate]:
    """(nprobes, candidates, measured) that find enough: few candidates, and few partitions to find them in.

    Enough is what the lower bound says. Recall grows with both. The fewest partitions that are enough with the most
    candidates are looked for from below, because a search of all partitions of a large index takes seconds; fewer
    candidates are taken where they need no more than WIDER times as many. Where nothing is enough, the fewest
    partitions of which three times as many find no more, or all.
    """
    steps = nprobes_grid(partitions)
    most = candidates_grid[-1]

    def fewest(candidates: int, low: int, high: int, best: RecallEstimate) -> tuple[int, RecallEstimate]:
        """The first of the steps from `low` to `high` that is enough; `best` is what `high` has been found to be."""
        while low < high:
            middle = (low + high) // 2
            tried = try_out(steps[middle], candidates)
            if tried.lower_bound >= target:
                high, best = middle, tried
            else:
                low = middle + 1
        return high, best

    low, high = 0, 0
    best = try_out(steps[high], most)
    while best.lower_bound < target:
        if high == len(steps) - 1:
            return steps[high], most, best
        before, low, high = (high, best), high + 1, min(high + STRIDE, len(steps) - 1)
        best = try_out(steps[high], most)
        if best.lower_bound < target and best.no_better_than(before[1]):
            return steps[before[0]], most, before[1]
    high, best = fewest(most, low, high, best)
    widest = max(i for i, step in enumerate(steps) if step <= WIDER * steps[high])
    for candidates in candidates_grid[:-1]:
        tried = try_out(steps[widest], candidates)
        if tried.lower_bound >= target:
            place, tried = fewest(candidates, high, widest, tried)
            return steps[place], candidates, tried
    return steps[high], most, best


def sample_dataset(dataset: lance.LanceDataset, seed: int = 0) -> list[Queries]:
    """Rows of a data set, to be used as queries."""
    rows = dataset.count_rows()
    chosen = sorted(random.Random(seed).sample(range(rows), min(2 * NUM_QUERIES, rows)))
    return sample_queries(dataset.take(chosen, columns=["id", "kind", "embedding"]))


def sample_queries(rows: pa.Table) -> list[Queries]:
    """Rows of an embeddings table as queries, those of each kind by themselves, at most NUM_QUERIES of each."""
    tables = [rows.filter(pa.compute.equal(rows["kind"], kind)).slice(0, NUM_QUERIES) for kind in ("image", "text")]
    return [Queries(embedding_matrix(table), _keys(table)) for table in tables if len(table)]


def tune(
    dataset: lance.LanceDataset,
    settings: SearchSettings,
    samples: Sequence[Queries],
    wheres: Sequence[str | None],
    target: float,
) -> SearchSettings:
    """The settings with the least work that find enough, for the worst of the samples and of the conditions.

    `settings` say the type of index, and the least number of partitions to look at.
    """
    k = max(1, min(RECALL_AT, min(dataset.count_rows(where) for where in wheres) - 1))
    cases = [(where, queries, exact_thresholds(dataset, where, queries, k)) for where in wheres for queries in samples]

    # By Lance, from disk: in memory as much is found, or more, because nothing is quantised.
    def try_out(nprobes: int, candidates: int, at_least: float = target) -> RecallEstimate:
        tried = replace(settings, nprobes=max(nprobes, settings.nprobes)).with_candidates(candidates)
        searcher = Searcher(dataset, tried)
        measured = []
        for where, queries, thresholds in cases:
            search = partial(searcher.search, where=where)
            measured.append(measure_recall(search, queries, thresholds, k, at_least))
        return min(measured, key=lambda one: one.lower_bound)

    nprobes, candidates = 0, 0
    if settings.index_type == "exact":
        measured = try_out(nprobes, candidates)
    else:
        grid = CANDIDATES_GRID[settings.index_type]
        nprobes, candidates, measured = cheapest_settings(settings.partitions, grid, try_out, target)
        if measured.recall < target:
            measured = try_out(nprobes, candidates, 0.0)
    return replace(
        settings.with_candidates(candidates),
        nprobes=max(nprobes, settings.nprobes),
        recall_at_10=measured.recall,
        p50_ms=measured.p50_ms,
        p99_ms=measured.p99_ms,
    )


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["id"].to_pylist(), table["kind"].to_pylist(), strict=True))
