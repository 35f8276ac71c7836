"""Retrieval over one's own images and captions: `jobs/evaluate.py MODEL --benchmarks retrieval --data TABLE_OR_SHARDS`.

The data is a table (CSV, TSV, JSON lines, Parquet), scanned shards, COCO or Karpathy JSON or a folder of images with
texts: what jobs/prepare.py reads. It is scored when it is asked for by name only: a folder of benchmarks is none.
"""

from vladva.benchmarks.protocols.own_retrieval import OwnRetrieval
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = OwnRetrieval(
    title="Own retrieval",
    annotations=(),
    images=(),
    table=TableLayout("Own retrieval", 5),
    cutoffs=(1, 5, 10),
    source="the user's own",
    licence="the user's own",
)
