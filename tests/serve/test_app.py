"""The application as a whole: how it starts, what it says of itself, and that every error has the one shape."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import httpx
import pytest
import yaml

from serve.app import API_KEYS, application, build, check_model, start
from serve.config import ArgumentError, ServeArgs
from serve.deployments.served_models import Served, adapter_name
from serve.protocol.proxy_errors import controller_options
from tests.support.wire import ADAPTER, error_of

if TYPE_CHECKING:
    from openai import OpenAI

    from vladva.models.embedder import Embedder

ROOT = Path(__file__).parents[2]


def test_importing_does_no_work() -> None:
    """A clean interpreter imports the application without a model, torch, or a connection to Ray."""
    code = "import sys, ray, serve.app; print(ray.is_initialized(), 'torch' in sys.modules, 'lance' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "False"]


def test_ready_names_both_deployments(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    ready = {"status": "ready", "deployments": ["discriminative", "generative"], "asleep": []}
    assert client.get("/ready").json() == client.get("/v1/health/ready").json() == ready
    assert client.get("/v1/health/live").json() == {"status": "ok"}


def test_asleep_is_ready_and_looking_wakes_nothing(client: httpx.Client) -> None:
    from ray import serve

    args = ServeArgs(min_replicas=0, ingress_replicas=1, ingress_cpus=0, num_cpus=0, max_replicas=1)
    serve.run(application(args), name="asleep", route_prefix="/asleep", logging_config={"log_level": "WARNING"})
    try:
        for _ in range(3):
            ready = client.get("/asleep/ready").json()
            assert (ready["status"], ready["asleep"]) == ("ready", ready["deployments"])
            [card] = client.get("/asleep/v1/models").json()["data"]
            assert client.get("/asleep/v1/models/tiny").json() == card
            time.sleep(1)
        deployments = serve.status().applications["asleep"].deployments
        awake = {name for name, one in deployments.items() if any(one.replica_states.values())}
        assert awake == {"Ingress"}
        reply = client.post("/asleep/v1/embeddings", json={"input": "a"}).json()
        assert (reply["model"], reply["fingerprint"]) == (card["id"], card["fingerprint"])
        told = {**client.get("/asleep/v1/models").json()["data"][0]}
        assert told == card, "what is read from files is what the replica says"
    finally:
        serve.delete("asleep")


def test_models_are_listed_with_what_embeddings_depend_on(openai_client: OpenAI, embedder: Embedder) -> None:
    adapter, base = openai_client.models.list().data
    assert (adapter.id, base.id) == (ADAPTER, "tiny")
    card = adapter.model_extra
    assert card["mode"] == ["discriminative", "generative"]
    assert base.model_extra["mode"] == ["generative"]
    assert (card["base_model"], card["adapter"]) == ("tiny", ADAPTER)
    assert (card["dimension"], card["layer"]) == (embedder.dimension, embedder.layer)
    assert card["fingerprint"] == embedder.fingerprint
    assert openai_client.models.retrieve(ADAPTER).id == ADAPTER


def test_names_of_models() -> None:
    zero_shot = {"base_model": "org/model", "adapter": None}
    assert Served.of("org/model", None, zero_shot).embedding_model == "org/model"
    local = {"base_model": "/models/llava", "adapter": "/x/adapter"}
    served = Served.of("s3://bucket/runs/sea", None, local)
    assert (served.base, served.adapter) == ("llava", "sea")
    assert Served.of("s3://bucket/runs/sea", "mine", local).adapter == "mine"
    assert adapter_name("s3://bucket/runs/sea/checkpoints/step-300/") == "sea-step-300"


def test_every_error_has_the_one_shape(client: httpx.Client) -> None:
    error_of(client.get("/nope"), 404, "not_found")
    error_of(client.get("/v1/models/nope"), 404, "model_not_found")
    response = client.get("/v1/embeddings")
    assert error_of(response, 405, "method_not_allowed")["message"] == "this path takes POST, not GET"
    assert response.headers["allow"] == "POST"


def test_what_clients_get_slightly_wrong_is_answered(client: httpx.Client) -> None:
    head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.get("/health/").status_code == 200


def test_pages_of_other_origins_may_call_where_they_are_named(client: httpx.Client, strict: httpx.Client) -> None:
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        wanted = asked | {"Access-Control-Request-Headers": "authorization,content-type", "Authorization": ""}
        assert strict.options("/v1/embeddings", headers=wanted).headers.get("access-control-allow-origin") == allowed
        refused = strict.post("/v1/embeddings", headers={"Origin": origin, "Authorization": ""}, json={"input": "a"})
        error_of(refused, 401, "invalid_api_key")
        assert refused.headers.get("access-control-allow-origin") == allowed
        plain = client.get("/v1/models", headers={"Origin": origin})
        assert "access-control-allow-origin" not in plain.headers


def test_metrics_count_requests_by_reason(client: httpx.Client) -> None:
    """Ray gathers them every few seconds."""
    client.post("/v1/embeddings", json={"input": "a", "embed_dtype": "int4"})
    wanted = ("vladva_requests_total{", 'route="/v1/embeddings"', 'status="422"', 'code="invalid_value"')
    deadline = time.monotonic() + 300
    while not any(all(one in line for one in wanted) for line in client.get("/metrics").text.splitlines()):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_openapi_names_the_errors_that_there_are(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    responses = schema["paths"]["/v1/embeddings"]["post"]["responses"]
    assert {"200", "400", "401", "413", "415", "422", "429"} <= responses.keys()
    [one] = {str(responses[status]["content"]) for status in ("400", "422")}
    assert "ErrorReply" in one
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert "EmbeddingRequest" in schema["components"]["schemas"]


def raw_reply(client: httpx.Client, sent: bytes) -> httpx.Response:
    """The answer to bytes that are no proper HTTP request."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    pairs = [tuple(line.split(": ", 1)) for line in headers]
    return httpx.Response(int(status.split()[1]), headers=pairs, content=body)


