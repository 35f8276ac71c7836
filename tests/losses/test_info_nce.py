"""info_nce against a twin that lists every anchor's candidates in plain Python, against arithmetic, and in memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from vladva.losses.contrastive import contrastive_loss
from vladva.losses.info_nce import MAX_SCALE, InfoNCE
from vladva.losses.pairs import PairLoss, select_pairs

NUM_PAIRS, WIDTH = 11, 8
CASES = {
    "plain": {},
    "one-way": {"symmetric": False},
    "valid": {"valid": torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]).bool()},
    "duplicates": {
        "image_keys": torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8, 0, 10]),
        "caption_keys": torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10]),
    },
    "hard negatives": {"negatives": (NUM_PAIRS, 2)},
    "one-way, hard negatives of some": {
        "symmetric": False,
        "negatives": (5,),
        "negative_owners": torch.tensor([0, 0, 2, 6, 9]),
    },
}
CASES["everything"] = {
    **CASES["valid"],
    **CASES["duplicates"],
    "negatives": (5,),
    "negative_owners": torch.tensor([0, 0, 2, 6, 9]),
    "negative_keys": torch.tensor([1, 100, 8, 8, 4]),
    "dims": (3, 5),
}


def info_nce(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor | None = None,
    *,
    temperature: float | None = None,
    symmetric: bool = True,
    dims: tuple[int, ...] = (),
    chunk_size: int = 256,
    **columns: Tensor | None,
) -> PairLoss:
    """The loss under test, of a log scale or with a fixed temperature; `columns` are those of select_pairs."""
    loss = InfoNCE(temperature or 1.0, log_scale is not None, "symmetric" if symmetric else "one-way")
    scalars = {} if log_scale is None else {"log_scale": log_scale}
    return contrastive_loss(loss, select_pairs(images, texts, **columns), scalars, widths=dims, chunk_size=chunk_size)


def slow_info_nce(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    *,
    symmetric: bool = True,
    valid: Tensor | None = None,
    image_keys: Tensor | None = None,
    caption_keys: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_owners: Tensor | None = None,
    negative_keys: Tensor | None = None,
    dims: tuple[int, ...] = (),
) -> tuple[Tensor, float, float, int]:
    """One softmax per anchor over the candidates that a person would write down for it."""
    num_pairs = len(images)
    part = [i for i in range(num_pairs) if valid is None or valid[i]]
    image_keys = torch.arange(num_pairs) if image_keys is None else image_keys
    caption_keys = torch.arange(num_pairs) if caption_keys is None else caption_keys
    if negatives is not None and negatives.ndim == 3:
        negative_owners = torch.arange(num_pairs).repeat_interleave(negatives.shape[1])
        negatives = negatives.flatten(0, 1)
    hard = [] if negatives is None else [h for h in range(len(negatives)) if int(negative_owners[h]) in part]

    def duplicate(i: int, j: int) -> bool:
        return bool(image_keys[i] == image_keys[j] or caption_keys[i] == caption_keys[j])

    losses, hits, counts, left_out = [], [], [], 0
    for width in (images.shape[1], *dims):
        x, y, z = (
            rows if rows is None or width == rows.shape[1] else normalize(rows[:, :width], dim=-1)
            for rows in (images, texts, negatives)
        )
        for i in part:
            others = [j for j in part if j != i and not duplicate(i, j)]
            mine = [h for h in hard if negative_keys is None or negative_keys[h] != caption_keys[i]]
            anchors = [(x[i], y[i], [y[j] for j in others] + [z[h] for h in mine])]
            if symmetric:
                anchors.append((y[i], x[i], [x[j] for j in others]))
            for anchor, positive, rest in anchors:
                logits = torch.stack([anchor @ other for other in (positive, *rest)]) * log_scale.exp()
                losses.append(-logits.log_softmax(0)[0])
                if width == images.shape[1]:
                    hits += [all(bool(logits[0] > other) for other in logits[1:])] if rest else []
                    counts.append(len(rest))
            if width == images.shape[1]:
                left_out += len(part) - 1 - len(others) + len(hard) - len(mine)
    return torch.stack(losses).mean(), sum(hits) / len(hits), sum(counts) / len(counts), left_out


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", CASES)
def test_equals_slow_twin(name: str, dtype: torch.dtype, tolerance: float, chunk_size: int, unit: Callable) -> None:
    options = dict(CASES[name])
    leaves = [unit(NUM_PAIRS, WIDTH, seed=1, dtype=dtype), unit(NUM_PAIRS, WIDTH, seed=2, dtype=dtype)]
    leaves.append(torch.tensor(1.7, dtype=dtype, requires_grad=True))
    if "negatives" in options:
        options["negatives"] = unit(*options["negatives"], WIDTH, seed=3, dtype=dtype)
        leaves.append(options["negatives"])
    fast = info_nce(*leaves[:3], **options, chunk_size=chunk_size)
    loss, accuracy, negatives, duplicates = slow_info_nce(*leaves[:3], **options)

    torch.testing.assert_close(fast.loss, loss, rtol=tolerance, atol=tolerance)
    assert float(fast.accuracy) == pytest.approx(accuracy)
    assert float(fast.effective_negatives) == pytest.approx(negatives)
    assert int(fast.duplicates) == duplicates
    recalls = [fast.image_recall, fast.text_recall] if options.get("symmetric", True) else [fast.image_recall]
    assert sum(map(float, recalls)) / len(recalls) == pytest.approx(accuracy)
    grads, slow_grads = torch.autograd.grad(fast.loss, leaves), torch.autograd.grad(loss, leaves)
    for grad, slow_grad in zip(grads, slow_grads, strict=True):
        assert slow_grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, slow_grad, rtol=tolerance, atol=tolerance)


def test_options_change_the_loss(unit: Callable) -> None:
    """Negative control: were an option ignored by both the loss and its twin, all these would be equal."""
    losses = set()
    for case in CASES.values():
        options = dict(case)
        if "negatives" in options:
            options["negatives"] = unit(*options["negatives"], WIDTH, seed=3)
        loss = info_nce(
            unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2), torch.tensor(1.7), **options
        ).loss
        losses.add(round(loss.item(), 9))
    assert len(losses) == len(CASES)


def test_a_gradient_off_by_a_percent_is_noticed(unit: Callable) -> None:
    """Negative control of the comparison itself, at the tolerance of float32."""
    images, texts = unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2)
    (grad,) = torch.autograd.grad(info_nce(images, texts, torch.tensor(1.7), chunk_size=4).loss, images)
    (slow,) = torch.autograd.grad(slow_info_nce(images, texts, torch.tensor(1.7))[0], images)
    torch.testing.assert_close(grad, slow, rtol=2e-5, atol=2e-5)
    grad[3] *= 1.01
    with pytest.raises(AssertionError):
        torch.testing.assert_close(grad, slow, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 100])
def test_equal_embeddings_give_log_of_the_number_of_candidates(num_pairs: int) -> None:
    same = torch.zeros(num_pairs, 4)
    result = info_nce(same, same, torch.tensor(3.0), chunk_size=3)
    assert float(result.loss) == pytest.approx(math.log(num_pairs), abs=1e-6)
    # Ties are misses, and a pair without negatives is neither hit nor miss.
    assert float(result.accuracy) == pytest.approx(math.nan if num_pairs == 1 else 0, nan_ok=True)
    assert float(result.effective_negatives) == num_pairs - 1
    one_way = info_nce(same, same, temperature=0.05, symmetric=False, negatives=torch.zeros(num_pairs, 3, 4))
    assert float(one_way.loss) == pytest.approx(math.log(4 * num_pairs), abs=1e-6)
    assert float(one_way.effective_negatives) == 4 * num_pairs - 1


def test_orthogonal_pairs_by_arithmetic() -> None:
    """Unit matrix: each anchor has one logit t and G - 1 logits 0, so L = log(1 + (G - 1) exp(-t))."""
    eye = torch.eye(5, dtype=torch.float64)
    result = info_nce(eye, eye, temperature=0.5, chunk_size=2)
    assert float(result.loss) == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-12)
    assert float(result.accuracy) == 1


def test_small_losses_keep_their_precision_in_float32() -> None:
    """A loss of 5e-6 at a scale of 60: the usual log-sum-exp minus the logit rounds numbers of 60."""
    images = normalize(torch.eye(5) + 0.6, dim=-1)
    exact = float(info_nce(images.double(), images.double(), temperature=1 / 60).loss)
    assert 1e-6 < exact < 1e-5
    assert float(info_nce(images, images, temperature=1 / 60).loss) == pytest.approx(exact, abs=2e-7)
    logits = images @ images.T * 60
    usual = float((logits.logsumexp(1) - logits.diagonal()).mean())
    assert usual != pytest.approx(exact, abs=2e-7)  # negative control


def test_scale_is_clamped(unit: Callable) -> None:
    images, texts = unit(6, 4, seed=1), unit(6, 4, seed=2)
    log_scale = torch.tensor(math.log(MAX_SCALE) + 1, dtype=torch.float64, requires_grad=True)
    loss = info_nce(images, texts, log_scale).loss
    assert loss.item() == pytest.approx(info_nce(images, texts, temperature=1 / MAX_SCALE).loss.item(), rel=1e-12)
    assert float(torch.autograd.grad(loss, log_scale)[0]) == 0


def test_invalid_pairs_take_no_part_at_all(unit: Callable) -> None:
    """Whatever stands in the row of an invalid pair, the loss is that of the others alone; so are the gradients."""
    images, texts = unit(7, 4, seed=1), unit(7, 4, seed=2)
    valid = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    alone = info_nce(images[valid], texts[valid], torch.tensor(2.0))
    changed = texts.detach().clone()
    changed[~valid] = torch.nan
    result = info_nce(images, changed, torch.tensor(2.0), valid=valid)
    assert result == alone
    (grad,) = torch.autograd.grad(result.loss, images)
    assert not grad[~valid].any()
    assert grad[valid].all()


def test_no_valid_pair_gives_zero_and_zero_gradients(unit: Callable) -> None:
    images, texts, log_scale = unit(3, 4, seed=1), unit(3, 4, seed=2), torch.tensor(2.0, requires_grad=True)
    options = {"valid": torch.zeros(3, dtype=torch.bool), "negatives": unit(3, 2, 4, seed=3), "dims": (2,)}
    result = info_nce(images, texts, log_scale, **options)
    assert [result.loss.item(), result.effective_negatives.item(), result.duplicates.item()] == [0, 0, 0]
    assert all(math.isnan(x) for x in (result.accuracy, result.image_recall, result.text_recall))
    for grad in torch.autograd.grad(result.loss, (images, texts, log_scale)):
        assert not grad.any()


def test_ranks_together_have_the_gradient_of_one_process(unit: Callable) -> None:
    """Each rank holds all rows, only its own with gradient; put together, these are the gradient of the whole."""
    images, texts = unit(12, 4, seed=1), unit(12, 4, seed=2)
    (whole,) = torch.autograd.grad(info_nce(images, texts, torch.tensor(2.0)).loss, images)
    for own in (slice(0, 5), slice(5, 12)):
        mine = images.detach()[own].requires_grad_()
        gathered = torch.cat([images.detach()[: own.start], mine, images.detach()[own.stop :]])
        (grad,) = torch.autograd.grad(info_nce(gathered, texts.detach(), torch.tensor(2.0)).loss, mine)
        torch.testing.assert_close(grad, whole[own], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ends", [(0, 4, 11), (0, 1, 1, 7, 11)])
def test_the_shares_of_several_workers_add_up(unit: Callable, name: str, ends: tuple[int, ...]) -> None:
    """Each worker its own rows and columns: value, gradients and figures are those of the whole, to the last digits."""
    case = dict(CASES[name])
    dims, symmetric = case.pop("dims", ()), case.pop("symmetric", True)
    if "negatives" in case:
        case["negatives"] = unit(*case["negatives"], WIDTH, seed=3)
    images, texts = unit(NUM_PAIRS, WIDTH, seed=1), unit(NUM_PAIRS, WIDTH, seed=2)
    log_scale = torch.tensor(2.0, dtype=images.dtype, requires_grad=True)
    loss = InfoNCE(1.0, True, "symmetric" if symmetric else "one-way")
    pairs = select_pairs(images, texts, **case)
    inputs = (images, texts, log_scale)
    whole = contrastive_loss(loss, pairs, {"log_scale": log_scale}, widths=dims, chunk_size=3)
    expected = torch.autograd.grad(whole.loss, inputs, retain_graph=True)

    ends = sorted({min(end, len(pairs)) for end in ends})  # with `valid` fewer pairs take part
    shares = [replace(pairs, share=range(a, b)) for a, b in pairwise(ends)]
    if len(ends) > 3:
        shares.append(replace(pairs, share=range(1, 1)))  # a worker whose pairs are all without caption
    counted: list[Tensor] = []
    for share in shares:
        contrastive_loss(loss, share, {"log_scale": log_scale}, add_up=lambda x: counted.append(x) or x, chunk_size=3)
    total = torch.stack(counted).sum(0)
    found = [
        contrastive_loss(loss, share, {"log_scale": log_scale}, widths=dims, chunk_size=3, add_up=lambda _: total)
        for share in shares
    ]
    torch.testing.assert_close(sum(each.loss for each in found), whole.loss, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(each.loss, inputs, retain_graph=True) for each in found]
    for parts, gradient in zip(zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-10, atol=1e-14)
    for each in found:
        for figure, of_whole in zip(each[1:], whole[1:], strict=True):
            torch.testing.assert_close(figure, of_whole, equal_nan=True)
    some = sum(each.loss for each in found[1:])
    assert abs(float(some - whole.loss)) > 1e-3  # negative control: one share is missing


def test_alike_captions_leave_nothing_to_count(unit: Callable) -> None:
    """Sixteen images captioned alike have no negatives: no accuracy, no gradient. One other caption changes it."""
    images, texts = unit(16, 4, seed=1), unit(16, 4, seed=2)
    alike = info_nce(images, texts, torch.tensor(2.0), caption_keys=torch.zeros(16, dtype=torch.long))
    assert math.isnan(alike.accuracy)
    assert (alike.effective_negatives, alike.duplicates) == (0, 16 * 15)
    assert not torch.autograd.grad(alike.loss, images)[0].any()
    keys = torch.zeros(16, dtype=torch.long)
    keys[3] = 1
    other = info_nce(images, texts, torch.tensor(2.0), caption_keys=keys)
    assert 0 <= other.accuracy <= 1
    assert float(other.effective_negatives) == pytest.approx((15 + 15) / 16)


def test_a_width_that_is_no_part_is_refused(unit: Callable) -> None:
    images, texts = unit(3, 4, seed=1), unit(3, 4, seed=2)
    with pytest.raises(ValueError, match=r"dims: 4 .* width 4"):
        info_nce(images, texts, temperature=0.1, dims=(4,))


def test_memory_grows_with_the_batch_not_with_its_square(unit: Callable, peak_bytes: Callable) -> None:
    """Twice the pairs, twice the peak; negative control: the plain formula takes four times as much."""
    keys = torch.arange(2048) // 2

    def step(size: int, *, plain: bool) -> int:
        images, texts = (unit(size, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
        log_scale = torch.tensor(2.0, requires_grad=True)

        def call() -> None:
            if plain:
                logits = images @ texts.T * log_scale.exp()
                loss = (cross_entropy(logits, torch.arange(size)) + cross_entropy(logits.T, torch.arange(size))) / 2
            else:
                loss = info_nce(images, texts, log_scale, image_keys=keys[:size], chunk_size=64).loss
            loss.backward()

        return peak_bytes(call)

    assert 1.8 < step(2048, plain=False) / step(1024, plain=False) < 2.2
    assert 3.6 < step(1024, plain=True) / step(512, plain=True) < 4.4
    assert step(1024, plain=False) < step(1024, plain=True) / 6
