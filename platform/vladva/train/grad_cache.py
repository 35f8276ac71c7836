"""Gradients of a loss over the global batch, from chunks, exact under data parallelism.

A contrastive loss needs every embedding of the global batch at once, a forward pass only ever holds one chunk:

1. embed the rank's chunks without gradients,
2. gather the embeddings of all ranks, compute the loss and its gradient with respect to the rank's own embeddings,
3. run each chunk again, now with gradients, and back-propagate <embedding, its cached gradient> plus the chunk's own
   caption loss.

By the chain rule the parameters get the gradient of one big batch. When the activations of all chunks fit, the single
pass does the same without the second forward. (Gao et al., arXiv 2101.06983.)

The engine averages gradients over the W ranks, hence the factors W below. Every rank computes its own share of the
caption loss. Of the contrastive loss one or two ranks compute the whole; more compute each their own rows and columns
of the matrix of similarities, which share only a corner, and exchange the gradients of the embeddings. b pairs a chunk,
n hard negatives in it, S scalars of the contrastive loss, D width.

Where W does not divide the chunks of a global batch, some ranks have one less. They run their last one again, at weight
zero: every rank must take part in each forward and backward (ZeRO-3 gathers parameters there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from vladva.losses.pairs import PairLoss, Pairs
from vladva.models.batch import MicroBatch
from vladva.train.collectives import all_reduce_sum, gather, rank_and_world
from vladva.train.device_chunk import DeviceChunk, feed
from vladva.train.global_batch import gather_batch

if TYPE_CHECKING:
    from vladva.models.batch import Tokens

SHARING_RANKS = 3  # from so many on, rows and columns of one rank are fewer entries than the whole matrix
KEPT_FEATURES = 1 << 30  # bytes of image features that a worker keeps from step 1 to step 3

Contrastive = Callable[[Pairs, Tensor], PairLoss]
"""The pairs of the global batch, and the loss's scalars [S]."""


