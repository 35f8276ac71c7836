"""The tiny LVLM: tokenizer, a LLaVA of 4.8M parameters, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.data.scenes.captions import long_caption
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import IMAGE_SIZE
from vladva.models.tiny.dialogues import (
    BRIEF,
    DETAILED,
    VERY_BRIEF,
    brief_caption,
    caption_questions,
    image_questions,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from dialogues: scene words are single tokens, any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from vladva.config import IMAGE_PROMPT, TEXT_PROMPT

    def texts() -> Iterator[str]:
        for _ in range(50):
            yield from (*DETAILED, *BRIEF, *VERY_BRIEF, IMAGE_PROMPT, TEXT_PROMPT)
        for _, (scene, random) in zip(range(4000), scenes("train", seed), strict=False):
            for kind in (brief_caption, image_questions, caption_questions):
                yield from (text for turn in kind(scene, random)[1] for text in turn)
            yield long_caption(scene, random)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=20,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
        model_max_length=512,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained tiny LLaVA: a ViT of 4 x 192 on 16 patches, a Llama of 6 x 192, 576 embedding rows, some spare."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=16,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # Those of every configuration, which transformers' signatures leave out.
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **ends,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (float16), tokenizer and image processor settings as an ordinary Hugging Face checkpoint."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    module: Any = model  # transformers' `to` takes a type for the model
    module.to(torch.float16).save_pretrained(folder)
    model.float().load_state_dict(kept)
    tokenizer.save_pretrained(folder)
    size = IMAGE_SIZE
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    llava = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 16,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(llava, indent=2) + "\n")
