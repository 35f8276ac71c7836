"""cluster/gcp.yaml: Ray's schema after its defaults, node types as in ray_cluster.yaml, safe settings. Offline."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
PATH = ROOT / "cluster/gcp.yaml"


def load(path: Path) -> dict[str, Any]:
    """A file as `ray up` sees it, defaults merged in."""
    return prepare_config(yaml.safe_load(path.read_text()))


@pytest.fixture
def config() -> dict[str, Any]:
    return load(PATH)


def test_it_passes_rays_schema_after_defaults(config: dict[str, Any]) -> None:
    validate_config(config)


def test_the_schema_does_refuse(config: dict[str, Any]) -> None:
    broken = copy.deepcopy(config)
    broken["available_node_types"]["data"]["min_worker"] = 0  # no such field
    with pytest.raises(jsonschema.ValidationError):
        validate_config(broken)


def test_its_node_types_are_those_of_aws(config: dict[str, Any]) -> None:
    types, twins = (each["available_node_types"] for each in (config, load(ROOT / "ray_cluster.yaml")))
    assert types.keys() == twins.keys()
    for name, node_type in types.items():
        for field in ("min_workers", "max_workers", "priority"):
            assert node_type.get(field) == twins[name].get(field), (name, field)
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}


def test_spot_comes_before_its_on_demand_twin(config: dict[str, Any]) -> None:
    spot, twin = (config["available_node_types"][name] for name in ("gpu_spot", "gpu_on_demand"))
    assert spot["priority"] > twin["priority"]
    assert spot["resources"] == twin["resources"]
    scheduling = spot["node_config"].pop("scheduling")
    assert scheduling["provisioningModel"] == "SPOT"
    assert scheduling["instanceTerminationAction"] == "DELETE"
    assert scheduling.items() > twin["node_config"].pop("scheduling").items()
    assert spot["node_config"] == twin["node_config"]


def test_every_node_has_a_subnet_an_account_and_a_disk_that_goes_with_it(config: dict[str, Any]) -> None:
    accounts = {}
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        (disk,) = node["disks"]
        assert disk["autoDelete"]
        assert disk["initializeParams"]["diskSizeGb"] >= 200
        assert "/images/family/" not in disk["initializeParams"]["sourceImage"]  # a family moves
        assert node["networkInterfaces"][0]["subnetwork"], name
        assert not node["networkInterfaces"][0].get("accessConfigs"), name  # no address on the internet
        (account,) = node["serviceAccounts"]
        accounts[name] = account["email"]
    head = accounts.pop("head")
    assert head not in accounts.values()
    assert len(set(accounts.values())) == 1
    assert re.search(r"@sha256:[0-9a-f]{64}$", config["docker"]["image"])


def test_keys_and_token_are_read_before_ray_starts(config: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        _, start = config[f"{role}_start_ray_commands"]
        assert start.startswith("set -a; . ~/.vladva.env; RAY_AUTH_MODE=token; set +a;")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert {"~/.ray/auth_token", "~/.vladva.env"} == config["file_mounts"].keys()


def test_every_placeholder_is_explained_at_the_top() -> None:
    top, rest = PATH.read_text().split("\ncluster_name:", 1)
    placeholders = set(re.findall(r"\bmy-\w+", rest))
    assert placeholders == {"my-project", "my-image", "my-registry", "my-subnet"}
    assert all(each in top for each in placeholders)
