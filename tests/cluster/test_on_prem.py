"""cluster/on_prem.yaml: Ray's own schema after its defaults, closed to strangers, keys in one file. Offline.

That it brings up every worker is shown by the rehearsal, which runs it.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parents[2] / "cluster/on_prem.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as `ray up` sees it, defaults merged in."""
    return prepare_config(yaml.safe_load(PATH.read_text()))


def test_the_first_line_is_the_command_that_starts_every_worker() -> None:
    first = PATH.read_text().splitlines()[0]
    assert first.startswith("# RAY_UP_enable_autoscaler_v2=0 ray up cluster/on_prem.yaml --no-config-cache")


def test_it_passes_rays_schema_and_keeps_every_worker(config: dict[str, Any]) -> None:
    validate_config(config)
    (node_type,) = config["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_schema_does_refuse(config: dict[str, Any]) -> None:
    broken = copy.deepcopy(config)
    broken["worker_addresses"] = ["192.0.2.14"]  # no such field
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(broken)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_reads_the_keys_and_asks_for_the_token_before_ray_starts(config: dict[str, Any], role: str) -> None:
    stop, start = config[f"{role}_start_ray_commands"]
    assert stop == "ray stop"
    before, command = start.split("ray start")
    assert before.split("; ")[:4] == ["set -a", ". ~/.vladva.env", "RAY_AUTH_MODE=token", "set +a"]
    if role == "head":
        assert "--dashboard-host=127.0.0.1" in command
        assert "--num-cpus=0" in command  # drivers and controllers live there
    for path in ("~/.ray/auth_token", "~/.vladva.env"):
        assert config["file_mounts"][path] == path
        assert any("chmod 600" in each and path in each for each in config[f"{role}_setup_commands"])


@pytest.mark.parametrize(("failures", "starts", "status"), [(0, 1, 0), (2, 3, 0), (9, 5, 1)])
def test_a_worker_whose_ray_does_not_start_in_time_is_tried_again(
    config: dict[str, Any], tmp_path: Path, failures: int, starts: int, status: int
) -> None:
    """The launcher itself gives up a node after one failure. Here with a `ray` that fails a few times."""
    (tmp_path / ".vladva.env").touch()
    ray = f'ray() {{ echo "ray $1"; [ $1 = stop ] || [ $((n += 1)) -gt {failures} ]; }}; sleep() {{ :; }}; '
    done = subprocess.run(
        ["bash", "-c", ray + config["worker_start_ray_commands"][-1]],
        env={"HOME": str(tmp_path)}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout.split("\n").count("ray start") == starts
    assert done.stdout.split("\n").count("ray stop") == min(failures, starts)
