"""Negative controls: faults put into the real forward, each of which the rehearsal must find; and sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.gpu.rehearsal.cases import Measured
from tests.gpu.rehearsal.fake_cuda import CUDA, FakeCuda
from tests.gpu.rehearsal.rules import broken_rules
from tests.gpu.rehearsal.suite import QWEN, all_cases, run_case
from vladva.models.embedding_model import EmbeddingModel

CASE = f"embed texts {QWEN}"


def mix_up(ids: Tensor) -> None:
    """A mask that was left on the host."""
    ids + torch.zeros(ids.shape, dtype=torch.long)


def item(ids: Tensor) -> None:
    """The host asks for a number."""
    ids.sum().item()


def blocking_copy(ids: Tensor) -> None:
    """A list made a tensor of the device."""
    torch.tensor([1, 2, 3], device=ids.device)


def wide_product(ids: Tensor) -> None:
    """A layer that was left in float32."""
    wide = torch.empty(1024, 1024, device=ids.device)
    wide @ wide.T


def attention_with_mask(ids: Tensor) -> None:
    """Attention with a mask, of heads that share keys."""
    query, key = (torch.empty(1, heads, 256, 128, device=ids.device, dtype=torch.bfloat16) for heads in (12, 2))
    mask = torch.ones(256, 256, device=ids.device, dtype=torch.bool)
    functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)


def more_memory(ids: Tensor) -> None:
    """A table of 4 GiB that nobody needs."""
    torch.empty(1 << 32, device=ids.device, dtype=torch.bool)


def more_kernels(ids: Tensor) -> None:
    """Something that is done again and again."""
    for _ in range(50):
        ids = ids + 1


FAULTS: tuple[Callable[[Tensor], None], ...] = (
    mix_up,
    item,
    blocking_copy,
    wide_product,
    attention_with_mask,
    more_memory,
    more_kernels,
)


def controls(mode: FakeCuda, recorded: dict[str, Any]) -> dict[str, list[str]]:
    """What is found with each fault in place, and with none."""
    original, case = EmbeddingModel.inputs, all_cases()[CASE]
    found = {"none": broken_rules(run_case(mode, case, quick=True), recorded[CASE])}
    for fault in FAULTS:

        def inputs(model: EmbeddingModel, *arguments: Any, fault: Callable[[Tensor], None] = fault) -> Any:
            fault(arguments[0]["ids"])
            return original(model, *arguments)

        EmbeddingModel.inputs = inputs  # type: ignore[method-assign]
        try:
            found[fault.__name__] = broken_rules(run_case(mode, case, quick=True), recorded[CASE])
        except RuntimeError as error:  # what FakeTensorMode raises for tensors on two devices
            found[fault.__name__] = [str(error).splitlines()[0]]
        finally:
            EmbeddingModel.inputs = original  # type: ignore[method-assign]
            mode.counts.restart()
    return found


def by_hand(mode: FakeCuda) -> Measured:
    """Two tensors of 64 x 32 and 32 x 16 in float32, their product, its sum, and that number on the host."""
    mode.counts.restart()
    with mode:
        left, right = torch.ones(64, 32, device=CUDA), torch.ones(32, 16).to(CUDA)
        product = left @ right
        product.sum().item()
    return Measured.of(mode.counts, 1)
