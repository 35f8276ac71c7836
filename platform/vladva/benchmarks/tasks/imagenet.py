"""ImageNet-1k zero-shot: 50,000 validation images against OpenAI's 1,000 class names (Radford et al. 2021).

`top1`, `top5` with the ensemble of 80 templates, `_seven` with CLIP's subset of seven, `_single` with "a photo of a
{c}." alone.
Two names stand for two classes each (missile, sunglasses), so that 200 images tie.
"""

from vladva.benchmarks.protocols.classification import Classification
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = Classification(
    title="ImageNet-1k",
    images=("imagenet/val", "imagenet/validation", "imagenet/data", "imagenet"),
    prompts="imagenet_prompts.json",
    num_images=50_000,
    table=TableLayout("ImageNet (table 5)", 50, "table5_imagenet"),
    source="https://www.image-net.org (ILSVRC2012 validation)",
    licence="ImageNet terms of access (images); MIT, OpenAI (class names and templates)",
)
