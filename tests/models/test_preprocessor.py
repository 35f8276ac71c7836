"""Preprocessing equals that of the checkpoint's own Hugging Face processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT, ModelConfig
from vladva.data.examples import Example
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.embedding_model import EmbeddingModel, caption_labels
from vladva.models.preprocessor import Preprocessor


@pytest.fixture(scope="module")
def preprocessor(tiny: str) -> Preprocessor:
    return Preprocessor(tiny)


def random_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (200, 100), (1, 1), (37, 511)])
def test_parity_with_the_hugging_face_processor(preprocessor: Preprocessor, tiny: str, size: tuple[int, int]) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny)
    image = random_image(*size)
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(images=image, text=text, return_tensors="pt")

    tokens = preprocessor.images([image.size], [None])
    assert tokens.ids[0].tolist() == expected.input_ids[0].tolist()
    model = EmbeddingModel(ModelConfig(checkpoint=tiny), preprocessor)
    inputs = model.inputs(as_tensors(tokens, "cpu"), as_tensors(preprocessor.pixels([image]), "cpu"))
    torch.testing.assert_close(inputs["pixel_values"], expected.pixel_values, atol=1e-3, rtol=0)


def test_texts_go_through_the_chat_template(preprocessor: Preprocessor, tiny: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    content = [{"type": "text", "text": f"a red circle\n{TEXT_PROMPT}"}]
    expected = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert preprocessor.text_prompt("  a red circle ") == list(expected["input_ids"])
    assert preprocessor.text_prompt("\ufeffa red\0 circle\r\n") == preprocessor.text_prompt("a red circle")


def test_an_item_is_one_turn_image_instruction_text_prompt(preprocessor: Preprocessor, tiny: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    image = preprocessor.image_token * preprocessor.num_image_tokens((64, 64))

    def ids(words: str, pictures: int) -> list[int]:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": words}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text.replace(preprocessor.image_token, image)).input_ids

    item, of_image, of_text = preprocessor.item_prompt, f"{IMAGE_PROMPT}", f"{TEXT_PROMPT}"
    assert item("but in blue", (64, 64)) == ids(f"but in blue\n{of_image}", 1)
    assert item("but in blue", (64, 64), " Change it. ") == ids(f"Change it.\nbut in blue\n{of_image}", 1)
    assert item(None, (64, 64), "Find the caption.") == ids(f"Find the caption.\n{of_image}", 1)
    assert item("a red ring", None, "Find the image.") == ids(f"Find the image.\na red ring\n{of_text}", 0)
    # What has no instruction, and is of one kind, is asked for as ever.
    assert item("a red ring") == preprocessor.text_prompt("a red ring") == ids(f"a red ring\n{of_text}", 0)
    assert item("a red ring", instruction=" ") == item("a red ring")
    assert item(size=(64, 64)) == preprocessor.image_prompt((64, 64)) == ids(of_image, 1)
    # Special tokens that a user wrote are words, also where two of the user's texts meet.
    special = {preprocessor.config.image_token_id, tokenizer.eos_token_id}
    asked = item(f"{preprocessor.image_token}</s>", (64, 64), f"{preprocessor.image_token[:-1]}")
    assert [i for i in asked if i in special] == [i for i in item("", (64, 64)) if i in special]
    with pytest.raises(ValueError, match="a text, an image, or both"):
        item(instruction="Find it.")


def test_padding_lengths_and_caption_labels(preprocessor: Preprocessor) -> None:
    tokens = preprocessor.images([(64, 64), (64, 64)], ["two objects.", None])
    caption = [*preprocessor.tokenizer("two objects.", add_special_tokens=False).input_ids, 2]
    assert (tokens.lengths - tokens.prompt_lengths).tolist() == [len(caption), 0]
    labels = caption_labels(as_tensors(tokens, "cpu"))
    assert labels[0][labels[0] != -100].tolist() == caption
    assert (labels[1] == -100).all()
    assert (tokens.ids[1, tokens.lengths[1] :] == preprocessor.tokenizer.pad_token_id).all()


def test_soft_prompts_are_as_many_tokens_as_the_written_ones(tiny: str) -> None:
    plain, soft = Preprocessor(tiny), Preprocessor(tiny, soft_prompts=True)
    for side in ("image", "text"):
        assert len(soft.soft_ids[side]) == len(plain.prompt_ids[side])
    assert not set(soft.soft_ids["image"]) & set(soft.soft_ids["text"])
    assert set(soft.soft_ids["image"]) < set(soft.image_prompt((64, 64)))
    assert max(soft.soft_ids["text"]) < soft.config.get_text_config().vocab_size  # spare rows: nothing is resized


def test_a_batch_survives_the_object_store(ray_cluster: None, preprocessor: Preprocessor) -> None:
    import ray

    examples = [
        Example("a#0", random_image(64, 64), "a red ring", "long " * 30),
        Example("a#1", random_image(80, 64), None, None),
    ]
    batch = preprocessor.collate(7, examples)
    row = next(iter(ray.data.from_items([0]).map(lambda _: batch.to_row()).iter_rows()))
    back = MicroBatch.from_row(row)
    assert back.number == 7
    assert list(back.ids) == ["a#0", "a#1"]
    assert back.pixels.values.dtype == np.uint8
    assert (back.pixels.values == batch.pixels.values).all()
    assert back.pixels.sizes.tolist() == [[64, 64], [64, 80]]
    assert (back.image.ids == batch.image.ids).all()
    assert back.has_short.tolist() == [True, False]
    assert back.image_keys[0] != back.image_keys[1]


def test_hard_negatives_follow_the_captions(preprocessor: Preprocessor) -> None:
    examples = [
        Example("a#0", random_image(64, 64), "a red ring", None, ("a blue ring", "a red star")),
        Example("a#1", random_image(80, 64), None, None),
        Example("a#2", random_image(80, 64), "two stars", None, ("a red ring",)),
    ]
    batch = preprocessor.collate(0, examples)
    texts = ["a red ring", "", "two stars", "a blue ring", "a red star", "a red ring"]
    assert (batch.text.ids == preprocessor.texts(texts).ids).all()
    assert batch.text_owners.tolist() == [0, 1, 2, 0, 0, 2]
    assert batch.caption_keys[5] == batch.caption_keys[0]
    assert len(set(batch.caption_keys.tolist())) == 5


def test_texts_in_the_stead_of_images(preprocessor: Preprocessor) -> None:
    batch = preprocessor.collate(0, [Example("a#0", "two dogs run", "dogs are running", None, ("a cat sleeps",))])
    assert batch.image.ids[0].tolist() == preprocessor.text_prompt("two dogs run")
    back = MicroBatch.from_row(batch.to_row())
    assert back.pixels is None
    assert (back.text.ids == batch.text.ids).all()


def test_a_text_is_cut_between_tokens(preprocessor: Preprocessor) -> None:
    assert preprocessor.first_tokens("a red ring and a blue star", 3) == "a red ring"
    assert preprocessor.first_tokens("a red ring", 3) == "a red ring"
