"""The front door: `vladva.load` gives a `Model`, which embeds, compares, ranks, searches and answers.

In: texts and images in any common form. Out: numpy arrays, hits and strings. What a job does for millions of items on a
cluster (`jobs/embed.py`) this does for thousands in one process, by the same code.

N items, D width, Q vectors of one image (1 for most models; 32 for BLIP-2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from vladva.core.errors import InvalidSampleError
from vladva.core.item_content import ItemContent

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from vladva.core.model_description import ModelDescription
    from vladva.index.store import Hit
    from vladva.index.vector_index import VectorIndex
    from vladva.models.interface import Embeds, Generates

ImageLike = Union["Image", bytes, "os.PathLike[str]", str]
"""A PIL image, an encoded image, a path, or a URI (`data:image/png;base64,...`, `s3://bucket/key`, `file:///...`)."""
Item = Union[str, "Image", bytes, "os.PathLike[str]", Mapping[str, Any]]
"""A text (any `str`); a PIL image, an encoded image or a `pathlib.Path`; or a dictionary: {"text": str}, {"image":
ImageLike}, or both in one, with an "instruction" (str) where one is wanted."""
T = TypeVar("T")

IMAGE_FORMS = "a PIL image, an encoded image (bytes), a path, or a URI (data:image/...;base64,..., s3://, file://)"
ITEM_FORMS = (
    f'a text (str), an image as PIL image, bytes or Path, {{"text": str}}, or {{"image": {IMAGE_FORMS}}}; '
    'a dictionary may hold both, and an "instruction" (str)'
)
DUAL_ENCODERS_TAKE = "embeds a text or an image, not both together, and takes no instruction"
DECODED_AT_ONCE = 256  # that are decoded together
SHOWN_FROM = 256  # items from which progress is shown on a terminal


@dataclass(frozen=True)
class Ranked:
    """An item and how near it is to the query: the cosine of their embeddings."""

    index: int  # among the items that were given
    score: float
    item: Any


class InvalidItemsError(ValueError):
    """Some items could not be read; the others are embedded.

    reasons: the index of each item that failed, and why. embeddings: those of all items, NaN where an item failed.
    """

    def __init__(self, name: str, reasons: dict[int, str], embeddings: np.ndarray) -> None:
        first = next(iter(reasons))
        more = "" if len(reasons) == 1 else f", and {len(reasons) - 1} more: see .reasons"
        done = f"the other {len(embeddings) - len(reasons)} are in .embeddings"
        super().__init__(f"{name}[{first}]: {reasons[first]}{more}; {done}")
        self.reasons, self.embeddings = reasons, embeddings


def load(
    model: str | os.PathLike[str] = "tiny",
    *,
    adapter: bool = True,
    layer: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Model:
    """Load a model: `tiny`, a run folder or checkpoint of jobs/train.py, a Hugging Face name or folder.

    adapter: False is the base model of a run, zero-shot. layer: embed from another layer than the model's own.
    device: "cuda" where there is a GPU, else "cpu". dtype: "bfloat16" on a GPU, else "float32".

    Raises ValueError where there is no such model, or none of a family that vladva knows.
    """
    import torch

    from vladva.models.embedder import load_embedder

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    embedder = load_embedder(os.fspath(model), adapter=adapter, layer=layer, dtype=dtype, device=device)
    return Model(embedder, os.fspath(model))


class Model:
    """A loaded model: its discriminative mode (embeddings) and, of an LVLM, its generative one (answers)."""

    def __init__(self, embedder: Embeds, name: str) -> None:
        self.embedder, self.name = embedder, name

    def __repr__(self) -> str:
        kinds = "embeds and generates" if self.generates else "embeds"
        return f"<vladva model {self.name!r}: {kinds}, {self.dimension} dimensions, on {self.embedder.device}>"

    @property
    def dimension(self) -> int:
        """Width D of an embedding."""
        return self.embedder.dimension

    @property
    def fingerprint(self) -> str:
        """Equal for models whose embeddings may be compared."""
        return self.embedder.fingerprint

    @property
    def description(self) -> ModelDescription:
        """Base model, adapter, prompts, layer: what embeddings depend on."""
        return self.embedder.description()

    @property
    def generates(self) -> bool:
        """Whether the model also answers in words: LVLMs do, dual encoders (CLIP, BLIP) do not."""
        from vladva.models.interface import Generates

        return isinstance(self.embedder, Generates)

    # --- embeddings ----------------------------------------------------------------------------------------------

    def embed_texts(
        self, texts: Sequence[str] | str, *, batch_size: int = 64, progress: bool | None = None
    ) -> np.ndarray:
        """Unit vectors [N, D], float32, of texts; of one text [1, D].

        progress: a line on standard error; by default on a terminal, from 256 items on. Raises ValueError that names
        the index of what is no text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}] is a {type(text).__name__}, not a str{_hint(text)}")
        return self._embed("texts", [], list(enumerate(texts)), len(texts), batch_size, progress)

    def embed_images(
        self, images: Sequence[ImageLike] | ImageLike, *, batch_size: int = 64, progress: bool | None = None
    ) -> np.ndarray:
        """Unit vectors [N, D], float32, of images; [N, Q, D] where an image has several.

        An image is a PIL image, the bytes of an encoded one, a path, or a URI (`data:image/...;base64,...`,
        `s3://...`, `file:///...`); a `str` is a path or URI. Images that cannot be read do not cost the others: the
        InvalidItemsError (a ValueError) that names them holds what was embedded.
        """
        every: list[Any] = [images] if _is_image(images) else list(images)  # type: ignore[arg-type]
        for i, image in enumerate(every):
            if not _is_image(image):
                raise ValueError(f"images[{i}] is a {type(image).__name__}; give {IMAGE_FORMS}{_hint(image)}")
        return self._embed("images", list(enumerate(every)), [], len(every), batch_size, progress)

    def embed(self, items: Sequence[Item], *, batch_size: int = 64, progress: bool | None = None) -> np.ndarray:
        """Unit vectors [N, D], float32, of texts and images in any order, and of both together.

        A `str` is a text; an image is a PIL image, bytes, or a `pathlib.Path`. Unmistakable are {"text": "..."} and
        {"image": PATH_OR_URI}; {"image": PATH_OR_URI, "text": "but in blue"} is one vector of both. Each of the three
        may have an "instruction", a text that says what the vector is wanted for. Errors are those of `embed_images`;
        a dual encoder takes neither both together nor instructions.
        """
        if isinstance(items, (str, bytes, os.PathLike, Mapping)) or not hasattr(items, "__iter__"):
            raise ValueError(f"items is a {type(items).__name__}; give a list, each item {ITEM_FORMS}")
        kinds: dict[str, list[tuple[int, Any]]] = {"image": [], "text": [], "mixed": []}
        for i, (kind, content) in enumerate(self._kinds(items, "items")):
            kinds[kind].append((i, content))
        return self._embed(
            "items", kinds["image"], kinds["text"], len(items), batch_size, progress, mixed=kinds["mixed"]
        )

    def _kinds(self, items: Sequence[Item], name: str) -> list[tuple[str, Any]]:
        """`_kind_of` each item. Raises ValueError that names the first which is none, or not for this model."""
        kinds = [_kind_of(item, f"{name}[{i}]") for i, item in enumerate(items)]
        if not self.generates:
            for i, (kind, _) in enumerate(kinds):
                if kind == "mixed":
                    raise ValueError(f"{name}[{i}]: {self.name} is a dual encoder: it {DUAL_ENCODERS_TAKE}")
        return kinds

    def _embed(
        self,
        name: str,
        images: list[tuple[int, Any]],
        texts: list[tuple[int, str]],
        count: int,
        batch_size: int,
        progress: bool | None,
        *,
        mixed: Sequence[tuple[int, Mapping[str, Any]]] = (),
    ) -> np.ndarray:
        """Embeddings of (index, content) pairs, each in its row. Texts first: they take little memory.

        mixed: of items with text and image, or an instruction.
        """
        import numpy as np

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        vectors = self._vectors_per_image if images else 1
        if vectors > 1 and texts:
            raise ValueError(f"{self.name} has {vectors} vectors an image and one a text: embed them separately")
        shape = (count, self.dimension) if vectors == 1 else (count, vectors, self.dimension)
        embeddings = np.full(shape, np.nan, np.float32)
        reasons: dict[int, str] = {}
        with _progress(f"embedding {name}", count, progress) as shown:
            for part in _parts(texts, DECODED_AT_ONCE * 4):
                rows = [i for i, _ in part]
                embeddings[rows] = self.embedder.embed_texts([text for _, text in part], batch_size)
                shown.advance(len(part))
            for part in _parts(images, DECODED_AT_ONCE):
                decoded = _decoded([image for _, image in part])
                good = [(i, image) for (i, _), image in zip(part, decoded, strict=True) if not isinstance(image, str)]
                reasons |= {i: image for (i, _), image in zip(part, decoded, strict=True) if isinstance(image, str)}
                if good:
                    found = self.embedder.embed_images([image for _, image in good], batch_size)
                    embeddings[[i for i, _ in good]] = found
                shown.advance(len(part))
            for several in _parts(list(mixed), DECODED_AT_ONCE):
                contents = _contents([item for _, item in several], self.embedder)
                whole = {i: one for (i, _), one in zip(several, contents, strict=True) if isinstance(one, ItemContent)}
                reasons |= {i: one for (i, _), one in zip(several, contents, strict=True) if isinstance(one, str)}
                embeddings[list(whole)] = self.embedder.embed_items(list(whole.values()), batch_size)
                shown.advance(len(several))
        if reasons:
            raise InvalidItemsError(name, reasons, embeddings)
        return embeddings

    @property
    def _vectors_per_image(self) -> int:
        return self.description.get("vectors_per_image", 1)

    # --- comparing -----------------------------------------------------------------------------------------------

    def similarity(self, a: np.ndarray | Sequence[Item], b: np.ndarray | Sequence[Item]) -> np.ndarray:
        """Cosines [A, B] of items, or of embeddings [N, D] or [N, Q, D] that were made before.

        Where an image has several vectors, the nearest of them counts.
        """
        import numpy as np

        first, second = (self._vectors(each, name) for each, name in ((a, "a"), (b, "b")))
        cosines = np.einsum("apd,bqd->apbq", first, second)
        return cosines.max(axis=(1, 3))

    def _vectors(self, given: np.ndarray | Sequence[Item], name: str) -> np.ndarray:
        """Embeddings [N, Q, D] of items, or given ones."""
        import numpy as np

        embeddings = given
        if not isinstance(given, np.ndarray):
            kinds = {kind for kind, _ in self._kinds(given, name)}
            only_texts = kinds <= {"text"}
            embeddings = self.embed(given) if only_texts or self._vectors_per_image == 1 else self._embed_kinds(given)
        embeddings = np.asarray(embeddings, np.float32)
        if embeddings.ndim not in (2, 3) or embeddings.shape[-1] != self.dimension:
            wanted = f"[N, {self.dimension}] or [N, Q, {self.dimension}]"
            raise ValueError(f"{name} has the shape {list(embeddings.shape)}; embeddings of {self.name} have {wanted}")
        return embeddings if embeddings.ndim == 3 else embeddings[:, None]

    def _embed_kinds(self, items: Sequence[Item]) -> np.ndarray:
        """[N, Q, D] of a mixture, where a text's one vector stands Q times."""
        import numpy as np

        kinds = self._kinds(items, "items")
        found = np.zeros((len(items), self._vectors_per_image, self.dimension), np.float32)
        for kind, embed in (("text", self.embed_texts), ("image", self.embed_images)):
            rows = [i for i, (each, _) in enumerate(kinds) if each == kind]
            if rows:
                embeddings = embed([kinds[i][1] for i in rows])
                found[rows] = embeddings[:, None] if embeddings.ndim == 2 else embeddings
        return found

    def rerank(self, query: Item, items: Sequence[Item], *, top_k: int | None = None) -> list[Ranked]:
        """The items by their cosine with the query, best first; of equals, the earlier first."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all")
        if not items:
            return []
        [scores] = self.similarity([query], items)
        order = sorted(range(len(items)), key=lambda i: (-scores[i], i))[:top_k]
        return [Ranked(i, float(scores[i]), items[i]) for i in order]

    def search(
        self, index: VectorIndex | str | os.PathLike[str], query: Item, k: int = 10, *, where: str | None = None
    ) -> list[Hit]:
        """The k nearest rows of an index (`vladva.open_index`, or its folder or URI), best first.

        where: SQL condition on the index's columns, "kind = 'image'". Raises FingerprintMismatch (a ValueError) for an
        index of another model.
        """
        if isinstance(index, (str, os.PathLike)):
            from vladva.index.vector_index import open_index

            index = open_index(os.fspath(index))
        index.check(self.fingerprint)
        return index.search(self.embed([query])[0], k, filter=where)

    # --- answers -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | list[dict[str, Any]],
        images: Sequence[ImageLike] | ImageLike = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: bool = False,
    ) -> str:
        """The model's answer to a prompt, with images before it, or to a conversation in Hugging Face's chat form.

        By the original generator: `adapter=True` asks it with the adapter on. Greedy at temperature 0; else drawn from
        the likeliest `top_p`. Raises ValueError for a dual encoder, which has no words, and for images that cannot be
        read.
        """
        return "".join(
            self.stream(
                prompt,
                images,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                adapter=adapter,
            )
        )

    def stream(
        self,
        prompt: str | list[dict[str, Any]],
        images: Sequence[ImageLike] | ImageLike = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: bool = False,
    ) -> Iterator[str]:
        """As `generate`, the pieces of the answer as they come."""
        from vladva.models.interface import Generates

        if not isinstance(self.embedder, Generates):
            raise ValueError(f"{self.name} is a dual encoder: it embeds, and generates nothing; load an LVLM")
        if not isinstance(prompt, (str, list)):
            raise ValueError(f"prompt is a {type(prompt).__name__}; give a str, or a list of chat messages")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        every: list[Any] = [images] if _is_image(images) else list(images)  # type: ignore[arg-type]
        for i, image in enumerate(every):
            if not _is_image(image):
                raise ValueError(f"images[{i}] is a {type(image).__name__}; give {IMAGE_FORMS}")
        decoded = _decoded(every)
        for i, image in enumerate(decoded):
            if isinstance(image, str):
                raise ValueError(f"images[{i}]: {image}")
        if isinstance(prompt, str):
            content: list[dict[str, Any]] = [{"type": "image"} for _ in every] + [{"type": "text", "text": prompt}]
            prompt = [{"role": "user", "content": content}]
        generator: Generates = self.embedder
        return generator.generate(
            prompt,
            decoded,  # type: ignore[arg-type]  # the loop has seen that all are images
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            adapter=adapter,
        )


# ------------------------------------------------------------------------------------------------------------- items


def _is_image(value: Any) -> bool:
    from PIL.Image import Image

    return isinstance(value, (Image, bytes, bytearray, memoryview, str, os.PathLike))


def _kind_of(item: Any, name: str) -> tuple[str, Any]:
    """("text", "image" or "mixed", what it is). Raises ValueError that names the item."""
    if isinstance(item, str):
        return "text", item
    if isinstance(item, Mapping):
        given = {key: value for key, value in item.items() if value is not None}
        right = {"text": isinstance(given.get("text"), str), "instruction": isinstance(given.get("instruction"), str)}
        right["image"] = _is_image(given.get("image"))
        if not {"text", "image"} & set(given) or not all(right.get(key) for key in given):
            raise ValueError(f"{name} is a mapping with {sorted(map(str, item))}; give {ITEM_FORMS}")
        if len(given) > 1:
            return "mixed", given
        [(kind, content)] = given.items()
        return kind, content
    if _is_image(item):
        return "image", item
    raise ValueError(f"{name} is a {type(item).__name__}; give {ITEM_FORMS}{_hint(item)}")


def _hint(value: Any) -> str:
    """How a value of a type that is often given by mistake becomes one that is accepted."""
    name = type(value).__name__
    if name in ("ndarray", "Tensor"):
        return "; PIL.Image.fromarray makes an image of an array [H, W, 3] of uint8"
    if isinstance(value, (list, tuple)):
        return "; the list is nested: give a flat one"
    if isinstance(value, Path) or name.endswith("ImageFile") or name == "Image":
        return "; embed_images takes images, embed takes both"
    return ""


def _decoded(images: Sequence[Any]) -> list[Image | str]:
    """Each image, upright, RGB, on white; or why there is none. Files are read, and decoded, in threads."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(8, max(1, len(images)))) as pool:
        return list(pool.map(_decode, images))


