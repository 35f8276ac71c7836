"""Soups: against means by hand; what scores decide; what cannot be averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import soup as soup_job
from tests.support.small_corpora import run_over
from vladva.config import DataConfig, RunConfig
from vladva.core import storage
from vladva.evaluate.soup import greedy_soup, uniform_soup
from vladva.models import checkpoint
from vladva.models.adapter import save_adapter
from vladva.models.embedder import load_embedder
from vladva.train.setup import build_trained_model

CONFIG = run_over(DataConfig("data"), "runs")


def write(
    run: Path, step: int, values: dict[str, torch.Tensor], config: RunConfig = CONFIG, log_scale: float = 2.0
) -> str:
    """A checkpoint of an adapter of these values."""
    folder = run / f"files-{step}"
    folder.mkdir(parents=True)
    save_file(values, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    state = {"next_chunk": step, "seed": 0, "log_scale": log_scale, "config": config.to_json(), "data_fingerprint": "0"}
    weights = {"a.weight": values["a"].float() + 0.5, "a.exp_avg": torch.ones(3)}
    return checkpoint.save(str(run), step, adapter_files=folder, optimizer=weights, state=state)


def adapter(uri: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.fetch_adapter(uri) / "adapter_model.safetensors")


def test_the_mean_is_taken_number_by_number(tmp_path: Path) -> None:
    values = [{"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16()} for _ in range(3)]
    uris = [write(tmp_path / f"run{i}", 10 * i, value, log_scale=float(i)) for i, value in enumerate(values, start=1)]
    soup = uniform_soup([*uris[:2], str(tmp_path / "run3")], str(tmp_path / "soup"))  # a run is its newest checkpoint
    assert soup.members == uris
    written = checkpoint.latest(str(tmp_path / "soup"))
    found = adapter(written)
    for name in ("a", "b"):
        by_hand = sum(value[name].double() for value in values) / 3
        torch.testing.assert_close(found[name], by_hand.to(values[0][name].dtype), rtol=0, atol=0)
    assert not torch.equal(found["a"], values[0]["a"])  # negative control
    saved = checkpoint.read_checkpoint(written)
    assert (saved.state["log_scale"], saved.state["step"], saved.state["soup"]) == (2.0, 30, uris)
    torch.testing.assert_close(saved.optimizer, {"a.weight": found["a"] + 0.5})  # no moments: it is no point of a run
    assert RunConfig.from_json(storage.read_json(str(tmp_path / "soup/config.json"))) == CONFIG


@pytest.mark.parametrize(
    ("score", "members"),
    [
        (lambda a: -abs(a - 2.2), [2.0, 3.0]),  # 2, then with 3 (2.5: worse than 2), with 1 (1.5: worse)
        (lambda a: -abs(a - 2.4), [2.0, 3.0]),
        (lambda a: -abs(a - 3.0), [3.0]),
        (lambda a: 1.0, [1.0, 2.0, 3.0]),  # no worse
    ],
)
def test_greedy_takes_what_makes_it_no_worse(
    score: Callable[[float], float], members: list[float], tmp_path: Path
) -> None:
    """Checkpoints of one number each; the twin tries every order that the rule allows."""
    uris = {value: write(tmp_path / f"run{value}", 1, {"a": torch.full((3,), value)}) for value in (1.0, 2.0, 3.0)}
    soup = greedy_soup(list(uris.values()), str(tmp_path / "soup"), lambda uri: score(float(adapter(uri)["a"][0])))
    ranked = sorted(uris, key=lambda value: -score(value))
    kept = ranked[:1]
    for value in ranked[1:]:
        if score(sum([*kept, value]) / (len(kept) + 1)) >= score(sum(kept) / len(kept)):
            kept.append(value)
    assert soup.members == [uris[value] for value in kept]
    assert float(adapter(checkpoint.latest(soup.uri))["a"][0]) == pytest.approx(sum(kept) / len(kept))
    assert soup.score == pytest.approx(score(sum(kept) / len(kept)))
    assert soup.score >= max(soup.scores.values())


def test_what_cannot_be_averaged_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1, {"a": torch.ones(3)})
    wider = write(tmp_path / "wider", 1, {"a": torch.ones(4)})
    with pytest.raises(ValueError, match="other weights"):
        uniform_soup([one, wider], str(tmp_path / "soup"))
    other = replace(CONFIG, model=replace(CONFIG.model, lora_rank=4))
    with pytest.raises(ValueError, match=r"model\.lora_rank is 4 there, 16 here"):
        uniform_soup([one, write(tmp_path / "other", 1, {"a": torch.ones(3)}, other)], str(tmp_path / "soup"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        uniform_soup([one, str(tmp_path / "nothing")], str(tmp_path / "soup"))
    storage.write_json(str(tmp_path / "run/config.json"), CONFIG.to_json())
    with pytest.raises(ValueError, match="no soup"):
        uniform_soup([one, one], str(tmp_path / "run"))


@pytest.mark.slow
def test_a_soup_embeds_as_its_mean_does(tmp_path: Path) -> None:
    """Two real adapters on the tiny model: the soup is a run, and between the two."""
    config = replace(CONFIG, storage=str(tmp_path))
    uris = []
    for number in range(2):
        model = build_trained_model(config, 0)
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
        folder = tmp_path / f"adapter{number}"
        folder.mkdir()
        save_adapter(model, config.model, folder)
        state = {"next_chunk": 1, "seed": 0, "log_scale": 2.0, "config": config.to_json(), "data_fingerprint": "0"}
        uris.append(checkpoint.save(str(tmp_path / f"run{number}"), 1, adapter_files=folder, optimizer={}, state=state))
    soup = uniform_soup(uris, str(tmp_path / "soup"))
    texts = ["a red circle", "a large blue square above a star"]
    one, other, mean = (load_embedder(uri).embed_texts(texts) for uri in (*uris, soup.uri))
    same = load_embedder(uniform_soup([uris[0], uris[0]], str(tmp_path / "same")).uri).embed_texts(texts)
    assert abs(same - one).max() < 1e-6
    assert abs(mean - one).max() > 1e-3
    assert ((mean * one).sum(1) > (one * other).sum(1)).all()  # nearer to each than they are to each other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["one", "--out", "o"], "two checkpoints"), (["a", "b", "--out", "o", "--greedy"], "--data")],
)
def test_the_command_says_what_it_needs(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soup_job.parse(arguments)
