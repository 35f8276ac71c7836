"""Memory: what a run needs on each worker's device, told before there is a device, a weight or a cluster.

The model is built on the meta device from its configuration. Images, texts and captions are taken as long as the run's
settings allow: the plan errs on the high side. b pairs a chunk, G pairs in the global batch,
W workers, D width, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

GIB = 1 << 30
LARGEST_EDGES = (336, 672, 1008, 1344, 4096, 8192)  # of images, among which is one with as many tokens as can be
PUBLISHED_IMAGE_TOKENS = 16_384  # of an image, at most, by the files of Qwen's checkpoints
PROMPT_TOKENS = 32  # around an image or a text: chat template, written or soft prompt
LOGIT_ROWS = 512  # positions of a block in the next-token loss
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: gathered at a time
RESERVE = int(1.5 * GIB)  # on a GPU: CUDA's context, and what its allocator cannot use


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a run. `device` and `host`: bytes of one worker, by part."""

    parameters: int
    trainable: int
    image_tokens: int  # of one image with its prompt and long caption, at most
    text_tokens: int  # of one caption with its prompt, at most
    tokens_per_step: int
    device: dict[str, int]
    host: dict[str, int]
    plain: str | None  # why the plain forward is trained; None where tokens are packed

    @property
    def total(self) -> int:
        """Bytes on one worker's device."""
        return sum(self.device.values())


def check_memory(config: RunConfig) -> MemoryPlan:
    """The plan of a run. Raises ValueError, naming the setting to change, if it exceeds cluster.device_memory_gib."""
    fewest = config.cluster.min_workers or config.cluster.workers  # whose shares are the largest
    plan = plan_memory(replace(config, cluster=replace(config.cluster, workers=fewest)))
    limit = config.cluster.device_memory_gib
    if limit is None or plan.total <= limit * GIB:
        return plan
    largest = max(plan.device, key=plan.device.__getitem__)
    raise ValueError(
        f"{config.name} needs {plan.total / GIB:.1f} GiB on each worker, cluster.device_memory_gib is {limit:g}; "
        f"the largest part is {largest} ({plan.device[largest] / GIB:.1f} GiB); {_advice(config, limit)}"
    )


def check_device(config: RunConfig, device_bytes: int) -> None:
    """Raises ValueError where a worker's device has less memory than cluster.device_memory_gib says that it has."""
    limit = config.cluster.device_memory_gib
    if limit is not None and device_bytes < 0.99 * limit * GIB:  # cards of one kind differ by a little
        raise ValueError(
            f"this device has {device_bytes / GIB:.1f} GiB, cluster.device_memory_gib is {limit:g}: use a recipe for "
            f"smaller cards (..._48gb, ..._24gb), or nodes with larger ones"
        )


def _advice(config: RunConfig, limit: float) -> str:
    """The settings that make it fit: one after the other, the cheapest first, until it does."""
    train = config.train
    steps: list[dict[str, Any]] = [] if config.caches_gradients else [{"gradient_cache": True}]
    steps.append({"activation_checkpointing": True})
    size = train.chunk_size
    while size % 2 == 0 and size // 2 % config.data.run_length == 0:
        size //= 2
        steps.append({"chunk_size": size})
    splits = not config.data.mixed_inputs  # ZeRO-3 takes no such pairs
    steps += [{"zero_stage": 3}, {"offload": True}] if splits else [{"zero_stage": 2}, {"offload": True}]
    changes: dict[str, Any] = {}
    for step in steps:
        changes |= step
        needed = plan_memory(replace(config, train=replace(train, **changes))).total
        if needed <= limit * GIB:
            told = ", ".join(f"train.{name} {value}" for name, value in changes.items())
            return f"{told} makes it {needed / GIB:.1f} GiB"
    more = "more workers with train.zero_stage 3, or " if splits else ""
    return f"no setting makes it fit: use {more}devices with more memory"


