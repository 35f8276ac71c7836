"""The demo as a newcomer runs it, on a reduced setting: interrupted, resumed from the wheel, complete."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REDUCED = ["--train-images", "256", "--test-images", "40", "--negatives", "6", "--steps", "4"]


def command(storage: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "jobs.demo", "--storage", str(storage), "--port", str(port), *REDUCED]


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_ray_train(run: Path, demo: subprocess.Popen) -> None:
    """Return when Ray's controller runs: from then on Ctrl-C is Ray's, who would end the demo without a word."""
    end = time.monotonic() + 240
    while not list(run.glob("ray/attempt-*")):
        assert demo.poll() is None, demo.communicate()[0]
        assert time.monotonic() < end, f"no attempt in {run}"
        time.sleep(0.2)


def test_interrupted_it_leaves_nothing_running_and_then_goes_on(tmp_path: Path, port: int, installed: Path) -> None:
    """Interrupted in the repository; the rest is done by the wheel in another folder: what it lacks is missed there."""
    outside = tmp_path / "outside"
    storage = outside / ".vladva"  # the default, there
    outside.mkdir()
    demo = subprocess.Popen(command(storage, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_ray_train(storage / "tiny-vladva", demo)
    started = psutil.Process(demo.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in started)
    demo.send_signal(signal.SIGINT)
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == 130, output
    assert output.endswith("interrupted; run the same command again to go on\n")
    assert "Traceback" not in output
    assert not psutil.wait_procs(started, timeout=20)[1]

    from_wheel = [sys.executable, "-m", "jobs", "demo", "--port", str(port), *REDUCED]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(from_wheel, cwd=outside, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drawing scenes complete" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    wanted = {"zero_shot_t2i_r1", "t2i_r1", "i2t_r1", "swap_object", "swap_attribute", "train_s", "total_s"}
    assert wanted <= figures.keys()
    assert figures["adapter_off_max_diff"] == 0
    assert figures["merged_max_diff"] < 1e-5
    assert figures["served_max_diff"] < 1e-5
    assert figures["captions_equal_base_model"]
    page = (storage / "demo" / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(f"http://127.0.0.1:{port}", "")
    assert len((storage / "tiny-vladva" / "metrics.jsonl").read_text().splitlines()) == 4

    again = subprocess.run(command(storage, port), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == figures


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command(tmp_path, port), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port {port}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
