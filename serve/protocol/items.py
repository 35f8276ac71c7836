"""Items: the things to embed, taken out of the forms in which clients send them. One grammar for every route.

    "text"                                             a text
    "data:image/png;base64,..."                        an image, whatever `modality` says
    {"text"}, {"image"}, {"text", "image", "instruction"}
    {"content": [parts]}                               Cohere, Voyage, vLLM, mteb
    {"type": "image_url", "image_url": {"url"}}        a bare part
    [{"role", "content"}, ...]                         a conversation

A bad item is a `Failure` in its place, so that a caller who asked for `partial` still gets the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from serve.protocol.errors import ApiError, Failure, validation_failure
from serve.protocol.images import image_size, is_data_uri, parse_image_bytes
from serve.protocol.schema import INSTRUCTION_CHARACTERS, MAX_PARTS, ContentPart, Modality
from vladva.core.errors import InvalidSampleError
from vladva.core.text import clean_text

CHARACTERS_PER_TOKEN = 16  # a text of more characters per token of context is not read: no tokenizer is that good
FORMS = 'send a string, {"text": "..."}, {"image": "data:image/png;base64,..."} or {"content": [parts]}'
TOKEN_IDS = "token ids are not taken, send texts: langchain-openai does with check_embedding_ctx_length=False"


@dataclass(frozen=True)
class Limits:
    """Caps on what one request may carry.

    cuts: the model cuts long texts by itself, as CLIP does. mixes: it takes an image with words, and instructions.
    all_characters: of the texts of one list of items, together.
    """

    items: int
    image_bytes: int
    image_pixels: int
    text_characters: int = 1 << 20
    all_characters: int = 1 << 40
    cuts: bool = False
    mixes: bool = True

    def of_model(self, context: int, *, cuts: bool, mixes: bool) -> "Limits":
        """The caps for a model with so many tokens of context."""
        return replace(self, text_characters=CHARACTERS_PER_TOKEN * context, cuts=cuts, mixes=mixes)


@dataclass(frozen=True)
class ItemOptions:
    """How the items of a request are to be taken."""

    modality: Modality = "text"
    truncate: Literal["none", "start", "end"] = "none"
    instruction: str | None = None


@dataclass(frozen=True)
class EmbedItem:
    """A text, the encoded bytes and the (width, height) of an image, or both in one.

    truncate: where a long text is cut. instruction: what the vector is wanted for.
    """

    text: str | None = None
    image: bytes | None = None
    size: tuple[int, int] = (0, 0)
    truncate: Literal["none", "start", "end"] = "none"
    instruction: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is of one kind, without instruction."""
        return (self.text is None or self.image is None) and self.instruction is None

    @property
    def pixels(self) -> int:
        """Pixels of the image, 0 for a text."""
        return self.size[0] * self.size[1]


@dataclass
class Sent:
    """What an item was sent as: its texts and images, and how it is to be read."""

    texts: list[str]
    images: list[str]
    instruction: str | None = None


class _ItemError(ValueError):
    """A form that is no item."""


def as_list(value: JsonValue, *, parts_apart: bool = False) -> list[JsonValue]:
    """The items of a field that takes one or several.

    parts_apart: {"content": [...]} alone holds as many items as parts, as vLLM's score and rerank have it.
    """
    match value:
        case {"content": list(parts)} if parts_apart:
            return parts
        case [{"role": _}, *_]:
            return [value]  # one conversation
        case [int() | float(), *_]:
            return [value]  # token ids, or a vector
        case list():
            return value
    return [value]


def parse_items(
    values: Sequence[JsonValue], field: str, limits: Limits, options: ItemOptions = ItemOptions()
) -> list[EmbedItem | Failure]:
    """The items in `values`, the content of the body's `field`. Raises ApiError for none and for too many."""
    check_number(len(values), field, limits)
    items: list[EmbedItem | Failure] = []
    characters = 0
    for i, value in enumerate(values):
        item = _parse(value, f"{field}[{i}]", limits, options)
        characters += len(item.text or "") if isinstance(item, EmbedItem) else 0
        if characters > limits.all_characters:
            raise too_much(limits)
        items.append(item)
    return items