def plan_memory(config: RunConfig) -> MemoryPlan:
    """Expected sizes of a run, from its configuration alone."""
    from vladva.models.backbones import find_backbone
    from vladva.models.packed.decoder import packing_unsupported
    from vladva.train.grad_cache import KEPT_FEATURES

    settings = settings_of(config.model.checkpoint)
    text_settings = settings.get_text_config()
    parameters, trainable = count_parameters(settings, config)
    image, text = side_tokens(settings, config)
    tokens_per_pair = image + text * (1 + config.data.hard_negatives)
    chunks = 1 if config.caches_gradients else config.chunks_per_worker
    kept = tokens_per_pair * config.train.chunk_size * chunks
    plain = packing_unsupported(find_backbone(settings.model_type), text_settings, config)

    device, host = states(config, parameters, trainable), {}
    if config.train.offload:
        host["optimizer"] = device.pop("optimizer")
    device["activations"] = kept * activation_bytes(text_settings, config, image, plain)
    if config.train.activation_checkpointing:
        # With what its backward makes: without checkpointing, the last layer is done and freed before a whole one is.
        gradients = element_bytes(config) * (4 * text_settings.intermediate_size + 4 * text_settings.hidden_size)
        device["one layer again"] = kept * (layer_bytes(text_settings, config, image, plain) + gradients)
    if plain and config.model.soft_prompts:
        device["token table"] = table_bytes(settings, config)
    if not plain and config.caches_gradients and not config.data.texts_only:
        features = image * text_settings.hidden_size * element_bytes(config)
        images = config.chunks_per_worker * config.train.chunk_size
        device["image features"] = min(KEPT_FEATURES, images * features)
    device |= loss_bytes(text_settings, config)
    if config.cluster.gpus_per_worker:
        device["reserve"] = RESERVE
    tokens = tokens_per_pair * config.train.global_batch
    return MemoryPlan(parameters, trainable, image, text, tokens, device, host, plain)


def settings_of(checkpoint: str) -> PreTrainedConfig:
    """The checkpoint's configuration: the package's copy of the published one, else that of the folder or the hub."""
    from transformers import AutoConfig

    from vladva.models.backbones import backbone_of, pretrained, real_config

    try:
        return real_config(checkpoint)
    except ValueError:
        backbone_of(checkpoint)  # says what is wrong where there is none
        return pretrained(AutoConfig, checkpoint)


def count_parameters(settings: PreTrainedConfig, config: RunConfig) -> tuple[int, int]:
    """Parameters of the base model, and those that are trained: LoRA's rank x (inputs + outputs), and soft prompts."""
    from torch import nn

    from vladva.losses.contrastive import find_loss
    from vladva.models.backbones import find_backbone, without_weights

    targets = find_backbone(settings.model_type).lora_targets
    model = without_weights(settings)
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, name)]
    trainable = sum(config.model.lora_rank * (m.in_features + m.out_features) for m in linears)
    if config.model.soft_prompts:  # a token for every word and mark, which is what tokenizers make of the prompts
        prompts = config.model.image_prompt + config.model.text_prompt
        trainable += len(re.findall(r"\w+|[^\w\s]", prompts)) * settings.get_text_config().hidden_size
    trainable += sum(scalar.learned for scalar in find_loss(config.loss).scalars().values())
    return sum(p.numel() for p in model.parameters()), trainable


