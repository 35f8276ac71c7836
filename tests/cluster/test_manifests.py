"""The Kubernetes manifests and the image: right kinds, one pinned image, tokens on, versions as in constraints.txt."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jobs.train import parse
from serve.config import ServeArgs

ROOT = Path(__file__).parents[2]
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
CLUSTER_FIELD = {"train": "rayClusterSpec", "serve": "rayClusterConfig"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster/kuberay" / f"{name}.yaml").read_text())


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize(("name", "kind"), [("train", "RayJob"), ("serve", "RayService")])
def test_kind(name: str, kind: str) -> None:
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)


@pytest.mark.parametrize("name", CLUSTER_FIELD)
def test_cluster(name: str) -> None:
    cluster = load(name)["spec"][CLUSTER_FIELD[name]]
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    images = {container["image"] for pod in pods(cluster) for container in pod["containers"]}
    assert len(images) == 1
    assert re.search(r"@sha256:[0-9a-f]{64}$", images.pop())


@pytest.mark.parametrize("name", CLUSTER_FIELD)
def test_pods_state_their_size(name: str) -> None:
    # Ray takes a pod's resources from its limits, or its requests; without them it would see the whole machine.
    for pod in pods(load(name)["spec"][CLUSTER_FIELD[name]]):
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert int(requests["cpu"]) > 0
            assert requests["memory"] == limits["memory"]
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


def test_the_job_is_a_recipe_that_the_cluster_can_hold() -> None:
    spec = load("train")["spec"]
    python, script, *arguments = spec["entrypoint"].split()
    assert (python, script) == ("python", "/home/ray/vladva/jobs/train.py")
    _, config = parse(arguments)
    assert config.uri.startswith("s3://BUCKET/")
    assert config.data.uri.startswith("s3://BUCKET/")
    (group,) = (each for each in spec["rayClusterSpec"]["workerGroupSpecs"] if each["groupName"] == "gpu")
    resources = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    workers_per_pod = min(
        int(resources["nvidia.com/gpu"]) // config.cluster.gpus_per_worker,
        int(resources["cpu"]) // config.cluster.cpus_per_worker,
    )
    assert group["maxReplicas"] * workers_per_pod >= config.cluster.workers


def test_the_service_is_that_of_the_plain_cluster_with_arguments_that_it_takes() -> None:
    ours = yaml.safe_load(load("serve")["spec"]["serveConfigV2"])
    plain = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    for config in (ours, plain):
        (application,) = ServeDeploySchema(**config).applications
        ServeArgs(**application.args)
        assert application.import_path == "serve.app:build"
    assert ours["controller_options"] == plain["controller_options"]
    assert ours["http_options"]["port"] == plain["http_options"]["port"]


def test_every_pod_of_the_service_has_the_clients_keys() -> None:
    # `build` reads them where Serve runs it, which may be any node.
    for pod in pods(load("serve")["spec"]["rayClusterConfig"]):
        assert [variable["name"] for variable in pod["containers"][0]["env"]] == ["VLADVA_API_KEYS"]


def test_the_image() -> None:
    dockerfile = (ROOT / "cluster/Dockerfile").read_text()
    assert f"rayproject/ray:{RAY_VERSION}-" in dockerfile
    for source in re.findall(r"^COPY --chown=ray (.+) \S+$", dockerfile, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path


def test_the_runtime_environment() -> None:
    environment = yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())
    assert environment["py_modules"] == ["platform/vladva"]
    assert {".git", ".venv", ".vladva"} <= set(environment["excludes"])
