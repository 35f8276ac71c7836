"""ray_cluster.yaml passes Ray's own schema after Ray's defaults, and no dangerous default is left. Offline."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from vladva.recipes import RECIPES
from vladva.train.memory_plan import GIB, plan_memory

ROOT = Path(__file__).parents[2]
PATH = ROOT / "ray_cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as `ray up` sees it, defaults merged in."""
    return prepare_config(yaml.safe_load(PATH.read_text()))


def test_it_passes_rays_schema_after_defaults(config: dict[str, Any]) -> None:
    validate_config(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("autoscaling_mode",), "default"),  # no such field
        (("available_node_types", "data", "resources", "CPU"), 1.5),  # resources are integers
        (("head_node_type",), "boss"),  # no such node type
    ],
)
def test_the_schema_does_refuse(config: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    broken = copy.deepcopy(config)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(broken)


def test_the_head_is_on_demand_and_takes_no_tasks(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_spot_comes_before_its_on_demand_twin(config: dict[str, Any]) -> None:
    spot, twin = (config["available_node_types"][name] for name in ("gpu_spot", "gpu_on_demand"))
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["priority"] > twin["priority"]
    # The autoscaler compares utilisation, then availability, then priority: other resources would decide before it.
    assert spot["resources"] == twin["resources"]
    assert spot["node_config"] == twin["node_config"]


def test_either_gpu_pool_alone_holds_every_recipe(config: dict[str, Any]) -> None:
    for name in ("gpu_spot", "gpu_on_demand"):
        pool = config["available_node_types"][name]
        gpus = pool["max_workers"] * pool["resources"]["GPU"]
        assert pool["max_workers"] <= config["max_workers"]
        for recipe, make in RECIPES.items():
            cluster = make().cluster
            assert cluster.workers * cluster.gpus_per_worker <= gpus, (name, recipe)


def test_every_node_has_safe_machine_settings(config: dict[str, Any]) -> None:
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required", name
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["ImageId"]), name
        # Given groups are left as they are; a group that Ray makes opens SSH to 0.0.0.0/0, whatever IpPermissions say.
        assert node["SecurityGroupIds"], name
        assert node["SubnetIds"], name
        for device in node["BlockDeviceMappings"]:
            assert device["Ebs"]["VolumeType"] == "gp3", name
            assert device["Ebs"]["VolumeSize"] >= 200, name
            assert device["Ebs"]["Encrypted"], name


def test_workers_have_a_profile_of_their_own(config: dict[str, Any]) -> None:
    profile_of = {
        name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in config["available_node_types"].items()
    }
    head = profile_of.pop(config["head_node_type"])
    assert head not in profile_of.values()
    assert len(set(profile_of.values())) == 1


def test_rays_default_commands_are_gone(config: dict[str, Any]) -> None:
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert not [
        command for command in commands if "pip" in command or "anaconda" in command
    ]  # the image holds everything
    assert not [command for command in commands if "0.0.0.0" in command]


def test_token_and_dashboard(config: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        start = [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        assert len(start) == 1
        assert "export RAY_AUTH_MODE=token;" in start[0]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in config["head_setup_commands"]
    assert "chmod 600 ~/.ray/auth_token" in config["worker_setup_commands"]


def test_images_are_pinned_by_digest(config: dict[str, Any]) -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", config["docker"]["image"])
    assert config["provider"]["cache_stopped_nodes"] is False


def test_every_placeholder_is_explained_at_the_top() -> None:
    text = PATH.read_text()
    top, rest = text.split("\ncluster_name:", 1)
    placeholders = set(re.findall(r"\w+-0{17}|\b123456789012\b|0{64}", rest))
    assert len(placeholders) == 5
    for placeholder in placeholders - {"0" * 64}:
        assert placeholder in top, placeholder
    assert "sha256:000" in top


# GB of a card as it is sold, of the kinds of machines that are written in the file or in its comments.
CARDS = {"g6e.12xlarge": ("L40S", 48, 4), "p5.48xlarge": ("H100", 80, 8)}


def test_the_gpus_hold_the_recipes_that_the_file_names(config: dict[str, Any]) -> None:
    """Cards, and as many of them as a run has workers; the other recipes are told what machine to put there."""
    for name in ("gpu_spot", "gpu_on_demand"):
        node = config["available_node_types"][name]
        _, gigabytes, gpus = CARDS[node["node_config"]["InstanceType"]]
        assert node["resources"]["GPU"] == gpus
    most = sum(
        each["max_workers"] * each["resources"].get("GPU", 0) for each in config["available_node_types"].values()
    )
    comment = re.search(
        r"^# +(\d+) x (\w+).*recipes \.\.\._(\d+)gb.*?(\S+), \{CPU: \d+, GPU: (\d+)\}", PATH.read_text(), re.M | re.S
    )
    assert comment is not None, "the file says for which recipes its cards are"
    assert (comment[2], int(comment[3]), int(comment[1])) == ("L40S", gigabytes, gpus)
    assert CARDS[comment[4]][2] == int(comment[5])
    fitting = [recipe() for recipe_name, recipe in RECIPES.items() if recipe_name.endswith(f"_{gigabytes}gb")]
    assert len(fitting) == 3
    for run in fitting:
        assert run.cluster.device_memory_gib is not None
        assert run.cluster.device_memory_gib < gigabytes  # what a process can have of it
        assert plan_memory(run).total <= run.cluster.device_memory_gib * GIB
        assert run.cluster.workers <= most
    for recipe_name in set(RECIPES) - {"tiny", "tiny_e5_v", "tiny_composed"}:
        limit = RECIPES[recipe_name]().cluster.device_memory_gib
        assert limit in (22, 44, 79), recipe_name
