"""A run saved with 4 workers under ZeRO-3 goes on with 2 under ZeRO-1, and the other way round, and is the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import portable_worker as worker
from tests.support.checkpoints import build_llava
from vladva.data.scan import scan
from vladva.models import checkpoint
from vladva.models.preprocessor import Preprocessor


@pytest.fixture(scope="module")
def storage(ray_cluster: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of the worker."""
    folder = tmp_path_factory.mktemp("portable")
    lvlm, data = build_llava(folder / "llava"), str(scenes / "train")
    scan(data, Preprocessor(lvlm).count_tokens)
    command = [sys.executable, "-m", worker.__name__, lvlm, str(folder), data]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def end_of(storage: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Adapter, optimizer and state after the last step."""
    from safetensors.torch import load_file

    saved = checkpoint.read_checkpoint(str(storage / name / "checkpoints" / f"step-{worker.STEPS}"))
    return load_file(saved.adapter / "adapter_model.safetensors"), saved.optimizer, saved.state


@pytest.mark.parametrize("name", ["there", "back"])
def test_workers_and_stage_do_not_matter(storage: Path, name: str) -> None:
    for found, expected in zip(end_of(storage, name)[:2], end_of(storage, "plain")[:2], strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max(), key
    state, plain = end_of(storage, name)[2], end_of(storage, "plain")[2]
    assert state["log_scale"] == pytest.approx(plain["log_scale"], rel=1e-6)
    assert state["log_scale"] != pytest.approx(-torch.tensor(0.07).log().item(), rel=1e-6)
    assert state["next_chunk"] == plain["next_chunk"] == 16
    for start in (worker.HALF,) if name == "there" else (0, worker.HALF):
        found, expected = (torch.load(storage / n / f"losses-{start}.pt") for n in (name, "plain"))
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_a_bfloat16_run_keeps_its_float32_weights(storage: Path) -> None:
    """They are more exact than what the adapter holds, and the run goes on with them (the worker asserts it)."""
    _, optimizer, _ = end_of(storage, "bfloat16")
    weights = {key: value for key, value in optimizer.items() if key.endswith(".weight") and "exp_avg" not in key}
    masters = {key: value for key, value in weights.items() if value.dtype == torch.float32}
    assert masters
    assert any((value != value.bfloat16().float()).any() for value in masters.values())


def test_the_comparison_tells_runs_apart(storage: Path) -> None:
    """Negative control: had the second half begun without the moments, the optimizer's state would differ as here."""
    half = checkpoint.read_checkpoint(str(storage / "plain" / "checkpoints" / f"step-{worker.HALF}")).optimizer
    whole = end_of(storage, "plain")[1]
    assert max(((half[key] - value).abs().max() / value.abs().max()).item() for key, value in whole.items()) > 0.1
