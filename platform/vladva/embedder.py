"""Embedder: an LVLM with an adapter and soft prompts, giving one normalised vector for a picture or a text.

The embedding is the hidden state at the last prompt token of layer k, after the model's final norm, L2-normalised in
float32. One PEFT adapter holds everything that was learned: LoRA on the language model's linear layers and the
embeddings of the soft-prompt tokens. With the adapter off the model is the original generator, bit for bit.

B pictures or texts, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from vladva.backbones import resolve
from vladva.batches import Pixels, Preprocessor, Tokens, cut, key_of
from vladva.config import ModelConfig, RunConfig
from vladva.dual_encoders import family_of
from vladva.fast_forward import Forward, embedding_forward
from vladva.losses.next_token import cross_entropy_sum, mean_share, next_token
from vladva.operations import Table
from vladva.prompts import IMAGE_PROMPT, TEXT_PROMPT
from vladva.training_forward import TrainingForward, why_plain

if TYPE_CHECKING:
    from PIL import Image

    from vladva.dual_encoder import DualEncoder

ADAPTER_NOTE = "vladva.json"  # beside adapter_config.json: what the adapter was trained on and how to prompt it


class EmbeddingModel(nn.Module):
    """The trained module: backbone with adapter, and the contrastive loss's learnable log scale and bias."""

    def __init__(
        self, config: ModelConfig, preprocessor: Preprocessor, *, log_scale: float = 0.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.backbone = preprocessor.backbone
        self.layer = config.layer
        self.lvlm = self.backbone.load(resolve(config.checkpoint), getattr(torch, config.dtype))
        layers = self.lvlm.config.get_text_config().num_hidden_layers
        if config.layer is not None and config.layer > layers:
            raise ValueError(f"model.layer is {config.layer}, but {config.checkpoint} has {layers} layers")
        if config.layer == layers:
            self.layer = None
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))  # DeepSpeed does not take 0-d parameters
        self.bias = nn.Parameter(torch.tensor([bias]))
        mean, std = preprocessor.pixel_statistics()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.packed: TrainingForward | None = None  # what training runs on, where it can

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model, with the adapter's layers in place where there is one."""
        from peft import PeftModel

        return self.lvlm.get_base_model() if isinstance(self.lvlm, PeftModel) else self.lvlm

    def inputs(
        self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes; uint8 pixels [R, 3, h, w] are normalised here, on the device."""
        ids = tokens["ids"]
        positions = torch.arange(ids.shape[1], device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": (positions < tokens["lengths"][:, None]).long()}
        if pixels is None:
            return self.backbone.model_inputs(self.base.config, inputs, None, None)
        values = pixels["values"]
        if "features" not in pixels:
            values = values.float().sub_(self.pixel_mean).div_(self.pixel_std).to(self.base.dtype)
        return self.backbone.model_inputs(self.base.config, inputs, values, pixels["sizes"])

    def forward(
        self,
        tokens: dict[str, torch.Tensor],
        pixels: dict[str, torch.Tensor] | None = None,
        *,
        caption_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, D] (float32, unit norm), next-token loss of the captions that follow, and (log scale, bias).

        One forward serves both losses: attention is causal, so the summary token does not see the caption after it.
        `caption_tokens` is the number of caption tokens in the global batch, over which the loss is a mean; with None
        there is no caption loss (0).
        """
        if self.packed is not None and self.training:
            return self.packed_forward(self.packed, tokens, pixels, caption_tokens)
        inputs = self.inputs(tokens, pixels)
        if "position_ids" not in inputs:
            # Causal attention with the padding on the right sees none of it. (Without a mask, transformers takes
            # positions that are not 0, 1, 2... for those of several samples in a row.)
            del inputs["attention_mask"]
        # The summary comes first, with and without captions: so dropout draws the same masks for it.
        summary = hidden = self.backbone.hidden_states(self.base, inputs, self.layer)
        if caption_tokens is not None and self.layer is not None:
            hidden = self.backbone.hidden_states(self.base, inputs, None)
        rows = torch.arange(len(hidden), device=hidden.device)
        embeddings = normalize(summary[rows, tokens["prompt_lengths"] - 1].float(), dim=-1)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if caption_tokens is not None:
            loss = next_token(hidden, self.base.lm_head.weight, caption_labels(tokens), caption_tokens)
        return embeddings, loss, torch.cat([self.log_scale, self.bias]).float()

    def packed_forward(
        self,
        packed: TrainingForward,
        tokens: dict[str, torch.Tensor],
        pixels: dict[str, torch.Tensor] | None,
        caption_tokens: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same without what is not needed for it."""
        scalars = torch.cat([self.log_scale, self.bias]).float()
        if caption_tokens is None:
            return packed(tokens, pixels), scalars.new_zeros(()), scalars
        embeddings, before, targets = packed.with_captions(tokens, pixels)
        head = Table.of(self.base.lm_head)
        replaced = None if head.rows is None else (head.soft, head.rows)
        total = cross_entropy_sum(before, head.base.weight, targets, replaced=replaced)
        return embeddings, mean_share(total, caption_tokens), scalars

    def see(self, pixels: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The pictures as the vision tower, which is frozen, gives them; unchanged where training is not packed."""
        if pixels is None or self.packed is None:
            return pixels
        nothing = pixels["values"].new_zeros(len(pixels["sizes"]), 1, dtype=torch.long)
        tokens = {"ids": nothing, "lengths": nothing[:, 0]}
        features = self.packed.image_features(self.inputs(tokens, pixels))
        shape = torch.empty(pixels["values"].shape, device="meta")
        return {"values": shape, "sizes": pixels["sizes"], "features": features}


def caption_labels(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels [B, T]: the token ids of the captions and their end, -100 on prompts and padding."""
    positions = torch.arange(tokens["ids"].shape[1], device=tokens["ids"].device)
    caption = (positions >= tokens["prompt_lengths"][:, None]) & (positions < tokens["lengths"][:, None])
    return tokens["ids"].masked_fill(~caption, -100)


def as_tensors(record: Tokens | Pixels, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The record's fields, on the device."""
    return {f.name: torch.tensor(getattr(record, f.name), device=device) for f in fields(record)}


def add_adapter(model: EmbeddingModel, config: ModelConfig) -> None:
    """Put a new adapter on the model: LoRA, and soft prompts that start as the hand-written ones.

    With the initial adapter (LoRA's second factor is zero) the model embeds exactly as zero-shot.
    """
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    preprocessor, embed_tokens = model.preprocessor, model.backbone.EMBED_TOKENS
    soft = [i for side in ("image", "text") for i in preprocessor.soft_ids[side]]
    grow_embeddings(model.lvlm, max(soft, default=0) + 1)
    if config.lora_rank:
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=model.backbone.LORA_TARGETS,
            trainable_token_indices={embed_tokens: soft} if soft else None,
        )
    else:  # PEFT has no LoRA without a layer to put it on
        adapter = TrainableTokensConfig(token_indices=soft, target_modules=[embed_tokens])
    model.lvlm = get_peft_model(model.lvlm, adapter)
    if soft:
        table = model.base.get_input_embeddings()
        written = [i for side in ("image", "text") for i in preprocessor.prompt_ids[side]]
        with torch.no_grad():
            tokens = table.token_adapter if config.lora_rank else table
            tokens.trainable_tokens_delta["default"].copy_(table.weight[written])
    raise_precision(model)


def pack_training(model: EmbeddingModel, config: RunConfig) -> str | None:
    """Train on packed tokens from now on; returns the reason where that cannot be."""
    reason = why_plain(model.backbone, model.base.config.get_text_config(), config)
    if reason is None:
        model.packed = TrainingForward(model)
    return reason


def raise_precision(model: EmbeddingModel) -> None:
    """What is trained in float32, in which the optimizer works whatever the base model's dtype."""
    for parameter in model.lvlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def checkpoint_activations(model: EmbeddingModel) -> None:
    """Keep only the inputs of the language model's layers for backward; a frozen vision tower keeps nothing anyway."""
    language_model = model.base.model.language_model
    language_model.gradient_checkpointing_enable({"use_reentrant": False})


def grow_embeddings(lvlm: nn.Module, rows: int) -> None:
    """Make room for `rows` tokens, to a multiple of 64. LLaVA-1.5, Qwen2-VL and the tiny model have them already."""
    there = lvlm.get_input_embeddings().num_embeddings
    if there < rows:
        lvlm.resize_token_embeddings(rows, pad_to_multiple_of=64, mean_resizing=False)
        for table in (lvlm.get_input_embeddings(), lvlm.get_output_embeddings()):
            table.weight.data[there:] = 0  # not at random: an adapter gives the same model whenever it is loaded


def save_adapter(model: EmbeddingModel, config: ModelConfig, folder: Path) -> None:
    """Write the adapter in PEFT's format, with a note of base model, layer and prompts beside it."""
    model.lvlm.save_pretrained(folder, save_embedding_layers=False)
    (folder / ADAPTER_NOTE).write_text(json.dumps(adapter_note(config), indent=2) + "\n")


def adapter_note(config: ModelConfig) -> dict[str, Any]:
    """What must be known, beside the weights, to embed with an adapter."""
    names = ("checkpoint", "layer", "image_prompt", "text_prompt", "soft_prompts", "max_image_tokens")
    return {name: getattr(config, name) for name in names}


def load_adapter(model: EmbeddingModel, folder: Path, *, trainable: bool = False) -> None:
    """Put a saved adapter on the model."""
    import warnings

    from peft import PeftModel

    # PEFT asks for a property of transformers by the name it is about to lose.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    soft = [i for side in ("image", "text") for i in model.preprocessor.soft_ids[side]]
    grow_embeddings(model.lvlm, max(soft, default=0) + 1)
    model.lvlm = PeftModel.from_pretrained(model.lvlm, folder, is_trainable=trainable)
    if trainable:
        raise_precision(model)


# ---------------------------------------------------------------------------------------------------------- inference


@dataclass(frozen=True)
class ModelReference:
    """A model by name: a base checkpoint, and the local folder of an adapter where there is one."""

    checkpoint: str
    adapter: Path | None = None
    prompts: tuple[str, str] = (IMAGE_PROMPT, TEXT_PROMPT)  # of the base model, zero-shot


def find_model(model: str) -> ModelReference:
    """Resolve a run folder, a checkpoint `.../step-N`, an adapter folder, `tiny`, a name or path of Hugging Face's, or
    one of `systems.py`.

    Raises ValueError where a run has no checkpoint yet.
    """
    from vladva import checkpoint, storage, systems

    if storage.exists(storage.join(model, "config.json")) and storage.exists(storage.join(model, "checkpoints")):
        newest = checkpoint.latest(model)
        if newest is None:
            raise ValueError(f"{model} has no complete checkpoint yet (looked in {storage.join(model, 'checkpoints')})")
        model = newest
    if storage.exists(storage.join(model, "adapter", ADAPTER_NOTE)):
        adapter = checkpoint.load_adapter(model)
        return ModelReference(json.loads((adapter / ADAPTER_NOTE).read_text())["checkpoint"], adapter)
    if (Path(model) / ADAPTER_NOTE).exists():
        return ModelReference(json.loads((Path(model) / ADAPTER_NOTE).read_text())["checkpoint"], Path(model))
    system = systems.find(model)
    if system:
        return ModelReference(system.checkpoint, prompts=system.prompts)
    return ModelReference(model)


def load_embedder(
    model: str,
    *,
    adapter: bool = True,
    merge: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    layer: int | None = None,
) -> Embedder | DualEncoder:
    """Load what `find_model` resolves. `adapter=False` is the base model, zero-shot; `merge` folds the adapter in.

    `layer` embeds from another layer than the model's own.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights from the disk; downloads keep theirs
    reference = find_model(model)
    if family_of(reference.checkpoint):
        from vladva.dual_encoder import DualEncoder

        return DualEncoder(reference.checkpoint, dtype=dtype, device=device)
    folder = reference.adapter if adapter else None
    config = config_of(reference, folder, dtype)
    if layer is not None:
        config = replace(config, layer=layer)
    preprocessor = Preprocessor(
        config.checkpoint,
        image_prompt=config.image_prompt,
        text_prompt=config.text_prompt,
        soft_prompts=config.soft_prompts,
        max_image_tokens=config.max_image_tokens,
    )
    embedding_model = EmbeddingModel(config, preprocessor)
    if folder:
        load_adapter(embedding_model, folder)
        if merge:
            embedding_model.lvlm = embedding_model.lvlm.merge_and_unload()
    return Embedder(embedding_model.to(device).eval(), config, folder, merged=merge)


def config_of(reference: ModelReference, adapter: Path | None, dtype: str) -> ModelConfig:
    """The configuration to embed with: what the adapter was trained with, or the base model's, zero-shot."""
    if adapter:
        return ModelConfig(dtype=dtype, **json.loads((adapter / ADAPTER_NOTE).read_text()))
    image_prompt, text_prompt = reference.prompts
    return ModelConfig(
        reference.checkpoint,
        dtype=dtype,  # type: ignore[arg-type]
        image_prompt=image_prompt,
        text_prompt=text_prompt,
        soft_prompts=False,
    )


class Embedder:
    """Embeds texts and pictures, and generates, with one loaded model."""

    def __init__(self, model: EmbeddingModel, config: ModelConfig, adapter: Path | None, *, merged: bool) -> None:
        self.model = model
        self.preprocessor = model.preprocessor
        self.config = config
        self.adapter = adapter
        self.merged = merged
        self.device = model.log_scale.device
        self.dimension: int = model.base.config.get_text_config().hidden_size
        self.layer: int = config.layer or model.base.config.get_text_config().num_hidden_layers
        self.fingerprint = fingerprint_of(config, adapter, self.layer, self.dimension, self.preprocessor)

    @cached_property
    def forward(self) -> Forward:
        """Tokens, pixels -> unit vectors [B, D]. Made when first asked for: to chat, a model needs none."""
        return embedding_forward(self.model)

    def description(self) -> dict[str, Any]:
        """What tables and indexes made with this embedder carry."""
        return {
            "base_model": self.config.checkpoint,
            "adapter": str(self.adapter) if self.adapter else None,
            "image_prompt": self.config.image_prompt,
            "text_prompt": self.config.text_prompt,
            "soft_prompts": self.config.soft_prompts,
            "layer": self.layer,
            "dimension": self.dimension,
            "dtype": self.config.dtype,
            "fingerprint": self.fingerprint,
        }

    def count_text_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that embedding each text costs, prompt included."""
        return [len(self.preprocessor.text_prompt(text)) for text in texts]

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that embedding a picture costs, prompt included."""
        return len(self.preprocessor.image_prompt((width, height)))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32. Equal texts are embedded once; those of like length share a batch."""
        unique = list(dict.fromkeys(texts))
        row = {text: i for i, text in enumerate(unique)}
        return self.embed([self.preprocessor.text_prompt(text) for text in unique], None, batch_size)[
            [row[text] for text in texts]
        ]

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32. Equal pictures are embedded once."""
        keys = [key_of(f"{image.mode} {image.size}".encode() + image.tobytes()) for image in images]
        unique = dict(zip(keys, images, strict=True))
        row = {key: i for i, key in enumerate(unique)}
        prompts = [self.preprocessor.image_prompt(image.size) for image in unique.values()]
        return self.embed(prompts, list(unique.values()), batch_size)[[row[key] for key in keys]]

    @torch.inference_mode()
    def embed(
        self, prompts: Sequence[list[int]], images: Sequence[Image.Image] | None = None, batch_size: int = 64
    ) -> np.ndarray:
        """Unit vectors [N, D], float32, of prompts and the pictures in them; batches are cut by what they cost."""
        embeddings_ND = np.zeros((len(prompts), self.dimension), np.float32)
        for chosen in cut([len(prompt) for prompt in prompts], batch_size):
            tokens = as_tensors(self.preprocessor.pad([(prompts[i], []) for i in chosen]), self.device)
            pixels = images and as_tensors(self.preprocessor.pixels([images[i] for i in chosen]), self.device)
            embeddings_ND[chosen] = self.forward(tokens, pixels).cpu().numpy()
        return embeddings_ND

    def generate(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: bool = False,
    ) -> Iterator[str]:
        """Pieces of the assistant's answer, as they come. Greedy when the temperature is 0.

        `messages` are in Hugging Face's chat form (content: a list of {"type": "text", "text"} and {"type": "image"}).
        Raises ValueError where pictures and image parts differ in number, or the adapter is merged and asked off.
        """
        parts = sum(
            part.get("type") == "image" for m in messages if isinstance(m["content"], list) for part in m["content"]
        )
        if parts != len(images):
            raise ValueError(f"messages hold {parts} image parts, but {len(images)} pictures came with them")
        if self.merged and not adapter:
            raise ValueError("this model's adapter is merged into its weights; load it with merge=False to turn it off")
        if seed is not None:
            torch.manual_seed(seed)
        ids = self.preprocessor.render(messages, [image.size for image in images])
        tokens = as_tensors(self.preprocessor.pad([(ids, [])]), self.device)
        pixels = as_tensors(self.preprocessor.pixels(images), self.device) if images else None
        inputs = self.model.inputs(tokens, pixels)
        off = self.adapter is not None and not adapter and not self.merged
        tokenizer = self.preprocessor.tokenizer
        text, produced = "", []
        for token in self._decode(inputs, max_tokens, temperature, top_p, off):
            produced.append(token)
            whole = tokenizer.decode(produced, skip_special_tokens=True).lstrip()
            cut = min((whole.index(word) for word in stop if word in whole), default=None)
            if cut is not None:
                yield whole[len(text) : cut]
                return
            # A stop word may be half written, and so may a character of several bytes: hold those back.
            held = max((n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])), default=0)
            if not whole.endswith("\ufffd") and len(whole) - held > len(text):
                yield whole[len(text) : len(whole) - held]
                text = whole[: len(whole) - held]
        whole = tokenizer.decode(produced, skip_special_tokens=True).lstrip()
        if len(whole) > len(text):
            yield whole[len(text) :]

    def _decode(
        self, inputs: dict[str, torch.Tensor], max_tokens: int, temperature: float, top_p: float, adapter_off: bool
    ) -> Iterator[int]:
        """Token ids one by one, with the key-value cache, until the end-of-sequence token."""
        ends = self.model.base.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends)
        cache = None
        for _ in range(max_tokens):
            # The adapter is off only while a token is computed, so that other callers never see it off.
            with torch.inference_mode(), self.model.lvlm.disable_adapter() if adapter_off else nullcontext():
                output = self.model.base(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = choose_token(output.logits[0, -1].float(), temperature, top_p)
            if token in ends:
                return
            yield token
            mask, positions = inputs["attention_mask"], inputs.get("position_ids")
            inputs = {
                "input_ids": torch.tensor([[token]], device=mask.device),
                "attention_mask": torch.cat([mask, mask.new_ones(1, 1)], dim=1),
            }
            if positions is not None:  # [3, 1, T]: where a picture takes fewer positions than it has tokens
                inputs["position_ids"] = positions.amax().expand(3, 1, 1) + 1


def choose_token(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    """The next token from logits [V]: the best at temperature 0, else drawn from the smallest set of mass `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    outside[0] = False
    return int(order[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)])


def fingerprint_of(
    config: ModelConfig, adapter: Path | None, layer: int, dimension: int, preprocessor: Preprocessor
) -> str:
    """16 hex digits that change with base model, adapter, prompts, layer, dimension or preprocessing."""
    parts = {
        "base": base_revision(resolve(config.checkpoint)),
        "adapter": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        if adapter
        else None,
        "prompts": [config.image_prompt, config.text_prompt, config.soft_prompts],
        "layer": layer,
        "dimension": dimension,
        "pixels": json.loads(preprocessor.image_processor.to_json_string()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def base_revision(checkpoint: str) -> str:
    """The commit of a model from the hub; of a local folder, a hash of its configuration and samples of its weights."""
    from transformers import AutoConfig

    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(checkpoint)._commit_hash)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for offset in range(0, path.stat().st_size, max(1 << 20, path.stat().st_size // 64)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
