"""Pairs of images with words, and of images, on a real cluster: one run, whether two workers do it or one goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from tests.train.test_loop import adapter_of
from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.data.scan import scan
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import png, render
from vladva.data.shard_writer import ShardWriter
from vladva.models.preprocessor import Preprocessor
from vladva.train.audit import audit
from vladva.train.cost import training_work
from vladva.train.data_loader import ChunkReader
from vladva.train.launch import train
from vladva.train.memory_plan import plan_memory
from vladva.train.tracking import read_metrics

STEPS, SAMPLES = 4, 40


@pytest.fixture(scope="module")
def config(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps of four chunks of two pairs: a third have an image as positive, a third words and a long caption."""
    base, data = build_llava(tmp_path_factory.mktemp("llava")), str(tmp_path_factory.mktemp("data"))
    drawn = [(render(scene), captions(scene, random)) for scene, random in islice(scenes("train"), 2 * SAMPLES)]
    with ShardWriter(data, 16) as shards:
        for number, ((image, worded), (other, _)) in enumerate(zip(drawn[:SAMPLES], drawn[SAMPLES:], strict=True)):
            members, meta = {"png": png(image)}, {}
            if number % 3 == 0:
                members["positive.png"] = png(other)
                meta = {"query": {"text": f"but as in {worded[3]}"}, "positive": {"image": "positive.png"}}
            elif number % 3 == 1:
                meta = {"query": {"instruction": "Find the caption."}, "captions": [worded[0], worded[-1]]}
            else:
                meta = {"captions": worded}
            shards.write(f"{number:03d}", members | {"json": json.dumps(meta).encode()})
    scan(data, Preprocessor(base).count_tokens)
    return RunConfig(
        name="two-workers",
        storage=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(checkpoint=base, lora_rank=4),
        data=DataConfig(uri=data, run_length=1, mixed_inputs=True),
        loss=LossConfig(next_token_every=2),
        optim=OptimConfig(lr=1e-2, warmup_fraction=0.3),
        train=TrainConfig(steps=STEPS, global_batch=8, chunk_size=2, checkpoint_every=2, keep_last=3, audit=True),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5),
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> RunConfig:
    """The run with two workers, complete."""
    train(config)
    return config


def losses(config: RunConfig) -> list[tuple[float, float]]:
    return [(row["contrastive_loss"], row.get("next_token_loss", 0.0)) for row in read_metrics(config.uri)]


def test_one_worker_goes_on_with_the_run_of_two(finished: RunConfig) -> None:
    resumed = replace(finished, name="resumed", cluster=ClusterConfig(workers=1, cpus_per_worker=0.5))
    shutil.copytree(finished.uri, resumed.uri)
    shutil.rmtree(Path(resumed.uri) / "checkpoints" / "step-4")
    (Path(resumed.uri) / "config.json").unlink()
    train(resumed)
    assert len(losses(finished)) == STEPS
    for one, other in zip(losses(finished), losses(resumed), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert any(caption for _, caption in losses(finished))  # where there is a long caption
    first, second = adapter_of(finished), adapter_of(resumed)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4
    for run in (finished, resumed):
        report = audit(run.uri)
        assert report.ok, report.problems()
        assert report.figures()["delivered"] == STEPS * 8


def test_chunks_hold_what_the_samples_say(config: RunConfig) -> None:
    reader = ChunkReader(config)
    batches = [reader(number) for number in range(12)]
    of_images = sum(0 if batch.text_pixels is None else len(batch.text_pixels.sizes) for batch in batches)
    named = [name for batch in batches for name in batch.ids]
    assert of_images == sum(int(name.partition("#")[2]) % 3 == 0 for name in named) > 0
    assert all(batch.has_short.all() for batch in batches)
    prompt = reader.preprocessor.item_prompt(None, (64, 64), "Find the caption.")
    rows = [ids[: len(prompt)].tolist() for batch in batches for ids in batch.image.ids]
    assert rows.count(prompt) == sum(int(name.partition("#")[2]) % 3 == 1 for name in named)


def test_who_does_not_ask_for_such_pairs_is_told_of_them(config: RunConfig) -> None:
    plain = ChunkReader(replace(config, data=replace(config.data, mixed_inputs=False)))
    with pytest.raises(ValueError, match=r"has a query or a positive of its own: set data\.mixed_inputs"):
        list(plain.batches(range(12)))
    with pytest.raises(ValueError, match=r"set train\.zero_stage to 2"):
        replace(config, train=replace(config.train, zero_stage=3))
    with pytest.raises(ValueError, match=r"with data\.mixed_inputs, some pairs have none"):
        replace(config, loss=replace(config.loss, false_negatives_above=0.9))


def test_memory_and_work_are_planned_for_longer_queries_and_images_as_positives(config: RunConfig) -> None:
    plain = replace(config, data=replace(config.data, mixed_inputs=False))
    assert plan_memory(config).tokens_per_step > plan_memory(plain).tokens_per_step
    assert plan_memory(config).text_tokens == plan_memory(config).image_tokens - config.data.long_below
    assert training_work(config) > training_work(plain)
