"""A small checkpoint of every LVLM family: real architecture, special tokens and way of prompting; random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP_IMAGES = {
    "resample": 3,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}

# Each template asks for images where its family does; what they have in common is written once.
PARTS = "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
PARTS = "{% for part in message.content %}" + PARTS + "{% endfor %}"
LLAVA_CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: " + PARTS.replace("IMAGE", "<image>\n") + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA3_HEADER = "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
LLAMA3_CHAT = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou see images.<|eot_id|>{% for message in messages %}"
    + LLAMA3_HEADER
    + PARTS.replace("IMAGE", "<image>\n")
    + "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEXT_ONLY_CHAT = "{% for message in messages %}" + LLAMA3_HEADER + "{{ message.content | trim }}<|eot_id|>{% endfor %}"
QWEN_CHAT = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message.role }}\n"
    + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SYSTEM = "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TOKENS += ["<|image_pad|>", "<|video_pad|>"]


@lru_cache
def byte_pairs() -> list[tuple[str, str]]:
    """Merges learned from captions of scenes, as every family's tokenizer here has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from vladva.data.scenes.captions import captions
    from vladva.data.scenes.corpus import scenes

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [text for scene, random in islice(scenes("train"), 100) for text in captions(scene, random)]
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def tokenizer_of(special: list[str], eos: str, pad: str, bos: str | None, chat: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with a `bos`, it begins every text, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = byte_pairs()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*special, *letters, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $0", None, [(bos, special.index(bos))])
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="right"
    )
    fast.chat_template = chat
    return fast


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    images: dict[str, Any],
    processor: dict[str, Any],
    spread: float = 0.15,
) -> str:
    """The checkpoint, its weights larger than the default, so that a few steps and wrong paths show."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=spread)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return str(folder)


def build_llava(folder: Path) -> str:
    """LLaVA-1.5: every image a square, `<s>` before every text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tokenizer_of(["<s>", "</s>", "<pad>", "<image>"], "</s>", "<pad>", "<s>", LLAVA_CHAT)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, vocab_size=448),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 8}
    processor |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images = {"image_processor_type": "CLIPImageProcessor", **CLIP_IMAGES}
    return write(folder, LlavaForConditionalGeneration(config), tokenizer, images, processor)


def build_llava_next(folder: Path) -> str:
    """LLaVA-Next on Llama 3: tiles; the tokenizer's own template knows no images, the processor's does."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<image>", "<pad>"]
    tokenizer = tokenizer_of(special, "<|eot_id|>", "<pad>", "<|begin_of_text|>", TEXT_ONLY_CHAT)
    grid = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, vocab_size=448),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    processor = {"processor_class": "LlavaNextProcessor", "image_token": "<image>", "patch_size": 8}
    processor |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grid, **CLIP_IMAGES}
    write(folder, LlavaNextForConditionalGeneration(config), tokenizer, images, processor)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEXT_ONLY_CHAT}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA3_CHAT}))
    return str(folder)


def qwen(
    folder: Path,
    names: str,
    vision: dict[str, Any],
    *,
    system: str,
    vocabulary: int = 448,
    tied: bool = True,
    width: int = TEXT["hidden_size"],
    spread: float = 0.15,
) -> str:
    """What the Qwen families have in common: patches, positions on three axes, ChatML."""
    import transformers

    tokenizer = tokenizer_of(QWEN_TOKENS, "<|im_end|>", "<|endoftext|>", None, QWEN_CHAT.replace("SYSTEM", system))
    eighth = width // TEXT["num_attention_heads"] // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * eighth, eighth, eighth]}
    if names == "Qwen3VL":
        rope["mrope_interleaved"] = True
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    size = {"head_dim": 8} if names == "Qwen3VL" else {}
    text = {
        **TEXT,
        **size,
        "hidden_size": width,
        "vocab_size": vocabulary,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, **vision}
    config = getattr(transformers, f"{names}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    least, most = 4 * 16 * 16, 20 * 16 * 16  # pixels; Qwen3-VL's files name limits and processor in the newer way
    if names == "Qwen3VL":
        images |= {"size": {"shortest_edge": least, "longest_edge": most}}
        images["image_processor_type"] += "Fast"
    else:
        images |= {"min_pixels": least, "max_pixels": most}
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config)
    return write(folder, model, tokenizer, images, {"processor_class": f"{names}Processor"}, spread)


def build_qwen2_vl(folder: Path) -> str:
    """Qwen2-VL: embeddings tied to the LM head, as the 2B has them."""
    return qwen(folder, "Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, system=QWEN_SYSTEM)


def build_wide_qwen2_vl(folder: Path) -> str:
    """Qwen2-VL with heads of 32 numbers, the narrowest that vLLM computes on a CPU, and weights for bfloat16."""
    import torch

    torch.manual_seed(0)
    vision = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    return qwen(folder, "Qwen2VL", vision, system=QWEN_SYSTEM, width=128, spread=0.05)


def build_qwen2_5_vl(folder: Path) -> str:
    """Qwen2.5-VL: attention in windows; no spare rows for soft prompts."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    return qwen(folder, "Qwen2_5_VL", vision, system=QWEN_SYSTEM, vocabulary=352, tied=False)


def build_qwen3_vl(folder: Path) -> str:
    """Qwen3-VL: DeepStack into the first two layers; no system prompt by default."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return qwen(folder, "Qwen3VL", vision, system="")


BUILDERS: dict[str, Callable[[Path], str]] = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "qwen2_vl": build_qwen2_vl,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
}
"""By the name of the backbone's file."""


def build(family: str, folder: Path) -> str:
    """The checkpoint of a family."""
    import torch

    torch.manual_seed(0)
    return BUILDERS[family](folder)
