"""Schema: the bodies that clients send, as the `openai` client and curl examples written for vLLM send them.

OpenAI's routes ignore fields they do not know, as their clients expect; the routes that are ours refuse them, because a
misspelt option that does nothing is worse than an error. Lists stop at their first bad element.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)

T = TypeVar("T")
MAX_FIELDS = 100  # of one object
MAX_PARTS = 2048  # messages of a conversation, and parts of a message
Several = Annotated[list[T], Field(min_length=1, max_length=16_384, fail_fast=True)]
Modality = Literal["text", "image"]
Version = Annotated[int, Field(ge=0, lt=2**63)] | Annotated[str, StringConstraints(min_length=1, max_length=200)]
Truncate = Annotated[
    Literal["none", "start", "end"], BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
]
VectorType = Literal["float", "int8", "uint8", "binary", "ubinary"]
INSTRUCTION_CHARACTERS = 4000
Instruction = Annotated[str, StringConstraints(min_length=1, max_length=INSTRUCTION_CHARACTERS)]

STOP_CHARACTERS = 256


class Body(BaseModel):
    """A request. A field that is null counts as absent: some clients spell out every field they know."""

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """The fields that say something. Each that nobody knows would be an error of its own, so few are looked at."""
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_FIELDS:
            raise ValueError(f"an object of {len(body):,} fields; send {MAX_FIELDS} at most")
        return {name: value for name, value in body.items() if value is not None}


class ImageUrl(BaseModel):
    """Where the image is: a data: URI."""

    url: str


PART_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image_url": "image_url",
    "input_image": "image_url",
    "image_base64": "image_base64",
    "image": "image",
}


class ContentPart(BaseModel):
    """One part of a message: a text or an image, as OpenAI's two APIs, Cohere, Voyage and vLLM write them."""

    type: Literal["text", "input_text", "output_text", "image_url", "input_image", "image_base64", "image"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v)] = None
    image_base64: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def has_its_content(self) -> "ContentPart":
        """A text part has `text`, an image part `image_url`."""
        field = PART_FIELDS[self.type]
        if getattr(self, field) is None:
            raise ValueError(f"a part of type {self.type!r} has a field {field!r}")
        return self

    @property
    def is_text(self) -> bool:
        """Whether the part is a text."""
        return PART_FIELDS[self.type] == "text"

    @property
    def words(self) -> str:
        """The text of a text part."""
        return self.text or ""

    @property
    def image_data(self) -> str:
        """The image of an image part, as it was sent."""
        return getattr(self, PART_FIELDS[self.type]) if self.image_url is None else self.image_url.url


class Message(BaseModel):
    """One turn of a conversation. Only an assistant's may be empty, where it called a tool."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def says_something(self) -> "Message":
        """Everybody but the assistant has `content`."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} has a field 'content'")
        return self

    def parts(self) -> list[ContentPart]:
        """The content as parts, also where it came as a string."""
        if isinstance(self.content, list):
            return self.content
        return [ContentPart(type="text", text=self.content or "")]


class EmbedOptions(Body):
    """What every route that embeds takes."""

    model: str | None = None
    modality: Modality = "text"
    instruction: Instruction | None = None
    truncate: Truncate = "none"
    user: str | None = None


class EmbeddingRequest(EmbedOptions):
    """POST /v1/embeddings. `input` or `messages`: one item or several, in any of the forms of items.py."""

    input: JsonValue = None
    messages: JsonValue = None
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: VectorType = "float"
    output_dtype: VectorType | None = None  # Voyage's name for it
    dimensions: int | None = Field(None, ge=1)
    allow_untrained_dimensions: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=-1)  # vLLM's name for `truncate: end`
    partial: bool = False

    @model_validator(mode="after")
    def one_source(self) -> "EmbeddingRequest":
        """Either `input` or `messages`."""
        if (self.input is None) == (self.messages is None):
            raise ValueError("send either `input` or `messages`")
        return self

    @property
    def dtype(self) -> VectorType:
        """Numbers of the vectors."""
        return self.output_dtype or self.embed_dtype


class SearchRequest(EmbedOptions):
    """POST /v1/search. `query`: an item, or a vector; `filter`: SQL over the index's columns."""

    model_config = ConfigDict(extra="forbid")

    query: JsonValue
    k: int = Field(10, ge=1, le=1000)
    filter: str | None = Field(None, min_length=1, max_length=4000)
    index: str | None = None
    version: Version | None = None


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
    items: Several[UpsertItem]


