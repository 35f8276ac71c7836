"""ZeRO-3: the weights come from their files one by one, and are cut up as they come; the steps are as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import partition_worker as worker
from tests.support.checkpoints import build_llava

pytestmark = pytest.mark.slow  # its workers train


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker saw."""
    out = tmp_path_factory.mktemp("partition")
    command = [sys.executable, "-m", worker.__name__, build_llava(out / "llava"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(worker.WORLD)]


@pytest.mark.parametrize("dtype", worker.DTYPES)
def test_steps_are_those_of_a_model_that_deepspeed_partitions(found: list[dict[str, Any]], dtype: str) -> None:
    for rank in found:
        assert rank[f"{dtype}, ZeRO-3"] == rank[f"{dtype}, left whole"]
    first, *_, last = found[0][f"{dtype}, ZeRO-3"]
    assert first != pytest.approx(last, rel=1e-2)  # they do train


def test_steps_are_those_of_zero_2(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for three, two in zip(rank["float32, ZeRO-3"], rank["float32, ZeRO-2"], strict=True):
            assert three == pytest.approx(two, rel=1e-5)


def test_a_worker_holds_its_share_of_the_layers_and_one_whole_weight(found: list[dict[str, Any]]) -> None:
    for rank in found:
        sizes, (peak, written) = rank["sizes"], rank["memory"]
        outside = sizes["whole"] - sizes["in layers"]
        assert peak <= outside + sizes["in layers"] / worker.WORLD + 2 * sizes["largest"]
        assert peak < 0.9 * sizes["whole"]
        assert written == 0  # or a file's pages would be in memory once for every worker


def test_the_counts_see_what_would_be_wrong(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["memory not mapped"][0] >= rank["sizes"]["whole"]
    assert found[1]["memory no copy"][1] > 2 * found[1]["sizes"]["in layers"] / 2  # bytes: a half and more of them
