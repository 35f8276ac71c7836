"""Linear layers on a CPU as inference wants them, and the threads and memory that it computes them with.

On a CPU with bfloat16 products, weights are kept once more: in oneDNN's layout, side by side where the input is the
same, with the weight of the norm before them, and the activation after them is part of the product. Layers with LoRA,
in float32 or on a GPU are called as they are.

N tokens, D width.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import nn

from vladva.models.packed.decoder import LinearLayer

CPU_TOKENS = 1024  # in a group: so few that activations stay in the cache, so many that weights are seldom read again
QUICK_GELU = 1.702  # x * sigmoid(1.702 x)
FREED_BYTES = 1 << 30  # that a process on a CPU keeps: it asks for the same again at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -1, -3, 32 << 20  # of glibc's malloc.h

Linear = Callable[[torch.Tensor], torch.Tensor]
LinearResidual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def joined_linear(*linears: LinearLayer) -> Linear:
    """x [N, D] -> the outputs of linear layers side by side."""
    if can_prepack(*linears):
        return prepacked_linear(torch.cat([linear.weight for linear in linears]), concat_bias(*linears))
    if len(linears) == 1:
        return linears[0]
    return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)


def linear_residual(linear: LinearLayer) -> LinearResidual:
    """x [N, D], residual -> linear(x) + residual."""
    if can_prepack(linear):
        return prepacked_linear_residual(linear.weight, concat_bias(linear))
    return lambda x, residual: linear(x).add_(residual)


def mlp_residual(
    first: LinearLayer, second: LinearLayer, name: str, activation: Callable[[torch.Tensor], torch.Tensor]
) -> LinearResidual:
    """x [N, D], residual -> second(activation(first(x))) + residual."""
    if not can_prepack(first, second) or name != "quick_gelu":
        inner, outer = joined_linear(first), linear_residual(second)
        return lambda x, residual: outer(activation(inner(x)), residual)
    # oneDNN has no such activation, but swish(a x) / a, with a in the weights before it and 1 / a in those after it.
    before = prepacked_linear(
        (first.weight.float() * QUICK_GELU).bfloat16(), concat_bias(first, scale=QUICK_GELU), "swish"
    )
    after = prepacked_linear_residual((second.weight.float() / QUICK_GELU).bfloat16(), concat_bias(second))
    return lambda x, residual: after(before(x), residual)


def rms_normalize(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows divided by their root mean square, which is computed in float32 and rounded."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)


def can_prepack(*linears: LinearLayer) -> bool:
    """Whether oneDNN has a layout of its own for these weights: plain linear layers in bfloat16 on a CPU."""
    return all(
        type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16 and linear.weight.device.type == "cpu"
        for linear in linears
    ) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepacked_linear(weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none") -> Linear:
    """x [N, D] -> activation(x weight^T + bias)."""
    weight = prepack(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def prepacked_linear_residual(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearResidual:
    """x [N, D], residual -> x weight^T + bias + residual."""
    weight = prepack(weight)
    return lambda x, residual: torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of the weight in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), CPU_TOKENS)


def free_plain(*linears: LinearLayer) -> None:
    """Free the plain weights of layers that are kept in oneDNN's layout: the modules cannot be called any more."""
    if can_prepack(*linears):
        for linear in linears:
            linear.weight.data = linear.weight.data.new_empty(0)


def concat_bias(*linears: LinearLayer, scale: float = 1.0) -> torch.Tensor | None:
    """The biases side by side."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "a bias on some of the layers with the same input only"
    return (torch.cat(biases).detach().float() * scale).to(biases[0].dtype) if biases else None


# --------------------------------------------------------------------------------------------------- threads, memory


_here = threading.local()  # what `use_cores` has said


def use_cores(cores: int) -> None:
    """From now on the calling thread computes on so many of the process's cores."""
    _here.cores = cores
    if torch.get_num_threads() != cores:
        torch.set_num_threads(cores)


def in_threads(function: Callable[[Any], Any], tasks: list[Any], threads: int) -> list[Any]:
    """`function` of each task, without gradients, in so many threads, or what `use_cores` allows; few tasks share."""
    threads = min(threads, getattr(_here, "cores", threads))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    workers = min(threads, len(tasks))
    if workers < 2:
        return [function(task) for task in tasks]

    def work(task: Any) -> Any:
        if torch.get_num_threads() != threads // workers:
            torch.set_num_threads(threads // workers)
        with torch.inference_mode():
            return function(task)

    results = list(linear_threads(threads).map(work, tasks))
    torch.set_num_threads(threads)  # for threads that begin later: they take what was set last
    return results


@cache
def linear_threads(threads: int) -> ThreadPoolExecutor:
    """The process's threads for `in_threads`."""
    return ThreadPoolExecutor(threads, "vladva-linear")


def close_weight_files(model: nn.Module) -> None:
    """Copy the weights of a model on a CPU out of the files that are mapped.

    A mapping ends with the last tensor in it, and until then takes memory for all that was read of it: freeing some of
    the tensors, because they are kept in another layout, would free nothing.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def give_back_freed_memory() -> None:
    """Have glibc give what is free to the system: packing weights leaves some."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: an activation that is given back to the system costs page faults to have again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, FREED_BYTES)
