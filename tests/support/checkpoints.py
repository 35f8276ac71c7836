"""Small checkpoints of real architectures, with random weights, that the tests build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def build_llava(folder: Path, *, width: int = 32) -> str:
    """A LLaVA of 32 wide (language model: `width`), 3 layers, with tokenizer and image processor of the tiny one."""
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vladva.models.backbones import TINY
    from vladva.models.tiny.model import save_checkpoint

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # larger than the default, so that a few steps and wrong paths show
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    model.generation_config.eos_token_id = 2
    save_checkpoint(model, AutoTokenizer.from_pretrained(TINY), folder)
    return str(folder)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def build_clip(folder: Path) -> str:
    """A CLIP of 32 wide with CLIP's tokenizer over single letters, 20 tokens of context, 24-wide vectors."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!" for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "bos_token_id": len(vocab) - 2,
        "eos_token_id": len(vocab) - 1,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    return _save(model, CLIPTokenizer(vocab=vocab, merges=[]), folder, "CLIPImageProcessor")


def build_blip(folder: Path) -> str:
    """A BLIP with both heads and BERT's tokenizer over single letters."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval

    tokenizer = _bert_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=24))
    return _save(model, tokenizer, folder, "BlipImageProcessor")


def build_blip_2(folder: Path) -> str:
    """A BLIP-2 with 4 query tokens and BERT's tokenizer over single letters."""
    import torch
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    tokenizer = _bert_tokenizer()
    qformer = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "use_qformer_text_input": True,
    }
    generator = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=generator | {"model_type": "opt", "word_embed_proj_dim": 16},
        num_query_tokens=4,
        image_text_hidden_size=24,
    )
    model = Blip2ForImageTextRetrieval(config)
    model.query_tokens.data.normal_()
    return _save(model, tokenizer, folder, "BlipImageProcessor")


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789,!" for prefix in ("", "##")]
    return BertTokenizer(vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])})


def _save(model: Any, tokenizer: Any, folder: Path, processor: str) -> str:
    """An ordinary Hugging Face checkpoint; weights larger than the default, so that wrong paths show."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = VISION["image_size"]
    square = {"height": side, "width": side}
    settings = {
        "image_processor_type": processor,
        "size": {"shortest_edge": side} if processor == "CLIPImageProcessor" else square,
        "crop_size": square,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)
