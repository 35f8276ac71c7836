"""The published configurations, without weights: the paper's parameter counts, and what an adapter trains on them."""

from __future__ import annotations

import pytest

from vladva.models.backbones import find_backbone, real_config, without_weights

# Table 2 of the paper (and the model cards of those that are not in it), in billions.
PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": 7.063,
    "llava-hf/llava-1.5-13b-hf": 13.351,
    "llava-hf/llama3-llava-next-8b-hf": 8.355,
    "Qwen/Qwen2-VL-2B-Instruct": 2.209,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.755,
    "Qwen/Qwen3-VL-2B-Instruct": 2.128,
}
RANK, SOFT_TOKENS = 16, 20


def lora_parameters(rank: int, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head: int) -> int:
    """A LoRA of `rank` on a linear layer from n to m has rank * (n + m) parameters."""
    attention = 2 * (hidden + heads * head) + 2 * (hidden + kv_heads * head)  # q and o, k and v
    return rank * layers * (attention + 3 * (hidden + mlp))


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_parameters_are_as_published(checkpoint: str) -> None:
    model = without_weights(real_config(checkpoint))
    assert all(parameter.is_meta for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e9, 3) == PUBLISHED[checkpoint]


TRAINABLE = {
    # layers, hidden, MLP, heads, KV heads, width of a head: public facts, here once more by hand
    "llava-hf/llava-1.5-7b-hf": (32, 4096, 11008, 32, 32, 128),
    "llava-hf/llava-1.5-13b-hf": (40, 5120, 13824, 40, 40, 128),
    "llava-hf/llama3-llava-next-8b-hf": (32, 4096, 14336, 32, 8, 128),
    "Qwen/Qwen2-VL-2B-Instruct": (28, 1536, 8960, 12, 2, 128),
    "Qwen/Qwen2.5-VL-3B-Instruct": (36, 2048, 11008, 16, 2, 128),
    "Qwen/Qwen3-VL-2B-Instruct": (28, 2048, 6144, 16, 8, 128),
}


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_an_adapter_trains_lora_and_soft_tokens_only(checkpoint: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = real_config(checkpoint)
    backbone = find_backbone(config.model_type)
    rows = config.get_text_config().vocab_size
    lora = LoraConfig(
        r=RANK,
        target_modules=backbone.lora_targets,
        trainable_token_indices={backbone.embed_tokens: list(range(rows - SOFT_TOKENS, rows))},
    )
    adapted = get_peft_model(without_weights(config), lora)
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    layers, hidden, *others = TRAINABLE[checkpoint]
    expected = lora_parameters(RANK, layers, hidden, *others) + SOFT_TOKENS * hidden
    assert sum(trainable.values()) == expected
    assert all("language_model" in name for name in trainable)


def test_an_unknown_checkpoint_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'none'.*llava-hf/llava-1\.5-7b-hf"):
        real_config("none")
