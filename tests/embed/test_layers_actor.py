"""Several layers in one pass: each layer's embeddings are those of the model cut off there."""

import numpy as np
import pytest
import torch

from vladva.data.scenes.corpus import held_out_scenes
from vladva.data.scenes.scene import render
from vladva.embed.layers_actor import embed_layers
from vladva.models.batch import as_tensors
from vladva.models.embedder import Embedder, load_embedder

TEXTS = ["a small red circle", "two objects on a white background", "a blue star above a ring"]
LAYERS = [6, 5, 3, 1]


@pytest.fixture(scope="module")
def embedder(tiny: str) -> Embedder:
    return load_embedder(tiny)


def in_one_pass(embedder: Embedder, kind: str) -> np.ndarray:
    """Embeddings [L, N, D]."""
    preprocessor, pixels = embedder.preprocessor, None
    tokens = preprocessor.texts(TEXTS)
    if kind == "image":
        pictures = [render(scene) for scene, _, _ in held_out_scenes(3)]
        tokens = preprocessor.images([image.size for image in pictures], [None] * 3)
        pixels = as_tensors(preprocessor.pixels(pictures), "cpu")
    with torch.inference_mode():
        return embed_layers(embedder.model, as_tensors(tokens, "cpu"), pixels, LAYERS).numpy()


def cut_off(tiny: str, layer: int, kind: str) -> np.ndarray:
    """Embeddings [N, D] of the model that is run up to this layer only."""
    embedder = load_embedder(tiny, layer=layer)
    if kind == "text":
        return embedder.embed_texts(TEXTS)
    return embedder.embed_images([render(scene) for scene, _, _ in held_out_scenes(3)])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_each_layer_is_the_model_cut_off_there(embedder: Embedder, tiny: str, kind: str) -> None:
    together = in_one_pass(embedder, kind)
    for layer, embeddings in zip(LAYERS, together, strict=True):
        np.testing.assert_allclose(embeddings, cut_off(tiny, layer, kind), atol=1e-6)
    # The neighbour is another layer by far, so the bound above means something.
    assert np.abs(together[0] - cut_off(tiny, 5, kind)).max() > 1e-2


def test_without_the_final_norm_layers_would_differ(embedder: Embedder, tiny: str) -> None:
    norm, embedder.model.base.model.language_model.norm = (
        embedder.model.base.model.language_model.norm,
        torch.nn.Identity(),
    )
    try:
        bare = in_one_pass(embedder, "text")
    finally:
        embedder.model.base.model.language_model.norm = norm
    assert np.abs(bare[2] - cut_off(tiny, 3, "text")).max() > 1e-3


def test_nothing_is_left_on_the_model(embedder: Embedder) -> None:
    before = embedder.embed_texts(TEXTS)
    in_one_pass(embedder, "text")
    assert not any(layer._forward_hooks for layer in embedder.model.base.model.language_model.layers)
    np.testing.assert_array_equal(embedder.embed_texts(TEXTS), before)
