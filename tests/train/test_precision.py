"""Of a bfloat16 model, what is added up over chunks and what is learned in small steps stays in float32."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from tests.support import precision_worker as worker
from tests.support.checkpoints import build_llava

LIMIT = math.log(100)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("precision")
    command = [sys.executable, "-m", worker.__name__, build_llava(out / "llava"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((out / "precision.json").read_text())


@pytest.mark.parametrize("stage", worker.STAGES)
def test_gradients_of_many_chunks_are_added_up_in_float32(found: dict[str, Any], stage: int) -> None:
    assert found[f"added up, ZeRO-{stage}"] < 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_adding_in_bfloat16_would_show(found: dict[str, Any], stage: int) -> None:
    assert found[f"added up, ZeRO-{stage}, wrong"] > 1e-4


@pytest.mark.parametrize("stage", worker.STAGES)
def test_the_scale_moves_by_small_steps_up_to_its_limit_and_down_again(found: dict[str, Any], stage: int) -> None:
    """Near 4.6 a bfloat16 moves by 0.03, and past the limit the loss has no gradient that would bring it back."""
    values = found[f"scalar, ZeRO-{stage}"]
    assert values[0] == pytest.approx(LIMIT - 0.0025, abs=1e-5)
    assert values[1] == pytest.approx(LIMIT - 0.0015, abs=2e-5)  # a step of AdamW is at most the rate
    assert max(values) <= LIMIT + 1e-6
    assert values[3] == values[4] == pytest.approx(LIMIT, abs=1e-6)
    assert values[-1] < LIMIT - 0.0005
    assert len(set(values)) >= 5
