"""Model description: what embeddings, tables and indexes say of the model that made them."""

from __future__ import annotations

from typing import TypedDict


class _Always(TypedDict):
    base_model: str
    adapter: str | None  # folder of the adapter; None for a base model
    image_prompt: str
    text_prompt: str
    soft_prompts: bool
    layer: int | None  # None: a dual encoder embeds from its last layer only
    dimension: int  # D
    dtype: str
    fingerprint: str  # equal for models whose embeddings may be compared


class ModelDescription(_Always, total=False):
    """As JSON, in the schema of every file of a table, in its manifest, and in the metadata of an index."""

    vectors_per_image: int  # 1 where it is not there
    revision: str  # commit of a base model on the hub; not there for one in a folder
