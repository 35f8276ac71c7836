"""What fails while a corpus is embedded: memory, devices, disks. Faults are injected only where no real part can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.support.full_disk import resize_disk, small_disk
from vladva.core.device_errors import is_device_error, is_out_of_memory
from vladva.core.hashing import digest
from vladva.embed import pipeline
from vladva.embed.actor import EmbeddingActor
from vladva.embed.batching import PreparedBatch
from vladva.embed.device_failures import TRIES, DeviceFailures
from vladva.embed.table import embedding_matrix, read_embeddings, read_rows
from vladva.embed.table_writer import TableTarget, TableWriter
from vladva.models.resolve import describe

ROOT = Path(__file__).parents[2]
BROKEN = "CUDA error: an illegal memory access was encountered"


def texts(count: int) -> list[str]:
    return [f"text {number} " + "word " * (number % 7) for number in range(count)]


def batch_of(actor: EmbeddingActor, words: list[str]) -> PreparedBatch:
    rows = pa.table(
        {
            "id": [f"t{i}" for i in range(len(words))],
            "kind": ["text"] * len(words),
            "text": words,
            "content": pa.array([digest("text", word) for word in words], pa.binary(16)),
        }
    )
    return PreparedBatch(rows, [actor.embedder.preprocessor.text_prompt(word) for word in words], None)


@pytest.fixture
def actor(tiny: str, tmp_path: Path) -> EmbeddingActor:
    target = TableTarget(str(tmp_path / "table"), describe(tiny, adapter=True, dtype="float32")[1])
    TableWriter(target.uri, target.model, "")
    return EmbeddingActor({"model": tiny}, target)


# --- out of memory ---------------------------------------------------------------------------------------------------


def test_a_batch_without_memory_is_halved_and_counted(actor: EmbeddingActor, monkeypatch: pytest.MonkeyPatch) -> None:
    words, sizes = texts(20), []
    expected = actor.embedder.embed_texts(words)
    plain = actor.forward

    def small_device(prompts: list[list[int]], pixels: None) -> np.ndarray:
        sizes.append(len(prompts))
        if len(prompts) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return plain(prompts, pixels)

    monkeypatch.setattr(actor, "forward", small_device)
    report: dict[str, Any] = {}
    actor.encode(batch_of(actor, words), report)
    assert sizes == [20, 10, 5, 5, 5, 5]  # what was too big once is not tried again
    assert (report["embedded"], report["halvings"]) == (20, 3)
    assert "bad" not in report
    TableWriter(actor.target.uri, actor.target.model, "").commit()
    rows = read_embeddings(actor.target.uri)
    order = [words.index(text) for text in rows["text"].to_pylist()]
    np.testing.assert_allclose(embedding_matrix(rows), expected[order], atol=1e-5)


def test_an_item_without_memory_even_alone_is_left_out(actor: EmbeddingActor, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*texts(5), "a very long text " * 20]
    longest = max(len(prompt) for prompt in batch_of(actor, words).prompts)
    plain = actor.forward

    def small_device(prompts: list[list[int]], pixels: None) -> np.ndarray:
        if max(map(len, prompts)) == longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(prompts, pixels)

    monkeypatch.setattr(actor, "forward", small_device)
    report: dict[str, Any] = {}
    actor.encode(batch_of(actor, words), report)
    assert (report["embedded"], report["bad"]) == (5, 1)
    assert "out of memory" in report["last_bad"]


def test_errors_are_told_apart() -> None:
    of_memory = [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ]
    of_memory.append(RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"))
    of_device = [
        RuntimeError(BROKEN),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ]
    of_item = [
        ValueError("CUDA error"),
        IndexError("index out of range in self"),
        RuntimeError("shapes cannot be multiplied"),
    ]
    assert [is_out_of_memory(error) for error in of_memory + of_device + of_item] == [True] * 4 + [False] * 7
    assert [is_device_error(error) for error in of_memory + of_device + of_item] == [False] * 4 + [True] * 4 + [
        False
    ] * 3


# --- a broken device -------------------------------------------------------------------------------------------------


class BreaksOnce(EmbeddingActor):
    """An actor whose device breaks in the middle of the run, the first time that it is used for it."""

    def forward(self, prompts: list[list[int]], pixels: Any) -> np.ndarray:
        marker = Path(self.target.uri).with_name("broken")
        if len(prompts) > 3 and not marker.exists():
            marker.touch()
            raise RuntimeError(BROKEN)
        return super().forward(prompts, pixels)


@pytest.mark.slow
def test_a_broken_device_ends_the_actor_and_no_item_is_lost(
    tmp_path: Path, ray_cluster: None, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    monkeypatch.setattr(pipeline, "encoder_for", lambda _: BreaksOnce)
    rows = pa.table({"id": [f"t{i}" for i in range(24)], "kind": ["text"] * 24, "text": texts(24)})
    summary = pipeline.encode(ray.data.from_arrow(rows), tiny, str(tmp_path / "table"), batch_size=8, actors=1)
    assert (tmp_path / "broken").exists()
    assert (summary.embedded, summary.quarantined, summary.rows) == (24, 0, 24)
    assert not list((tmp_path / "table/_device_failures").glob("*"))


PROCESS = """
import sys
from pathlib import Path
from tests.embed.test_failures import BROKEN, batch_of, texts
from vladva.embed.actor import EmbeddingActor
from vladva.embed.table_writer import TableTarget
from vladva.models.resolve import describe

