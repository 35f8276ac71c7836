"""Config: what can be set when the application starts; every field is an argument of `serve run serve.app:build`."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from click import ClickException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve.protocol.bodies import BodyLimits
from serve.protocol.items import CHARACTERS_PER_TOKEN, Limits

SILENT_BODY_S = 10.0  # a client that sends nothing for so long has gone


class ArgumentError(ClickException, ValueError):
    """A wrong argument, in one line: `serve run` is a click command, and shows no traceback for such an error."""


# What arrives waits for the batch that has begun: on two cores a fifth of a second, and larger ones are no faster.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 4096


class ServeArgs(BaseModel):
    """Arguments of `build`. Sizes are bytes, times are seconds, costs are tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field("tiny", description="run folder, checkpoint folder, `tiny`, or a Hugging Face name or path")
    index: str | None = Field(None, description="index folder that /v1/search searches and /v1/index changes")
    index_version: int | str | None = Field(None, description="version or tag to stay at; default: always the newest")
    index_memory: int = Field(
        2 << 30, ge=0, description="vectors that a replica may hold in memory; an index of more is searched on disk"
    )
    name: str | None = Field(None, description="what clients call the adapter; default: the name of the run folder")
    layout: Literal["colocated", "separate"] = Field(
        "colocated", description="colocated: one copy of the weights for both modes; separate: each mode scales apart"
    )
    engine: Literal["vladva", "vllm"] = Field(
        "vladva", description="what answers conversations; vllm: needs layout=separate and vLLM, answers adapter off"
    )
    engine_options: dict[str, Any] = Field(
        {}, description="engine arguments of vLLM, as JSON: '{\"gpu_memory_utilization\": 0.8}'"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the model; default: float32, on GPUs that of its run"
    )
    # With two ingress processes, both layouts fit into two CPUs, and so do two replicas of both modes.
    num_cpus: float = Field(0.9, ge=0, description="CPUs of a replica")
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of a replica; 0: on the CPU; default: one, where the cluster has any"
    )
    min_replicas: int = Field(1, ge=0, description="of each deployment; 0: scale to zero when idle")
    max_replicas: int = Field(2, ge=1, description="of each deployment")
    ingress_replicas: int = Field(2, ge=1, description="processes that speak HTTP: with two, one may die")
    ingress_cpus: float = Field(
        0.1, ge=0, description="CPUs of each of them; they are spread over the nodes that have these left"
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="cost at which a batch of embeddings is full: others wait for it; default: 1024, on GPUs 4096",
    )
    step_tokens: int = Field(512, ge=1, description="cost of a batch, or of prompts, between two tokens of answers")
    batch_wait_s: float = Field(0.002, ge=0, description="how long an idle replica waits for more items")
    max_conversations: int = Field(32, ge=1, description="answered at the same time by a replica")
    max_cache_tokens: int = Field(16_384, ge=1, description="of all conversations that a replica answers at a time")
    max_queue_s: float = Field(10, gt=0, description="how long waiting work may take before more is answered 429")
    max_queued_tokens: int = Field(
        65_536, ge=1, description="waiting work in memory; a quarter is left to small requests"
    )
    prepare_threads: int = Field(2, ge=1, description="threads of a replica that tokenise and decode images")
    max_tokens: int = Field(256, ge=1, description="length of a generated answer, where the request does not say")
    max_items: int = Field(2048, ge=1, description="items of one request")
    max_body_bytes: int = Field(64 << 20, ge=1, description="size of a request's body")
    max_image_bytes: int = Field(20 << 20, ge=1, description="size of an image's file")
    max_image_pixels: int = Field(50_000_000, ge=1, description="width times height of an image")
    body_s: float = Field(60, gt=0, description="how long a request's body may take to arrive")
    batches: str | None = Field(None, description="folder or s3:// for OpenAI's files and batches; default: none")
    batch_actors: int = Field(1, ge=1, description="processes that hold the model for a batch")
    batch_cpus: int = Field(1, ge=0, description="CPUs of each of them; GPUs as many as a replica has")
    cors_origins: tuple[str, ...] = Field(
        (), description="web origins whose pages may call, separated by commas: https://a.example,https://b.example; *"
    )
    deadline_s: float = Field(120, gt=0, description="when a request is answered 408 and its work cancelled")

    @property
    def batch_tokens(self) -> int:
        """Cost at which a batch of embeddings is full, on what a replica runs on."""
        return self.max_batch_tokens or (GPU_BATCH_TOKENS if self.num_gpus else CPU_BATCH_TOKENS)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ServeArgs":
        """The arguments of a command line or a config file. Raises ArgumentError for the first that is wrong."""
        try:
            return cls.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                near = get_close_matches(name, cls.model_fields, 1)
                reason = f"no such argument; did you mean {near[0]}?" if near else "no such argument"
            start = f"{name}: " if name else ""
            raise ArgumentError(f"{start}{reason} (all arguments: serve run serve.app:build help=1)") from None

    @classmethod
    def listing(cls) -> str:
        """All arguments, their defaults and what they are for."""
        lines = [f"{'argument':18} {'default':12} "]
        for name, field in cls.model_fields.items():
            default = "" if field.default in (None, (), {}) else str(field.default)
            lines.append(f"{name:18} {default:12} {field.description or ''}")
        return "\n".join(lines)

    @field_validator("model", "index")
    @classmethod
    def located(cls, place: str | None) -> str | None:
        """Local paths made absolute: replicas do not run in the folder of whoever starts them."""
        if place is not None and "://" not in place:
            path = Path(place).expanduser()
            if path.exists() and place != "tiny":
                return str(path.resolve())
            if place.startswith(("/", ".", "~")):
                raise ValueError(f"there is no {place}; give an existing folder, or a URI such as s3://bucket/run")
        return place

    @field_validator("batches")
    @classmethod
    def absolute(cls, folder: str | None) -> str | None:
        """The folder of batches, which need not be there yet, by its full path."""
        return folder if folder is None or "://" in folder else str(Path(folder).expanduser().resolve())

    @field_validator("cors_origins", mode="before")
    @classmethod
    def separated(cls, origins: Any) -> Any:
        """A command line has no lists."""
        return [one.strip() for one in origins.split(",") if one.strip()] if isinstance(origins, str) else origins

    @field_validator("engine_options", mode="before")
    @classmethod
    def parsed(cls, options: Any) -> Any:
        """A command line has JSON in place of a mapping."""
        return json.loads(options) if isinstance(options, str) else options

    @model_validator(mode="after")
    def engine_stands_apart(self) -> "ServeArgs":
        """vLLM has a deployment of its own, and is the only engine with options."""
        if self.engine == "vllm" and self.layout != "separate":
            raise ValueError("engine: vllm cannot embed, so it needs a deployment of its own: add layout=separate")
        if self.engine_options and self.engine != "vllm":
            raise ValueError("engine_options: they are vLLM's; add engine=vllm")
        return self

    @model_validator(mode="after")
    def replicas_in_order(self) -> "ServeArgs":
        """`min_replicas` is at most `max_replicas`."""
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}")
        return self

    @property
    def limits(self) -> Limits:
        """Caps on what one request may carry."""
        characters = CHARACTERS_PER_TOKEN * self.max_queued_tokens
        return Limits(self.max_items, self.max_image_bytes, self.max_image_pixels, all_characters=characters)

    @property
    def body_limits(self) -> BodyLimits:
        """What a body may take."""
        return BodyLimits(self.max_body_bytes, self.body_s, min(self.body_s, SILENT_BODY_S))

    @property
    def index_name(self) -> str | None:
        """What clients call the index: the name of its folder."""
        return self.index.rstrip("/").rpartition("/")[2] if self.index else None