class DeleteRequest(Body):
    """POST /v1/index/delete: the rows with these ids, of either kind."""

    model_config = ConfigDict(extra="forbid")

    index: str | None = None
    ids: Annotated[list[str], Field(min_length=1, max_length=100_000, fail_fast=True)]


class ScoreRequest(EmbedOptions):
    """POST /v1/score: the similarity of one query with every document, or of each query with its document.

    vLLM's older names for the two lists, `text_1` and `text_2`, and `data_1` and `data_2`, are taken too.
    """

    model_config = ConfigDict(extra="forbid")

    queries: JsonValue
    documents: JsonValue
    mode: Literal["embedding", "generative"] = "embedding"

    @model_validator(mode="before")
    @classmethod
    def renamed(cls, body: Any) -> Any:
        """The fields by the names above."""
        names = {"text_1": "queries", "data_1": "queries", "text_2": "documents", "data_2": "documents"}
        return {names.get(name, name): value for name, value in body.items()} if isinstance(body, dict) else body


class RerankRequest(EmbedOptions):
    """POST /v1/rerank: the documents in the order of their similarity to the query."""

    query: JsonValue
    documents: JsonValue
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    mode: Literal["embedding", "generative"] = "embedding"


class ClassifyRequest(EmbedOptions):
    """POST /v1/classify: which label fits each input. `{}` in `template` stands for the label."""

    model_config = ConfigDict(extra="forbid")

    input: JsonValue
    labels: Annotated[list[str], Field(min_length=2, fail_fast=True)]
    template: str = Field("{}", max_length=4000)

    @field_validator("template")
    @classmethod
    def has_place(cls, template: str) -> str:
        """The template says where the label goes."""
        if "{}" not in template:
            raise ValueError("the template contains {} where the label goes")
        return template


class TokenizeRequest(EmbedOptions):
    """POST /v1/tokenize: what items would cost, or a conversation that is to be answered."""

    model_config = ConfigDict(extra="forbid")

    input: JsonValue = None
    messages: JsonValue = None

    @model_validator(mode="after")
    def one_source(self) -> "TokenizeRequest":
        """Either `input` or `messages`."""
        if (self.input is None) == (self.messages is None):
            raise ValueError("send either `input` or `messages`")
        return self


class CohereEmbedRequest(Body):
    """POST /v2/embed, Cohere's form: one of `texts`, `images` (data: URIs) and `inputs` (content parts)."""

    model: str | None = None
    texts: Several[str] | None = None
    images: Several[str] | None = None
    inputs: Several[JsonValue] | None = None
    input_type: str | None = Field(None, max_length=100)
    embedding_types: Annotated[
        list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]], Field(max_length=6, fail_fast=True)
    ] = ["float"]
    output_dimension: int | None = Field(None, ge=1)
    truncate: Truncate = "end"  # Cohere's default, END

    @model_validator(mode="after")
    def one_source(self) -> "CohereEmbedRequest":
        """One of the three lists."""
        if [self.texts, self.images, self.inputs].count(None) != 2:
            raise ValueError("send one of `texts`, `images` and `inputs`")
        return self


class CohereRerankRequest(Body):
    """POST /v2/rerank, Cohere's form."""

    model: str | None = None
    query: JsonValue
    documents: JsonValue
    top_n: int | None = Field(None, ge=1)


class BatchRequest(Body):
    """POST /v1/batches, OpenAI's form."""

    input_file_id: str = Field(max_length=100)
    endpoint: str = Field(max_length=100)
    completion_window: str = Field("24h", max_length=20)
    metadata: dict[str, Annotated[str, StringConstraints(max_length=512)]] | None = Field(None, max_length=16)


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: bool = False


# Fields of OpenAI's and vLLM's chat APIs that would change the answer and that this server cannot honour, each with the
# values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
OneStop = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARACTERS)]


class ChatRequest(Body):
    """POST /v1/chat/completions. Greedy unless `temperature` is given."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[OneStop],
        Field(max_length=4, fail_fast=True),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = []
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def unsupported(self) -> list[str]:
        """Fields sent that ask for what this server cannot do."""
        extra = self.model_extra or {}
        return [name for name, no_ops in UNSUPPORTED.items() if name in extra and extra[name] not in no_ops]
