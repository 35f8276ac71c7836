"""The Kubernetes manifests and the image: schemas, pinned images, tokens, versions, commands that the jobs take."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jobs import embed, evaluate
from jobs.train import parse
from serve.config import ServeArgs

ROOT = Path(__file__).parents[2]
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
FOLDER = ROOT / "cluster/kuberay"
KINDS = {"train": "RayJob", "embed": "RayJob", "evaluate": "RayJob", "nightly": "RayCronJob", "serve": "RayService"}
NATIVE = {
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("apps/v1", "StatefulSet"): "io.k8s.api.apps.v1.StatefulSet",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
    ("scheduling.k8s.io/v1", "PriorityClass"): "io.k8s.api.scheduling.v1.PriorityClass",
}


def load_all(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def load(name: str) -> dict[str, Any]:
    """The manifest of Ray's own kind."""
    return load_all(name)[0]


def job_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    return spec["jobTemplate"] if name == "nightly" else spec


def cluster_of(name: str) -> dict[str, Any]:
    return load(name)["spec"]["rayClusterConfig"] if name == "serve" else job_spec(name)["rayClusterSpec"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Definitions of both files; each refers to the other's."""
    folder = Path(__file__).parent / "schemas"
    return {
        name: definition
        for file in ("kubernetes-1.34.json", "kuberay.json")
        for name, definition in json.loads((folder / file).read_text())["$defs"].items()
    }


def validate(manifest: dict[str, Any], schemas: dict[str, Any]) -> None:
    kind = NATIVE.get((manifest["apiVersion"], manifest["kind"]), manifest["kind"])
    schema = {"$ref": f"#/$defs/{kind}", "$defs": schemas}
    jsonschema.Draft7Validator(schema).validate(manifest)


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys() | {"common"}
    for name, kind in KINDS.items():
        assert (load(name)["apiVersion"], load(name)["kind"]) == ("ray.io/v1", kind)


@pytest.mark.parametrize("name", [*KINDS, "common"])
def test_every_manifest_passes_its_schema(name: str, schemas: dict[str, Any]) -> None:
    for manifest in load_all(name):
        validate(manifest, schemas)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("train", ("spec", "backOffLimit"), 3),  # a field that is misspelt
        ("train", ("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        ("train", ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),  # text, not a number
        ("train", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), -1),
        ("train", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "container"), []),
        ("train", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "env"), {}),
        ("embed", ("spec", "rayClusterSpec", "autoscalerOptions", "version"), 2),
        ("nightly", ("spec", "schedule"), "daily"),
        ("nightly", ("spec", "rayClusterSpec"), {}),  # belongs into jobTemplate
        ("serve", ("spec", "upgradeStrategy", "type"), "RollingUpdate"),
        ("serve", ("spec", "upgradeStrategy", "clusterUpgradeOptions", "stepSizePercent"), 110),
        ("serve", ("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redis"), "redis://"),
    ],
)
def test_the_schemas_do_refuse(name: str, path: tuple[str | int, ...], value: object, schemas: dict[str, Any]) -> None:
    broken: Any = copy.deepcopy(load(name))
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(broken, schemas)


def test_the_schema_of_kubernetes_does_refuse(schemas: dict[str, Any]) -> None:
    for name, field, wrong in (("serve", "maxUnavailable", [1]), ("common", "value", "high")):
        for manifest in load_all(name):
            inner = manifest["spec"] if field in manifest.get("spec", {}) else manifest
            if field in inner:
                inner[field] = wrong
                with pytest.raises(jsonschema.ValidationError):
                    validate(manifest, schemas)


@pytest.mark.parametrize("name", KINDS)
def test_cluster(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token"}
    # Kueue admits a job of one size as a whole; the others grow and shrink.
    queued = "kueue.x-k8s.io/queue-name" in load(name)["metadata"].get("labels", {})
    assert cluster["enableInTreeAutoscaling"] is not queued
    if not queued:
        assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not queued or group["minReplicas"] == group["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods(cluster):
        ray, logs = pod["containers"]
        assert logs["name"] == "logs"
        assert all(re.search(r"@sha256:[0-9a-f]{64}$", each["image"]) for each in (ray, logs))
    assert len({pod["containers"][0]["image"] for pod in pods(cluster)}) == 1


@pytest.mark.parametrize("name", KINDS)
def test_pods_state_their_size(name: str) -> None:
    # Ray takes a pod's resources from its limits, or its requests; without them it would see the whole machine.
    for pod in pods(cluster_of(name)):
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests["cpu"]
            assert requests["memory"] == limits["memory"]
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


@pytest.mark.parametrize("name", KINDS)
def test_every_pod_has_shared_memory_logs_that_stay_a_class_and_a_place_of_its_own(name: str) -> None:
    classes = {each["metadata"]["name"] for each in load_all("common") if each["kind"] == "PriorityClass"}
    cluster = cluster_of(name)
    for pod in pods(cluster):
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        ray, logs = pod["containers"]
        assert volumes["shm"]["medium"] == "Memory"
        assert {mount["name"]: mount["mountPath"] for mount in ray["volumeMounts"]} == {
            "shm": "/dev/shm",
            "ray": "/tmp/ray",
        }
        assert {mount["name"] for mount in logs["volumeMounts"]} == {"ray"}
        assert pod["priorityClassName"] in classes
        assert pod["serviceAccountName"] == "vladva"
        assert not {"readinessProbe", "livenessProbe"} & ray.keys()  # KubeRay's own, which know Serve's proxies
    for group in cluster["workerGroupSpecs"]:
        labels = group["template"]["metadata"]["labels"]
        (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_what_others_select_is_there() -> None:
    """Selectors that match nothing do nothing, and no schema says so."""
    common = {each["kind"]: each for each in load_all("common")}
    selected = common["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for name in KINDS:
        cluster = cluster_of(name)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert selected.items() <= group["template"]["metadata"]["labels"].items()
    serve = {each["kind"]: each for each in load_all("serve")}
    (group,) = cluster_of("serve")["workerGroupSpecs"]
    budget = dict(serve["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])
    assert budget.pop("ray.io/serve") == "true"  # set by the operator on pods whose proxy answers
    assert budget.items() <= group["template"]["metadata"]["labels"].items()
    assert group["minReplicas"] >= 2  # or a budget of one pod would stop every drain
    redis = serve["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert serve["Service"]["spec"]["selector"].items() <= redis.items()
    assert selected.items() <= redis.items()
    address = cluster_of("serve")["gcsFaultToleranceOptions"]["redisAddress"]
    assert address == f"redis://{serve['Service']['metadata']['name']}:{serve['Service']['spec']['ports'][0]['port']}"


@pytest.mark.parametrize("name", ["embed", "nightly", "evaluate"])
def test_the_command_is_one_that_the_job_takes_and_the_cluster_can_hold(name: str) -> None:
    python, script, *arguments = job_spec(name)["entrypoint"].split()
    module = evaluate if name == "evaluate" else embed
    assert (python, script) == ("python", f"/home/ray/vladva/jobs/{module.__name__.rpartition('.')[2]}.py")
    options = module.parse(arguments)
    assert options.out.startswith("s3://BUCKET/")
    most = options.actors if isinstance(options.actors, int) else options.actors[1]
    gpus = sum(
        group["maxReplicas"]
        * int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"])
        for group in cluster_of(name)["workerGroupSpecs"]
        if group["groupName"] == "gpu"
    )
    assert most * options.gpus_per_actor <= gpus


def test_the_nightly_job_is_the_job() -> None:
    assert job_spec("nightly") == job_spec("embed")


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
    for pod in pods(cluster_of("serve")):
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
