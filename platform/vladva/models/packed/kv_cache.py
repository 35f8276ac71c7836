"""Key-value cache: keys and values of conversations in slots, so that all of them decode in one forward.

A slot is a row of a *block*: a block's rows have one capacity, a power of two, so that a long conversation among short
ones does not make their rows long. Rows in use are the first ones of their block: attention takes a view of them and
copies nothing. When a row in the middle is released, the last one moves into its place.

    block[capacity].keys[layer]     [rows, K, capacity, d]

K key-value heads of d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 64  # tokens of a slot


@dataclass(eq=False)
class Slot:
    """Where one conversation's keys and values are. `row` changes when another slot of the block is released."""

    block: CacheBlock
    row: int
    length: int = 0  # tokens that are there


class CacheBlock:
    """Slots of one capacity."""

    def __init__(self, cache: KeyValueCache, capacity: int) -> None:
        self.cache, self.capacity = cache, capacity
        self.slots: list[Slot] = []
        self.rows = 0  # that there is memory for
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def take(self) -> Slot:
        """A slot of its own."""
        if len(self.slots) == self.rows:
            self.resize(max(1, 2 * self.rows))
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Free a slot; the last one takes its place."""
        last = self.slots.pop()
        if last is not slot:
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot.row, :, : last.length] = tensor[last.row, :, : last.length]
            last.row = slot.row
            self.slots[last.row] = last
        if not self.slots:
            self.resize(0)
        elif len(self.slots) * 4 <= self.rows:
            self.resize(self.rows // 2)

    def resize(self, rows: int) -> None:
        """Memory for so many rows; those in use keep their content."""
        kept = min(rows, self.rows)
        for tensors in (self.keys, self.values):
            for layer in range(self.cache.layers):
                shape = (rows, self.cache.heads, self.capacity, self.cache.width)
                # Not empty: what is masked is multiplied by zero, and garbage may be NaN.
                grown = torch.zeros(shape, dtype=self.cache.dtype, device=self.cache.device)
                if kept:
                    grown[:kept] = tensors[layer][:kept]
                if layer < len(tensors):
                    tensors[layer] = grown
                else:
                    tensors.append(grown)
        self.rows = rows


class KeyValueCache:
    """Slots for conversations of any length up to the model's."""

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.heads, self.width = layers, heads, width
        self.dtype, self.device = dtype, device
        self.blocks: dict[int, CacheBlock] = {}

    def take(self, tokens: int) -> Slot:
        """A slot for up to `tokens` tokens."""
        capacity = slot_capacity(tokens)
        return self.blocks.setdefault(capacity, CacheBlock(self, capacity)).take()

    def release(self, slot: Slot) -> None:
        """Free a slot."""
        slot.block.release(slot)

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return sum(len(block.slots) for block in self.blocks.values())


def slot_capacity(tokens: int) -> int:
    """Tokens of the slot that `tokens` tokens get: the power of two that holds them, SMALLEST at least."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())
