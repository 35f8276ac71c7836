"""SugarCrepe++ (Dumpala et al., NeurIPS 2024): two true captions in different words against one hard negative.

There is no Add subset. swap_obj has two rows whose caption equals its negative: at most 243 of 245 can be won. The
Parquet names are those of Hugging Face's configurations, one of which it misspells.
"""

from vladva.benchmarks.protocols.subsets import Subset
from vladva.benchmarks.protocols.two_captions import TwoCaptions
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = TwoCaptions(
    title="SugarCrepe++",
    annotations=("sugar_crepe_pp", "sugar_crepe_pp/data"),
    images=("sugar_crepe_pp/images", "sugar_crepe/images", "sugar_crepe/val2017", "coco/val2017"),
    subsets=(
        Subset("swap_object", ("swap_obj.json", "swap_object.parquet"), {245: "5f33cae824de431a"}),
        Subset(
            "swap_attribute",
            ("swap_att.json", "swap_atribute.parquet", "swap_attribute.parquet"),
            {666: "450d0fd9fcad3e6f"},
        ),
        Subset("replace_object", ("replace_obj.json", "replace_object.parquet"), {1652: "5c6dc499ec8f511a"}),
        Subset("replace_attribute", ("replace_att.json", "replace_attribute.parquet"), {788: "6826413592894754"}),
        Subset("replace_relation", ("replace_rel.json", "replace_relation.parquet"), {1406: "040fb95d3f0619bf"}),
    ),
    num_images=1542,
    table=TableLayout("SugarCrepe++ (table 3)", 30, "table3_sugarcrepe_pp"),
    source="https://github.com/Sri-Harsha/scpp/tree/c083bbf/data",
    licence="see the source; COCO terms of use (images)",
)