def check_number(items: int, field: str, limits: Limits) -> None:
    """Raise ApiError for no items and for too many."""
    if not 1 <= items <= limits.items:
        raise ApiError(422, f"{field} holds {items} items; send 1 to {limits.items}", "invalid_value", field)


def too_much(limits: Limits) -> ApiError:
    """The refusal of texts that together take more tokens than a replica ever takes on, whatever the tokenizer."""
    message = f"the texts have more than {limits.all_characters:,} characters together; send several requests"
    return ApiError(413, message, "request_too_large")


def parse_item(value: JsonValue, field: str, limits: Limits, options: ItemOptions = ItemOptions()) -> EmbedItem:
    """The one item in the body's `field`. Raises ApiError for a bad one."""
    return only_items([_parse(value, field, limits, options)])[0]


def only_items(items: Sequence[EmbedItem | Failure]) -> list[EmbedItem]:
    """The items, where every one must be good. Raises ApiError for the first that is not."""
    good = []
    for item in items:
        if isinstance(item, Failure):
            raise ApiError.of(item)
        good.append(item)
    return good


def sent_texts(value: JsonValue, modality: Modality = "text") -> str | None:
    """The words of an item, None where it has none, or is no item."""
    try:
        texts = _sent(value, modality).texts
    except _ItemError:
        return None
    return "\n".join(texts) if texts else None


def _parse(value: JsonValue, field: str, limits: Limits, options: ItemOptions) -> EmbedItem | Failure:
    try:
        sent = _sent(value, options.modality)
    except _ItemError as error:
        return _refused(field, str(error))
    if len(sent.images) > 1:
        return _refused(field, f"an item has one image, not {len(sent.images)}")
    instruction = sent.instruction or options.instruction or ""
    if len(instruction) > INSTRUCTION_CHARACTERS:
        return _refused(field, f"the instruction has more than {INSTRUCTION_CHARACTERS:,} characters")
    try:
        instruction = clean_text(instruction)
    except InvalidSampleError:
        return _refused(field, "the instruction holds half a surrogate pair, which is no character")
    if not limits.mixes and (instruction or (sent.images and sent.texts)):
        text = "a text or an image is taken here, not both in one, and no instruction; send two items"
        return _refused(field, text, "unsupported")
    found = parse_image(sent.images[0], field, limits) if sent.images else EmbedItem()
    if isinstance(found, EmbedItem) and (any(sent.texts) or not sent.images):
        words = _text(sent.texts, field, limits, options)
        found = words if isinstance(words, Failure) else replace(words, image=found.image, size=found.size)
    return replace(found, instruction=instruction or None) if isinstance(found, EmbedItem) else found


def _text(texts: Sequence[str], field: str, limits: Limits, options: ItemOptions) -> EmbedItem | Failure:
    length = sum(len(text) + 1 for text in texts) - 1
    truncate = "end" if limits.cuts and options.truncate == "none" else options.truncate
    if length > limits.text_characters and truncate == "none":
        return too_long(length, limits).with_param(field)
    text = "\n".join(texts)
    if length > limits.text_characters:
        text = text[: limits.text_characters] if truncate == "end" else text[-limits.text_characters :]
    try:
        text = clean_text(text)
    except InvalidSampleError:
        return _refused(field, "the text holds half a surrogate pair, which is no character")
    return EmbedItem(text=text, truncate=options.truncate) if text else _refused(field, "the text is empty")


def too_long(characters: int, limits: Limits) -> Failure:
    """The refusal of a text that is too long to be read."""
    message = f"the text has {characters:,} characters; the model takes {limits.text_characters:,} at the very most"
    return Failure(422, message, "context_length_exceeded")


