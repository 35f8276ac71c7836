"""next_token against full logits, against arithmetic, and in memory."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vladva.losses.next_token import cross_entropy_sum, next_token, next_token_from_logits

VOCABULARY, WIDTH = 50, 16


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [3, 9, D], weight [V, D], labels [3, 9]: a caption; nothing to predict; a caption after a prompt."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (3, 9), generator=generator)
    labels[1] = -100
    labels[2, :4] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("chunk_size", [1, 3, 13, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_full_logits(dtype: torch.dtype, tolerance: float, chunk_size: int) -> None:
    hidden, weight, labels = batch(dtype)
    loss = next_token(hidden, weight, labels, 40, chunk_size=chunk_size)
    plain = next_token_from_logits(hidden @ weight.T, labels, 40)
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=tolerance)
    grads, plain_grads = (
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * plain, (hidden, weight)),
    )
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        assert plain_grad.abs().max() > 1e-2
        torch.testing.assert_close(grad, plain_grad, rtol=tolerance, atol=tolerance)


def test_replaced_rows_are_trained_without_a_gradient_of_the_weight() -> None:
    hidden, weight, labels = batch(torch.float64)
    rows = torch.tensor([7, 3, 49])
    own = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    labels[0, 3:6] = rows
    loss = cross_entropy_sum(hidden[0], weight.detach(), labels[0], replaced=(rows, own), chunk_size=4)
    whole = weight.detach().index_copy(0, rows, own)
    plain = torch.nn.functional.cross_entropy(hidden[0] @ whole.T, labels[0], reduction="sum")
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for grad, plain_grad in zip(
        torch.autograd.grad(loss, (hidden, own)), torch.autograd.grad(plain, (hidden, own)), strict=True
    ):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-12)
    unreplaced = cross_entropy_sum(hidden[0], weight.detach(), labels[0])
    assert unreplaced.item() != pytest.approx(plain.item(), rel=1e-3)  # negative control


def test_plain_loss_by_hand() -> None:
    """The sum over 8 + 5 positions of -log softmax, each position scored against the token that follows."""
    hidden, weight, labels = batch(torch.float64)
    total = 0.0
    for sample, first in ((0, 1), (2, 4)):
        for t in range(first, 9):
            logits = (weight @ hidden[sample, t - 1]).tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[labels[sample, t]]
    assert next_token_from_logits(hidden @ weight.T, labels, 13).item() == pytest.approx(total / 13, rel=1e-12)
    assert next_token(hidden, weight, labels, torch.tensor(13)).item() == pytest.approx(total / 13, rel=1e-12)
    unshifted = cross_entropy_sum(hidden[0], weight, labels[0]) + cross_entropy_sum(
        hidden[2, 4:], weight, labels[2, 4:]
    )
    assert unshifted.item() / 13 != pytest.approx(total / 13, rel=1e-3)  # negative control


def test_shares_of_parts_add_up_to_the_global_mean() -> None:
    """A mean per part would weigh the caption of 5 tokens like the one of 8."""
    hidden, weight, labels = batch(torch.float64)
    whole = next_token(hidden, weight, labels, 13)
    shares = [next_token(hidden[i : i + 1], weight, labels[i : i + 1], 13) for i in range(3)]
    torch.testing.assert_close(sum(shares), whole)
    means = [next_token(hidden[i : i + 1], weight, labels[i : i + 1], count) for i, count in ((0, 8), (2, 5))]
    assert (sum(means) / 2).item() != pytest.approx(whole.item(), rel=1e-3)


def test_zero_hidden_states_give_log_of_the_vocabulary() -> None:
    _, weight, labels = batch(torch.float32)
    assert next_token(torch.zeros(3, 9, WIDTH), weight, labels, 13).item() == pytest.approx(
        math.log(VOCABULARY), rel=1e-6
    )


def test_nothing_to_predict_gives_zero_and_zero_gradients() -> None:
    hidden, weight, labels = batch(torch.float32)
    loss = next_token(hidden, weight, torch.full_like(labels, -100), 0)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = batch(torch.float64)
    (expected,) = torch.autograd.grad(next_token(hidden, weight, labels, 13), hidden)
    next_token(hidden, weight.detach(), labels, 13).backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=0)
    with torch.no_grad():
        assert not next_token(hidden, weight, labels, 13).requires_grad


def test_bfloat16_sums_in_float32() -> None:
    """Expected from the same bfloat16 logits, summed in float64; the sum in bfloat16 would be off by up to 0.4%."""
    hidden, weight, labels = batch(torch.bfloat16)
    loss = next_token(hidden, weight, labels, 13)
    expected = next_token_from_logits((hidden @ weight.T).double(), labels, 13)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads, exact = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    for grad, exact_grad in zip(grads, exact, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad - exact_grad).norm() < 0.01 * exact_grad.norm()


def test_logits_are_never_held_for_all_positions(peak_bytes: Callable) -> None:
    """The peak is a few chunks of logits for any number of positions, and a fraction of what full logits take."""
    weight = torch.randn(2000, 8)

    def step(num_positions: int, *, plain: bool = False) -> int:
        hidden = torch.randn(1, num_positions, 8, requires_grad=True)
        labels = torch.randint(0, 2000, (1, num_positions))
        if plain:
            return peak_bytes(lambda: next_token_from_logits(hidden @ weight.T, labels, 100).backward())
        return peak_bytes(lambda: next_token(hidden, weight, labels, 100, chunk_size=64).backward())

    assert step(2048) < 1.3 * step(1024)
    assert step(2048) < 4 * 64 * 2000 * 4 + 2048 * 8 * 4 * 8
    assert step(2048) < step(2048, plain=True) / 8
