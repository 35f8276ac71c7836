"""A CUDA device for a CPU build of PyTorch: one that does nothing, so that fake tensors can be on it (pretend.cpp)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir


def pretend_device() -> None:
    """Build pretend.cpp, once for each PyTorch, and load it. Needs a C++ compiler.

    Call it before PyTorch is imported: its import already asks which accelerators there are, and nobody asks again.
    """
    assert "torch" not in sys.modules, "the device must be there before PyTorch looks for one"
    spec = find_spec("torch")
    assert spec is not None, "PyTorch is not installed"
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    if (installed / "lib/libtorch_cuda.so").exists():
        raise RuntimeError("this PyTorch is built for CUDA; the rehearsal needs the CPU build")
    source = Path(__file__).with_name("pretend.cpp")
    version = (installed / "version.py").read_bytes()
    key = sha256(source.read_bytes() + version + str(installed).encode()).hexdigest()[:16]
    library = Path(gettempdir()) / f"vladva-pretend-{os.getuid()}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        include = installed / "include"
        paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{installed / 'lib'}"]
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(source), "-o", str(unfinished), *paths]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        unfinished.replace(library)
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(installed / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
