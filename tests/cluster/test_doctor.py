"""The doctor as people run it: what it finds on this machine, and the line and exit status when something is wrong."""

import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.s3_server import s3_server

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
        "GFLOP/s",
        "MB/s, deleted",
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


# --- each check of speed, of storage and of what is between nodes, with its fault planted


@pytest.fixture(scope="module")
def doctor() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("doctor", DOCTOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_json_is_one_object_with_what_was_measured(doctor: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fast, few = doctor.Finding("fast", "", {"read MB/s": 90.0}), doctor.Finding("1", "more")
    nodes = {"a": {"storage": fast, "open files": few}}
    assert doctor.report(nodes, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["troubles"] == 1
    assert told["nodes"]["a"]["storage"]["figures"] == {"read MB/s": 90.0}


def test_a_check_that_hangs_is_left_after_its_time(doctor: ModuleType) -> None:
    began = time.monotonic()
    finding = doctor.attempt(lambda: time.sleep(30), 0.1)
    assert finding.found == "no answer within 0 s"
    assert finding.trouble
    assert time.monotonic() - began < 10


def test_a_device_slower_than_its_like(doctor: ModuleType) -> None:
    rates = {"H100 0": 600.0, "H100 1": 590.0, "H100 2": 200.0}
    assert "H100 2 at 34% of the others" in doctor.slow_device(rates)
    assert doctor.slow_device({"H100 0": 600.0, "H100 1": 590.0}) == ""
    nodes = {name: {"devices": doctor.Finding("", "", {"H100 0": rate})} for name, rate in rates.items()}
    assert "of H100 2" in doctor.compare_devices(nodes).trouble
    assert doctor.compare_devices({"a": {}}).found == "no GPUs"


def test_the_product_of_matrices_is_timed(doctor: ModuleType) -> None:
    import torch

    assert 0 < doctor.product_rate("cpu", torch.float32, 64) < 1000


def test_a_failed_build_says_why(doctor: ModuleType) -> None:
    reason = "c++: fatal error: Killed signal terminated program"
    assert doctor.compile_error(f"Command 'ninja -v' returned 1\n[1/2] c++ -O3 shm.cpp\n{reason}") == reason
    assert doctor.compile_error("Command failed") == "Command failed"


@pytest.mark.slow
def test_storage_with_wrong_keys_and_with_right_ones(
    doctor: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "STORAGE_BYTES", 1 << 20)
    with s3_server(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        finding = doctor.check_storage("s3://vladva/doctor")
        assert finding.trouble == ""
        assert set(finding.figures) == {"write MB/s", "read MB/s"}
        monkeypatch.setattr(doctor, "SLOW_STORAGE", 1e9)
        assert "slow" in doctor.check_storage("s3://vladva/doctor").trouble
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        assert "AWS_* variables" in doctor.check_storage("s3://vladva/doctor").trouble


@contextmanager
def dashboard(status: int) -> Iterator[str]:
    """A server that answers everybody with `status`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_open_dashboard_and_a_readable_token(
    doctor: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    with dashboard(200) as address:
        assert "RAY_AUTH_MODE=token" in doctor.check_access(address).trouble
    with dashboard(401) as address:
        assert doctor.check_access(address).trouble == ""
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("secret")
        (tmp_path / ".ray/auth_token").chmod(0o644)
        assert "chmod 600" in doctor.check_access(address).trouble
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")  # then the file is not the one in use
        assert doctor.check_access(address).trouble == ""


def test_an_object_store_too_small_for_the_recipe(doctor: ModuleType) -> None:
    def nodes(size: int) -> list[dict[str, Any]]:
        return [{"Resources": {"object_store_memory": size}}] * 2

    assert doctor.check_object_store("tiny", nodes(1 << 30)).trouble == ""
    # 2 workers, 3 chunks of 32 images of 640 x 480 x 3 bytes each
    assert doctor.check_object_store("tiny", nodes(1)).figures["needed GiB"] == 2 * 3 * 32 * 640 * 480 * 3 / 2**30
    assert "--object-store-memory" in doctor.check_object_store("tiny", nodes(1 << 20)).trouble
    assert "there are" in doctor.check_object_store("tinny", nodes(1)).trouble


def test_a_wrong_clock(doctor: ModuleType) -> None:
    assert doctor.judge_clocks({"a": 0.0, "b": 0.3}).trouble == ""
    assert "set the clock of b by 7.0 s" in doctor.judge_clocks({"a": 0.0, "b": 7.0}).trouble


def test_a_clock_is_off_by_what_no_delay_explains(ray_cluster: None, doctor: ModuleType) -> None:
    import ray

    class Late:
        def time(self) -> float:
            return time.time() - 5

    off = doctor.check_clocks({"late": ray.remote(num_cpus=0)(Late).remote()})
    assert 4 < off.figures["seconds"] <= 5
    assert "set the clock of late" in off.trouble


def test_a_port_that_is_not_reached(doctor: ModuleType) -> None:
    peer = doctor.Peer()
    port = peer.listen()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    refused = peer.connect({"open": ("127.0.0.1", port), "closed": ("127.0.0.1", closed)})
    assert refused.keys() == {"closed"}
