"""Device errors: what a failed computation says of the item, of its size, or of the device it ran on."""

from __future__ import annotations

import re

# What CUDA, its libraries and ROCm begin their messages with, where torch raises a bare RuntimeError.
_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|cuDNN error|CUBLAS_STATUS|CUSOLVER_STATUS|CUFFT_|NCCL|HIP error|MIOPEN|ROCBLAS|"
    r"device-side assert|illegal memory access|unspecified launch failure|AcceleratorError",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time might do: torch's OutOfMemoryError, or what allocators say on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_device_error(error: BaseException) -> bool:
    """Whether the device, or this process's hold on it, is broken: nothing that is computed after it can be trusted."""
    if is_out_of_memory(error):
        return False
    if any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error)))
