"""README's table of what the recipes cost, from what the rehearsal recorded.

    python tests/gpu/rehearsal/cost_table.py     writes it between its two marks in README.md

GPU-hours: FLOPs of all pairs of a run at 40% of an H100's 989 TFLOP/s in bfloat16, which no GPU has shown yet; samples
of usual lengths (an image of 640 x 480, 20 tokens of a short caption, 200 of a long one). Memory: the plan, samples as
long as the run allows. Cores: a JPEG of 640 x 480 decoded and cut up in so many milliseconds, as measured on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
RECORDED, README = HERE / "recorded.json", PROJECT / "README.md"
BEGIN, END = "<!-- costs: written by tests/gpu/rehearsal/cost_table.py -->\n", "<!-- end of costs -->\n"
PEAK, SHARE = 989e12, 0.4  # FLOP/s of an H100 in bfloat16, and what of it is assumed
CORE_SECONDS = {"llava": 0.0054, "qwen2_vl": 0.0109}  # of one core, to decode and cut up a JPEG of 640 x 480


def cost_table(recorded: dict[str, Any]) -> str:
    """The lines of the table."""
    from vladva.models.backbones import real_config
    from vladva.recipes import RECIPES
    from vladva.train.memory_plan import GIB, plan_memory

    lines = [
        "| recipe | card | memory, GiB | TFLOP a pair | H100-hours of the run | cores a GPU | kernels a pair |",
        "|---|---|---|---|---|---|---|",
    ]
    cards = {79: "80 GB", 44: "48 GB", 22: "24 GB"}  # by what a process can have of them
    for name, recipe in RECIPES.items():
        run = recipe()
        if not run.cluster.gpus_per_worker:
            continue
        limit = run.cluster.device_memory_gib
        assert limit is not None, name
        row = [f"`{name}`", cards[int(limit)], f"{plan_memory(run).total / GIB:.1f}"]
        if f"usual {name}" in recorded:
            one = recorded[f"usual {name}"]["all layers"]
            pair, pairs = one["flops"] / one["units"], run.train.steps * run.train.global_batch
            family = real_config(run.model.checkpoint).model_type
            cores = 0.0 if run.data.texts_only else PEAK * SHARE / pair * CORE_SECONDS[family]
            row += [f"{pair / 1e12:.2f}", f"{pair * pairs / (PEAK * SHARE) / 3600:,.0f}", f"{cores:.2f}"]
            row.append(f"{one['kernels'] / one['units']:,.0f}")
        else:
            row += [""] * 4
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| embedding | TFLOP each | a second on an H100 | cores a GPU |", "|---|---|---|---|"]
    for case_name, case in sorted(recorded.items()):
        if case_name.startswith("embed ") and "all layers" in case:
            _, side, checkpoint = case_name.split(" ")
            one = case["all layers"]
            each = one["flops"] / one["units"]
            rate = PEAK * SHARE / each
            family = real_config(checkpoint).model_type
            cores = f"{rate * CORE_SECONDS[family]:.1f}" if side == "images" and family in CORE_SECONDS else ""
            lines.append(f"| {checkpoint.split('/')[1]}, {side} | {each / 1e12:.3f} | {rate:,.0f} | {cores} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """README with the table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "platform")]
    README.write_text(with_table(README.read_text(), cost_table(json.loads(RECORDED.read_text()))))