def side_tokens(settings: PreTrainedConfig, config: RunConfig) -> tuple[int, int]:
    """Tokens of a pair's query, an image as a rule, and of one of its positives or negatives, at most."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    from vladva.models.backbones import find_backbone

    data = config.data
    text = PROMPT_TOKENS + min(data.max_text_tokens or data.short_below, data.short_below)
    if data.texts_only:
        return text, text
    backbone = find_backbone(settings.model_type)
    processor = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[settings.model_type]["pil"])()
    if config.model.max_image_tokens is not None:
        backbone.limit_image_tokens(settings, processor, config.model.max_image_tokens)
    elif "longest_edge" in processor.size:  # the published files allow more than the processor's own defaults
        backbone.limit_image_tokens(settings, processor, PUBLISHED_IMAGE_TOKENS)
    caption = data.long_below if config.loss.next_token_weight else 0
    sizes = [(width, height) for width in LARGEST_EDGES for height in LARGEST_EDGES]
    most = config.model.max_image_tokens or max(backbone.num_image_tokens(settings, processor, size) for size in sizes)
    if data.mixed_inputs:  # a positive may be all that a query is
        image = most + PROMPT_TOKENS + words_tokens(config)
        return image + caption, max(text, image)
    return most + PROMPT_TOKENS + caption, text


def words_tokens(config: RunConfig) -> int:
    """Tokens of the words and of the instruction beside an image, at most as far as is planned for."""
    return 2 * config.data.short_below if config.data.mixed_inputs else 0


def states(config: RunConfig, parameters: int, trainable: int) -> dict[str, int]:
    """Weights, gradients and AdamW's state, as the ZeRO stage spreads them over the workers."""
    from vladva.train.engine import BUCKET_ELEMENTS, zero_stage

    stage, world = zero_stage(config), config.cluster.workers
    width = element_bytes(config)
    in_float32 = width == 2 and stage == 0  # what is trained; see engine.py
    optimizer = trainable * (8 + (4 if width == 2 and stage > 0 else 0))  # two moments, and the float32 weights
    parts = {
        "weights": (parameters + trainable * (2 if in_float32 else 1)) * width // (world if stage == 3 else 1),
        "gradients": trainable * 4 // (world if stage >= 2 else 1),
        "optimizer": optimizer // (world if stage >= 1 else 1),
    }
    if stage >= 1:
        parts["gradients of a pass"] = trainable * width  # until they are reduced
        parts["collectives"] = BUCKET_ELEMENTS * 4
    if stage == 3:
        parts["gathered weights"] = min(parameters, LIVE_PARAMETERS) * width
    return parts


def element_bytes(config: RunConfig) -> int:
    """Bytes of a number in the model's dtype."""
    return 2 if config.model.dtype == "bfloat16" else 4


def table_bytes(settings: PreTrainedConfig, config: RunConfig) -> int:
    """PEFT's soft prompts in the plain forward: a copy of the token embeddings with them, and its gradient.

    Where the LM head is tied to them, the caption loss has another copy, and a gradient in float32.
    """
    text = settings.get_text_config()
    width, size = element_bytes(config), text.vocab_size * text.hidden_size
    tied = text.tie_word_embeddings and config.loss.next_token_weight > 0
    return size * (2 * width + (width + 4 if tied else 0))


def activation_bytes(text_settings: PreTrainedConfig, config: RunConfig, longest: int, plain: str | None) -> int:
    """What one token keeps for backward in the language model."""
    layers = config.model.layer or text_settings.num_hidden_layers
    if config.loss.next_token_weight:
        layers = text_settings.num_hidden_layers
    if config.train.activation_checkpointing:
        return layers * text_settings.hidden_size * element_bytes(config)
    return layers * layer_bytes(text_settings, config, longest, plain)


