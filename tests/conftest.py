"""What the tests share: one Ray cluster, the tiny model, a small corpus of scenes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
MTEB_TESTS = "evaluate/test_mteb_*.py"
collect_ignore_glob = [] if find_spec("mteb") else [MTEB_TESTS]


def pytest_report_header() -> list[str]:
    """Say what is left out: mteb needs Python 3.11, vladva does not."""
    return [f"mteb is not installed: {pattern} is left out" for pattern in collect_ignore_glob]


# Tests whose own processes start Ray or a group of training workers; whoever asks for `ray_cluster` needs no line here.
# Nor does the rehearsal: its hosts are namespaces, whose Ray nobody outside can meet.
STARTS_PROCESSES = (
    "cluster/test_job_submit.py",
    "jobs",
    "train/test_elastic.py",
    "train/test_grad_cache.py",
    "train/test_portable.py",
    "train/test_precision.py",
    "train/test_train_options.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark with `ray` what `make check` leaves out, and run it last.

    The cluster of `ray_cluster` lives as long as the session, and code that finds one uses it. In this order a test
    that does not ask for it never meets it, whichever tests run with it.
    """
    here = Path(__file__).parent
    starting = [here / name for name in STARTS_PROCESSES]
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) or any(item.path.is_relative_to(p) for p in starting):
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)  # stable: else in the order of the files


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Under `-m "not ray"` no test may start Ray: `make check` would take minutes, and nobody would know why."""
    if "not ray" in item.config.option.markexpr and "ray" in sys.modules:
        assert not sys.modules["ray"].is_initialized(), f"{item.nodeid} starts Ray: it should ask for `ray_cluster`"


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


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source_copy)], check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="session")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip does; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder
