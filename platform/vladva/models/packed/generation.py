"""Packed generation: prompts are read and answers decoded for many conversations in one forward, none of them padded.

A *chunk* is what one conversation brings to a step: a part of its prompt, or the token that it has just said. The
tokens of all chunks lie one after the other; linear layers see nothing else. Attention is each conversation's own:
chunks of one token, which are most, share products over the cache (kv_cache.py); longer ones come one by one. The
adapter is on or off for each conversation by itself (row_linear.py).

N tokens of a step, R chunks, D width, H heads, K key-value heads of d, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vladva.models.batch import as_tensors
from vladva.models.packed.cpu_linear import keep_freed_memory
from vladva.models.packed.kv_cache import CacheBlock, KeyValueCache, Slot
from vladva.models.packed.packing import round_up
from vladva.models.packed.rope import RotaryEmbedding
from vladva.models.packed.row_linear import SharedDecoder
from vladva.models.packed.towers import image_features, with_packed_tower

if TYPE_CHECKING:
    from vladva.models.batch import Pixels
    from vladva.models.embedding_model import EmbeddingModel

SMALL_STEP = 16  # tokens: so few wait for the weights, and one more costs nothing


@dataclass(eq=False)
class Chunk:
    """What one conversation brings to a step."""

    slot: Slot  # holds the tokens before these
    ids: Sequence[int]
    positions: Tensor  # [A, n] of each token, on A axes: 1, or 3 where images have rows and columns
    adapter: bool
    features: Tensor | None = None  # [k, D] of the image tokens among `ids`
    ends: bool = True  # whether the token after the last one is asked for


@dataclass(eq=False)
class Prompt:
    """The tokens of a prompt, and what is known of them before the language model has seen any."""

    ids: list[int]
    positions: Tensor  # [A, T]
    features: Tensor | None  # [K, D] of its image tokens
    next_position: int  # of the answer's first token

    def chunk(self, slot: Slot, image_token: int, tokens: int, *, adapter: bool) -> Chunk:
        """The next `tokens` tokens, of those that the slot does not hold yet."""
        start, end = slot.length, min(slot.length + tokens, len(self.ids))
        features = None
        if self.features is not None:
            before = self.ids[:start].count(image_token)
            features = self.features[before : before + self.ids[start:end].count(image_token)]
        return Chunk(slot, self.ids[start:end], self.positions[:, start:end], adapter, features, end == len(self.ids))

    def answer(self, slot: Slot, token: int, *, adapter: bool) -> Chunk:
        """A token of the answer."""
        position = self.next_position + slot.length - len(self.ids)
        positions = torch.full((len(self.positions), 1), position, device=self.positions.device)
        return Chunk(slot, [token], positions, adapter)


class PackedGeneration:
    """Chunks -> logits of the next tokens."""

    def __init__(self, model: EmbeddingModel, decoder: SharedDecoder | None = None, vision: Any = None) -> None:
        """`decoder`, `vision`: those of a `PackedInference` of the same model, to share their weights."""
        self.model = model
        self.decoder = decoder or SharedDecoder(model)
        base: Any = model.base
        self.language = base.model.language_model
        first, weight = self.decoder.layer(1), self.decoder.embed.weight
        self.cache = KeyValueCache(self.decoder.depth, first.kv_heads, first.width, weight.dtype, weight.device)
        self.device: torch.device = weight.device
        self.vision = vision or with_packed_tower(base.model)
        self.image_token: int = base.config.image_token_id
        if weight.device.type == "cpu":
            keep_freed_memory()

    @torch.inference_mode()
    def prompt(self, ids: Sequence[int], pixels: Pixels | None) -> Prompt:
        """A prompt and its images, which the vision tower sees here, all of them at once."""
        lengths = torch.tensor([len(ids)], device=self.device)
        tokens = {"ids": torch.tensor([ids], device=self.device), "lengths": lengths}
        there = None if pixels is None else as_tensors(pixels, self.device)
        inputs = self.model.inputs(tokens, there)
        positions = inputs.get("position_ids", torch.arange(len(ids), device=self.device)[None, None])[:, 0]
        features = None if there is None else image_features(self.vision, inputs, there)
        return Prompt(list(ids), positions, features, int(positions.amax()) + 1)

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [R, V] (float32) of the tokens that follow the chunks that end, in order; the cache holds all."""
        step = Step.of(chunks, self.image_token, self.decoder.embed.weight.device)
        hidden_ND = self.decoder.embed(step.ids, step.adapter)
        if step.features is not None:
            hidden_ND[step.image_rows] = step.features.to(hidden_ND.dtype)
        rotation = self.rotation(hidden_ND, step.positions)
        for number in range(1, self.decoder.depth):
            hidden_ND = self.layer(number, hidden_ND, rotation, step)
        hidden_RD = self.layer(self.decoder.depth, hidden_ND, rotation, step, only=step.ends)
        for chunk in chunks:
            chunk.slot.length += len(chunk.ids)
        return self.decoder.logits(hidden_RD, step.ends_adapter)

    def rotation(self, hidden_ND: Tensor, positions_AN: Tensor) -> RotaryEmbedding:
        """Of every token by its position, as if all were of one prompt."""
        axes = positions_AN if len(positions_AN) == 1 else positions_AN[:, None]
        return RotaryEmbedding.from_cos_sin(*self.language.rotary_emb(hidden_ND[None], axes))

    def layer(
        self, number: int, hidden_ND: Tensor, rotation: RotaryEmbedding, step: Step, only: Tensor | None = None
    ) -> Tensor:
        """Hidden states after a layer [N, D]; those of the rows `only` [R], where these alone go on."""
        layer = self.decoder.layer(number)
        heads_NE = layer.query_key_value(hidden_ND, step.adapter)
        unrotated_NEd, value_NKd = heads_NE.unflatten(-1, (-1, layer.width)).tensor_split([-layer.kv_heads], dim=1)
        query_NHd, key_NKd = rotation(unrotated_NEd[None])[0].tensor_split([-layer.kv_heads], dim=1)
        attended_ND = torch.zeros_like(query_NHd).flatten(1)
        for group in step.single:
            keys, values = group.block.keys[number - 1], group.block.values[number - 1]
            keys[group.rows, :, group.lengths] = key_NKd[group.tokens]
            values[group.rows, :, group.lengths] = value_NKd[group.tokens]
            attended_ND[group.tokens] = group.attention(query_NHd[group.tokens], keys, values)
        for part in step.several:
            slot, start, end = part.chunk.slot, part.start, part.start + len(part.chunk.ids)
            keys, values = slot.block.keys[number - 1][slot.row], slot.block.values[number - 1][slot.row]
            there = slot.length + len(part.chunk.ids)
            keys[:, slot.length : there] = key_NKd[start:end].transpose(0, 1)
            values[:, slot.length : there] = value_NKd[start:end].transpose(0, 1)
            attended = scaled_dot_product_attention(
                query_NHd[start:end].transpose(0, 1)[None],
                keys[None, :, :there],
                values[None, :, :there],
                attn_mask=part.mask,
                is_causal=part.mask is None,
                enable_gqa=layer.num_key_value_groups > 1,
            )
            attended_ND[start:end] = attended[0].transpose(0, 1).flatten(1)
        adapter = step.adapter
        if only is not None:
            attended_ND, hidden_ND, adapter = attended_ND[only], hidden_ND[only], step.ends_adapter
        return layer.mlp(layer.output.residual(attended_ND, hidden_ND, adapter), adapter)


