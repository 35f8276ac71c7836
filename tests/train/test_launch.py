"""What the driver says of workers that it lost."""

from __future__ import annotations

import pytest
from ray.train import WorkerGroupError

from vladva.train.launch import failures_in_short


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({1: RuntimeError("The node has died.\n\tTraceback: ...")}, "workers lost: rank 1: The node has died."),
        ({0: RuntimeError("")}, "workers lost: rank 0: no word"),
        (
            {rank: RuntimeError("gone") for rank in range(6)},
            "workers lost: rank 0: gone; rank 1: gone; rank 2: gone; rank 3: gone; ...",
        ),
    ],
)
def test_lost_workers_take_one_line(failures: dict[int, Exception], told: str) -> None:
    assert failures_in_short(WorkerGroupError("Traceback ...\nTraceback ...", failures)) == told
