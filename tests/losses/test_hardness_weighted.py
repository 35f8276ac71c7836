"""hardness_weighted against a twin that weighs every anchor's negatives in plain Python, InfoNCE, and in memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vladva.losses.contrastive import ROWS, contrastive_loss
from vladva.losses.hardness_weighted import HardnessWeighted
from vladva.losses.info_nce import InfoNCE
from vladva.losses.pairs import select_pairs

NUM_PAIRS, WIDTH, HARDNESS = 11, 8, 4.0
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]).bool()
IMAGE_KEYS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8, 0, 10])
CAPTION_KEYS = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10])
OWNERS = torch.tensor([0, 0, 2, 6, 9])
NEGATIVE_KEYS = torch.tensor([1, 100, 8, 8, 4])
EVERYTHING = {
    "valid": VALID,
    "image_keys": IMAGE_KEYS,
    "caption_keys": CAPTION_KEYS,
    "negative_owners": OWNERS,
    "negative_keys": NEGATIVE_KEYS,
}


def columns(negatives: Tensor | None) -> dict[str, Tensor]:
    return {} if negatives is None else {**EVERYTHING, "negatives": negatives}


def slow_loss(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    negatives: Tensor | None,
    *,
    symmetric: bool,
    detached: bool = True,
) -> Tensor:
    """One anchor after the other, the weights of its negatives written out."""
    part = [i for i in range(NUM_PAIRS) if negatives is None or VALID[i]]

    def is_negative(i: int, j: int) -> bool:
        return i != j and (
            negatives is None or bool(IMAGE_KEYS[i] != IMAGE_KEYS[j] and CAPTION_KEYS[i] != CAPTION_KEYS[j])
        )

    def term(anchor: Tensor, positive: Tensor, others: list[Tensor]) -> Tensor:
        if not others:
            return anchor.sum() * 0
        similarities = torch.stack([anchor @ other for other in others])
        weights = (HARDNESS * (similarities.detach() if detached else similarities)).exp()
        weights = weights / weights.mean()
        excess = (log_scale.exp() * (similarities - anchor @ positive)).exp()
        return (1 + (weights * excess).sum()).log()

    of_images, of_texts = [], []
    for i in part:
        others = [texts[j] for j in part if is_negative(i, j)]
        if negatives is not None:
            others += [
                negatives[h] for h in range(len(OWNERS)) if VALID[OWNERS[h]] and NEGATIVE_KEYS[h] != CAPTION_KEYS[i]
            ]
        of_images.append(term(images[i], texts[i], others))
        of_texts.append(term(texts[i], images[i], [images[j] for j in part if is_negative(i, j)]))
    directions = [of_images, of_texts] if symmetric else [of_images]
    return torch.stack([torch.stack(terms).mean() for terms in directions]).mean()


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_slow_twin(
    symmetric: bool, everything: bool, dtype: torch.dtype, tolerance: float, chunk_size: int, unit: Callable
) -> None:
    leaves = [unit(NUM_PAIRS, WIDTH, seed=seed, dtype=dtype) for seed in (1, 2)]
    leaves.append(torch.tensor(1.7, dtype=dtype, requires_grad=True))
    if everything:
        leaves.append(unit(len(OWNERS), WIDTH, seed=3, dtype=dtype))
    images, texts, log_scale, negatives = (*leaves, None)[:4]
    loss = HardnessWeighted(1.0, True, "symmetric" if symmetric else "one-way", HARDNESS)
    pairs = select_pairs(images, texts, **columns(negatives))
    fast = contrastive_loss(loss, pairs, {"log_scale": log_scale}, chunk_size=chunk_size).loss
    slow = slow_loss(images, texts, log_scale, negatives, symmetric=symmetric)
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(fast, leaves, retain_graph=True)
    for found, expected in zip(gradients, torch.autograd.grad(slow, leaves), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    # Negative control: had the weights a gradient, it would be another.
    attached = slow_loss(images, texts, log_scale, negatives, symmetric=symmetric, detached=False)
    (other,) = torch.autograd.grad(attached, images)
    assert (other - gradients[0]).abs().max() > 1e-2


def test_a_fixed_temperature_is_the_learned_one_at_that_value(unit: Callable) -> None:
    pairs = select_pairs(unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2))
    learned = HardnessWeighted(1.0, True, hardness=3.0)(pairs, {"log_scale": torch.tensor(-math.log(0.2)).double()})
    fixed = HardnessWeighted(0.2, False, hardness=3.0)(pairs, {})
    assert float(fixed.detach()) == pytest.approx(float(learned.detach()), rel=1e-6)


@pytest.mark.parametrize("symmetric", ["symmetric", "one-way"])
def test_with_next_to_no_hardness_it_is_info_nce(symmetric: str, unit: Callable) -> None:
    negatives = unit(len(OWNERS), WIDTH, seed=3)
    inputs = [unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2), torch.tensor(2.0, requires_grad=True)]
    pairs = select_pairs(inputs[0], inputs[1], **columns(negatives))
    values = [
        loss(pairs, {"log_scale": inputs[2]}, chunk_size=3)
        for loss in (InfoNCE(1.0, True, symmetric), *(HardnessWeighted(1.0, True, symmetric, h) for h in (1e-9, 1.0)))
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)
    plain, same, weighted = (torch.autograd.grad(value, inputs, retain_graph=True) for value in values)
    for one, other in zip(plain, same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert (values[2] - values[0]).item() > 1e-3  # a hard negative counts for more than an easy one for less
    assert (weighted[0] - plain[0]).abs().max() > 1e-3


def test_equal_embeddings_give_log_of_the_number_of_candidates() -> None:
    """All negatives are equally hard, so all weights are 1."""
    pairs = select_pairs(torch.zeros(7, 4), torch.zeros(7, 4), negatives=torch.zeros(7, 3, 4))
    loss = HardnessWeighted(0.05, False, "one-way", hardness=9.0)(pairs, {}, chunk_size=3)
    assert float(loss) == pytest.approx(math.log(4 * 7), abs=1e-5)


def test_no_negatives_give_zero_and_zero_gradients(unit: Callable) -> None:
    images, texts, log_scale = unit(5, 4, seed=1), unit(5, 4, seed=2), torch.tensor(2.0, requires_grad=True)
    for options in ({"caption_keys": torch.zeros(5, dtype=torch.long)}, {"valid": torch.zeros(5, dtype=torch.bool)}):
        value = HardnessWeighted(1.0, True)(select_pairs(images, texts, **options), {"log_scale": log_scale})
        assert float(value.detach()) == 0
        for gradient in torch.autograd.grad(value, (images, texts, log_scale)):
            assert not gradient.any()


@pytest.mark.parametrize("ends", [(0, 4, 8), (0, 1, 1, 7, 8)])
def test_the_shares_of_several_workers_add_up(ends: tuple[int, ...], unit: Callable) -> None:
    inputs = [unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2), torch.tensor(2.0, requires_grad=True)]
    pairs = select_pairs(inputs[0], inputs[1], **columns(unit(len(OWNERS), WIDTH, seed=3)))
    assert len(pairs) == ends[-1]
    loss, scalars = HardnessWeighted(1.0, True, hardness=HARDNESS), {"log_scale": inputs[2]}
    whole = loss(pairs, scalars)
    parts = [loss(replace(pairs, share=range(a, b)), scalars, chunk_size=3) for a, b in pairwise(ends)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(whole, inputs, retain_graph=True)
    found = [torch.autograd.grad(part, inputs, retain_graph=True) for part in parts]
    for gradients, of_whole in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(gradients), of_whole, rtol=1e-10, atol=1e-14)
    assert abs((sum(parts[1:]) - whole).item()) > 1e-3  # negative control: one share is missing


def test_memory_is_what_is_planned_and_grows_with_the_batch(unit: Callable, peak_bytes: Callable) -> None:
    keys = torch.arange(2048) // 2

    def peak(size: int) -> int:
        images, texts = (unit(size, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
        pairs = select_pairs(images, texts, image_keys=keys[:size])
        log_scale = torch.tensor(2.0, requires_grad=True)
        return peak_bytes(lambda: HardnessWeighted(1.0, True)(pairs, {"log_scale": log_scale}).backward())

    embeddings = 6 * 2048 * 32 * 4  # their gradients, and what is added up
    assert 0.5 < (peak(2048) - embeddings) / HardnessWeighted(1.0, True).block_bytes(2048, 2048) <= 1
    assert 1.8 < peak(2048) / peak(1024) < 2.2
    assert ROWS < 2048


@pytest.mark.parametrize("hardness", [0, -1])
def test_no_hardness_is_refused(hardness: float) -> None:
    with pytest.raises(ValueError, match=rf"hardness is {hardness}; it must be positive"):
        HardnessWeighted(1.0, True, hardness=hardness)
