"""What the tests share: one Ray cluster, the tiny model, a small corpus of scenes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session, with four logical CPUs."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny() -> str:
    """Folder of the tiny LVLM that ships with the package."""
    from vladva.models.backbones import TINY

    return str(TINY)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: 256 training and 64 test images, 16 hard negatives of each kind, scanned."""
    from vladva.data.scenes.corpus import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), train=256, test=64, negatives=16, samples_per_shard=100)
    return folder
