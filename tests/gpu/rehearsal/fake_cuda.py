"""Fake CUDA: the real code on tensors that are on `cuda` and have shapes, dtypes and places, but no memory.

PyTorch's FakeTensorMode knows shapes and refuses to mix devices. `FakeCuda`, a dispatch mode above it, adds

* values: of integers, bools and a few floats that were computed from known ones it keeps the values, on the CPU, so
  that code whose shapes depend on them (packing, masks, grids of images) runs as it would;
* counts (`Counts`): where the host waits for the device, what is copied to it in a blocking way, kernels, FLOPs,
  products in float32, the kernel that each attention gets, and the bytes that are live, now and at most.

A process that rehearses is good for nothing else: PyTorch thinks that it has a GPU (device.py).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda", 0)
MOST_VALUES = 100_000_000  # of a tensor whose values are kept: a chunk's tokens and pixels are one buffer
MOST_FLOATS = 64
PROJECT = Path(__file__).resolve().parents[3]
PACKAGE, SERVE = f"{PROJECT / 'platform/vladva'}/", f"{PROJECT / 'serve'}/"

VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes"),
    *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "diagonal", "narrow", "unfold", "lift_fresh"),
    *(
        "_reshape_alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_local_scalar_dense",
    ),
}
ASKS_FOR_VALUES = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select"),
    *("unique_consecutive", "_unique2", "unique_dim", "unique_dim_consecutive"),
}
OF_UNKNOWN_VALUES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "multinomial"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


# ------------------------------------------------------------------------------------------------------------- counts


@dataclass
class Counts:
    """What happened since the counts began. Places are `file.py:function`, of the project where it is on the stack."""

    waits: Counter[str] = field(default_factory=Counter)  # "KIND: PLACE"; the host waits for the device
    kernels: int = 0  # about: one for every operation that is no view
    flops: Counter[str] = field(default_factory=Counter)  # by operation
    wide: Counter[str] = field(default_factory=Counter)  # the largest product in float32, by place
    attention: Counter[str] = field(
        default_factory=Counter
    )  # "KERNEL: PLACE"; of those that are not flash, with shapes
    live: int = 0
    peak: int = 0
    peak_place: str = ""

    def restart(self) -> None:
        """Begin again; what is live stays so."""
        live = self.live
        self.__init__()  # type: ignore[misc]
        self.live = self.peak = live

    @property
    def total_flops(self) -> int:
        """Of all operations."""
        return sum(self.flops.values())


def place() -> str:
    """Where in the project this is, or in the library that the project did not call."""
    library, frame = "", sys._getframe(1)
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name.startswith("<"):  # a comprehension: newer versions of Python have none of their own
            pass
        elif file.startswith((PACKAGE, SERVE)):
            found = f"{file.removeprefix(PACKAGE).removeprefix(SERVE)}:{name}"
            return f"{found} <- {library}" if library else found
        elif not library and ("/transformers/" in file or "/peft/" in file):
            library = f"{file.rsplit('/', 1)[1]}:{name}"
        frame = frame.f_back  # type: ignore[assignment]
    return library or "elsewhere"


# ----------------------------------------------------------------------------------------------------------- the mode


def known(tensor: Any) -> torch.Tensor | None:
    """The values of a fake tensor, where they are known."""
    return getattr(tensor, "known_values", None)


def on_device(tensor: Any) -> bool:
    """Whether it is a tensor on the pretended device."""
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


class FakeCuda(TorchDispatchMode):
    """Goes on top of `self.fake`; `counts` says what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()
        self.storages: set[int] = set()

    # --- tensors

    def lift(self, tensor: Any) -> Any:
        """A real tensor (of the CPU) as a fake one, with its values."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():
            fake = self.fake.from_tensor(tensor, static_shapes=True)
            if worth_keeping(tensor):
                fake.known_values = tensor.detach().clone()
        return fake

    def of_values(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A fake tensor with these values."""
        with self.fake:
            fake = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device)
        fake.known_values = values
        self.account(fake)
        return fake

    def account(self, out: Any) -> None:
        """Count the storages that are new, until they are freed."""
        for tensor in tree_leaves(out):
            if not isinstance(tensor, FakeTensor) or tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.storages:
                continue
            size = -(-int(storage.nbytes()) // 512) * 512  # CUDA's allocator rounds
            self.storages.add(key)
            self.grow(size)
            weakref.finalize(storage, self.freed, key, size)

    def grow(self, size: int, *, lasting: bool = True) -> None:
        """So many bytes more, for good or for the time of one kernel."""
        counts = self.counts
        if counts.live + size > counts.peak:
            counts.peak = counts.live + size
            counts.peak_place = place()
        if lasting:
            counts.live += size

    def freed(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.storages.discard(key)
        self.counts.live -= size

    # --- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "prim":
            with self.fake:
                return func(*args, **kwargs)
        if name == "_fused_rms_norm" and on_device(args[0]):
            return self.rms_norm(*args)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode these arrive whole
                return func.decompose(*args, **kwargs)
        args, kwargs = tree_map(self.lift, (args, kwargs))
        if name in INDEXING:
            args = (args[0], self.without_masks(args[1]), *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        touches = any(map(on_device, tensors))
        all_known = all(known(tensor) is not None for tensor in tensors)
        if name in ("is_pinned", "_pin_memory"):
            return self.pinned(args[0]) if name == "_pin_memory" else getattr(args[0], "pinned", False)
        if name in ASKS_FOR_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            if touches:
                self.waits(".item()" if name == "_local_scalar_dense" else name)
            return self.answer(func, name, args, kwargs, tensors, all_known=all_known)
        if name in ("_to_copy", "copy_"):
            self.copied(name, args, kwargs)

        with self.fake:
            out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if touches or any(map(on_device, outs)):
            self.measure(func, name, args, kwargs, out)
        self.keep_values(func, name, args, kwargs, outs, all_known=all_known)
        self.account(out)
        return out

    def answer(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor], *, all_known: bool
    ) -> Any:
        """What the host is told of values: a number, or a tensor as large as they say."""
        if not all_known:
            assert name in ("_local_scalar_dense", "equal"), f"{name} of values that are not known, at {place()}"
            return unknown_scalar(tensors[0]) if name == "_local_scalar_dense" else True
        found = func(*tree_map(real, args), **real_options(kwargs))
        return tree_map(lambda t: self.of_values(t, tensors[0].device) if isinstance(t, torch.Tensor) else t, found)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory."""
        values = known(tensor)
        with self.fake:
            out: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        out.known_values, out.pinned = values, True
        return out

    def rms_norm(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel, as in a build for CUDA; this build has the formula alone."""
        self.counts.kernels += 1
        with self.fake:
            out = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        self.account(out)
        return out

    def without_masks(self, indices: Any) -> Any:
        """Indices whose boolean masks are places; finding them makes the host wait."""
        found = []
        for index in indices:
            if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            if on_device(index):
                self.waits("boolean index")
            values = known(index)
            assert values is not None, f"boolean index of values that are not known, at {place()}"
            found += [self.of_values(column, index.device) for column in values.nonzero(as_tuple=True)]
        return found

    def copied(self, name: str, args: Any, kwargs: Any) -> None:
        """Copies between host and device: the host does not wait for those from pinned memory that need not block."""
        source, target = args[0], kwargs.get("device")
        blocking = not kwargs.get("non_blocking", False)
        if name == "copy_":
            target, source = args[0].device, args[1]
            blocking = not (len(args) > 2 and args[2])
        if not isinstance(source, torch.Tensor) or target is None or not source.numel():
            return
        ways = source.device.type, torch.device(target).type
        if ways == ("cuda", "cpu"):
            self.waits("device to host")
        if ways == ("cpu", "cuda") and (blocking or not getattr(source, "pinned", False)):
            self.waits("host to device")

    def waits(self, kind: str) -> None:
        """The host waits for the device."""
        self.counts.waits[f"{kind}: {place()}"] += 1

    def measure(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Kernels, FLOPs and the memory that a kernel takes for itself."""
        counts = self.counts
        if name not in VIEWS:
            counts.kernels += 1
        flops = flops_of(func, name, args, kwargs, out)
        if flops:
            counts.flops[name] += flops
            first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            if first.dtype == torch.float32:
                where = place()
                counts.wide[where] = max(counts.wide[where], flops)
        if name in ("_scaled_dot_product_flash_attention_backward", "_flash_attention_backward"):
            self.grow(4 * args[1].numel(), lasting=False)  # it adds up the queries' gradient in float32

    def keep_values(self, func: Any, name: str, args: Any, kwargs: Any, outs: Any, *, all_known: bool) -> None:
        """Compute small results for real where all that they come from is known."""
        small = outs and all(map(worth_keeping, outs))
        if name in ("empty", "new_empty") and small and not outs[0].is_floating_point():
            outs[0].known_values = torch.zeros(outs[0].shape, dtype=outs[0].dtype)
        elif name == "copy_" and small and known(args[1]) is not None:  # whatever was there
            with _disable_current_modes():
                outs[0].known_values = known(args[1]).to(outs[0].dtype).expand(outs[0].shape).clone()
        elif all_known and small and name not in OF_UNKNOWN_VALUES and "rand" not in name and "attention" not in name:
            with _disable_current_modes():
                found = func(*tree_map(real, args), **real_options(kwargs))
            for fake, values in zip(outs, (t for t in tree_leaves(found) if isinstance(t, torch.Tensor)), strict=False):
                fake.known_values = values
        elif func._schema.is_mutable:
            for tensor in outs:
                tensor.known_values = None


def worth_keeping(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor decide shapes, and are few."""
    return tensor.numel() <= (MOST_FLOATS if tensor.is_floating_point() else MOST_VALUES)


def real(leaf: Any) -> Any:
    """The values for a fake tensor; the CPU for the device."""
    if isinstance(leaf, torch.Tensor):
        return known(leaf)
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def real_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an operation for the real one."""
    return {name: real(value) for name, value in tree_map(real, kwargs).items() if name != "pin_memory"}


def unknown_scalar(tensor: torch.Tensor) -> float | int | bool:
    """What stands for a number that is not known."""
    return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)


def flops_of(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of products and attention, by PyTorch's own formulas and, for what writes in place, ours."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if name in ("addmm_", "baddbmm_"):
        return 2 * args[1].numel() * args[2].shape[-1]
    return 0


# -------------------------------------------------------------------------------------------------------------- start


def start() -> FakeCuda:
    """Make this process one that rehearses; returns the mode to run in."""
    import transformers.utils.import_utils as transformers_imports

    from tests.gpu.rehearsal.attention import choose_kernels

    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a tensor of the host, and a copy
    mode = FakeCuda()
    transformers_imports.is_fake_tensor = lambda x: False  # or it makes masks that it leaves out otherwise
    choose_kernels(mode)
    for name, stand_in in {
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }.items():
        setattr(torch.cuda, name, stand_in)

    def values_of(tensor: torch.Tensor, what: str) -> torch.Tensor:
        values = known(tensor)
        assert values is not None, f"{what} of values that are not known, at {place()}"
        return values

    def numpy(tensor: torch.Tensor, **_: Any) -> Any:
        if on_device(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        with no_modes():
            return values_of(tensor, "numpy()").numpy()

    def tolist(tensor: torch.Tensor) -> Any:
        if on_device(tensor):
            mode.waits(".tolist()")
        with no_modes():
            return values_of(tensor, "tolist()").tolist()

    FakeTensor.numpy, FakeTensor.tolist = numpy, tolist  # type: ignore[method-assign]
    return mode


def no_modes() -> AbstractContextManager[None]:
    """Real tensors within."""
    return _disable_current_modes()
