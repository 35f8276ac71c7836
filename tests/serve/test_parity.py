"""Training, batch job and server give the same embedding; and the command that proves it notices when they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.wire import KEY, STRICT
from vladva.evaluate.parity import ParitySample, by_server, differences
from vladva.recipes import tiny as tiny_recipe

ROOT = Path(__file__).parents[2]


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, on the Ray of these tests."""
    import ray

    command = [sys.executable, "jobs/verify.py", *arguments]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_way_gives_the_same_embedding(server: str, adapter: str, scenes: Path) -> None:
    data = str(scenes / "train")
    done = verify(adapter, "--data", data, "--url", server, "--samples", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "largest difference" in line]  # Ray writes others
    assert [(line[0], line[2]) for line in lines[::2]] == [
        ("training", "job"),
        ("training", "server"),
        ("job", "server"),
    ]
    assert all(float(line[-1]) < 1e-5 for line in lines)
    assert lines[0][3:5] == ["8", "images"]
    strict = verify(adapter, "--data", data, "--samples", "8", "--tolerance", "0")
    assert strict.returncode == 1, strict.stdout + strict.stderr
    assert "more than 0.0e+00" in strict.stdout


def test_a_server_with_another_model_is_refused(server: str, adapter: str, scenes: Path) -> None:
    from vladva.models.resolve import describe

    sample = ParitySample(tiny_recipe().model, str(scenes / "train"), 2)
    ours = describe(adapter, adapter=True, dtype="float32")[1]["fingerprint"]
    with pytest.raises(ValueError, match=f"serves model .*, not {ours}"):
        by_server(f"{server}/{STRICT}", KEY, ours, sample)
    with pytest.raises(ValueError, match="answers 401"):
        by_server(f"{server}/{STRICT}", "", ours, sample)
    with pytest.raises(ValueError, match="cannot be reached"):
        by_server("http://127.0.0.1:1", "", ours, sample)


def test_the_largest_difference_is_told() -> None:
    rows = np.eye(3, dtype=np.float32)
    paths = {"training": {"text": rows}, "job": {"text": rows + np.array([0, 0, 1e-3], np.float32)}}
    [(first, second, kind, difference)] = differences(paths)
    assert (first, second, kind) == ("training", "job", "text")
    assert difference == pytest.approx(1e-3, rel=1e-3)
