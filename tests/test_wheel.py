"""The wheel holds all that the commands and the server need, and nothing else, and works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
PACKAGES = {"vladva": ROOT / "platform/vladva", "jobs": ROOT / "jobs", "serve": ROOT / "serve"}


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = set()
    for name in listed.splitlines():
        for package, folder in PACKAGES.items():
            path = ROOT / name
            if path.is_relative_to(folder) and path.exists() and path.name != "README.md":
                expected.add(f"{package}/{path.relative_to(folder)}")
    found = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("README.md")}
    assert found == expected


def test_the_source_distribution_has_the_sources_and_nothing_else(source_copy: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source_copy, check=True, capture_output=True)
    [file] = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as tar:
        folders = {name.split("/")[1] for name in tar.getnames() if name.count("/") > 1}
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert folders <= {"platform", "jobs", "serve", "vladva.egg-info"}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert "platform/vladva/models/tiny/weights/model.safetensors" in names


def test_verbs_work_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    told = run(installed, tmp_path, "-m", "jobs", "--help")
    assert told.returncode == 0
    for verb in ("train", "embed", "index", "search", "evaluate", "export", "demo", "serve"):
        assert f"\n  {verb} " in told.stdout
    planned = run(installed, tmp_path, "-m", "jobs", "train", "tiny", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "GiB" in planned.stdout
    wrong = run(installed, tmp_path, "-m", "jobs", "nonesuch")
    assert wrong.returncode == 2
    assert "there is no verb 'nonesuch'; there are" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_packaged_model_embeds_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    code = (
        "import vladva, jobs, serve.app, serve.routes.status; model = vladva.load('tiny');"
        "print(vladva.__file__, jobs.__file__, serve.__file__, model.embed_texts(['a red circle']).shape)"
    )
    told = run(installed, tmp_path, "-c", code)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count(str(installed)) == 3
    assert "(1, 192)" in told.stdout


def test_the_console_script_is_declared(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "vladva = jobs.__main__:main" in wheel.read(name).decode()