# ------------------------------------------------------------------------------------------------------------- steps


@dataclass
class SingleTokens:
    """Chunks of one token each, in slots of one block."""

    block: CacheBlock
    rows: Tensor  # [n] of the block
    lengths: Tensor  # [n] tokens that were there before
    tokens: slice  # their places among the step's
    longest: int
    mask: Tensor  # [n, 1, 1, T] -inf after each one's own token
    every: bool  # whether these are the first n rows of the block, in order

    def attention(self, query_nHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What each token attends to [n, H * d]: its own row of the cache, up to itself."""
        n, heads, width = query_nHd.shape
        kv_heads = keys.shape[1]
        if self.every:
            keys, values = keys[:n, :, : self.longest], values[:n, :, : self.longest]
        else:
            keys, values = keys[self.rows, :, : self.longest], values[self.rows, :, : self.longest]
        # The query heads of a key-value head are more rows of the same product.
        query = query_nHd.view(n, kv_heads, heads // kv_heads, width)
        return scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).reshape(n, heads * width)


@dataclass
class SeveralTokens:
    """A chunk of more than one token."""

    chunk: Chunk
    start: int  # its place among the step's tokens
    mask: Tensor | None  # [n, tokens there]; None: causal from the first token on


@dataclass
class Step:
    """The chunks of a step as tensors, made once for all layers."""

    ids: Tensor  # [N]
    positions: Tensor  # [A, N]
    adapter: Tensor  # rows for which it is on
    ends: Tensor  # [R] the last tokens of the chunks that end
    ends_adapter: Tensor  # which of those have the adapter on
    image_rows: Tensor
    features: Tensor | None
    single: list[SingleTokens]
    several: list[SeveralTokens]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], image_token: int, device: torch.device) -> Step:
        """Chunks of one token first, ordered by slot, so that attention finds them as the cache has them."""
        order = sorted(
            range(len(chunks)),
            key=lambda i: (len(chunks[i].ids) > 1, chunks[i].slot.block.capacity, chunks[i].slot.row),
        )
        starts, total = {}, 0
        for i in order:
            starts[i] = total
            total += len(chunks[i].ids)
        filled = step_size(total) - total
        ids = torch.tensor([token for i in order for token in chunks[i].ids] + [0] * filled, device=device)
        positions = torch.cat([chunks[i].positions for i in order], dim=1).to(device)
        positions = torch.nn.functional.pad(positions, (0, filled))
        adapter = [starts[i] + k for i in order if chunks[i].adapter for k in range(len(chunks[i].ids))]
        ending = [i for i in range(len(chunks)) if chunks[i].ends]
        pictured = {i: chunk.features for i in order if (chunk := chunks[i]).features is not None}
        # A model may say an image token: that is an answer, not an image.
        image_rows = [starts[i] + k for i in pictured for k, token in enumerate(chunks[i].ids) if token == image_token]
        features = [one for one in pictured.values() if one is not None]
        return cls(
            ids=ids,
            positions=positions,
            adapter=torch.tensor(adapter, dtype=torch.long, device=device),
            ends=torch.tensor([starts[i] + len(chunks[i].ids) - 1 for i in ending], dtype=torch.long, device=device),
            ends_adapter=torch.tensor(
                [k for k, i in enumerate(ending) if chunks[i].adapter], dtype=torch.long, device=device
            ),
            image_rows=torch.tensor(image_rows, dtype=torch.long, device=device),
            features=torch.cat(features) if features else None,
            single=singles(chunks, order, device),
            several=[several(chunks[i], starts[i], device) for i in order if len(chunks[i].ids) > 1],
        )


def step_size(tokens: int) -> int:
    """Tokens to fill a step up to: a CPU's products are compiled for every size that they meet, half a MiB for each."""
    return 1 << (tokens - 1).bit_length() if tokens <= SMALL_STEP else round_up(tokens)


def singles(chunks: Sequence[Chunk], order: Sequence[int], device: torch.device) -> list[SingleTokens]:
    """Chunks of one token by the block that they are in. `order`: theirs, and first."""
    groups: dict[int, list[Chunk]] = {}
    for i in order:
        if len(chunks[i].ids) == 1:
            groups.setdefault(chunks[i].slot.block.capacity, []).append(chunks[i])
    found, start = [], 0
    for group in groups.values():
        rows = [chunk.slot.row for chunk in group]
        lengths = torch.tensor([chunk.slot.length for chunk in group], device=device)
        longest = max(chunk.slot.length for chunk in group) + 1
        mask = torch.arange(longest, device=device) <= lengths[:, None]
        found.append(
            SingleTokens(
                group[0].slot.block,
                torch.tensor(rows, device=device),
                lengths,
                slice(start, start + len(group)),
                longest,
                mask[:, None, None],
                rows == list(range(len(rows))),
            )
        )
        start += len(group)
    return found


def several(chunk: Chunk, start: int, device: torch.device) -> SeveralTokens:
    """A chunk of more than one token, which sees those before it in its slot, and its own up to each."""
    if chunk.slot.length == 0:
        return SeveralTokens(chunk, start, None)
    there = torch.arange(chunk.slot.length + len(chunk.ids), device=device)
    own = torch.arange(len(chunk.ids), device=device)[:, None] + chunk.slot.length
    return SeveralTokens(chunk, start, there <= own)
