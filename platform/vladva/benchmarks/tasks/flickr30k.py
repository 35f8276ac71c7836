"""Flickr30K retrieval, Karpathy's test split: 1,000 images with 5 captions each (Young et al. 2014)."""

from vladva.benchmarks.protocols.retrieval import Retrieval
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = Retrieval(
    title="Flickr30K",
    annotations=(
        "flickr30k/dataset_flickr30k.json",
        "flickr30k/flickr30k_test.json",
        "flickr30k/flickr30k_test_karpathy.txt",
        "flickr30k/test_1k_flickr.csv",
    ),
    tables=("flickr30k/data/test*.parquet",),
    images=("flickr30k/images", "flickr30k/flickr30k-images", "flickr30k"),
    num_images=1000,
    num_captions=5000,
    min_captions_per_image=5,
    table=TableLayout("Retrieval (table 1)", 10, "table1_retrieval"),
    column_title="Flickr30K",
    paper_set="flickr30k",
    paper_layers={"i2t_r1": "flickr30k_text_retrieval_R@1"},
    source="https://cs.stanford.edu/people/karpathy/deepimagesent/",
    licence="Flickr terms of use; research only",
)
