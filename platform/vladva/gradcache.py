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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, distributed

from vladva.batches import Batch
from vladva.embedder import as_tensors
from vladva.losses.pairs import PairLoss

if TYPE_CHECKING:
    from vladva.batches import Tokens

Contrastive = Callable[..., PairLoss]
"""images [G, D], texts [G, D], log scale; valid, image_keys, caption_keys [G] by name."""


class Backward(Protocol):
    """What is needed of an engine: the model's forward, and a backward that knows the last call of a step."""

    device: torch.device

    def __call__(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None = None, *, caption_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...


@dataclass
class StepLoss:
    """The losses of one global batch, without gradient, equal on every rank."""

    contrastive: PairLoss
    next_token: Tensor
    log_scale: Tensor
    caption_tokens: int


@dataclass
class Pair:
    """Which pairs the rows of a gathered matrix are: validity and duplicate keys, each [G]."""

    valid: Tensor
    image_keys: Tensor
    caption_keys: Tensor


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


def total(value: Tensor) -> Tensor:
    """Sum over the ranks."""
    value = value.detach().clone()
    if world()[1] > 1:
        distributed.all_reduce(value)
    return value


def gathered_pairs(chunks: Sequence[Batch], device: torch.device) -> Pair:
    """Validity and keys of the whole global batch, in the order in which `gather` puts embeddings."""

    def column(name: str) -> Tensor:
        return gather(torch.cat([torch.tensor(getattr(chunk, name)) for chunk in chunks]).to(device))

    return Pair(column("has_short").bool(), column("image_keys"), column("caption_keys"))


def count_caption_tokens(chunks: Sequence[Batch], device: torch.device) -> int:
    """Caption tokens (with their end tokens) in the global batch."""
    own = sum(int((chunk.image.lengths - chunk.image.prompt_lengths).sum()) for chunk in chunks)
    return int(total(torch.tensor(own, device=device)))


def prompts_only(tokens: Tokens, device: torch.device) -> dict[str, Tensor]:
    """The tokens without the captions that follow the prompt: all that an embedding needs, as attention is causal."""
    width = int(tokens.prompt_lengths.max())
    cut = as_tensors(tokens, device)
    return cut | {"ids": cut["ids"][:, :width], "lengths": cut["prompt_lengths"]}


def single_pass(
    engine: Backward, chunks: Sequence[Batch], contrastive: Contrastive, *, next_token_weight: float
) -> StepLoss:
    """Forward all chunks, keep their activations, one backward."""
    size = world()[1]
    tokens = count_caption_tokens(chunks, engine.device) if next_token_weight else 0
    images, texts, captions = [], [], []
    for chunk in chunks:
        image_side = chunk.image if tokens else None
        inputs = as_tensors(chunk.image, engine.device) if image_side else prompts_only(chunk.image, engine.device)
        pixels = as_tensors(chunk.pixels, engine.device)
        embedding, caption_loss, _ = engine(inputs, pixels, caption_tokens=tokens or None)
        images.append(embedding)
        captions.append(caption_loss)
        embedding, _, log_scale = engine(as_tensors(chunk.text, engine.device))
        texts.append(embedding)
    pairs = gathered_pairs(chunks, engine.device)
    # Every rank has the whole gradient of the scale: a W-th of it on each adds up to one.
    shared_scale = log_scale / size + (log_scale * (1 - 1 / size)).detach()
    loss = contrastive(gather(torch.cat(images)), gather(torch.cat(texts)), shared_scale, **vars(pairs))
    caption_loss = torch.stack(captions).sum()
    engine.backward(size * (loss.loss + next_token_weight * caption_loss), last=True)
    return StepLoss(detached(loss), total(caption_loss), log_scale.detach(), tokens)


def cached(
    engine: Backward, chunks: Sequence[Batch], contrastive: Contrastive, *, next_token_weight: float
) -> StepLoss:
    """The three steps above: memory of one chunk, whatever the batch."""
    size = world()[1]
    device = engine.device
    tokens = count_caption_tokens(chunks, device) if next_token_weight else 0

    states, images, texts = [], [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(rng_state(device))
            images.append(engine(prompts_only(chunk.image, device), as_tensors(chunk.pixels, device))[0])
            embedding, _, log_scale = engine(as_tensors(chunk.text, device))
            texts.append(embedding)
    after = rng_state(device)

    own = [torch.stack(part).flatten(0, 1).requires_grad_() for part in (images, texts)]
    scale = log_scale.detach().clone().requires_grad_()
    pairs = gathered_pairs(chunks, device)
    loss = contrastive(gather(own[0]), gather(own[1]), scale, **vars(pairs))
    scale_gradient = torch.zeros_like(scale)
    gradients = torch.autograd.grad(loss.loss, [*own, scale], allow_unused=True)
    if gradients[2] is not None:  # a fixed temperature has none
        scale_gradient = gradients[2]
    image_gradients, text_gradients = (g.view(len(chunks), -1, g.shape[-1]) for g in gradients[:2])

    caption_total = torch.zeros((), device=device)
    for i, chunk in enumerate(chunks):
        set_rng_state(states[i], device)  # the same dropout as in step 1
        inputs = as_tensors(chunk.image, device) if tokens else prompts_only(chunk.image, device)
        image, caption_loss, _ = engine(inputs, as_tensors(chunk.pixels, device), caption_tokens=tokens or None)
        text, _, log_scale = engine(as_tensors(chunk.text, device))
        surrogate = (image * image_gradients[i]).sum() + (text * text_gradients[i]).sum()
        surrogate = surrogate + log_scale * scale_gradient / (size * len(chunks))
        engine.backward(size * (surrogate + next_token_weight * caption_loss), last=i == len(chunks) - 1)
        caption_total += caption_loss.detach()
    set_rng_state(after, device)
    return StepLoss(detached(loss), total(caption_total), scale.detach(), tokens)


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