def layer_bytes(text_settings: PreTrainedConfig, config: RunConfig, longest: int, plain: str | None) -> int:
    """What one token, of a sequence of `longest`, keeps for backward in one layer with LoRA on its linear layers.

    The two norms keep their input, and a number, and what comes out, which is the input of the LoRA factors; attention
    keeps queries, keys, values and its output, and on a CPU its probabilities; the MLP gate, other half, and product.
    Frozen linear layers keep nothing; a LoRA keeps its `rank` numbers. Transformers' own layer keeps the norms' input
    in float32 and the gate after SiLU, too; dropout copies each LoRA's input, and its mask.
    """
    from vladva.models.packed.training import UNFUSED_TRAINING_TOKENS

    s, width, rank = text_settings, element_bytes(config), config.model.lora_rank
    head = getattr(s, "head_dim", None) or s.hidden_size // s.num_attention_heads
    queries, keys = s.num_attention_heads * head, s.num_key_value_heads * head
    if plain is None:
        attention = 2 * queries + 2 * keys + s.num_attention_heads * longest
        if (
            config.cluster.gpus_per_worker or longest > UNFUSED_TRAINING_TOKENS
        ):  # a fused kernel: its output, and values beside the rest
            attention = 4 * queries + 3 * keys
        return width * (4 * s.hidden_size + attention + 3 * s.intermediate_size + 7 * rank) + 2 * 4
    kept = 2 * 4 * s.hidden_size + width * (2 * s.hidden_size + 2 * queries + 2 * keys + 4 * s.intermediate_size)
    if config.model.lora_dropout:
        kept += (width + 1) * (5 * s.hidden_size + queries + s.intermediate_size)
    return kept + width * 7 * rank


def loss_bytes(text_settings: PreTrainedConfig, config: RunConfig) -> dict[str, int]:
    """Embeddings with their gradients, own and gathered, and the largest block of similarities or of logits."""
    from vladva.losses.contrastive import ROWS, find_loss

    texts = 1 + config.data.hard_negatives
    vectors = 4 * text_settings.hidden_size * (1 + texts)  # of one pair, in float32
    pairs = config.train.global_batch
    blocks = find_loss(config.loss).block_bytes(pairs, pairs * texts)
    teacher = 0
    if config.loss.false_negatives_above is not None:
        teacher = (
            2 * 4 * text_settings.hidden_size * pairs
        )  # on the host's and the device's side; its own width: not known
        blocks += ROWS * pairs * 4  # products of the teacher's vectors
    if config.loss.next_token_weight:
        # Logits, their softmax and its gradient, of one block and, until they are overwritten, of the one before.
        blocks = max(blocks, LOGIT_ROWS * text_settings.vocab_size * (3 * 4 + 2 * element_bytes(config)))
    return {
        "gradient cache": 2 * vectors * pairs // config.cluster.workers if config.caches_gradients else 0,
        "gathered embeddings": 2 * vectors * pairs * (1 + len(config.loss.matryoshka)),
        "blocks of losses": blocks,
        **({"teacher's vectors": teacher} if teacher else {}),
    }


def memory_table(config: RunConfig, plan: MemoryPlan) -> Table:
    """The plan as a table to print."""
    from rich.table import Table

    from vladva.train.engine import zero_stage

    train, workers = config.train, config.cluster.workers
    title = (
        f"{config.name}: {workers} workers, ZeRO-{zero_stage(config)}, chunks of {train.chunk_size}, "
        f"{'gradient cache' if config.caches_gradients else 'single pass'}"
    )
    table = Table("", "size", title=title)
    table.columns[1].justify = "right"
    table.add_row("parameters", f"{plan.parameters / 1e9:.3f} B")
    table.add_row("trained", f"{plan.trainable / 1e6:.2f} M")
    table.add_row("tokens of an image, prompt and caption, at most", f"{plan.image_tokens:,}")
    table.add_row("tokens of a text and prompt, at most", f"{plan.text_tokens:,}")
    table.add_row("training forward", f"with padding: {plan.plain}" if plan.plain else "packed tokens")
    table.add_row("tokens of a step, all workers, at most", f"{plan.tokens_per_step:,}", end_section=True)
    for name, size in plan.device.items():
        table.add_row(name, _told(size))
    table.add_section()
    limit = config.cluster.device_memory_gib
    table.add_row("on each worker's device", _told(plan.total) + (f" of {limit:g}" if limit else ""))
    for name, size in plan.host.items():
        table.add_row(f"{name}, on the host", _told(size))
    return table


def _told(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
