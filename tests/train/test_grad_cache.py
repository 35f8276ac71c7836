"""Every backbone, ZeRO stage and path, one and two workers, one and four chunks each: the steps of plain PyTorch.

The reference shares nothing with the code under test but the model: one process, one batch, InfoNCE by torch's
cross_entropy on the whole similarity matrix, the caption loss by transformers' own `labels` in *separate* forwards, and
torch's AdamW. By default a part of the matrix runs, in which every two options meet; VLADVA_FULL_MATRIX=1 runs it all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import exactness_worker as worker

FULL = os.environ.get("VLADVA_FULL_MATRIX") == "1"
CASES = (worker.FULL if FULL else worker.pairwise()) + worker.UNEVEN


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases saved, and plain PyTorch for each family."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", worker.__name__, str(out), *(["--full"] if FULL else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-8)).item() for name in a)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_step_equals_plain_pytorch(results: Path, case: worker.Case) -> None:
    found, expected = (torch.load(results / f"{name}.pt") for name in (case.name, case.family))
    # That of the scale is a small difference of large logits.
    scale, expected_scale = (part["gradients"].pop("log_scale") for part in (found, expected))
    assert scale.item() == pytest.approx(expected_scale.item(), rel=1e-4)
    assert largest_difference(found["gradients"], expected["gradients"]) < 1e-5
    assert largest_difference(found["weights"], expected["weights"]) < 1e-5
    assert found["losses"] == [pytest.approx(step, rel=1e-5) for step in expected["losses"]]
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("case", worker.FAULTS, ids=[case.name for case in worker.FAULTS])
def test_the_comparison_catches_a_wrong_step(results: Path, case: worker.Case) -> None:
    found, expected = (torch.load(results / f"{name}.pt") for name in (case.name, case.family))
    assert largest_difference(found["gradients"], expected["gradients"]) > 1e-2
    assert largest_difference(found["weights"], expected["weights"]) > 1e-3


def test_the_part_of_the_matrix_covers_every_pair_of_options() -> None:
    pairs = set().union(*map(worker.pairs_of, worker.FULL))
    assert set().union(*map(worker.pairs_of, worker.pairwise())) == pairs
    assert len(worker.pairwise()) < len(worker.FULL) / 5
