"""Backbones: one file per LVLM family, named after the `model_type` of its Hugging Face configuration.

A file defines `BACKBONE`, a `Backbone`: what differs between families, and nothing else. Adding a family is adding a
file; nothing is registered. One that differs from another in its class alone is a few lines:

    BACKBONE = replace(qwen2_vl.BACKBONE, model_class="Qwen2_5_VLForConditionalGeneration")
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

CONFIGS = Path(__file__).parent / "configs"
TINY = Path(__file__).parents[1] / "tiny/weights"  # the packaged checkpoint
COMMIT = re.compile("[0-9a-f]{40}")
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Backbone(ABC):
    """A family of LVLMs: how it is loaded, and what its images become.

    B samples, T tokens, D width; N images in R rows: tiles, or patches, of [3, h, w].
    """

    model_class: str  # of transformers
    packed_decoders: tuple[str, ...] = ()  # `model_type`s of its language models that packed/ computes
    lora_targets: str = LANGUAGE_LINEARS  # regular expression of the language model's linear layers
    embed_tokens: str = "embed_tokens"  # name of the token embedding, for PEFT's trainable_token_indices

    def load(self, checkpoint: str, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The pretrained model, its weights read tensor by tensor straight onto the device.

        The files are mapped, so that all processes of a node share one copy of them in the host's memory. With None for
        the dtype, that of the files, weights on the host are the mapped files themselves, and take no memory beside.
        """
        import torch
        import transformers

        kind = getattr(transformers, self.model_class)
        # With a map for the host PEFT would spread the model over whatever devices it finds.
        where = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
        return pretrained(kind, checkpoint, dtype=dtype or "auto", **where)

    @abstractmethod
    def num_image_tokens(self, config: PreTrainedConfig, processor: BaseImageProcessor, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height). Raises ValueError for a shape that the family does not take."""

    def limit_image_tokens(self, config: PreTrainedConfig, processor: BaseImageProcessor, most: int) -> None:
        """Have the processor make larger images smaller. Raises ValueError where the family has no such limit."""
        raise ValueError(f"model.max_image_tokens: {config.model_type} models have no such limit; leave it out")

    @abstractmethod
    def pixels(self, processor: BaseImageProcessor, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
        """An image as the processor cuts it up, neither rescaled nor normalised [R, 3, h, w], and its (height, width).

        In the unit that `model_inputs` needs: pixels before resizing, or patches.
        """

    @abstractmethod
    def model_inputs(
        self,
        config: PreTrainedConfig,
        inputs: dict[str, torch.Tensor],
        values: torch.Tensor | None,
        sizes: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes.

        inputs: input_ids and attention_mask [B, T]. values, sizes: normalised pixels [R, 3, h, w] of all images, and
        (height, width) of each [N, 2] as `pixels` gave it; None without images.
        """

    def hidden_states(self, model: Any, inputs: dict[str, torch.Tensor], layer: int | None) -> torch.Tensor:
        """Hidden states [B, T, D] of layer `layer` (None: the last) after the final norm.

        Neither later layers nor the LM head are computed.
        """
        multimodal = model.model if layer is None else first_layers(model.model, layer)
        return multimodal(**inputs, use_cache=False).last_hidden_state


def first_layers(multimodal: Any, layer: int) -> Any:
    """A view of a model whose language model ends after `layer` layers; it shares every weight with the original."""
    import copy

    from torch import nn

    short = copy.copy(multimodal)
    short._modules = dict(multimodal._modules)
    language = copy.copy(multimodal.language_model)
    language._modules = dict(multimodal.language_model._modules)
    language.layers = nn.ModuleList(multimodal.language_model.layers[:layer])
    language.config = copy.copy(language.config)
    language.config.num_hidden_layers = layer
    short.language_model = language
    return short


# ------------------------------------------------------------------------------------------------------------ finding


