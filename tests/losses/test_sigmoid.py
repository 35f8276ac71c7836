"""sigmoid against a twin that sums over all combinations in plain Python, against arithmetic, and in memory."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from vladva.losses.contrastive import contrastive_loss
from vladva.losses.pairs import PairLoss, select_pairs
from vladva.losses.sigmoid import Sigmoid

NUM_PAIRS, WIDTH = 11, 8
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]).bool()
IMAGE_KEYS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8, 0, 10])
CAPTION_KEYS = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10])
OWNERS = torch.tensor([0, 0, 2, 6, 9])
NEGATIVE_KEYS = torch.tensor([1, 100, 8, 8, 4])


def sigmoid(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    dims: tuple[int, ...] = (),
    chunk_size: int = 256,
    **columns: Tensor | None,
) -> PairLoss:
    """The loss under test; `columns` are those of select_pairs."""
    scalars = {"log_scale": log_scale, "bias": bias}
    pairs = select_pairs(images, texts, **columns)
    return contrastive_loss(Sigmoid(0.1, True), pairs, scalars, widths=dims, chunk_size=chunk_size)


def slow_sigmoid(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, negatives: Tensor | None) -> Tensor:
    """The paper's double sum; with `negatives`, also valid pairs, duplicates and hard negatives as in the constants."""
    everything = negatives is not None
    part = [i for i in range(len(images)) if not everything or VALID[i]]
    total = torch.zeros((), dtype=images.dtype)
    for i in part:
        for j in part:
            if everything and i != j and (IMAGE_KEYS[i] == IMAGE_KEYS[j] or CAPTION_KEYS[i] == CAPTION_KEYS[j]):
                continue
            sign = 1 if i == j else -1
            total = total - logsigmoid(sign * (images[i] @ texts[j] * log_scale.exp() + bias))
        for h in range(len(OWNERS) if everything else 0):
            if VALID[OWNERS[h]] and NEGATIVE_KEYS[h] != CAPTION_KEYS[i]:
                total = total - logsigmoid(-(images[i] @ negatives[h] * log_scale.exp() + bias))
    return total / len(part)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("everything", [False, True])
def test_equals_slow_twin(
    everything: bool, dtype: torch.dtype, tolerance: float, chunk_size: int, unit: Callable
) -> None:
    leaves = [unit(NUM_PAIRS, WIDTH, seed=1, dtype=dtype), unit(NUM_PAIRS, WIDTH, seed=2, dtype=dtype)]
    leaves += [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (2.3, -3.0)]
    options = {}
    if everything:
        leaves.append(unit(5, WIDTH, seed=3, dtype=dtype))
        options = {"valid": VALID, "image_keys": IMAGE_KEYS, "caption_keys": CAPTION_KEYS}
        options |= {"negatives": leaves[4], "negative_owners": OWNERS, "negative_keys": NEGATIVE_KEYS}
    loss = sigmoid(*leaves[:4], **options, chunk_size=chunk_size).loss
    slow_loss = slow_sigmoid(*leaves[:4], leaves[4] if everything else None)
    torch.testing.assert_close(loss, slow_loss, rtol=tolerance, atol=tolerance)
    grads, slow_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(slow_loss, leaves)
    for grad, slow_grad in zip(grads, slow_grads, strict=True):
        assert slow_grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, slow_grad, rtol=tolerance, atol=tolerance)


def test_negative_control(unit: Callable) -> None:
    """The masks and hard negatives of the twin test do matter, and so does the sign of the pairs."""
    images, texts, scale, bias = (
        unit(NUM_PAIRS, WIDTH, seed=1),
        unit(NUM_PAIRS, WIDTH, seed=2),
        torch.tensor(2.3),
        torch.tensor(-3.0),
    )
    plain = sigmoid(images, texts, scale, bias).loss.item()
    assert sigmoid(images, texts, scale, bias, valid=VALID).loss.item() != pytest.approx(plain, rel=1e-3)
    assert sigmoid(images, texts, scale, bias, image_keys=IMAGE_KEYS).loss.item() < plain
    assert sigmoid(images, texts, scale, bias, negatives=texts[:, None].roll(1, 0)).loss.item() > plain
    assert sigmoid(images, texts.roll(1, 0), scale, bias).loss.item() != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_zero_embeddings_by_arithmetic(num_pairs: int) -> None:
    """All logits are b: softplus(-b) for the pair and softplus(b) for each of the G - 1 others; ln 2 each at b = 0."""
    zeros = torch.zeros(num_pairs, 4)
    result = sigmoid(zeros, zeros, torch.tensor(2.3), torch.tensor(0.0), chunk_size=3)
    assert float(result.loss) == pytest.approx(num_pairs * math.log(2), rel=1e-6)
    assert float(result.effective_negatives) == num_pairs - 1
    expected = math.log1p(math.exp(10)) + (num_pairs - 1) * math.log1p(math.exp(-10))
    assert sigmoid(zeros, zeros, torch.tensor(2.3), torch.tensor(-10.0)).loss.item() == pytest.approx(
        expected, rel=1e-6
    )


def test_matryoshka_is_the_mean_over_widths(unit: Callable) -> None:
    images, texts, scale, bias = unit(5, 8, seed=1), unit(5, 8, seed=2), torch.tensor(2.3), torch.tensor(-3.0)
    full = sigmoid(images, texts, scale, bias).loss
    half = sigmoid(normalize(images[:, :4], dim=-1), normalize(texts[:, :4], dim=-1), scale, bias).loss
    torch.testing.assert_close(sigmoid(images, texts, scale, bias, dims=(4,)).loss, (full + half) / 2)


def test_no_valid_pair_gives_zero_and_zero_gradients(unit: Callable) -> None:
    images, texts, scale = unit(3, 4, seed=1), unit(3, 4, seed=2), torch.tensor(2.0, requires_grad=True)
    result = sigmoid(images, texts, scale, torch.tensor(-3.0), valid=torch.zeros(3, dtype=torch.bool))
    assert [result.loss.item(), result.effective_negatives.item(), result.duplicates.item()] == [0, 0, 0]
    for grad in torch.autograd.grad(result.loss, (images, texts, scale), allow_unused=True, materialize_grads=True):
        assert not grad.any()


def test_memory_grows_with_the_batch_not_with_its_square(unit: Callable, peak_bytes: Callable) -> None:
    def step(size: int) -> int:
        images, texts = (unit(size, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
        scale, bias = (torch.tensor(value, requires_grad=True) for value in (2.3, -3.0))
        keys = torch.arange(size) // 2

        def call() -> None:
            sigmoid(images, texts, scale, bias, image_keys=keys, chunk_size=64).loss.backward()

        return peak_bytes(call)

    assert 1.8 < step(2048) / step(1024) < 2.2
