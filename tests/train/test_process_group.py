"""The interface that workers meet on, and the line that says where they are."""

from __future__ import annotations

import io
import socket
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from vladva.train.process_group import interface_of
from vladva.train.tracking import follow
from vladva.train.worker_places import WorkerPlace, describe_places, read_places, write_places

PLACES = [
    WorkerPlace(0, "node-a", "10.0.0.1", "eth0", (0,)),
    WorkerPlace(1, "node-a", "10.0.0.1", "eth0", (1,)),
    WorkerPlace(2, "node-b", "10.0.0.2", "ens5"),
]


def test_the_interface_is_the_one_that_holds_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""  # of documentation: no machine has it
    held = {a.address: name for name, all_ in psutil.net_if_addrs().items() for a in all_ if a.family == socket.AF_INET}
    assert {address: interface_of(address) for address in held} == held


def test_a_line_names_the_ranks_of_each_node(tmp_path: Path) -> None:
    assert describe_places(PLACES) == "3 workers: ranks 0, 1 on node-a (10.0.0.1); rank 2 on node-b (10.0.0.2)"
    assert describe_places(PLACES[:1]) == "1 worker: rank 0 on node-a (10.0.0.1)"
    assert read_places(str(tmp_path)) == []
    write_places(str(tmp_path), PLACES)
    assert read_places(str(tmp_path)) == PLACES


@pytest.mark.parametrize("again", [False, True])
def test_whoever_started_the_run_is_told_of_each_new_group(tmp_path: Path, again: bool) -> None:
    shown = io.StringIO()
    write_places(str(tmp_path), PLACES)  # of an earlier start
    with follow(str(tmp_path), 10, console=Console(file=shown, width=200), every_s=0.01):
        if again:
            time.sleep(0.02)
            write_places(str(tmp_path), PLACES)
        time.sleep(0.05)
    assert ("rank 2 on node-b" in shown.getvalue()) == again
