"""vladva: turns a generative vision-language model into a retriever on a Ray cluster, and keeps the generator.

    import vladva

    model = vladva.load("tiny")
    model.embed_texts(["a red circle"])  # unit vectors [N, D]

Nothing is imported before it is used: `import vladva` loads neither torch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vladva.api import load as load
    from vladva.config import RunConfig as RunConfig
    from vladva.index.vector_index import open_index as open_index

    __version__: str

__all__ = ["RunConfig", "__version__", "load", "open_index"]

_HOMES = {"load": "vladva.api", "open_index": "vladva.index.vector_index", "RunConfig": "vladva.config"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vladva")
    if name not in _HOMES:
        raise AttributeError(f"module 'vladva' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