class Backward(Protocol):
    """What is needed of an engine: the model's forward, and a backward that knows the last call of a step."""

    device: torch.device
    scalars: Tensor
    """[S] the loss's scalars in float32, where the model's own may be rounded."""

    def __call__(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None = None, *, caption_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def vision_features(self, pixels: dict[str, Tensor] | None) -> dict[str, Tensor] | None: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...


@dataclass
class StepLoss:
    """The losses of one global batch, without gradient, equal on every rank; scalars: [S]."""

    contrastive: PairLoss
    next_token: Tensor
    scalars: Tensor
    caption_tokens: int


class Outputs(NamedTuple):
    """What the model gives for one chunk."""

    image: Tensor  # [b, D]
    text: Tensor  # [b + n, D]
    caption_loss: Tensor  # 0-d
    scalars: Tensor  # [S]


@dataclass
class Pass:
    """One chunk on its way through the model, twice."""

    chunk: MicroBatch
    weight: float  # 0 for a chunk that runs again because other ranks have one more
    index: int  # which of the rank's chunks it is
    features: dict[str, Tensor] | None = None  # its images as the vision tower gave them, where they are kept
    rng_states: list[RngState] | None = None  # before its images and before its texts, the first time


def padded_passes(chunks: Sequence[MicroBatch], device: torch.device) -> list[Pass]:
    """The chunks at weight 1, and the last one again at weight 0 until every rank has as many."""
    most = int(gather(torch.tensor([len(chunks)], device=device)).max())
    last = len(chunks) - 1
    again = [Pass(chunks[last], 0.0, last) for _ in range(most - len(chunks))]
    return [Pass(chunk, 1.0, i) for i, chunk in enumerate(chunks)] + again


def count_caption_tokens(chunks: Sequence[MicroBatch], device: torch.device) -> int:
    """Caption tokens (with their end tokens) in the global batch."""
    local = sum(int((chunk.image.lengths - chunk.image.prompt_lengths).sum()) for chunk in chunks)
    return int(all_reduce_sum(torch.tensor(local, device=device)))


def prompts_only(tokens: Tokens, on_device: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens without the captions that follow the prompt: all that an embedding needs, as attention is causal."""
    width = int(tokens.prompt_lengths.max())  # of the host's copy: nobody waits for the device
    prompts = on_device | {"ids": on_device["ids"][:, :width], "lengths": on_device["prompt_lengths"]}
    if "host_ids" in on_device:
        prompts |= {"host_ids": on_device["host_ids"][:, :width], "host_lengths": on_device["host_prompt_lengths"]}
    return prompts


# ------------------------------------------------------------------------------------------------------ the two paths


def single_pass(
    engine: Backward,
    chunks: Sequence[MicroBatch],
    contrastive: Contrastive,
    *,
    next_token_weight: float,
    mask_duplicates: bool = True,
    false_negatives_above: float | None = None,
) -> StepLoss:
    """Forward all chunks, keep their activations, one backward."""
    world, device = rank_and_world()[1], engine.device
    tokens = count_caption_tokens(chunks, device) if next_token_weight else 0
    images, texts, captions = [], [], []
    idle = torch.zeros((), device=device)
    passes = padded_passes(chunks, device)
    for each, there in zip(passes, feed([(each.chunk, True) for each in passes], device), strict=True):
        found = forward(engine, each, there, there.pixels, captions=bool(tokens), caption_tokens=tokens or None)
        if each.weight:
            images.append(found.image)
            texts.append(found.text)
            captions.append(found.caption_loss)
        else:
            idle = idle + 0.0 * (found.image.sum() + found.text.sum() + found.caption_loss)
    # The scalars' exact values, with the gradient of the model's own.
    scalars = engine.scalars + (found.scalars - found.scalars.detach())
    shared = world >= SHARING_RANKS
    if not shared:  # every rank has the whole gradient of the scalars: a W-th of it on each adds up to one
        scalars = scalars / world + (scalars * (1 - 1 / world)).detach()
    batch = gather_batch(chunks, images, texts, shared=shared)
    pairs = batch.pairs(mask_duplicates=mask_duplicates, false_negatives_above=false_negatives_above)
    loss = contrastive(pairs, scalars)
    caption_loss = torch.stack(captions).sum()
    engine.backward(world * (loss.loss + next_token_weight * caption_loss) + idle, last=True)
    return StepLoss(of_all_ranks(loss, shared), all_reduce_sum(caption_loss), engine.scalars.clone(), tokens)


def cached(
    engine: Backward,
    chunks: Sequence[MicroBatch],
    contrastive: Contrastive,
    *,
    next_token_weight: float,
    mask_duplicates: bool = True,
    false_negatives_above: float | None = None,
    dropout: bool = False,
) -> StepLoss:
    """The three steps above: memory of one chunk, whatever the batch.

    dropout: whether the model draws random numbers. Then step 1 runs over the captions, too: a mask is drawn for a
    whole tensor, and step 3 must draw the same one.
    """
    world, device = rank_and_world()[1], engine.device
    tokens = count_caption_tokens(chunks, device) if next_token_weight else 0
    passes = padded_passes(chunks, device)
    newest = passes[-1]  # its graph is kept: step 3 begins with it

    # --- step 1: embeddings, without gradients but for the newest pass
    outputs: list[Outputs] = []
    for each, there in zip(passes, feed([(each.chunk, True) for each in passes], device), strict=True):
        with torch.set_grad_enabled(each is newest):
            pixels = engine.vision_features(there.pixels)
            each.features = keep_features(pixels, [other.features for other in passes])
            whole = bool(tokens) and (dropout or each is newest)
            found = forward(
                engine, each, there, pixels, captions=whole, caption_tokens=tokens or None if each is newest else None
            )
        outputs.append(found)
    newest_outputs, after = outputs[-1], rng_state(device)

    # --- step 2: the loss of the global batch, and its gradient with respect to the local embeddings and the scalars
    images = [leaf(found.image) for found in outputs[: len(chunks)]]
    texts = [leaf(found.text) for found in outputs[: len(chunks)]]
    scalars = leaf(engine.scalars)
    del outputs, found
    shared = world >= SHARING_RANKS
    batch = gather_batch(chunks, images, texts, shared=shared)
    pairs = batch.pairs(mask_duplicates=mask_duplicates, false_negatives_above=false_negatives_above)
    loss = contrastive(pairs, scalars)
    # A fixed temperature has no gradient: zeros.
    gradients = torch.autograd.grad(loss.loss, [*images, *texts, scalars], materialize_grads=True)
    image_gradients, text_gradients = gradients[: len(chunks)], gradients[len(chunks) : -1]
    scalar_gradient = all_reduce_sum(gradients[-1]) if shared else gradients[-1]

    # --- step 3: each pass again, the newest first
    caption_total = torch.zeros((), device=device)
    again = feed([(each.chunk, each.features is None) for each in reversed(passes[:-1])], device)
    for each in reversed(passes):
        if each is newest:
            found = newest_outputs
            del newest_outputs
        else:
            there = next(again)
            pixels = each.features or engine.vision_features(there.pixels)
            found = forward(engine, each, there, pixels, captions=bool(tokens), caption_tokens=tokens or None)
        surrogate = (found.image * image_gradients[each.index]).sum() + (found.text * text_gradients[each.index]).sum()
        surrogate = each.weight * (surrogate + next_token_weight * found.caption_loss)
        # The scalars' gradient is the same on all W ranks, and is handed in with every pass.
        surrogate = surrogate + (found.scalars * scalar_gradient).sum() / (world * len(passes))
        engine.backward(world * surrogate, last=each is passes[0])
        caption_total += each.weight * found.caption_loss.detach()
    set_rng_state(after, device)
    return StepLoss(of_all_ranks(loss, shared), all_reduce_sum(caption_total), engine.scalars.clone(), tokens)


def forward(
    engine: Backward,
    each: Pass,
    there: DeviceChunk,
    pixels: dict[str, Tensor] | None,
    *,
    captions: bool,
    caption_tokens: int | None,
) -> Outputs:
    """Both sides of a chunk through the model. The second time dropout draws what it drew the first time.

    there: the chunk on the device. pixels: its images, or what the vision tower made of them.
    captions: whether the long captions go in. caption_tokens: None for no caption loss.
    """
    device, chunk, again = engine.device, each.chunk, each.rng_states
    inputs = there.image if captions else prompts_only(chunk.image, there.image)
    if again:
        set_rng_state(again[0], device)
    before_images = rng_state(device)
    image, caption_loss, _ = engine(inputs, pixels, caption_tokens=caption_tokens)
    if again:
        set_rng_state(again[1], device)
    each.rng_states = [before_images, rng_state(device)]
    text, _, scalars = engine(there.text, there.text_pixels)  # positives that are images: the tower sees them each time
    return Outputs(image, text, caption_loss, scalars)


def leaf(tensor: Tensor) -> Tensor:
    """A copy of the tensor, to find the gradient of."""
    return tensor.detach().clone().requires_grad_()


def keep_features(
    pixels: dict[str, Tensor] | None, kept: Sequence[dict[str, Tensor] | None]
) -> dict[str, Tensor] | None:
    """The images as the vision tower gave them, for step 3, as long as there is room for those of another chunk."""
    if pixels is None or "features" not in pixels:
        return None
    held = [each["features"] for each in kept if each is not None] + [pixels["features"]]
    return pixels if sum(features.nbytes for features in held) <= KEPT_FEATURES else None


def of_all_ranks(loss: PairLoss, shared: bool) -> PairLoss:
    """The loss of the global batch and its statistics, without graph. The statistics are those of all ranks already."""
    value, *figures = (value.detach() for value in loss)
    return PairLoss(all_reduce_sum(value) if shared else value, *figures)


class RngState(NamedTuple):
    """State of the generators that dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None


def rng_state(device: torch.device) -> RngState:
    """The state now."""
    return RngState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Restore what `rng_state` gave."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)
