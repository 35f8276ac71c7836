"""`make gpu` on small shapes: every measurement runs, on a CPU too. Nothing here says how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench/gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_all_figures_are_there_and_both_ways_embed_alike() -> None:
    done = run("--tiny")
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert figures["tiny"]
    assert figures["left_out"] == []
    for recipe in ("qwen2_vl_2b", "llava_1_5_7b"):
        for size in (8, 32):
            assert figures[f"train {recipe} {size}"]["pairs_per_s"] > 0
        embed, serve = figures[f"embed {recipe}"], figures[f"serve {recipe}"]
        for side in ("images", "texts"):
            assert embed[f"{side}_per_s"] > 0
            # In bfloat16, unit vectors of two models of random weights are about 1.4 apart.
            assert embed[f"{side}_largest_distance"] < 0.05
        for streams in (1, 8, 64):
            assert serve[f"first_token_s_{streams}"] > 0
            assert serve[f"tokens_per_s_{streams}"] > 0
        assert serve["embeddings_per_s"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