def test_what_is_not_http_gets_the_one_shape_too(client: httpx.Client) -> None:
    for sent in (
        b"GARBAGE\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        error_of(raw_reply(client, sent), 400, "invalid_http")


def test_who_wants_a_websocket_gets_it_too(client: httpx.Client) -> None:
    handshake = (
        b"GET /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    error_of(raw_reply(client, handshake), 404, "not_found")


def test_errors_of_serves_own_proxy_have_it_too(client: httpx.Client) -> None:
    late = client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-timeout-seconds": "0.0001"})
    error_of(late, 408, "deadline_exceeded")


def test_the_callers_request_id_comes_back(client: httpx.Client) -> None:
    for path in ("/health", "/nope"):
        response = client.get(path, headers={"x-request-id": "mine-17"})
        assert response.headers.get_list("x-request-id") == ["mine-17"]
    assert client.get("/health").headers["x-request-id"] != client.get("/health").headers["x-request-id"]


def test_the_page_uses_the_same_endpoints(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/v1/search", "/v1/chat/completions"):
        assert path.strip("/") in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text  # nothing is loaded from elsewhere


def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^port {port} .*in use.*another port$"):
            start(ServeArgs(), port=port)


def test_beyond_this_machine_a_key_is_needed() -> None:
    with pytest.raises(ValueError, match=API_KEYS):
        start(ServeArgs(), host="0.0.0.0")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "tiny"}, "^modle: no such argument; did you mean model?"),
        ({"model": "/no/such/run"}, "^model: there is no /no/such/run"),
        ({"index": "./no-index"}, "there is no ./no-index"),
        ({"min_replicas": 3}, "min_replicas is 3"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_queued_tokens": 0}, "max_queued_tokens"),
        ({"deadline_s": "soon"}, "^deadline_s: "),
        ({"index": str(ROOT / "serve")}, "^index: .*serve holds no index"),
        ({"engine": "vllm"}, "^engine: .*add layout=separate"),
        ({"engine": "vllm", "layout": "separate"}, "^engine: vllm is not installed"),
        ({"engine_options": '{"enforce_eager": true}'}, "^engine_options: .*add engine=vllm"),
        ({"engine_options": "enforce_eager", "engine": "vllm", "layout": "separate"}, "^engine_options: "),
    ],
)
def test_wrong_arguments_are_named_in_one_line(args: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        build(args)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_serve_run_shows_one_line_for_a_wrong_argument_and_lists_them_all() -> None:
    """As a user types it. Ray is never started."""
    command = [Path(sys.executable).with_name("serve"), "run", "serve.app:build"]
    wrong = subprocess.run([*command, "modle=tiny"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith("Error: modle: no such argument; did you mean model?")
    listed = subprocess.run([*command, "help=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in listed.stdout for name in ServeArgs.model_fields)


def test_every_argument_says_what_it_is_for() -> None:
    assert all(field.description for field in ServeArgs.model_fields.values())


def test_an_index_of_another_model_fails_at_the_start(adapter: str, index: str, foreign_index: str) -> None:
    check_model(ServeArgs(model=adapter, index=index))
    check_model(ServeArgs(model=adapter, index=index, index_version="first"))
    with pytest.raises(ArgumentError, match="^index: .*0123456789abcdef"):
        check_model(ServeArgs(model=adapter, index=foreign_index))
    with pytest.raises(ArgumentError, match="^index: .*no-such-tag"):
        check_model(ServeArgs(model=adapter, index=index, index_version="no-such-tag"))


def test_a_model_that_is_not_there_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArgumentError, match="^model: nobody/nothing cannot be loaded"):
        check_model(ServeArgs(model="nobody/nothing"))


def test_arguments_come_as_strings_from_the_command_line() -> None:
    args = ServeArgs.model_validate({"model": "tiny", "num_gpus": "0.5", "max_replicas": "3"})
    assert (args.num_gpus, args.max_replicas) == (0.5, 3)
    listed = ServeArgs.model_validate({"cors_origins": "https://a.example, https://b.example"})
    assert listed.cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("layout", "models"), [("colocated", {"Colocated"}), ("separate", {"Discriminative", "Generative"})]
)
def test_deployments_scale_by_themselves_without_thrashing(
    layout: Literal["colocated", "separate"], models: set[str]
) -> None:
    from ray.serve._private.build_app import build_app

    app = application(ServeArgs(layout=layout, min_replicas=0))
    deployments = {d.name: d for d in build_app(app, name="x").deployments}
    assert deployments.keys() == {*models, "Ingress"}
    ingress = deployments["Ingress"]
    assert ingress._deployment_config.num_replicas == 2
    assert ingress.ray_actor_options["num_cpus"] == 0.1  # a node without any CPU, such as a head, gets none
    counts = {name: 2 if name in ("Ingress", "Colocated") else 1 for name in deployments}
    needed = sum(counts[name] * deployment.ray_actor_options["num_cpus"] for name, deployment in deployments.items())
    assert needed <= 2.0 + 1e-9  # a machine of two cores
    for name in models:
        config = deployments[name]._deployment_config
        scaling = config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (0, 2)
        assert scaling.look_back_period_s <= min(scaling.upscale_delay_s, scaling.downscale_delay_s)
        assert config.max_ongoing_requests >= scaling.target_ongoing_requests
        assert config.max_ongoing_requests >= ServeArgs(num_gpus=1).batch_tokens > ServeArgs().batch_tokens


def test_the_serve_config_file_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "cluster/serve.yaml").read_text()))
    [application] = config.applications
    assert application.import_path == "serve.app:build"
    assert config.controller_options.runtime_env == controller_options()["runtime_env"]
    assert application.logging_config.encoding == config.logging_config.encoding == "JSON"
    ServeArgs.model_validate(application.args)
