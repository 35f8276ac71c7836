"""The teacher's mask against a twin in plain Python, for every loss; and the arithmetic that makes it exact."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vladva.config import LossConfig
from vladva.losses.contrastive import contrastive_loss, find_loss, loss_names
from vladva.losses.pairs import TEACHER_NORM, Pairs, select_pairs, to_teacher_numbers

NUM_PAIRS, WIDTH, ABOVE = 11, 8, 0.6
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]).bool()
CAPTION_KEYS = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10])
OWNERS = torch.tensor([0, 0, 2, 6, 9])


def vectors(seed: int = 9) -> Tensor:
    """A teacher's vectors: of few directions, so that some are similar."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 5, generator=random)
    return centres[torch.arange(NUM_PAIRS) % 4] + 0.4 * torch.randn(NUM_PAIRS, 5, generator=random)


def masked(images: Tensor, texts: Tensor, negatives: Tensor | None = None) -> Pairs:
    return select_pairs(
        images,
        texts,
        valid=VALID,
        caption_keys=CAPTION_KEYS,
        negatives=negatives,
        negative_owners=None if negatives is None else OWNERS,
        teacher=to_teacher_numbers(vectors()).float(),
        false_negatives_above=ABOVE,
    )


def is_false_negative(i: int, j: int) -> bool:
    """By cosines of vectors that nobody has rounded."""
    one, other = vectors()[i].double(), vectors()[j].double()
    return i != j and float(one @ other / one.norm() / other.norm()) >= ABOVE


@pytest.mark.parametrize("name", loss_names())
def test_what_the_teacher_finds_similar_is_as_if_it_were_not_there(name: str, unit: Callable) -> None:
    """Each anchor alone with the negatives that are left, as pairs of their own: the loss of the rows adds up."""
    images, texts = unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2)
    loss = find_loss(LossConfig(contrastive=name, learn_temperature=False))
    scalars = {key: torch.tensor(scalar.start, dtype=torch.float64) for key, scalar in loss.scalars().items()}
    part = [i for i in range(NUM_PAIRS) if VALID[i]]
    excluded = masked(images, texts).excluded(range(len(part)))
    expected = torch.tensor(
        [[i != j and bool(CAPTION_KEYS[i] == CAPTION_KEYS[j] or is_false_negative(i, j)) for j in part] for i in part]
    )
    assert torch.equal(excluded, expected)
    assert 0 < sum(is_false_negative(i, j) for i in part for j in part) < len(part) ** 2 / 2
    # The same mask, told by keys: a group of its own for each combination that is left out.
    value = loss(masked(images, texts), scalars, chunk_size=3)
    by_keys = _with_mask(masked(images, texts), expected)
    torch.testing.assert_close(value, loss(by_keys, scalars, chunk_size=4), rtol=1e-12, atol=0)
    unmasked = loss(replace(masked(images, texts), teacher=None), scalars)
    assert abs((unmasked - value).item()) > 1e-3  # negative control
    for gradient in torch.autograd.grad(value, (images, texts)):
        assert gradient.isfinite().all()


def _with_mask(pairs: Pairs, mask: Tensor) -> Pairs:
    class Masked(Pairs):
        def excluded(self, rows: range) -> Tensor:
            return mask[rows.start : rows.stop]

    return Masked(pairs.images, pairs.texts, None, None, None)


def test_hard_negatives_are_negatives_whatever_the_teacher_says(unit: Callable) -> None:
    pairs = masked(*(unit(NUM_PAIRS, WIDTH, seed=seed) for seed in (1, 2)), unit(len(OWNERS), WIDTH, seed=3))
    excluded = pairs.excluded(range(len(pairs)))
    assert excluded.shape == (len(pairs), len(pairs.texts))
    assert not excluded[:, len(pairs) :].any()
    assert excluded[:, : len(pairs)].any()


@pytest.mark.parametrize("ends", [(0, 8), (0, 3, 8), (0, 1, 1, 7, 8)])
def test_the_log_counts_them_apart_from_duplicates(ends: tuple[int, ...], unit: Callable) -> None:
    """By all workers together: each counts those of its own rows."""
    pairs = masked(unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2))
    part = [i for i in range(NUM_PAIRS) if VALID[i]]
    combinations = [(i, j) for i in part for j in part if i != j]
    duplicates = sum(bool(CAPTION_KEYS[i] == CAPTION_KEYS[j]) for i, j in combinations)
    similar = sum(bool(CAPTION_KEYS[i] != CAPTION_KEYS[j]) and is_false_negative(i, j) for i, j in combinations)
    loss, scalars = find_loss(LossConfig()), {"log_scale": torch.tensor(2.0).double()}
    shares = [replace(pairs, share=range(a, b)) for a, b in pairwise(ends)]
    counted: list[Tensor] = []
    for share in shares:
        contrastive_loss(loss, share, scalars, add_up=lambda x: counted.append(x) or x)
    total = torch.stack(counted).sum(0)
    for share in shares:
        found = contrastive_loss(loss, share, scalars, add_up=lambda _: total)
        assert (int(found.duplicates), int(found.false_negatives)) == (duplicates, similar)
        assert float(found.effective_negatives) == pytest.approx((len(combinations) - duplicates - similar) / len(part))
    assert int(contrastive_loss(loss, replace(pairs, teacher=None), scalars).false_negatives) == 0  # negative control


@pytest.mark.parametrize("width", [3, 192, 4096, 8192])
def test_products_are_exact_in_whatever_order_they_are_added_up(width: int) -> None:
    """Sums below 2^24 have no rounding in float32; ten times as long, they have."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(16, width, generator=random)
    rows[0] = 1.0  # all rounded the same way, the longest or the shortest
    rows[1:4] = rows[0] + 1e-3 * torch.randn(3, width, generator=random)
    whole = to_teacher_numbers(rows)
    exact = whole.long() @ whole.long().T
    order = torch.randperm(width, generator=random)
    assert torch.equal((whole.float() @ whole.float().T).long(), exact)
    assert torch.equal((whole.float()[:, order] @ whole.float()[:, order].T).long(), exact)
    assert int(exact.max()) < 2**24
    usual = normalize(rows[4:].double(), dim=-1)
    assert (exact[4:, 4:] / TEACHER_NORM**2 - usual @ usual.T).abs().max() < 5e-4
    if width >= 4096:
        tenfold = (normalize(rows, dim=-1) * 10 * TEACHER_NORM).round()
        assert not torch.equal((tenfold @ tenfold.T).long(), tenfold.long() @ tenfold.long().T)  # negative control
