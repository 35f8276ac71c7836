"""Gradients of a loss over the global batch, from chunks, exact under data parallelism.

A contrastive loss needs every embedding of the global batch at once, a forward pass only ever holds one chunk:

1. embed the rank's chunks without gradients,
2. gather the embeddings of all ranks, compute the loss and its gradient with respect to the rank's own embeddings,
3. run each chunk again, now with gradients, and back-propagate <embedding, its cached gradient> plus the chunk's own
   caption loss.

By the chain rule the parameters get the gradient of one big batch. When the activations of all chunks fit, the single
pass does the same without the second forward. (Gao et al., arXiv 2101.06983.)

Every rank computes the same contrastive loss, and its own share of the caption loss; the engine averages gradients over
the W ranks, hence the factors W below. c chunks a rank, b pairs a chunk, G pairs in the global batch, D width.

Where W does not divide the chunks of a global batch, some ranks have one less. They run their last one again, at weight
zero: every rank must take part in each forward and backward (ZeRO-3 gathers parameters there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, distributed

from vladva.losses.pairs import PairLoss
from vladva.models.batch import MicroBatch, as_tensors

if TYPE_CHECKING:
    from vladva.models.batch import Tokens

KEPT_FEATURES = 1 << 30  # bytes of image features that a worker keeps from step 1 to step 3

Contrastive = Callable[..., PairLoss]
"""images [G, D], texts [G, D], scalars [2] (log scale, bias); the columns of `GlobalBatch` by name."""


class Backward(Protocol):
    """What is needed of an engine: the model's forward, and a backward that knows the last call of a step."""

    device: torch.device

    def __call__(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None = None, *, caption_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def see(self, pixels: dict[str, Tensor] | None) -> dict[str, Tensor] | None: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...


@dataclass
class StepLoss:
    """The losses of one global batch, without gradient, equal on every rank; scalars: log scale and bias."""

    contrastive: PairLoss
    next_token: Tensor
    scalars: Tensor
    caption_tokens: int


@dataclass
class GlobalBatch:
    """What is known of the rows of gathered matrices: of G pairs, and of H hard-negative captions if there are any."""

    valid: Tensor  # bool [G]
    image_keys: Tensor  # [G]
    caption_keys: Tensor  # [G]
    negatives: Tensor | None = None  # [H, D]
    negative_owners: Tensor | None = None  # [H]
    negative_keys: Tensor | None = None  # [H]


def world() -> tuple[int, int]:
    """(rank, W); (0, 1) outside a process group."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gather(own: Tensor) -> Tensor:
    """Rows of all ranks, [n, ...] -> [W n, ...]; only the rank's own rows carry gradient."""
    rank, size = world()
    if size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(size)]
    distributed.all_gather(parts, own.detach().contiguous())
    parts[rank] = own
    return torch.cat(parts)


