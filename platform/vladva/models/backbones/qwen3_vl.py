"""Qwen3-VL: as Qwen2-VL, with features of several vision layers added to the first layers of the language model.

So no packed forward: that adds features to the input of the first layer only.
"""

from __future__ import annotations

from dataclasses import replace

from vladva.models.backbones import qwen2_vl

BACKBONE = replace(qwen2_vl.BACKBONE, model_class="Qwen3VLForConditionalGeneration", packed_decoders=())
