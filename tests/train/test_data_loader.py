"""Chunk stream: the same global batches for any number of workers; a whole epoch out of a storage full of faults."""

from __future__ import annotations

import logging
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.support.s3_server import BUCKET, FaultyProxy, faulty_proxy, s3_server
from tests.support.small_corpora import run_over, scan_here, write_corpus, write_large_index
from vladva.config import DataConfig, RunConfig
from vladva.core import object_store, storage
from vladva.data.examples import choose_captions
from vladva.data.sampler import SampleFinder, SampleRange
from vladva.train.audit import check_chunks
from vladva.train.audit_log import ChunkRecord
from vladva.train.data_loader import ChunkReader, ChunkStream, fetch_ahead

Chunk = tuple[int, list[str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> RunConfig:
    """Six steps of eight chunks over two data sets."""
    uris = [str(tmp_path_factory.mktemp(name)) for name in ("one", "other")]
    for uri, count in zip(uris, (150, 60), strict=True):
        write_corpus(uri, count)
        scan_here(uri)
    data = DataConfig(uris[0], mix=(f"{uris[0]}=0.75", f"{uris[1]}=0.25"), run_length=2)
    return run_over(data, tmp_path_factory.mktemp("runs"), tiny, steps=6, batch=32, chunk=4)


def dealt(stream: ChunkStream) -> list[list[Chunk]]:
    """The chunks that each worker gets; some workers are slower than others."""
    import ray

    @ray.remote(num_cpus=0.1)
    def consume(name: str, rank: int) -> list[Chunk]:
        chunks = []
        for batch in stream.share(name, rank, ahead=2):
            chunks.append((int(batch.number), [str(name) for name in batch.ids]))
            time.sleep(0.02 * (rank % 3))
        return chunks

    name = f"chunks-{uuid.uuid4()}"
    _dealers = [stream.start(name, number) for number in range(stream.num_dealers)]
    return ray.get([consume.remote(name, rank) for rank in range(stream.workers)])


def planned_chunks(config: RunConfig) -> list[Chunk]:
    """The chunks of the run."""
    find = SampleFinder(config)
    return [(number, [find.name(run.source, ref.id) for run, ref in find(number)]) for number in range(48)]


def test_eight_workers_get_the_batches_of_one(ray_cluster: None, config: RunConfig) -> None:
    planned = planned_chunks(config)
    for workers, tasks_per_window in ((1, 256), (2, 5), (4, 256), (8, 256)):  # 5: windows of 20 chunks, 20 and 8
        shares = [planned[rank::workers] for rank in range(workers)]
        assert dealt(ChunkStream(config, 0, workers, tasks_per_window)) == shares
    left = planned[3 * 8 :]  # what is left of the run after three steps, taken up by three workers
    assert dealt(ChunkStream(config, 3, 3, tasks_per_window=2)) == [left[rank::3] for rank in range(3)]
    record = [ChunkRecord(number // 8, number, ids) for number, ids in planned]
    assert check_chunks(record, SampleFinder(config), 6).ok


def test_several_dealers_deal_what_one_deals(ray_cluster: None, config: RunConfig) -> None:
    """Three workers of two dealers, which have one and two of them; windows of 12 chunks."""
    stream = ChunkStream(config, 3, 3, tasks_per_window=3, workers_per_dealer=2)
    assert [stream.ranks(number) for number in range(2)] == [range(1), range(1, 3)]
    left = planned_chunks(config)[3 * 8 :]
    assert dealt(stream) == [left[rank::3] for rank in range(3)]


@pytest.mark.parametrize(("workers", "dealers"), [(1, 1), (64, 1), (65, 2), (97, 2), (256, 4), (1000, 16)])
def test_workers_have_a_dealer_each_and_every_chunk_is_dealt_once(
    config: RunConfig, workers: int, dealers: int
) -> None:
    run = replace(config, train=replace(config.train, steps=1_000))
    stream = ChunkStream(run, 1, workers, tasks_per_window=300)
    assert stream.num_dealers == dealers
    assert [rank for number in range(dealers) for rank in stream.ranks(number)] == list(range(workers))
    assert all(rank in stream.ranks(stream.dealer_of(rank)) for rank in range(workers))
    assert max(len(stream.ranks(number)) for number in range(dealers)) <= 64
    numbers: list[int] = []
    for window in range(stream.num_windows):
        for number in range(dealers):
            dealt = stream.chunk_numbers(window, number)
            ranks = stream.ranks(number)
            assert all((chunk - 8) % workers == ranks[row % len(ranks)] for row, chunk in enumerate(dealt))
            pieces = [stream.chunk_numbers(window, number, range(row, row + 4)) for row in range(0, len(dealt), 4)]
            assert [chunk for piece in pieces for chunk in piece] == dealt
            numbers += dealt
    assert sorted(numbers) == list(range(8, stream.last))


def test_dealers_share_the_cluster(config: RunConfig) -> None:
    limits = ChunkStream(config, 0, 256).limits({"CPU": 800.0, "object_store_memory": 8e12})
    assert (limits.cpu, limits.object_store_memory) == (200, 1e12)  # half of the store, by four


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_windows_hold_every_chunk_once_and_no_more_tasks_for_a_longer_run(config: RunConfig, workers: int) -> None:
    """A million steps are laid out as many windows, each no larger than those of sixty."""
    for steps, first_step in ((6, 0), (60, 7), (1_000_000, 999_000)):
        run = replace(config, train=replace(config.train, steps=steps))
        stream = ChunkStream(run, first_step, workers, tasks_per_window=16)
        starts = range(stream.first, stream.last, stream.window_size)
        assert (len(starts), stream.first) == (stream.num_windows, first_step * 8)
        assert stream.window_size % workers == 0
        assert 64 <= stream.window_size < 64 + workers
        assert steps * 8 <= stream.last < steps * 8 + workers
        assert (stream.last - stream.first) % workers == 0


def test_items_are_fetched_ahead_in_order_but_not_without_end() -> None:
    made: list[int] = []

    def endless() -> Iterator[int]:
        for number in range(1_000_000):
            made.append(number)
            yield number

    items = fetch_ahead(endless(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    time.sleep(0.3)
    assert len(made) <= 5 + 3 + 1  # three wait, one is in the thread's hand
    items.close()


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise EOFError("the shard ends here")

    items = fetch_ahead(failing(), 3)
    assert next(items) == 1
    with pytest.raises(EOFError, match="the shard ends here"):
        next(items)


def test_each_data_set_draws_captions_by_its_own_epoch(config: RunConfig) -> None:
    """The smaller one begins its third epoch while the larger is in its fourth."""
    reader = ChunkReader(config)
    runs = [run for number in range(160) for run, _ in reader.find(number)]
    assert {(run.source, run.epoch) for run in runs} == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)}
    (_, _, ref, content, _), drawn = reader.fetch(0)[0], []
    ref = replace(ref, captions=[f"short {number}" for number in range(20)], caption_tokens=[2] * 20)
    for epoch in range(3):
        by = {"seed": config.seed, "epoch": epoch, "sample_id": ref.id}
        expected = choose_captions(ref.captions, ref.caption_tokens, short_below=5, long_below=500, **by)
        drawn.append(reader.example(SampleRange(1, epoch, 0, 2), ref, content, with_captions=False).short)
        assert drawn[-1] == expected[0]
    assert len(set(drawn)) > 1


def test_chunks_are_the_same_one_by_one_and_ahead(config: RunConfig) -> None:
    reader = ChunkReader(config)
    for ahead, number in zip(reader.batches(range(3, 9)), range(3, 9), strict=True):
        alone = reader(number)
        assert (ahead.number, ahead.ids) == (alone.number, alone.ids)
        assert (ahead.pixels.values == alone.pixels.values).all()
        assert (ahead.image_keys == alone.image_keys).all()
        assert len(set(alone.image_keys)) == 4
    assert list(reader.batches([])) == []


def test_the_first_chunk_of_a_large_index_reads_its_own_sidecars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten million samples take some hundred bytes of memory a shard, and no more files than ten thousand do."""
    opened: dict[int, list[str]] = {}
    read = storage._read_range
    for num_shards in (10, 10_000):
        run = run_over(DataConfig(str(tmp_path / str(num_shards)), run_length=8), tmp_path, chunk=32, batch=64)
        needed = write_large_index(run, num_shards, per_shard=1_000)
        reads = opened[num_shards] = []
        with monkeypatch.context() as patch:
            patch.setattr(storage, "_read_range", lambda part, reads=reads: reads.append(part.uri) or read(part))
            tracemalloc.start()
            samples = SampleFinder(run)(0)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert len({ref.id for _, ref in samples}) == 32
        assert {uri.partition("_index/")[2].removesuffix(".parquet") for uri in reads} == needed
    assert peak < 2_000 * 10_000  # bytes
    assert len(opened[10_000]) <= 3 * 4 * 2  # requests for a footer and a group of rows, four runs over two shards


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of a real S3 server; AWS_* variables lead to the proxy."""
    with s3_server(tmp_path) as variables, faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy:
        for name, value in (variables | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.slow
def test_an_epoch_survives_every_fault_and_the_log_counts_them(
    proxy: FaultyProxy, config: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, reset, truncated, short and stalled, in 5% of the requests each."""
    uri = f"s3://{BUCKET}/corpus"
    write_corpus(uri, 330)
    scan_here(uri)
    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "ATTEMPTS", 12)  # a quarter of all attempts fails, seven in a row in 1 of 16,000
    storage._s3.cache_clear()
    kinds, random = ("503", "reset", "truncate", "short", "stall"), Random(7)
    proxy.requests.clear()
    proxy.faults = iter(lambda: random.choices((*kinds, "ok"), (*[0.05] * 5, 0.75))[0], None)

    run = replace(config, data=DataConfig(uri, run_length=2), train=replace(config.train, steps=10, global_batch=32))
    with caplog.at_level(logging.WARNING, logger="vladva.core.storage"):
        reader = ChunkReader(run)
        delivered = [ChunkRecord(batch.number // 8, batch.number, batch.ids) for batch in reader.batches(range(80))]
        proxy.faults = iter(())
        # Of an answer that has no body, nothing can be cut off.
        injected = Counter(
            fault for method, _, fault in proxy.requests if fault != "ok" and (method == "GET" or fault in kinds[:2])
        )
    assert set(injected) == set(kinds)
    assert len(caplog.records) == injected.total() > 30
    figures = check_chunks(delivered, reader.find, 10).figures()
    assert (figures["epochs"], figures["delivered"], figures["left_out"]) == (1, 320, 10)
    assert not any(figures[name] for name in ("duplicated", "missing", "unknown", "wrong_steps"))
