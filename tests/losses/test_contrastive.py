"""A loss is one file: found by its name, with its settings, scalars and memory estimate; nothing else names it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vladva
from tests.support.site_pages import file_of_page
from vladva.config import LossConfig
from vladva.losses.contrastive import Scalar, find_loss, loss_names
from vladva.losses.info_nce import InfoNCE
from vladva.losses.sigmoid import Sigmoid

PACKAGE = Path(vladva.__file__).parent

PAGE, FILE = "extend/loss.md", "platform/vladva/losses/hinge.py"

# Three steps of the tiny model with the new loss, on two chunks, by the code that trains; then its memory plan.
PROGRAM = """
import json, os, socket, sys
from dataclasses import replace
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
from vladva.losses.contrastive import find_loss
from vladva.models.batch import MicroBatch
from vladva.recipes import parse_recipe
from vladva.train.memory_plan import plan_memory
from vladva.train.setup import build_engine, make_backward
from tests.support.train_options_worker import examples

config = parse_recipe(["tiny", "--loss.contrastive", "hinge", "--loss.options", "margin=0.205", "hardest=true",
                       "--cluster.workers", "1", "--loss.next-token-weight", "0", "--train.global-batch", "12",
                       "--train.chunk-size", "6", "--data.run-length", "1", "--optim.lr", "0.1"], prog="test")
engine = build_engine(config, 0)
rows = examples("plain")
chunks = [engine.model.preprocessor.collate(i, rows[6 * i : 6 * i + 6]) for i in range(2)]
backward = make_backward(config)
margins = [engine.scalars.tolist()]
for step in range(3):
    found = backward(engine, chunks)
    engine.step(0.1)
    margins.append(engine.scalars.tolist())
print(json.dumps({
    "loss": found.contrastive.loss.item(), "margins": margins, "hardest": find_loss(config.loss).hardest,
    "trained": sorted(n for n in engine.trainable if "lora" not in n and "token" not in n),
    "blocks": plan_memory(config).device["blocks of losses"],
}))
"""


@pytest.mark.slow
def test_a_new_file_is_a_new_loss(tmp_path: Path) -> None:
    """The package and the file of the page: command line, step, clamp, names in checkpoints and the memory plan."""
    shutil.copytree(PACKAGE, tmp_path / "vladva", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "vladva/losses/hinge.py").write_text(file_of_page(PAGE, FILE))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] > 0
    assert found["hardest"] is True
    assert found["trained"] == ["margin"]
    # Its gradient is positive: AdamW's first step takes 0.1 of it, the others nearly as much, until it is held at 0.
    margins = [margin for (margin,) in found["margins"]]
    assert margins[:2] == pytest.approx([0.205, 0.105], abs=1e-5)
    assert 0 < margins[2] < 0.02
    assert margins[3] == 0
    assert found["blocks"] == 12345 * 12


def test_what_is_there() -> None:
    assert loss_names() == ["hardness_weighted", "info_nce", "sigmoid"]
    assert find_loss(LossConfig(temperature=0.5)) == InfoNCE(0.5, True)
    one_way = find_loss(LossConfig(options=("directions=one-way",), learn_temperature=False))
    assert one_way == InfoNCE(0.07, False, "one-way")
    assert not one_way.symmetric
    sigmoid = find_loss(LossConfig(contrastive="sigmoid", temperature=0.1, options=("bias=-3",)))
    assert sigmoid == Sigmoid(0.1, True, -3.0)
    assert sigmoid.scalars() == {"log_scale": Scalar(-math.log(0.1)), "bias": Scalar(-3.0)}
    assert find_loss(LossConfig()).scalars()["log_scale"].highest == math.log(100)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            LossConfig(contrastive="triplet"),
            r"loss\.contrastive: there is no 'triplet'; known are hardness_weighted, info_nce, sigmoid",
        ),
        (LossConfig(contrastive="pairs"), r"there is no 'pairs'"),
        (
            LossConfig(contrastive="sigmoid", options=("directions=one-way",)),
            r"no option of the loss sigmoid.*bias=\.\.\.",
        ),
        (LossConfig(options=("directions=both",)), r"directions is 'both'; it must be one of symmetric, one-way"),
        (LossConfig(contrastive="sigmoid", options=("bias=low",)), r"bias is 'low'; it must be a float"),
        (LossConfig(options=("directions",)), r"'directions' is no option"),
    ],
)
def test_what_is_not_there_is_named(loss: LossConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_loss(loss)
