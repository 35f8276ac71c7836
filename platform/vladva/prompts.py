"""Prompts: what asks an LVLM to sum up its input in one embedding, written by hand or learned.

A soft prompt is a row of added tokens, one for every token of the hand-written prompt, whose embeddings are trained
(method: soft prompts are separate per modality and start from the hand-written ones).
"""

from __future__ import annotations

from typing import Literal

IMAGE_PROMPT = "Summarize the provided image in one word:"
TEXT_PROMPT = "Summarize the provided text in one word:"


def soft_tokens(side: Literal["image", "text"], count: int) -> list[str]:
    """Names of the `count` soft-prompt tokens of a side."""
    return [f"<|vladva_{side}_{i}|>" for i in range(count)]
