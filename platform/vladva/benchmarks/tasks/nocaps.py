"""nocaps retrieval, validation split: 4,500 Open Images images with ten captions each (Agrawal et al. 2019).

The test split has no public captions. Text retrieval is easier than on COCO, as ten captions are right instead of five.
"""

from vladva.benchmarks.protocols.retrieval import Retrieval
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = Retrieval(
    title="nocaps",
    annotations=("nocaps/nocaps_val_4500_captions.json", "nocaps/nocaps_val.json"),
    tables=("nocaps/data/val*.parquet",),
    images=("nocaps/val", "nocaps/images", "nocaps"),
    num_images=4500,
    num_captions=45000,
    min_captions_per_image=10,
    groups={"in-domain": 648, "near-domain": 2938, "out-domain": 914},
    table=TableLayout("Retrieval (table 1)", 12, "table1_retrieval"),
    column_title="nocaps",
    paper_set="nocaps",
    source="https://nocaps.org",
    licence="CC BY 2.0",
)
