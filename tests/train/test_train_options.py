"""Every loss and every option of the engine: the same two steps as plain PyTorch with one big batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import train_options_worker as worker
from tests.support.checkpoints import build_llava


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases saved, theirs and plain PyTorch's."""
    out = tmp_path_factory.mktemp("options")
    checkpoint = build_llava(out / "llava")
    command = [sys.executable, "-m", worker.__name__, checkpoint, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def difference(results: Path, name: str, reference: str, part: str) -> float:
    """Largest difference over all tensors, relative to the largest value of each."""
    found, expected = (torch.load(results / f"{n}.pt")[part] for n in (name, f"{reference}, plain"))
    names = [n for n in found if not n.endswith(".weight") or part == "weights"]
    assert set(names) == set(expected)
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-8)).item() for n in names)


@pytest.mark.parametrize("name", [name for name in worker.CASES if not name.startswith("bfloat16")])
def test_two_steps_equal_plain_pytorch(results: Path, name: str) -> None:
    reference = worker.CASES[name].reference or name
    losses, expected = (torch.load(results / f"{n}.pt")["losses"] for n in (name, f"{reference}, plain"))
    for step, plain in zip(losses, expected, strict=True):
        assert step == pytest.approx(plain, rel=1e-5)
    assert difference(results, name, reference, "moments") < 1e-4
    assert difference(results, name, reference, "weights") < 1e-4


@pytest.mark.parametrize("name", [name for name in worker.CASES if name.startswith("bfloat16")])
def test_bfloat16_is_float32_but_for_its_rounding(results: Path, name: str) -> None:
    losses, expected = (torch.load(results / f"{n}.pt")["losses"] for n in (name, "info_nce, plain"))
    for step, plain in zip(losses, expected, strict=True):
        assert step == pytest.approx(plain, rel=0.05)
    moments, plain = (torch.load(results / f"{n}.pt")["moments"] for n in (name, "info_nce, plain"))
    for key in plain:
        if key.endswith("exp_avg"):
            assert torch.nn.functional.cosine_similarity(moments[key].flatten(), plain[key].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("name", ["dropout", "sigmoid", "shares, two workers", "false negatives", "mixed"])
def test_the_comparison_catches_a_wrong_step(results: Path, name: str) -> None:
    reference = worker.CASES[name].reference or name
    assert difference(results, f"{name}, wrong", reference, "moments") > 1e-2
