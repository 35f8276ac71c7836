"""Model card: README.md of an exported model in the Hub's form, with the one right call for each tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from vladva.core.model_description import ModelDescription
    from vladva.evaluate.scores import ModelScores, Scores

# Of base models that the recipes train; as their own cards on the Hub say.
LICENCES = {
    "tiny": "apache-2.0",
    "llava-hf/llava-1.5-7b-hf": "llama2",
    "llava-hf/llava-1.5-13b-hf": "llama2",
    "llava-hf/llama3-llava-next-8b-hf": "llama3",
    "Qwen/Qwen2-VL-2B-Instruct": "apache-2.0",
}


class Training(TypedDict, total=False):
    """How the adapter was trained: what a run's folder says."""

    recipe: str
    run: str
    step: int
    data: str
    data_fingerprint: str
    loss: str


class ScoreRow(TypedDict):
    """A score with its 95% interval in percent, as text; empty where no intervals were computed."""

    benchmark: str
    metric: str
    score: float
    interval: str


def model_card(
    description: ModelDescription,
    *,
    name: str,
    folder: str,
    dtype: str,
    training: Training,
    matryoshka: tuple[int, ...] = (),
    dimensions: int | None = None,
    licence: str = "",
    scores: Scores | None = None,
) -> str:
    """The card as Markdown. `folder` stands in the examples; `licence`: the base model's where we do not know it.

    Raises ValueError where `scores` hold no model with this fingerprint: they are of another model.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Plain Markdown, not HTML: nothing is to be escaped.
    environment = Environment(loader=PackageLoader("vladva.export"), undefined=StrictUndefined, autoescape=False)
    base_model = description["base_model"]
    scored = _scores_of(scores, description["fingerprint"]) if scores else None
    rows = score_rows(scored) if scored else []
    content: dict[str, Any] = {
        "licence": licence or LICENCES.get(base_model, "other"),
        "base_on_hub": "/" in base_model and not base_model.startswith(("/", ".")),
        "trained": bool(description["adapter"]),
        "training": {key.replace("_", " "): value for key, value in training.items() if value not in ("", None)},
        "scores": rows,
        "scores_command": f"`{scores['command']}`, {scores['created'][:10]}:" if scores else "",
        "intervals": any(row["interval"] for row in rows),
    }
    return (
        environment.get_template("model_card.md.j2")
        .render(
            content,
            name=name,
            folder=folder,
            dtype=dtype,
            base_model=base_model,
            layer=description["layer"],
            dimension=description["dimension"],
            fingerprint=description["fingerprint"],
            matryoshka=matryoshka,
            dimensions=dimensions,
        )
        .rstrip()
        + "\n"
    )


def score_rows(scored: ModelScores) -> list[ScoreRow]:
    """Every metric of every benchmark."""
    rows: list[ScoreRow] = []
    for benchmark, metrics in scored["scores"].items():
        for metric, score in metrics.items():
            ends = scored["intervals"].get(benchmark, {}).get(metric)
            interval = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""
            rows.append({"benchmark": benchmark, "metric": metric, "score": score, "interval": interval})
    return rows


def _scores_of(scores: Scores, fingerprint: str) -> ModelScores:
    for scored in scores["models"].values():
        if scored["fingerprint"] == fingerprint:
            return scored
    there = ", ".join(f"{label} ({scored['fingerprint']})" for label, scored in scores["models"].items())
    raise ValueError(
        f"--scores: no scores of this model, whose fingerprint is {fingerprint}; the file has {there}. "
        "Evaluate the run that is exported"
    )
