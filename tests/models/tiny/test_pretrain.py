"""How the tiny LVLM is trained: what it is told of places, pointers against attention itself, what the weights know."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vladva.data.scenes.scene import Scene, SceneObject
from vladva.models.tiny.dialogues import detailed_caption, place_questions, relation_questions
from vladva.models.tiny.model import build_model, build_tokenizer
from vladva.models.tiny.pretrain import (
    POINTERS,
    build_readers,
    collate,
    loss_sums,
    patch_labels,
    patch_losses,
    patch_places,
    pointer_sum,
    relation_accuracy,
    weight_of_patches,
)

RED = SceneObject("circle", "red", "small", 10.0, 50.0, 6.5, 0.0)  # patch 12: third row from 0, column 0
BLUE = SceneObject("star", "blue", "large", 40.0, 20.0, 11.0, 0.0)  # patch 6: row 1, column 2
SCENE = Scene((RED, BLUE), "white")
IMAGE_START = 2  # after <s> and <|user|>


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_patches_hold_the_objects_whose_centre_they_hold() -> None:
    labels, places = patch_labels(SCENE), patch_places(SCENE)
    assert [number for number, label in enumerate(labels) if label != [0, 0, 0]] == [6, 12]
    assert labels[12] == [1, 1, 1]
    assert labels[6] == [3, 4, 2]
    assert places[12] == [-0.6875, 0.5625]
    assert places[6] == [0.25, -0.375]


def test_empty_patches_count_a_fifth() -> None:
    labels = torch.tensor(patch_labels(SCENE))
    assert weight_of_patches(labels) == pytest.approx(2 + 14 / 5)
    # Equal logits: every patch costs the logarithm of the number of classes, which are 9, 7 and 3.
    even = patch_losses(torch.zeros(16, 19), labels) / weight_of_patches(labels)
    torch.testing.assert_close(even, torch.tensor([9.0, 7.0, 3.0]).log())
    sure = torch.zeros(16, 19)
    sure[6, 9 + 4] = 100.0  # a star
    assert patch_losses(sure, labels)[1] < patch_losses(torch.zeros(16, 19), labels)[1] - 1.9
    sure[6, 9 + 5] = 200.0  # a cross
    assert patch_losses(sure, labels)[1] > 100


def test_losses_in_bfloat16_are_those_in_float32(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model()
    readers = build_readers(model)
    batch = collate([kind(SCENE, Random(2)) for kind in (relation_questions, detailed_caption)], tokenizer)
    assert batch["labels_of_patches"].tolist() == [*patch_labels(SCENE), *patch_labels(SCENE)]
    with torch.no_grad():
        exact = loss_sums(model, readers, batch)
        rough = loss_sums(model, readers, batch, "bfloat16")
        assert not torch.equal(rough, exact)
        torch.testing.assert_close(rough, exact, rtol=0.01, atol=0.0)
        # The patches' reader has a part of its own: no images, no loss.
        alone = collate([(None, [("a red circle. Is there a red circle?", "yes")])], tokenizer)
        sums = loss_sums(model, readers, alone)
        assert sums[0] > 0
        assert not sums[1:].any()


def test_questions_say_which_tokens_name_what(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [
        ("Where is the red circle, seen from the blue star?", "left of"),
        ("Where is the blue star?", "at the top"),
    ]
    batch = collate([(SCENE, asked)], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert [tokens[place] for _, place in batch["named"].tolist()] == ["Ġcircle", "Ġstar", "Ġstar"]
    assert batch["patches"].tolist() == [IMAGE_START + 12, IMAGE_START + 6, IMAGE_START + 6]
    assert {tokens[place] for place in batch["patches"].tolist()} == {"<image>"}
    [[row, last]] = batch["compared"].tolist()
    assert row == 0
    assert tokens[last] == "<|assistant|>"
    assert tokens[last + 1] == "Ġleft"
    assert tokens[batch["firsts"][0]] == "Ġcircle"
    assert tokens[batch["seconds"][0]] == "Ġstar"
    torch.testing.assert_close(batch["apart"], torch.tensor([[-0.9375, 0.9375]]))


def test_articles_announce_the_object_that_comes_next(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([detailed_caption(SCENE, Random(0))], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert [tokens[place] for _, place in batch["announced"].tolist()] == ["Ġa", "Ġa"]
    assert batch["next_patches"].tolist() == [IMAGE_START + 12, IMAGE_START + 6]  # from left to right


def test_text_alone_has_no_places(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([(None, [("a red circle and a blue star. Where is the red circle?", "left of")])], tokenizer)
    assert "pixel_values" not in batch
    assert all(not len(batch[name]) for name in ("named", "places", "compared", "apart"))


def test_every_pair_is_asked_in_both_directions() -> None:
    three = Scene((RED, BLUE, SceneObject("ring", "pink", "small", 30.0, 55.0, 6.2, 0.0)), "mint")
    _, turns = relation_questions(three, Random(0))
    assert len(turns) == 6
    _, turns = place_questions(SCENE, Random(0))
    assert dict(turns) == {
        "Where is the red circle?": "in the bottom left",
        "Where is the blue star?": "at the top",
    }


def test_pointers_are_the_attention_that_the_layer_pays(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model()
    model.set_attn_implementation("eager")
    kinds = (relation_questions, place_questions, detailed_caption)
    batch = collate([kind(SCENE, Random(1)) for kind in kinds], tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        seen = model.model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
        for layer, head, looking, target in POINTERS:
            row, place = batch[looking].T
            state = seen.hidden_states[layer]
            paid = pointer_sum(model, state, layer, head, batch[looking], batch[target])
            expected = -seen.attentions[layer][row, head, place, batch[target]].log().sum()
            torch.testing.assert_close(paid, expected, rtol=1e-5, atol=1e-4)
            other = pointer_sum(model, state, layer, head + 2, batch[looking], batch[target])
            assert abs(other - expected) > 1e-3


def test_the_weights_know_where_things_are(tiny: str, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import LlavaForConditionalGeneration

    shipped = LlavaForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
    assert relation_accuracy(shipped, tokenizer, 100) >= 0.95
    assert relation_accuracy(build_model().eval(), tokenizer, 20) <= 0.5
