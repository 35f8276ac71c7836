"""COCO retrieval, Karpathy's test split: 5,000 val2014 images with all their captions (Lin et al. 2014).

25,010 captions, as at most ten images have more than five. Some papers keep the first five (25,000): both counts are
accepted, and the number found is in the scores.
"""

from vladva.benchmarks.protocols.retrieval import Retrieval
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = Retrieval(
    title="COCO",
    annotations=(
        "coco/dataset_coco.json",
        "coco/coco_karpathy_test.json",
        "coco/coco_test_karpathy.json",
        "coco/test_5k_mscoco_2014.csv",
    ),
    tables=("coco/data/test*.parquet",),
    images=("coco/val2014", "coco/images", "coco"),
    num_images=5000,
    num_captions=(25010, 25000),
    min_captions_per_image=5,
    image_ids="d20da3dd48646d91a7ff7837c1c1f591d52c75e72921b2fd7f6854dc1093339f",
    table=TableLayout("Retrieval (table 1)", 11, "table1_retrieval"),
    column_title="COCO",
    paper_set="coco",
    source="https://cs.stanford.edu/people/karpathy/deepimagesent/",
    licence="CC BY 4.0 (captions); COCO terms of use (images)",
)
