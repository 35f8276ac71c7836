"""Qwen2.5-VL: as Qwen2-VL, with a vision tower that attends in windows."""

from __future__ import annotations

from dataclasses import replace

from vladva.models.backbones import qwen2_vl

BACKBONE = replace(
    qwen2_vl.BACKBONE, model_class="Qwen2_5_VLForConditionalGeneration", packed_decoders=("qwen2_5_vl_text",)
)
