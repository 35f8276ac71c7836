"""Models: what this application serves, and the names by which clients ask for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.config import ServeArgs
from serve.protocol.errors import ApiError


@dataclass(frozen=True)
class Served:
    """The base model, and the adapter on it where there is one. The adapter is switched per request."""

    base: str
    adapter: str | None
    description: dict[str, Any]

    @classmethod
    def of(cls, model: str, name: str | None, description: dict[str, Any]) -> "Served":
        """Names for the model that `load_embedder(model)` describes. Local folders go by their last part."""
        checkpoint = description["base_model"]
        base = Path(checkpoint).name if Path(checkpoint).is_absolute() else checkpoint
        if description["adapter"] is None:
            return cls(name or base, None, description)
        adapter = name or adapter_name(model)
        if adapter == base:  # by this name clients would get either
            adapter = f"{adapter}-adapter"
        return cls(base, adapter, description)

    @property
    def generates(self) -> bool:
        """Whether the model answers conversations; a dual encoder, such as CLIP, only embeds."""
        return bool(self.description["generates"])

    @property
    def embedding_model(self) -> str:
        """The model that embeds."""
        return self.adapter or self.base

    def check_embedding(self, asked: str | None) -> str:
        """The model that embeds. Raises ApiError where another is asked for.

        NAME-query and NAME-passage are names of it too, for clients whose only option is the model.
        """
        names = [f"{self.embedding_model}{side}" for side in ("", "-query", "-passage")]
        if asked is not None and asked not in names:
            raise self.unknown(asked, [self.embedding_model])
        return self.embedding_model

    def check_judge(self, asked: str | None) -> str:
        """The model that judges pairs: the base model. Raises ApiError where another is asked for, or none answers."""
        self.check_generation(asked)
        return self.base

    def check_generation(self, asked: str | None) -> tuple[str, bool]:
        """The model that answers, and whether it is the adapter. Raises ApiError where another is asked for."""
        if not self.generates:
            message = f"model: {self.base} embeds and does not answer; serve a vision-language model for that"
            raise ApiError(404, message, "model_not_found", "model")
        name = asked or self.base
        if name not in (self.base, self.adapter):
            raise self.unknown(name, [self.base, *([self.adapter] if self.adapter else [])])
        return name, name == self.adapter

    def unknown(self, asked: str, known: list[str]) -> ApiError:
        """The refusal of a model that does not do this."""
        return ApiError(404, f"model: no {asked!r} here; send {' or '.join(known)}", "model_not_found", "model")

    def cards(self, created: int) -> list[dict[str, Any]]:
        """OpenAI's model list, with what the embeddings depend on."""
        about = self.description
        common = {"object": "model", "created": created, "owned_by": "vladva", "base_model": self.base}
        generator = {"id": self.base, **common, "type": "chat", "mode": ["generative"], "adapter": None}
        embedder = {
            "id": self.embedding_model,
            **common,
            "type": "embedding",
            "mode": ["discriminative", "generative"] if self.generates else ["discriminative"],
            "adapter": self.adapter,
            "dimension": about["dimension"],
            "matryoshka_dimensions": [*(about.get("matryoshka_dimensions") or [about["dimension"]])],
            "max_model_len": about["context"],
            "layer": about["layer"],
            "prompts": {"image": about["image_prompt"], "text": about["text_prompt"], "soft": about["soft_prompts"]},
            "dtype": about["dtype"],
            "fingerprint": about["fingerprint"],
        }
        return [embedder, generator] if self.adapter and self.generates else [embedder]


def described_by_files(args: ServeArgs) -> Served:
    """The models as a replica would describe them, without loading their weights."""
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.resolve import describe, preprocessor_of

    config, description = describe(args.model, adapter=True, dtype=args.dtype or "float32")
    context = preprocessor_of(config).config.get_text_config().max_position_embeddings
    generates = not is_dual_encoder(config.checkpoint)
    about = {**description, "context": context, "cuts": not generates, "generates": generates}
    return Served.of(args.model, args.name, about)


def adapter_name(model: str) -> str:
    """`.../demo` is `demo`, `.../demo/checkpoints/step-300` is `demo-step-300`."""
    parts = model.rstrip("/").split("/")
    return f"{parts[-3]}-{parts[-1]}" if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1]
