"""Every ZeRO stage, both paths, one and two workers: the same steps as plain PyTorch with one big batch.

The reference shares nothing with the code under test but the model: InfoNCE by torch's cross_entropy on the whole
similarity matrix, the caption loss by transformers' own `labels`, in *separate* forwards, and torch's AdamW.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import gradcache_worker as worker
import pytest
import torch
from checkpoints import build_llava
from torch.nn.functional import cross_entropy, normalize

from vladva.embedder import as_tensors, caption_labels
from vladva.gradcache import prompts_only

WEIGHT = 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> dict:
    """Two optimizer steps of plain PyTorch."""
    model, _ = worker.build(worker.config_of(checkpoint, 1))
    model.train()
    whole = model.preprocessor.collate(0, worker.examples())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=worker.RATE, betas=(0.9, 0.98), weight_decay=0.0)
    valid = torch.as_tensor(whole.has_short)
    losses, norms, gradients = [], [], {}
    for _ in range(worker.STEPS):
        hidden = model.base.model(
            **model.inputs(prompts_only(whole.image, torch.device("cpu")), as_tensors(whole.pixels, "cpu"))
        ).last_hidden_state
        images = normalize(hidden[torch.arange(len(hidden)), torch.tensor(whole.image.prompt_lengths) - 1], dim=-1)
        hidden = model.base.model(**model.inputs(as_tensors(whole.text, "cpu"), None)).last_hidden_state
        texts = normalize(hidden[torch.arange(len(hidden)), torch.tensor(whole.text.lengths) - 1], dim=-1)
        logits = images[valid] @ texts[valid].T * model.log_scale.exp()
        row = {number: i for i, number in enumerate(valid.nonzero().flatten().tolist())}
        for a, b in ((8, 9), (9, 8)):  # pairs with the same caption are not negatives of each other
            logits[row[a], row[b]] = -torch.inf
        target = torch.arange(len(logits))
        contrastive = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

        tokens = as_tensors(whole.image, "cpu")
        inputs = model.inputs(tokens, as_tensors(whole.pixels, "cpu"))
        caption = model.base(**inputs, labels=caption_labels(tokens)).loss
        (contrastive + WEIGHT * caption).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in trainable.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append((contrastive.item(), caption.item()))
    moments = {f"{n}.{m}": optimizer.state[p][m] for n, p in trainable.items() for m in ("exp_avg", "exp_avg_sq")}
    weights = {name: p.detach().clone() for name, p in trainable.items()}
    return {"weights": weights, "losses": losses, "norms": norms, "moments": moments}


def run_ranks(checkpoint: str, out: Path, world: int, fault: str = "none") -> None:
    """Run `world` ranks of the worker on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    tests = Path(worker.__file__).parent
    ranks = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": str(tests),
        }
        command = [sys.executable, str(tests / "gradcache_worker.py"), checkpoint, str(out), fault]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [rank.communicate(timeout=600)[0].decode() for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs[0][-3000:]


@pytest.fixture(scope="module")
def results(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks saved, for one and for two workers."""
    out = tmp_path_factory.mktemp("results")
    for world in (1, 2):
        run_ranks(checkpoint, out, world)
    return out


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-8)).item() for name in a)


@pytest.mark.parametrize("path", ["single_pass", "cached"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_equals_plain_pytorch(results: Path, reference: dict, world: int, stage: int, path: str) -> None:
    found = torch.load(results / f"{world}-{stage}-{path}-none.pt")
    for (contrastive, caption), (expected_contrastive, expected_caption) in zip(
        found["losses"], reference["losses"], strict=True
    ):
        assert contrastive == pytest.approx(expected_contrastive, rel=1e-5)
        assert caption == pytest.approx(expected_caption, rel=1e-5)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert largest_difference(found["weights"], reference["weights"]) < 1e-4
    # The first moment is the (clipped) gradient, averaged over two steps.
    assert largest_difference(found["moments"], reference["moments"]) < 1e-4


@pytest.mark.parametrize("fault", ["no-gather", "drop-chunk"])
def test_the_comparison_catches_a_wrong_step(checkpoint: str, reference: dict, tmp_path: Path, fault: str) -> None:
    run_ranks(checkpoint, tmp_path, 2, fault)
    for path in ("single_pass", "cached"):
        found = torch.load(tmp_path / f"2-2-{path}-{fault}.pt")
        assert largest_difference(found["moments"], reference["moments"]) > 1e-2
