"""SugarCrepe (Hsieh et al., NeurIPS 2023): one true caption of a COCO val2017 image against one hard negative.

swap_obj has 245 rows since its row "108" was taken out (2023-11-18); the paper's own numbers are on 246. Of the 1,560
images 1,200 are in Karpathy's COCO training split: models fine-tuned on COCO have seen the true captions.
"""

from vladva.benchmarks.protocols.caption_choice import CaptionChoice
from vladva.benchmarks.protocols.subsets import Subset
from vladva.benchmarks.score_columns import TableLayout

BENCHMARK = CaptionChoice(
    title="SugarCrepe",
    annotations=("sugar_crepe", "sugar_crepe/data"),
    images=("sugar_crepe/images", "sugar_crepe/val2017", "coco/val2017"),
    subsets=(
        Subset("replace_object", ("replace_obj.json",), {1652: "9d299600639947e9"}, 823),
        Subset("replace_attribute", ("replace_att.json",), {788: "9fe55fd4c0a9ad1f"}, 524),
        Subset("replace_relation", ("replace_rel.json",), {1406: "356bcc2fc4c6aed3"}, 777),
        Subset("swap_object", ("swap_obj.json",), {245: "073cdb8e253d0536", 246: None}, 224),
        Subset("swap_attribute", ("swap_att.json",), {666: "7a7ce04e5c4c8041"}, 593),
        Subset("add_object", ("add_obj.json",), {2062: "1b9d76b93139a937"}, 908),
        Subset("add_attribute", ("add_att.json",), {692: "012d88d729693d19"}, 497),
    ),
    groups={
        "replace_macro": ("replace_object", "replace_attribute", "replace_relation"),
        "swap_macro": ("swap_object", "swap_attribute"),
        "add_macro": ("add_object", "add_attribute"),
    },
    table=TableLayout("SugarCrepe (table 2)", 20, "table2_sugarcrepe"),
    paper_layers={"average_macro": "sugarcrepe_average"},
    source="https://github.com/RAIVNLab/sugar-crepe/tree/0047054/data",
    licence="MIT (annotations); COCO terms of use (images)",
)
