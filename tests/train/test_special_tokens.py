"""Captions that hold the names of special tokens are trained on as the text that they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from tests.support.shards import image
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.data.scan import scan
from vladva.data.shard_writer import ShardWriter
from vladva.models import checkpoint
from vladva.models.preprocessor import Preprocessor
from vladva.train.data_loader import ChunkReader
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

NAMES = ["</s>", "<s>", "<pad>", "<image>", "<|vladva_text_0|>", "<|vladva_image_0|>", "<unk>", "<image><image>"]
SHORT = [f"a {name} in {number} words" for number, name in enumerate(NAMES)]
LONG = [f"{name} begins {'and goes on ' * 12}with {name} inside, {number}, and ends {name}"
        for number, name in enumerate(NAMES)]  # fmt: skip


@pytest.mark.slow
def test_special_tokens_in_captions_are_trained_on_as_text(ray_cluster: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "shards")
    with ShardWriter(uri, len(NAMES)) as writer:
        for number, captions in enumerate(zip(SHORT, LONG, strict=True)):
            about = json.dumps({"captions": captions}).encode()
            writer.write(f"{number}", {"png": image(seed=number), "json": about})
    run = RunConfig(
        name="run",
        storage=str(tmp_path / "runs"),
        model=ModelConfig(build_llava(tmp_path / "llava"), lora_rank=2),
        data=DataConfig(uri, run_length=1),
        train=TrainConfig(steps=2, global_batch=8, chunk_size=4, checkpoint_every=2),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5),
    )
    preprocessor = Preprocessor.of(run.model)
    scan(uri, preprocessor.count_tokens)
    added = {*preprocessor.tokenizer.added_tokens_decoder, *preprocessor.tokenizer.all_special_ids}
    around_text = [i for i in preprocessor.text_prompt("x") if i in added]
    of_image = preprocessor.image_prompt((12, 8))
    seen = set()
    for batch in ChunkReader(run).batches(range(2)):
        assert batch.replaced == "[]"
        for row, name in enumerate(batch.ids):
            number = int(name.rpartition("#")[2])
            seen.add(number)
            text = batch.text.ids[row, : batch.text.lengths[row]].tolist()
            assert text == preprocessor.text_prompt(SHORT[number])
            assert [i for i in text if i in added] == around_text
            start, end = batch.image.prompt_lengths[row], batch.image.lengths[row]
            assert batch.image.ids[row, :start].tolist() == of_image
            caption = batch.image.ids[row, start : end - 1].tolist()
            assert not added.intersection(caption)
            # The tokenizer lowers text, and begins it with a space: nothing of these captions is lost otherwise.
            assert preprocessor.tokenizer.decode(caption).strip() == LONG[number]
            assert batch.image.ids[row, end - 1] == preprocessor.tokenizer.eos_token_id
    assert seen == set(range(len(NAMES)))

    train(run)
    rows = read_metrics(run.uri)
    assert [row["quarantined"] for row in rows] == [0, 0]
    assert all(row["contrastive_loss"] > 0 and row["next_token_loss"] > 0 for row in rows)
    assert checkpoint.finished_steps(run.uri) == 2
