"""Winoground (Thrush et al., CVPR 2022): 400 pairs of images and captions made of the same words in another order."""

from vladva.benchmarks.protocols.matching import Matching
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = Matching(
    title="Winoground",
    annotations=(
        "winoground/data/test-00000-of-00001.parquet",
        "winoground/test-00000-of-00001.parquet",
        "winoground/data/examples.jsonl",
        "winoground/examples.jsonl",
    ),
    images=("winoground/data/images", "winoground/images", "winoground"),
    num_examples=400,
    table=TableLayout("Winoground (table 4)", 40, "table4_winoground"),
    source="https://huggingface.co/datasets/facebook/winoground",
    licence="META Images Research License",
)
