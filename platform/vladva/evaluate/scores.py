"""Scores: what `evaluate` returns and writes to scores.json, and what the report's tables and pages are made from."""

from __future__ import annotations

from typing import TypedDict

from vladva.core.model_description import ModelDescription

Metrics = dict[str, dict[str, float]]  # benchmark -> metric -> a fraction


class BenchmarkFacts(TypedDict):
    """What a reader needs to know of a benchmark."""

    title: str
    ties: str  # policy of the reported scores
    source: str
    licence: str
    counts: dict[str, int]
    files: dict[str, str]  # annotation file -> sha256
    chance: dict[str, float]  # metric -> score of a model that guesses


class LayerScores(TypedDict):
    """The scores of one model, embedding from one layer."""

    fingerprint: str
    scores: Metrics
    tie_rates: Metrics
    intervals: dict[str, dict[str, tuple[float, float]]]  # benchmark -> metric -> 95% interval


class ModelScores(LayerScores):
    """The scores of a model at its own layer, and at others where these were asked for."""

    model: str
    description: ModelDescription
    num_items: int
    num_embedded: int  # of the items; the others had been embedded before
    layers: dict[str, LayerScores]  # by the layer's number
    seconds: dict[str, float]  # "embed", "score"; of a re-ranked model "ask"


class ScoreChange(TypedDict):
    """One model's score minus another's: with its 95% interval, and p that there is no difference."""

    difference: float
    low: float
    high: float
    p: float


class Comparison(TypedDict):
    """Two models on the same samples."""

    model: str
    against: str
    benchmarks: dict[str, dict[str, ScoreChange]]


class Scores(TypedDict):
    """Everything that an evaluation found."""

    created: str
    command: str
    data: str
    protocol: dict[str, str]
    bootstrap: int
    benchmarks: dict[str, BenchmarkFacts]
    models: dict[str, ModelScores]  # by label
    comparisons: list[Comparison]
