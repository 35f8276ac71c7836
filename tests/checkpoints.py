"""Small checkpoints of real architectures, with random weights, that the tests build."""

from __future__ import annotations

from pathlib import Path


def build_llava(folder: Path) -> str:
    """A LLaVA of 32 wide, 3 layers, with the tiny model's tokenizer and image processor."""
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vladva.tiny import TINY, save_checkpoint

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=32,
        intermediate_size=64,
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