def parse_image(sent: str, field: str, limits: Limits) -> EmbedItem | Failure:
    """The image in a data: URI, or in base64."""
    try:
        data = parse_image_bytes(sent, limits.image_bytes)
        return EmbedItem(image=data, size=image_size(data, limits.image_pixels))
    except ValueError as error:
        return Failure(422, str(error), "invalid_image").with_param(field)


def _sent(value: JsonValue, modality: Modality) -> Sent:
    """The texts and images of an item in any of its forms. Raises _ItemError for what is none."""
    match value:
        case str():
            return Sent([], [value]) if modality == "image" or is_data_uri(value) else Sent([value], [])
        case dict():
            return _object(value, modality)
        case list():
            return _conversation(value, modality)
    raise _ItemError(FORMS)


def _object(value: Mapping[str, JsonValue], modality: Modality) -> Sent:
    match value:
        case {"content": _}:
            return _turn(value, modality)
        case {"type": str()}:
            return _part(value)
        case {"text": _} | {"image": _}:
            return _fields(value)
    raise _ItemError(FORMS)


def _conversation(turns: list[JsonValue], modality: Modality) -> Sent:
    match turns:
        case [int() | float(), *_]:
            raise _ItemError(TOKEN_IDS)
        case [{"role": _}, *_]:
            check_parts(turns)
            sent = [_sent(turn, modality) for turn in turns]
            instructions = [turn.instruction for turn in sent if turn.instruction]
            texts = [text for turn in sent for text in turn.texts]
            return Sent(texts, [image for turn in sent for image in turn.images], "\n".join(instructions))
    raise _ItemError(FORMS)


def _turn(value: Mapping[str, JsonValue], modality: Modality) -> Sent:
    """{"content"}, with a role or without; what the system says is an instruction."""
    sent = _content(value["content"], modality)
    if value.get("role") in ("system", "developer"):
        return Sent([], sent.images, "\n".join(sent.texts))
    return replace(sent, instruction=_instruction(value))


def _content(content: JsonValue, modality: Modality) -> Sent:
    match content:
        case None:
            return Sent([], [])  # an assistant's turn without words
        case str():
            return _sent(content, modality)
        case list():
            check_parts(content)
            parts = [_part(part) for part in content]
            return Sent([text for part in parts for text in part.texts], [one for part in parts for one in part.images])
    raise _ItemError(FORMS)


def check_parts(parts: Sequence[JsonValue]) -> None:
    """Raise _ItemError where an item has too many parts."""
    if len(parts) > MAX_PARTS:
        raise _ItemError(f"an item has at most {MAX_PARTS:,} messages, and a message as many parts")


def _part(value: Any) -> Sent:
    try:
        part = ContentPart.model_validate(value)
    except ValidationError as error:
        raise _ItemError(validation_failure(error.errors(include_url=False, include_input=False)).message) from None
    return Sent([part.words], []) if part.is_text else Sent([], [part.image_data])


def _fields(value: Mapping[str, JsonValue]) -> Sent:
    """{"text"}, {"image"} or both; what is null is not there."""
    present = {name: one for name, one in value.items() if one is not None}
    text, image = present.get("text"), present.get("image")
    if isinstance(image, dict):
        image = image.get("url")
    if set(present) - {"text", "image", "instruction"} or not isinstance(text, str | None):
        raise _ItemError(FORMS)
    if not isinstance(image, str | None) or (text is None and image is None):
        raise _ItemError(FORMS)
    return Sent([] if text is None else [text], [] if image is None else [image], _instruction(present))


def _instruction(value: Mapping[str, JsonValue]) -> str | None:
    instruction = value.get("instruction")
    if not isinstance(instruction, str | None):
        raise _ItemError("instruction: send a text")
    return instruction


def _refused(field: str, message: str, code: str = "invalid_value") -> Failure:
    return Failure(422, message, code).with_param(field)
