"""The scan of a data set: only what changed, the same with Ray and without, and from S3 with faults."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from tests.support.s3_server import BUCKET, FaultyProxy, faulty_proxy, s3_server
from tests.support.shards import PNG, bad_corpus, count_words, run_here, tar_of, write_shards
from vladva.core import storage
from vladva.data import scan as scan_module
from vladva.data.scan import scan
from vladva.data.shard_index import ShardIndex, read_samples


def test_only_what_changed_is_scanned_again(tmp_path: Path, without_ray: None) -> None:
    uri = str(tmp_path)
    write_shards(uri, 12, 4)
    first = scan(uri, count_words)
    assert scan(uri, count_words).num_scanned == 0
    assert ShardIndex.open(uri).fingerprint == first.fingerprint

    (tmp_path / "_index/manifest.json").unlink()  # as after a scan that was killed at the end
    with pytest.raises(ValueError, match=r"has no complete index in .*/_index: scan its shards first"):
        ShardIndex.open(uri)
    resumed = scan(uri, count_words)
    assert (resumed.num_scanned, resumed.fingerprint) == (0, first.fingerprint)

    (tmp_path / "000001.tar").write_bytes(tar_of([("new.png", PNG), ("new.txt", b"new")]))
    changed = scan(uri, count_words)
    assert (changed.num_scanned, changed.num_samples) == (1, 9)
    assert changed.fingerprint != first.fingerprint
    assert [ref.id for ref in ShardIndex.open(uri).samples(3, 3)] == [
        *("000000.tar#0003", "000001.tar#new", "000002.tar#0008")
    ]

    (tmp_path / "000002.tar").unlink()
    assert scan(uri, count_words).num_samples == 5
    assert sorted(os.listdir(tmp_path / "_index")) == [
        *("000000.tar.parquet", "000001.tar.parquet", "manifest.json", "quarantine.parquet")
    ]
    recounted = scan(uri, lambda texts: [len(text) for text in texts])  # another tokenizer
    assert recounted.num_scanned == 2
    assert ShardIndex.open(uri).samples(0, 1)[0].caption_tokens == [
        len("image 0"),
        len("this one has number 0 of 12"),
    ]


def test_ray_tasks_find_what_one_process_finds(tmp_path: Path, ray_cluster: None) -> None:
    good, bad = bad_corpus(tmp_path)
    summary = scan(str(tmp_path), count_words, str(tmp_path / "elsewhere"))
    assert (summary.num_shards, summary.num_scanned, summary.num_samples) == (10, 10, len(good))
    assert summary.reasons == Counter(bad.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_run", run_here)
        assert scan(str(tmp_path), count_words).fingerprint == summary.fingerprint
    (tmp_path / "elsewhere/manifest.json").unlink()
    assert scan(str(tmp_path), count_words, str(tmp_path / "elsewhere")).num_scanned == 0
    index = ShardIndex.open(str(tmp_path), str(tmp_path / "elsewhere"))
    assert {ref.id for ref in index.samples(0, index.num_samples)} == good


def test_bad_samples_are_listed_and_the_rest_is_delivered(tmp_path: Path, without_ray: None) -> None:
    good, bad = bad_corpus(tmp_path)
    summary = scan(str(tmp_path), count_words)
    index = ShardIndex.open(str(tmp_path))
    assert {ref.id for ref in index.samples(0, index.num_samples)} == good
    rows = pq.read_table(tmp_path / "_index/quarantine.parquet").to_pylist()
    assert {row["id"]: row["reason"] for row in rows} == bad
    assert summary.num_quarantined == len(bad) == 8
    assert summary.reasons == Counter(bad.values())
    assert f"{len(good)} samples in 10 shards (10 scanned now), 8 quarantined (1 " in str(summary)
    # the same through the other door: what was quarantined is still known when nothing is scanned
    again = scan(str(tmp_path), count_words)
    assert (again.num_scanned, again.reasons) == (0, summary.reasons)

    with pytest.raises(ValueError, match=r"8 of 200 samples and 0 of 10 shards are bad, more than max_bad_fraction"):
        scan(str(tmp_path), count_words, max_bad_fraction=0.03)
    (tmp_path / "7.tar").write_bytes((tmp_path / "7.tar").read_bytes()[:2_000])
    with pytest.raises(
        ValueError, match=r"The worst: 7.tar \(. of . samples, damaged\), .*truncated tar|raise max_bad"
    ) as e:
        scan(str(tmp_path), count_words)
    assert "1 of 10 shards" in str(e.value)
    with pytest.raises(ValueError, match="scan its shards first"):
        ShardIndex.open(str(tmp_path))  # the old index no longer holds, and the new one was refused
    assert scan(str(tmp_path), count_words, max_bad_fraction=0.2).num_scanned == 0  # the work was kept


def test_a_folder_without_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .tar shards: check the path"):
        scan(str(tmp_path), count_words)
    with pytest.raises(ValueError, match=r"holds no .tar shards"):
        scan(str(tmp_path / "missing"), count_words)


def test_a_data_set_without_a_good_sample_says_so(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_of([("a.png", PNG)])))
    with pytest.raises(ValueError, match=r"1 compressed tar. The worst: a.tar"):
        scan(str(tmp_path), count_words)
    with pytest.raises(ValueError, match="the data set is empty, none of its 1 shards holds a good sample"):
        scan(str(tmp_path), count_words, max_bad_fraction=1.0)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as variables,
        faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (variables | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        patch.setattr(storage, "FIRST_PAUSE", 0.01)
        yield proxy


@pytest.mark.slow
def test_s3_with_faults_gives_what_the_disk_gives(tmp_path: Path, proxy: FaultyProxy, without_ray: None) -> None:
    images = write_shards(str(tmp_path), 60, 20)
    uri = f"s3://{BUCKET}/data"
    faults = Random(0)
    proxy.faults = iter(lambda: faults.choice(["503", "reset", "truncate", "short", *["ok"] * 12]), "")
    write_shards(uri, 60, 20)
    local, remote = scan(str(tmp_path), count_words), scan(uri, count_words)
    assert remote.fingerprint == local.fingerprint
    assert remote.num_scanned == 3
    assert scan(uri, count_words).num_scanned == 0
    index = ShardIndex.open(uri)
    assert index.samples(0, 60) == ShardIndex.open(str(tmp_path)).samples(0, 60)
    random = Random(1)
    for _ in range(15):
        first = random.randrange(50)
        assert read_samples(uri, index.samples(first, 10)) == images[first : first + 10]
    proxy.faults = iter(())
    assert sum(fault != "ok" for _, _, fault in proxy.requests) > 5
