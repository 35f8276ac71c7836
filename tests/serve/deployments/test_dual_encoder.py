"""A dual encoder is served as it is: it embeds; who asks it to answer is told what to serve instead."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest

from serve.config import ServeArgs
from serve.deployments.embedding import Discriminative, ItemEmbedding
from serve.deployments.generation import Generative
from serve.deployments.served_models import Served
from serve.protocol.errors import ApiError
from serve.protocol.items import EmbedItem
from tests.support.checkpoints import build_blip_2, build_clip
from tests.support.wire import noise_image


def test_texts_and_images_are_embedded_and_nothing_is_answered(tmp_path: Path) -> None:
    from vladva.models.embedder import load_embedder

    model = build_clip(tmp_path)
    embedder = load_embedder(model)
    texts = ["a red circle", "a red circle and so on for far more than twenty tokens"]
    png = io.BytesIO()
    noise_image(1).save(png, "PNG")
    items = [EmbedItem(text=texts[0]), EmbedItem(image=png.getvalue(), size=(64, 64)), EmbedItem(text=texts[1])]
    replica = Discriminative(ServeArgs(model=model))

    async def served() -> tuple[object, dict[str, object]]:
        await replica.check_health()
        return await replica.embed(items), await replica.describe()

    results, description = asyncio.run(served())
    assert isinstance(results, list)
    good = [one for one in results if isinstance(one, ItemEmbedding)]
    expected = [
        embedder.embed_texts(texts)[0],
        embedder.embed_images([noise_image(1)])[0],
        embedder.embed_texts(texts)[1],
    ]
    np.testing.assert_allclose([one.vector for one in good], expected, atol=1e-5)
    assert [one.tokens for one in good] == [
        embedder.count_text_tokens(texts)[0],
        embedder.num_image_tokens(64, 64),
        description["context"],
    ]
    assert (description["generates"], description["cuts"], description["context"]) == (False, True, 20)
    names = Served.of(model, None, description)
    [card] = names.cards(0)
    assert (card["mode"], card["type"]) == (["discriminative"], "embedding")
    with pytest.raises(ApiError) as refused:
        names.check_generation(None)
    assert refused.value.failure.status == 404
    assert "serve a vision-language model" in refused.value.failure.message
    with pytest.raises(ValueError, match="has no generator"):
        Generative(ServeArgs(model=model))


def test_a_model_with_several_vectors_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several vectors"):
        Discriminative(ServeArgs(model=build_blip_2(tmp_path)))
