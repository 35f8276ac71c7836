"""The rehearsal on fake CUDA: nothing breaks a rule, and every kind of fault that is planted is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rehearsal.cost_table import README, RECORDED, cost_table, with_table

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What rehearse.py finds, in a process of its own: PyTorch there thinks that it has a GPU."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built for CUDA; the rehearsal needs the CPU build")
    command = [sys.executable, str(HERE / "rehearse.py"), "--quick", "--controls"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_rule_is_broken(report: dict[str, Any]) -> None:
    """No mix-up of devices (an error), no more waits, kernels or memory than recorded, flash attention, no float32."""
    assert report["broken"] == {}
    assert len(report["measured"]) >= 9


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("mix_up", "found at least two devices, cuda:0 and cpu"),
        ("item", "the host waits 1 times for '.item()', 0 are recorded"),
        ("blocking_copy", "for 'host to device'"),
        ("wide_product", "a product in float32 of 2.1 GFLOP at models/packed/inference.py"),
        ("attention_with_mask", "by the kernel math, not flash"),
        ("more_memory", "peak 4"),
        ("more_kernels", "kernels "),
    ],
)
def test_a_planted_fault_is_found(report: dict[str, Any], fault: str, told: str) -> None:
    lines = report["controls"][fault]
    assert any(told in line for line in lines), lines
    assert report["controls"]["none"] == []


def test_readmes_table_is_what_is_recorded() -> None:
    readme = README.read_text()
    table = cost_table(json.loads(RECORDED.read_text()))
    assert readme == with_table(readme, table), "run tests/gpu/rehearsal/cost_table.py"
    assert "| `llava_1_5_7b` | 80 GB |" in table


def test_sums_are_those_done_by_hand(report: dict[str, Any]) -> None:
    found = report["by hand"]
    assert found["flops"] == 2 * 64 * 32 * 16
    assert found["peak"] == 4 * (64 * 32 + 32 * 16 + 64 * 16) + 512  # the sum, rounded up
    assert found["waits"] == {"host to device": 1, ".item()": 1}
    assert found["kernels"] == 4  # ones, a copy, the product, its sum
