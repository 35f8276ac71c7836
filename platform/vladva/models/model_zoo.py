"""Systems: every row of the paper's tables 1 to 5, and how it is run; a row that cannot be is marked so.

`jobs/evaluate.py NAME` runs a system that needs no training, `jobs/evaluate.py --systems` lists all. Other checkpoints
than these are run by their Hugging Face name or folder, without a row of the paper beside them.
"""

from __future__ import annotations

from typing import NamedTuple

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT
from vladva.core.model_description import ModelDescription

E5_V_PROMPTS = ("Summary above image in one word: ", "Summary above sentence in one word: ")
ZERO_SHOT_PROMPTS = (IMAGE_PROMPT, TEXT_PROMPT)

NO_TORCHVISION = "open_clip needs torchvision, which the tests do without"


class System(NamedTuple):
    """A system of the paper. One with a recipe is run from the folder of its training run."""

    name: str  # on the command line; empty where nothing can be run
    row: str  # of the paper's tables; empty where the paper has none
    checkpoint: str = ""  # Hugging Face name, or open_clip:MODEL:WEIGHTS
    recipe: str = ""  # of jobs/train.py, which trains the adapter
    prompts: tuple[str, str] = ("", "")  # image and text; a dual encoder has none
    untested: str = ""  # why no test runs its architecture; empty where one does
    note: str = ""

    @property
    def how(self) -> str:
        """The command, or why there is none."""
        if not self.name:
            return "reported only"
        if self.recipe:
            return f"jobs/train.py {self.recipe}, then jobs/evaluate.py RUN"
        return f"jobs/evaluate.py {self.name}"


def lvlm(name: str, row: str, checkpoint: str, *, recipe: str = "") -> tuple[System, System]:
    """An LVLM zero-shot, and with VladVA's adapter where the paper has it."""
    return (
        System(name, row, checkpoint, prompts=ZERO_SHOT_PROMPTS),
        System(f"vladva-{name}", f"VladVA ({row})", checkpoint, recipe, ZERO_SHOT_PROMPTS),
    )


def e5_v(name: str, row: str, checkpoint: str, recipe: str) -> tuple[System, System]:
    """E5-V's prompts on an LVLM without training, and with its adapter."""
    return (
        System(f"e5-v-zero-shot-{name}", "", checkpoint, prompts=E5_V_PROMPTS, note="E5-V's prompts, untrained"),
        System(f"e5-v-{name}", f"E5-V ({row})", checkpoint, recipe, E5_V_PROMPTS),
    )


SYSTEMS: tuple[System, ...] = (
    *lvlm("qwen2-vl-2b", "Qwen2-VL-2B", "Qwen/Qwen2-VL-2B-Instruct", recipe="qwen2_vl_2b"),
    *lvlm("llava-1.5-7b", "LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", recipe="llava_1_5_7b"),
    *lvlm("llava-1.5-13b", "LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf", recipe="llava_1_5_13b"),
    System("llava-next-8b", "LLaVA-Next-8B", "llava-hf/llama3-llava-next-8b-hf", prompts=ZERO_SHOT_PROMPTS),
    *e5_v("llava-next-8b", "LLaVA-Next-8B", "llava-hf/llama3-llava-next-8b-hf", "e5_v_llava_next_8b"),
    *e5_v("llava-1.5-7b", "LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", "e5_v_llava_1_5_7b"),
    System("clip-vit-b", "CLIP (ViT-B)", "openai/clip-vit-base-patch16", note="ViT-B/16: table 5's 68.4 is its top-1"),
    System("clip-vit-l", "CLIP (ViT-L)", "openai/clip-vit-large-patch14"),
    System(
        "negclip",
        "NegCLIP",
        "open_clip:ViT-B-32:negclip.pth",
        untested=NO_TORCHVISION,
        note="negclip.pth, from its authors, in the working directory; it has seen COCO's training captions",
    ),
    System("openclip-vit-g", "OpenCLIP (ViT-G/14)", "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    System("openclip-vit-bigg", "OpenCLIP (ViT-BigG/14)", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    System(
        "eva-02-clip-e",
        "EVA-02-CLIP (ViT-E/14+)",
        "open_clip:EVA02-E-14-plus:laion2b_s9b_b144k",
        untested=NO_TORCHVISION,
    ),
    System("eva-clip-8b", "EVA-CLIP (8B)", "BAAI/EVA-CLIP-8B", untested="its code comes with its weights"),
    System("eva-clip-18b", "EVA-CLIP (18B)", "BAAI/EVA-CLIP-18B", untested="its code comes with its weights"),
    System(
        "blip-vit-l",
        "BLIP (ViT-L)",
        "Salesforce/blip-itm-large-coco",
        note="contrastive head, no re-ranking; fine-tuned on COCO",
    ),
    System(
        "blip-2",
        "",
        "Salesforce/blip2-itm-vit-g",
        note="contrastive head, largest of 32 query tokens, no re-ranking; vision tower ViT-g, not the paper's ViT-L",
    ),
    System("", "BLIP2 (ViT-L)", note="no checkpoint with ViT-L is known in transformers' form; blip-2 has ViT-g"),
    System("", "CLIP (ViT-B) 15M", note="no public weights known"),
    System("", "HiDeCLIP (ViT-B)", note="no public weights known"),
    System("", "FFF (ViT-B)", note="no public weights known"),
)


def find(name: str) -> System | None:
    """The system called `name`. Raises ValueError for one that has to be trained first."""
    system = next((each for each in SYSTEMS if each.name == name), None) if name else None
    if system and system.recipe:
        raise ValueError(f"{name} has to be trained: {system.how}")
    return system


def paper_row(description: ModelDescription) -> str | None:
    """The row that shows the system which an embedder's description describes; None where the paper has no such row."""
    e5_v_prompts = (description.get("image_prompt"), description.get("text_prompt")) == E5_V_PROMPTS
    for system in SYSTEMS:
        if (
            system.checkpoint == description["base_model"]
            and bool(system.recipe) == bool(description["adapter"])
            and (system.prompts == E5_V_PROMPTS) == e5_v_prompts
        ):
            return system.row or None
    return None
