"""An order of neighbours: each sample once, near ones side by side; from a table to the file that training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.small_corpora import scan_here, write_corpus
from vladva.data.order import read_order
from vladva.data.shard_index import ShardIndex
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.mine.neighbours import neighbour_order, order_samples


def clustered(clusters: int, each: int, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled vectors of clusters far from each other, and which one each is of."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, width))
    of = random.permutation(np.repeat(np.arange(clusters), each))
    vectors = centres[of] + 0.05 * random.normal(size=(len(of), width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), of


def purity(order: np.ndarray, of: np.ndarray, window: int) -> float:
    """Mean share of the commonest cluster in each window of the order."""
    windows = of[order][: len(order) // window * window].reshape(-1, window)
    return float(np.mean([np.bincount(each).max() / window for each in windows]))


@pytest.mark.parametrize(("clusters", "each"), [(64, 16), (37, 13)])
def test_neighbours_are_of_one_cluster(clusters: int, each: int) -> None:
    vectors, of = clustered(clusters, each)
    order = neighbour_order(vectors)
    assert np.array_equal(np.sort(order), np.arange(len(vectors)))
    assert np.array_equal(order, neighbour_order(vectors))
    assert purity(order, of, 8) > 0.75
    assert purity(np.random.default_rng(0).permutation(len(vectors)), of, 8) < 0.3  # negative control


def test_equal_vectors_are_in_some_order() -> None:
    assert sorted(neighbour_order(np.ones((21, 4), np.float32))) == list(range(21))
    assert list(neighbour_order(np.zeros((0, 4), np.float32))) == []


@pytest.mark.parametrize("width", [16, 200])
def test_from_a_table_to_the_file(width: int, tmp_path: Path) -> None:
    """Images of a table in another order than the samples; captions are not looked at; one sample is missing."""
    write_corpus(str(tmp_path / "data"), 96)
    scan_here(str(tmp_path / "data"))
    index = ShardIndex.open(str(tmp_path / "data"))
    ids = [ref.id for ref in index.samples(0, 96)]
    vectors, of = clustered(8, 12, width)
    model = {"fingerprint": "0123456789abcdef", "dimension": width}
    table = str(tmp_path / "table")
    writer = TableWriter(table, model, "")
    for part in np.array_split(np.random.default_rng(5).permutation(95), 3):  # without sample 95
        names = [ids[number] for number in part]
        for kind, found, values in (
            ("image", names, vectors[part]),
            ("text", [f"{n}#0" for n in names], -vectors[part]),
        ):
            content = pa.array([bytes(16)] * len(found), pa.binary(16))
            write_part(table, pa.table({"id": found, "kind": [kind] * len(found), "content": content}), values, model)
    writer.commit()
    uri = str(tmp_path / "order.parquet")
    order_samples(table, index, uri)
    order = read_order(uri, index)
    assert order[-1] == 95
    assert purity(order[:95], of, 4) > 0.75
    assert purity(np.arange(95), of, 4) < 0.55  # negative control: the order of the samples