def backbone_families() -> list[str]:
    """The `model_type`s that there are backbones for."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def find_backbone(model_type: str) -> Backbone:
    """The backbone of a family. Raises ValueError where there is none."""
    if model_type not in backbone_families():
        raise ValueError(f"there is no backbone for {model_type!r} models; vladva has {', '.join(backbone_families())}")
    return import_module(f"{__name__}.{model_type}").BACKBONE


def backbone_of(checkpoint: str) -> Backbone:
    """The backbone of a checkpoint. Raises ValueError where there is no checkpoint or no such family."""
    from transformers import AutoConfig

    try:
        model_type = pretrained(AutoConfig, checkpoint).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"model.checkpoint {checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        return find_backbone(model_type)
    except ValueError as error:
        raise ValueError(f"model.checkpoint {checkpoint!r}: {error}") from None


# ------------------------------------------------------------------------------------------------------------ loading


class CheckpointSource(NamedTuple):
    """Where a checkpoint is: a folder, or a repository of the hub at a revision (a commit, branch or tag)."""

    name: str
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether what is loaded is the same wherever and whenever it is loaded."""
        return Path(self.name).is_dir() or COMMIT.fullmatch(self.revision or "") is not None


def checkpoint_source(checkpoint: str) -> CheckpointSource:
    """Of `tiny` (which ships with the package), a folder, `NAME` or `NAME@REVISION` of the hub."""
    if checkpoint == "tiny":
        return CheckpointSource(str(TINY))
    name, separator, revision = checkpoint.rpartition("@")
    if not separator or Path(checkpoint).is_dir():
        return CheckpointSource(checkpoint)
    return CheckpointSource(name, revision)


def pretrained(kind: Any, checkpoint: str, **options: Any) -> Any:
    """What a class of transformers loads of a checkpoint, at its revision."""
    source = checkpoint_source(checkpoint)
    return kind.from_pretrained(source.name, revision=source.revision or "main", **options)


def checkpoint_file(checkpoint: str, name: str) -> Path | None:
    """A file of a checkpoint, fetched where it is on the hub; None where the checkpoint has none of that name."""
    from transformers.utils import cached_file

    source = checkpoint_source(checkpoint)
    revision = source.revision or "main"
    found = cached_file(source.name, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def pinned(checkpoint: str) -> str:
    """`NAME@COMMIT` of a checkpoint on the hub, as it is there now; any other as it is.

    A branch moves while a job runs: its driver asks once, and every process loads that commit.
    """
    source = checkpoint_source(checkpoint)
    if source.is_pinned or ":" in source.name:  # open_clip names its weights by a tag of its own
        return checkpoint
    return f"{source.name}@{commit_of(checkpoint)}"


def commit_of(checkpoint: str) -> str:
    """The commit of a checkpoint on the hub, which is in the path of every file in the hub's cache.

    Raises ValueError where there is no such checkpoint.
    """
    try:
        file = checkpoint_file(checkpoint, "config.json")
    except OSError as error:
        raise ValueError(f"{checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    found = re.search("/snapshots/([0-9a-f]{40})/", file.as_posix() if file else "")
    if found is None:
        raise ValueError(f"{checkpoint!r}: the hub's cache does not say which commit {file} is of")
    return found[1]


# ------------------------------------------------------------------------------------------- models that are not loaded


def real_config(checkpoint: str) -> PreTrainedConfig:
    """The published configuration of a checkpoint, from this package: nothing is downloaded.

    Raises ValueError where the package does not have it.
    """
    from transformers import AutoConfig

    checkpoint = checkpoint_source(checkpoint).name
    files = {json.loads(path.read_text())["checkpoint"]: path for path in sorted(CONFIGS.glob("*.json"))}
    if checkpoint not in files:
        raise ValueError(f"there is no configuration of {checkpoint!r} in the package; known: {', '.join(files)}")
    content = json.loads(files[checkpoint].read_text())
    del content["checkpoint"]
    return AutoConfig.for_model(**content)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: every parameter's shape, no memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
