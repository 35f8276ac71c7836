"""Schema: the bodies that clients send, as the `openai` client and curl examples written for vLLM send them.

OpenAI's routes ignore fields they do not know, as their clients expect; the routes that are ours refuse them, because a
misspelt option that does nothing is worse than an error.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator


class Body(BaseModel):
    """A request. A field that is null counts as absent: some clients spell out every field they know."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """The fields that say something."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class ImageUrl(BaseModel):
    """Where the image is: a data: URI."""

    url: str


class ContentPart(BaseModel):
    """One part of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v)] = None

    @model_validator(mode="after")
    def has_its_content(self) -> "ContentPart":
        """A text part has `text`, an image part `image_url`."""
        if (self.text if self.type == "text" else self.image_url) is None:
            raise ValueError(f"a part of type {self.type!r} has a field {self.type!r}")
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    def parts(self) -> list[ContentPart]:
        """The content as parts, also where it came as a string."""
        return [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class EmbeddingRequest(Body):
    """POST /v1/embeddings. `input`: string, `{text}`, `{image}` or a list of these; or `messages` of one or several."""

    model: str | None = None
    input: JsonValue = None
    messages: list[Message] | list[list[Message]] | None = Field(None, min_length=1)
    modality: Literal["text", "image"] = "text"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    partial: bool = False
    user: str | None = None

    @model_validator(mode="after")
    def one_source(self) -> "EmbeddingRequest":
        """Either `input` or `messages`."""
        if (self.input is None) == (self.messages is None):
            raise ValueError("send either `input` or `messages`")
        return self

    def conversations(self) -> list[list[Message]]:
        """`messages` as a list of conversations, also where it was one."""
        assert self.messages is not None
        return [self.messages] if isinstance(self.messages[0], Message) else self.messages


class SearchRequest(Body):
    """POST /v1/search. `query`: string, `{text}`, `{image}`, or a vector; `filter`: SQL over the index's columns."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    query: JsonValue
    modality: Literal["text", "image"] = "text"
    k: int = Field(10, ge=1, le=1000)
    filter: str | None = Field(None, min_length=1, max_length=4000)
    index: str | None = None
    version: int | str | None = None


class UpsertItem(Body):
    """A text or an image to write, under an id, with values for the columns that the index carries."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, max_length=1000)
    text: str | None = None
    image: str | None = None
    columns: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def one_content(self) -> "UpsertItem":
        """Either `text` or `image`."""
        if (self.text is None) == (self.image is None):
            raise ValueError("send either `text` or `image`")
        return self

    def content(self) -> JsonValue:
        """What is to be embedded."""
        return {"image": self.image} if self.text is None else {"text": self.text}


class UpsertRequest(Body):
    """POST /v1/index/upsert."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    index: str | None = None
    items: list[UpsertItem] = Field(min_length=1)


class DeleteRequest(Body):
    """POST /v1/index/delete: the rows with these ids, of either kind."""

    model_config = ConfigDict(extra="forbid")

    index: str | None = None
    ids: list[str] = Field(min_length=1, max_length=100_000)


class ScoreRequest(Body):
    """POST /v1/score: the similarity of one query with every document, or of each query with its document."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    queries: JsonValue
    documents: JsonValue


class RerankRequest(Body):
    """POST /v1/rerank: the documents in the order of their similarity to the query."""

    model: str | None = None
    query: JsonValue
    documents: list[JsonValue] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)


class ClassifyRequest(Body):
    """POST /v1/classify: which label fits each input. `{}` in `template` stands for the label."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    input: JsonValue
    labels: list[str] = Field(min_length=2)
    template: str = "{}"
    modality: Literal["text", "image"] = "text"

    @field_validator("template")
    @classmethod
    def has_place(cls, template: str) -> str:
        """The template says where the label goes."""
        if "{}" not in template:
            raise ValueError("the template contains {} where the label goes")
        return template


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: bool = False


# Fields of OpenAI's chat API that would change the answer and that this server cannot honour.
UNSUPPORTED = ("tools", "functions", "audio", "logprobs", "logit_bias", "frequency_penalty", "presence_penalty")


class ChatRequest(Body):
    """POST /v1/chat/completions. Greedy unless `temperature` is given."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field([], max_length=4)
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop")
    @classmethod
    def as_list(cls, stop: str | list[str]) -> list[str]:
        """One stop string is a list of one."""
        stops = [stop] if isinstance(stop, str) else stop
        if "" in stops:
            raise ValueError("a stop string is not empty")
        return stops

    def unsupported(self) -> list[str]:
        """Fields sent that ask for what this server cannot do."""
        return [name for name in UNSUPPORTED if self.model_extra and self.model_extra.get(name)]