def _contents(items: Sequence[Mapping[str, Any]], embedder: Embeds) -> list[ItemContent | str]:
    """Each item, its image decoded; or why the model cannot take it."""
    images = iter(_decoded([item["image"] for item in items if "image" in item]))
    found: list[ItemContent | str] = []
    for item in items:
        image = next(images) if "image" in item else None
        if isinstance(image, str):
            found.append(image)
            continue
        content = ItemContent(item.get("text"), image, item.get("instruction"))
        try:
            embedder.count_item_tokens(content)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(content)
    return found


def _decode(image: Any) -> Image | str:
    from PIL.Image import Image

    from vladva.core.images import decode_image, from_data_uri, to_upright_rgb
    from vladva.data.image_refs import read_file

    try:
        if isinstance(image, Image):
            return to_upright_rgb(image)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return decode_image(bytes(image))
        uri = os.fspath(image)
        data = from_data_uri(uri) if uri[:5].lower() == "data:" else read_file(uri)
        if isinstance(data, InvalidSampleError):
            return f"{data}"
        return decode_image(data)
    except ValueError as error:  # an InvalidSampleError is one
        return str(error)


def _parts(values: list[T], size: int) -> Iterator[list[T]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


class _Silent:
    def advance(self, items: int) -> None:
        """Nothing is shown."""


def _progress(label: str, count: int, wanted: bool | None) -> Any:
    """A `Progress`, or something that shows nothing."""
    import sys

    from vladva.core.progress import Progress

    if wanted is None:
        wanted = count >= SHOWN_FROM and sys.stderr.isatty()
    return Progress(label, count) if wanted else nullcontext(_Silent())