def gather_ragged(own: Tensor) -> Tensor:
    """As `gather`, where ranks have different numbers of rows, or none."""
    if world()[1] == 1:
        return own
    counts = gather(torch.tensor([len(own)], device=own.device)).tolist()
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), *own.shape[1:])])
    rows = gather(padded).view(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


def total(value: Tensor) -> Tensor:
    """Sum over the ranks."""
    value = value.detach().clone()
    if world()[1] > 1:
        distributed.all_reduce(value)
    return value


def global_loss(
    contrastive: Contrastive, chunks: Sequence[MicroBatch], images: list[Tensor], texts: list[Tensor], scalars: Tensor
) -> PairLoss:
    """The contrastive loss of the global batch from each own chunk's images [b, D] and texts [b + n, D].

    Rows are ordered by rank, then by chunk, the hard negatives after all captions.
    """
    device, rank = scalars.device, world()[0]
    pairs = [len(chunk.image_keys) for chunk in chunks]
    first = int(gather(torch.tensor([sum(pairs)], device=device))[:rank].sum())
    keys, owners = [], []
    for chunk, count in zip(chunks, pairs, strict=True):
        keys.append(torch.tensor(chunk.caption_keys, device=device))
        owners.append(torch.tensor(chunk.text_owners, device=device) + first)
        first += count

    def captions(columns: list[Tensor]) -> Tensor:
        return gather_ragged(torch.cat([column[:count] for column, count in zip(columns, pairs, strict=True)]))

    def negatives(columns: list[Tensor]) -> Tensor:
        return gather_ragged(torch.cat([column[count:] for column, count in zip(columns, pairs, strict=True)]))

    columns = GlobalBatch(
        gather_ragged(torch.cat([torch.tensor(chunk.has_short, device=device) for chunk in chunks]).long()).bool(),
        gather_ragged(torch.cat([torch.tensor(chunk.image_keys, device=device) for chunk in chunks])),
        captions(keys),
    )
    owners_H = negatives(owners)
    if len(owners_H):
        columns.negatives, columns.negative_owners, columns.negative_keys = negatives(texts), owners_H, negatives(keys)
    return contrastive(gather_ragged(torch.cat(images)), captions(texts), scalars, **vars(columns))


def weighted(chunks: Sequence[MicroBatch], device: torch.device) -> list[tuple[MicroBatch, float]]:
    """The chunks at weight 1, and the last one again at weight 0 until every rank has as many."""
    most = int(gather(torch.tensor([len(chunks)], device=device)).max())
    return [(chunk, 1.0) for chunk in chunks] + [(chunks[-1], 0.0)] * (most - len(chunks))


def count_caption_tokens(chunks: Sequence[MicroBatch], device: torch.device) -> int:
    """Caption tokens (with their end tokens) in the global batch."""
    own = sum(int((chunk.image.lengths - chunk.image.prompt_lengths).sum()) for chunk in chunks)
    return int(total(torch.tensor(own, device=device)))


def pixels_of(chunk: MicroBatch, device: torch.device) -> dict[str, Tensor] | None:
    """The images on the device; None where the chunk has texts in their stead."""
    return None if chunk.pixels is None else as_tensors(chunk.pixels, device)


def prompts_only(tokens: Tokens, device: torch.device) -> dict[str, Tensor]:
    """The tokens without the captions that follow the prompt: all that an embedding needs, as attention is causal."""
    width = int(tokens.prompt_lengths.max())
    cut = as_tensors(tokens, device)
    return cut | {"ids": cut["ids"][:, :width], "lengths": cut["prompt_lengths"]}


def single_pass(
    engine: Backward, chunks: Sequence[MicroBatch], contrastive: Contrastive, *, next_token_weight: float
) -> StepLoss:
    """Forward all chunks, keep their activations, one backward."""
    size, device = world()[1], engine.device
    tokens = count_caption_tokens(chunks, device) if next_token_weight else 0
    images, texts, captions = [], [], []
    idle = torch.zeros((), device=device)
    for chunk, weight in weighted(chunks, device):
        inputs = as_tensors(chunk.image, device) if tokens else prompts_only(chunk.image, device)
        image, caption_loss, _ = engine(inputs, pixels_of(chunk, device), caption_tokens=tokens or None)
        text, _, scalars = engine(as_tensors(chunk.text, device))
        if not weight:
            idle = idle + 0.0 * (image.sum() + text.sum() + caption_loss)
            continue
        images.append(image)
        texts.append(text)
        captions.append(caption_loss)
    # Every rank has the whole gradient of the scalars: a W-th of it on each adds up to one.
    shared_scalars = scalars / size + (scalars * (1 - 1 / size)).detach()
    loss = global_loss(contrastive, chunks, images, texts, shared_scalars)
    caption_loss = torch.stack(captions).sum()
    engine.backward(size * (loss.loss + next_token_weight * caption_loss) + idle, last=True)
    return StepLoss(detached(loss), total(caption_loss), scalars.detach(), tokens)


def cached(
    engine: Backward,
    chunks: Sequence[MicroBatch],
    contrastive: Contrastive,
    *,
    next_token_weight: float,
    dropout: bool = False,
) -> StepLoss:
    """The three steps above: memory of one chunk, whatever the batch.

    dropout: whether the model draws random numbers. Then step 1 runs over the captions, too: a mask is drawn for a
    whole tensor, and step 3 must draw the same one.
    """
    size, device = world()[1], engine.device
    tokens = count_caption_tokens(chunks, device) if next_token_weight else 0
    own, passes = len(chunks), weighted(chunks, device)

    states, images, texts, seen = [], [], [], []
    for i, (chunk, _) in enumerate(passes):
        newest = i == len(passes) - 1  # its graph is kept: step 3 begins with it
        with torch.set_grad_enabled(newest):
            whole = tokens and (dropout or newest)
            inputs = as_tensors(chunk.image, device) if whole else prompts_only(chunk.image, device)
            pixels = engine.see(pixels_of(chunk, device))
            seen.append(keep(pixels, seen))
            before_image = rng_state(device)
            image, caption_loss, _ = engine(inputs, pixels, caption_tokens=(tokens or None) if newest else None)
            states.append((before_image, rng_state(device)))
            text, _, scalars = engine(as_tensors(chunk.text, device))
        images.append(image)
        texts.append(text)
    newest_outputs = images[-1], texts[-1], caption_loss, scalars
    after = rng_state(device)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*images[:own], *texts[:own], scalars)]
    images, texts, scalars = leaves[:own], leaves[own:-1], leaves[-1]
    loss = global_loss(contrastive, chunks, images, texts, scalars)
    gradients = torch.autograd.grad(loss.loss, leaves, materialize_grads=True)  # a fixed temperature has none

    caption_total = torch.zeros((), device=device)
    for i in reversed(range(len(passes))):
        chunk, weight = passes[i]
        if i == len(passes) - 1:
            image, text, caption_loss, own_scalars = newest_outputs
            del newest_outputs
        else:
            inputs = as_tensors(chunk.image, device) if tokens else prompts_only(chunk.image, device)
            pixels = seen[i] or engine.see(pixels_of(chunk, device))
            set_rng_state(states[i][0], device)  # the same dropout as in step 1
            image, caption_loss, _ = engine(inputs, pixels, caption_tokens=tokens or None)
            set_rng_state(states[i][1], device)
            text, _, own_scalars = engine(as_tensors(chunk.text, device))
        number = min(i, own - 1)
        surrogate = (image * gradients[number]).sum() + (text * gradients[own + number]).sum()
        surrogate = weight * (surrogate + next_token_weight * caption_loss)
        surrogate = surrogate + (own_scalars * gradients[-1]).sum() / (size * len(passes))
        engine.backward(size * surrogate, last=i == 0)
        caption_total += weight * caption_loss.detach()
    set_rng_state(after, device)
    return StepLoss(detached(loss), total(caption_total), scalars.detach(), tokens)


def keep(pixels: dict[str, Tensor] | None, kept: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """The images as the vision tower gave them, for step 3, as long as there is room for those of another chunk."""
    if pixels is None or "features" not in pixels:
        return None
    there = [each["features"] for each in kept if each is not None] + [pixels["features"]]
    return pixels if sum(features.nbytes for features in there) <= KEPT_FEATURES else None


def detached(loss: PairLoss) -> PairLoss:
    """The loss and its statistics without graph."""
    return PairLoss(*(value.detach() for value in loss))


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Restore what `rng_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
