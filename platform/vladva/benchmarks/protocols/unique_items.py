"""What all protocols need: annotations -> unique texts and images to embed, and outcomes -> columns of a table."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa


class UniqueItems:
    """Numbers items by first appearance, so that each is embedded once and equal texts get equal embeddings.

    A text that is embedded twice, in two batches, may come out slightly different, which hides a tie. Captions are used
    as written but for the space around them, which the annotators left by accident.
    """

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def add(self, items: Iterable[str]) -> np.ndarray:
        """Numbers [N] of `items`, new ones being added."""
        return np.array([self.number.setdefault(item, len(self.number)) for item in items], np.int64)

    @property
    def items(self) -> tuple[str, ...]:
        """All items, in the order of their numbers."""
        return tuple(self.number)


def in_lists(values: np.ndarray, names: pa.Array | None = None) -> pa.Array:
    """Rows of a matrix [N, K] as a column of N lists; with `names`, of the names that the values number."""
    flat = pa.array(values.ravel())
    starts = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(starts), flat if names is None else names.take(flat))
