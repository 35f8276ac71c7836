"""The doctor as people run it: what it finds on this machine, and the line and exit status when something is wrong."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCTOR = ROOT / "cluster/doctor.py"


def run(*arguments: str, python: str | Path = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(DOCTOR), *arguments]
    return subprocess.run(command, env=os.environ | variables, text=True, capture_output=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_healthy_machine(tmp_path: Path) -> None:
    done = run("--storage", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        f"Python {sys.version.split()[0]}",
        "packages as in constraints.txt",
        "compiled",
        "written, read, deleted",
    ):
        assert line in done.stdout
    assert done.stdout.splitlines()[-1] == "no troubles on nodes: 1"
    assert not list(tmp_path.iterdir())  # it cleans up after itself


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What it prints with a wrong version, storage that cannot be written to, no compiler, and bad modules."""
    folder = tmp_path_factory.mktemp("sick")
    (folder / "constraints.txt").write_text("# a comment\nrich==0.1\nPyYAML==5.0  # old\nnot-installed==1.0\n")
    (folder / "file").write_text("in the way")
    # torch fails to import, as it does where it was built for another machine.
    (folder / "torch.py").write_text("raise ImportError('libtorch.so: wrong ELF class')\n")
    arguments = ("--constraints", str(folder / "constraints.txt"), "--storage", str(folder / "file"))
    done = run(*arguments, PATH=str(folder), PYTHONPATH=str(folder))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "cannot import torch (libtorch.so: wrong ELF class)",
        f"pyyaml {version('pyyaml')} (not 5.0), rich {version('rich')} (not 0.1)",
        "no c++, no ninja on PATH",
        "check the URI, the AWS_* variables and the node's rights",
        "needs an import that fails: libtorch.so: wrong ELF class",
    ],
)
def test_each_trouble_has_its_line(sick: str, line: str) -> None:
    assert line in sick


def test_it_starts_with_nothing_but_python(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    done = run(python=tmp_path / "bin/python")
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_missing_constraints_file_is_one_clear_line(tmp_path: Path) -> None:
    done = run("--constraints", str(tmp_path / "none.txt"))
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == f"doctor: there is no {tmp_path / 'none.txt'}; --constraints takes the repository's constraints.txt"
    )
