"""Shared by the tests of all losses: random unit vectors, and the peak of tensor memory as the allocator sees it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def unit() -> Callable[..., Tensor]:
    def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (
            normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()
        )

    return unit


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    def peak_bytes(call: Callable[[], object]) -> int:
        """Most bytes that `call` held at once beyond what was there before, temporaries inside operators included."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        assert peak > 0, "the profiler reported no allocations"
        return peak

    return peak_bytes