tiny, uri = sys.argv[1:]
actor = EmbeddingActor({"model": tiny}, TableTarget(uri, describe(tiny, adapter=True, dtype="float32")[1]))
batch = batch_of(actor, texts(4))
plain, poison = actor.forward, batch.prompts[2]

def breaks(prompts, pixels):
    if poison in prompts:
        raise RuntimeError(BROKEN)
    return plain(prompts, pixels)

actor.forward = breaks
report = {}
actor.encode(batch, report)
print(report)
"""


@pytest.mark.slow
def test_an_item_that_breaks_the_device_each_time_is_found(tmp_path: Path, tiny: str) -> None:
    uri = str(tmp_path / "table")
    TableWriter(uri, describe(tiny, adapter=True, dtype="float32")[1], "")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    for attempt in range(2 * TRIES + 1):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, tiny, uri], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == (1 if attempt < 2 * TRIES else 0), done.stderr
    assert "'bad': 1" in done.stdout
    assert "'embedded': 3" in done.stdout
    assert f"t2: the device fails on it: RuntimeError: {BROKEN}" in done.stdout


def test_failures_are_counted_by_what_was_computed(tmp_path: Path) -> None:
    failures = DeviceFailures(str(tmp_path))
    failures.note("one", RuntimeError("first\nand more"))
    failures.note("one", RuntimeError("second"))
    later = DeviceFailures(str(tmp_path))
    assert (later.count("one"), later.count("other")) == (2, 0)
    assert later.reason("one") in ("RuntimeError: first", "RuntimeError: second")


# --- disks -----------------------------------------------------------------------------------------------------------


def embed(tiny: str, out: Path, data: Path) -> subprocess.CompletedProcess[str]:
    import ray

    command = [sys.executable, "jobs/embed.py", tiny, "--data", str(data), "--out", str(out), "--actors", "1"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_room(
    tmp_path: Path, ray_cluster: None, tiny: str
) -> None:
    words = texts(1500)
    (tmp_path / "texts.txt").write_text("\n".join(words))
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        out = disk / "table"
        full = embed(tiny, out, tmp_path / "texts.txt")
        assert full.returncode == 2, full.stderr
        [line] = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
        assert f"{out}/" in line
        assert "No space left on device. What was complete is kept: make room, and run the same command again" in line
        assert "Traceback" not in full.stderr
        assert not list(out.rglob("*.part"))
        with pytest.raises(ValueError, match="is not complete"):
            read_embeddings(str(out))
        kept = sum(len(read_rows(str(part))) for part in (out / "_parts").rglob("*.parquet"))
        assert 0 < kept < 1500

        resize_disk(disk, 64 << 20)
        done = embed(tiny, out, tmp_path / "texts.txt")
        assert done.returncode == 0, done.stderr
        assert f"{kept:,} from before" in done.stdout
        assert read_embeddings(str(out))["id"].to_pylist() == sorted(f"texts.txt#{i}" for i in range(1500))

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        (tmp_path / "texts.txt").write_text("\n".join([*words, "one more"]))
        refused = embed(tiny, out, tmp_path / "texts.txt")
        assert refused.returncode == 2
        assert "Read-only file system" in refused.stderr
        assert len(read_embeddings(str(out))) == 1500
