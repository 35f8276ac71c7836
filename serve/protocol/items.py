"""Items: the things to embed, text or image, taken out of the forms in which clients send them.

A bad item is a `Failure` in its place, so that a caller who asked for `partial` still gets the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from serve.protocol.errors import ApiError, Failure
from serve.protocol.images import image_size, parse_data_uri
from serve.protocol.schema import Message
from vladva.core.errors import InvalidSampleError
from vladva.core.text import clean_text

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class Limits:
    """Caps on what one request may carry."""

    items: int
    image_bytes: int
    image_pixels: int


@dataclass(frozen=True)
class EmbedItem:
    """One text, or the encoded bytes and the (width, height) of one image."""

    text: str | None = None
    image: bytes | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def pixels(self) -> int:
        """Pixels of the image, 0 for a text."""
        return self.size[0] * self.size[1]


def as_list(value: JsonValue) -> list[JsonValue]:
    """The items of a field that takes one or several."""
    return value if isinstance(value, list) else [value]


def parse_items(
    values: Sequence[JsonValue], field: str, limits: Limits, modality: Modality = "text"
) -> list[EmbedItem | Failure]:
    """The items in `values`, the content of the body's `field`. Raises ApiError for none and for too many."""
    if not 1 <= len(values) <= limits.items:
        raise ApiError(422, f"{field} holds {len(values)} items; send 1 to {limits.items}", "invalid_value", field)
    return [_parse(value, f"{field}[{i}]", limits, modality) for i, value in enumerate(values)]


def parse_item(value: JsonValue, field: str, limits: Limits, modality: Modality = "text") -> EmbedItem:
    """The one item in the body's `field`. Raises ApiError for a bad one."""
    return only_items([_parse(value, field, limits, modality)])[0]


def parse_conversations(conversations: Sequence[list[Message]], limits: Limits) -> list[EmbedItem | Failure]:
    """One item for every conversation: its image, or its text."""
    values: list[JsonValue] = []
    for conversation in conversations:
        parts = [part for message in conversation for part in message.parts()]
        texts = [part.text for part in parts if part.type == "text"]
        images = [part.image_url.url for part in parts if part.image_url]
        value: dict[str, JsonValue] = {}
        if texts:
            value["text"] = "\n".join(texts)
        if images:
            value["image"] = images[0] if len(images) == 1 else images
        values.append(value)
    return parse_items(values, "messages", limits)


def only_items(items: Sequence[EmbedItem | Failure]) -> list[EmbedItem]:
    """The items, where every one must be good. Raises ApiError for the first that is not."""
    for item in items:
        if isinstance(item, Failure):
            raise ApiError.of(item)
    return list(items)


def _parse(value: JsonValue, field: str, limits: Limits, modality: Modality) -> EmbedItem | Failure:
    if isinstance(value, str):
        value = {modality: value}
    match value:
        case {"text": str(text)} if len(value) == 1:
            try:
                text = clean_text(text)
            except InvalidSampleError:
                return _refused(field, "the text holds half a surrogate pair, which is no character")
            return EmbedItem(text=text) if text else _refused(field, "the text is empty")
        case {"image": str(uri)} if len(value) == 1:
            return parse_image(uri, field, limits)
        case {"text": _, "image": _}:
            return _refused(field, "the model embeds a text or an image, not both at once; send two items")
    return _refused(field, 'send a string, {"text": "..."} or {"image": "data:image/png;base64,..."}')


def parse_image(uri: str, field: str, limits: Limits) -> EmbedItem | Failure:
    """The image in a data: URI."""
    try:
        data = parse_data_uri(uri, limits.image_bytes)
        return EmbedItem(image=data, size=image_size(data, limits.image_pixels))
    except ValueError as error:
        return Failure(422, str(error), "invalid_image").with_param(field)


def _refused(field: str, message: str) -> Failure:
    return Failure(422, message, "invalid_value").with_param(field)
