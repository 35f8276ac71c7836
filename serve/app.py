"""App: the application, and how to start it.

    serve run serve.app:build model=.vladva/demo index=.vladva/demo/index

An ingress that speaks HTTP, and behind it either Colocated (embeds with the adapter on and answers with it off, from
one copy of the weights) or, with `layout=separate`, Discriminative and Generative, each scaling by itself.
"""

import importlib.util
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import click
import ray
from fastapi import APIRouter, FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.routing import Route
from starlette.types import ASGIApp

from serve.config import ArgumentError, ServeArgs
from serve.deployments.client import Backend
from serve.deployments.colocated import Colocated
from serve.deployments.embedding import Discriminative
from serve.deployments.generation import Generative
from serve.deployments.vllm_generation import VllmGenerative
from serve.protocol import proxy_errors
from serve.protocol.auth import Auth, key_digest
from serve.protocol.bodies import SWITCH_S, BoundedBodies
from serve.protocol.errors import LastResort, handle_errors
from serve.protocol.forgiving import Forgiving, with_origins
from serve.protocol.request_metrics import RequestMetrics
from serve.routes import batches, chat, cohere, embeddings, index_changes, metrics, scores, search, status, tokenize
from vladva.core.ray_tasks import protect_token

logger = logging.getLogger(__name__)

API_KEYS = "VLADVA_API_KEYS"  # environment variable: keys, separated by commas
WRITE_KEYS = "VLADVA_WRITE_KEYS"  # the same: keys that may change the index as well, which the others then may not
ROUTES = (status, metrics, embeddings, search, index_changes, scores, tokenize, cohere, batches, chat)
INGRESS_REQUESTS, REPLICA_REQUESTS = 1000, 4096  # at the same time, of one process
EMBEDDING_BUSY, ANSWERING_BUSY, COLOCATED_BUSY = 32, 8, 16  # requests at which a replica has enough to do
START_S = 600


@serve.deployment
@serve.ingress()
class Ingress:
    """HTTP in, HTTP out. Holds no model."""

    def __init__(
        self,
        args: ServeArgs,
        key_digests: list[bytes],
        write_digests: list[bytes],
        discriminative: DeploymentHandle,
        generative: DeploymentHandle,
        created: int,
    ) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.args = args
        self.key_digests, self.write_digests = key_digests, write_digests
        self.backend = Backend(args, discriminative, generative, created)
        protect_token()  # `serve run` has started Ray by now

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, made in the replica."""
        app = FastAPI(title="vladva", docs_url=None, redoc_url=None, redirect_slashes=False)
        routers = [noun.routes(self.backend) for noun in ROUTES]
        for router in routers:
            app.include_router(router)
        handle_errors(app)
        bounded = BoundedBodies(app, self.args.body_limits)
        guarded = LastResort(Auth(bounded, self.key_digests, self.write_digests))
        counted = RequestMetrics(with_origins(guarded, self.args.cors_origins), paths_of(routers))
        return Forgiving(counted)


def paths_of(routers: Sequence[APIRouter]) -> list[str]:
    """The paths of the routes that there are."""
    return [route.path for router in routers for route in router.routes if isinstance(route, Route)]


def build(arguments: dict[str, Any]) -> Application:
    """The application, as `serve run` and `serve deploy` build it; `help=1` lists the arguments.

    Raises ArgumentError, in one line, for a wrong argument, for a model that is not there, and for an index that is
    none or another model's: they would fail in every replica, again and again.
    """
    if "help" in arguments:
        click.echo(ServeArgs.listing())
        raise click.exceptions.Exit(0)
    args = ServeArgs.of(arguments)
    check_model(args)
    if not ray.is_initialized():  # `serve run` starts Ray next, and Serve's controller in it
        os.environ.update(proxy_errors.ENVIRONMENT)
    return application(args)


def check_model(args: ServeArgs) -> None:
    """Raise ArgumentError where the model or its index cannot be had. Nothing but their descriptions is read."""
    from vladva.core.errors import FingerprintMismatch
    from vladva.index.vector_index import open_index
    from vladva.models.resolve import describe

    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ArgumentError("engine: vllm is not installed in this environment: pip install 'vladva[vllm]'")
    try:
        description = describe(args.model, adapter=True, dtype=args.dtype or "float32")[1]
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(f"model: {args.model} cannot be loaded: {reason}") from None
    if args.index is None:
        return
    try:
        open_index(args.index, version=args.index_version, fingerprint=description["fingerprint"])
    except FingerprintMismatch as error:
        raise ArgumentError(f"index: {error}") from None
    except (ValueError, OSError) as error:
        raise ArgumentError(f"index: {str(error).strip().splitlines()[0]}") from None


def application(args: ServeArgs) -> Application:
    """The application. API keys come from the environment; only digests of them are kept.

    VLADVA_API_KEYS: who is served. VLADVA_WRITE_KEYS: who may change the index as well; without any, every key may.
    """
    from vladva.core.devices import gpus_for
    from vladva.models.dual_encoders import family_name
    from vladva.models.resolve import dtype_for, find_model, pin_revision

    autoscaling = {
        "min_replicas": args.min_replicas,
        "max_replicas": args.max_replicas,
        # Decisions at least a look-back apart, or the number of replicas swings.
        "look_back_period_s": 30,
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    }
    gpus = gpus_for(args.num_gpus, actors=1 if args.layout == "colocated" else 2)
    dtype = args.dtype or dtype_for(args.model, gpus)
    if gpus and args.num_gpus is None:
        logger.warning("replicas have %g GPU each and compute in %s (num_gpus, dtype)", gpus, dtype)
    # Every replica, whenever it starts, serves the same commit of a model on the hub.
    args = args.model_copy(update={"num_gpus": gpus, "dtype": dtype, "model": pin_revision(args.model)})
    resources = {"num_cpus": args.num_cpus, "num_gpus": gpus}
    # A new model or index: new replicas are up before old ones stop; one that cannot start is not tried for ever.
    update = {"max_surge_percent": 100, "max_constructor_retry_count": 3}
    full = BackpressureConfig(status_code=429, retry_after_s=1)
    options = {"ray_actor_options": resources, "backpressure_config": full, **update}
    # The replica refuses by the time that its work takes; Serve holds nothing back, or batches would not form.
    ongoing = {"max_ongoing_requests": REPLICA_REQUESTS}

    def bound(replica: type, busy: int) -> Application:
        scaling = {**autoscaling, "target_ongoing_requests": busy}
        deployment: Any = serve.deployment(replica)
        return deployment.options(**options, **ongoing, autoscaling_config=scaling).bind(args)

    if family_name(find_model(args.model).checkpoint):  # a dual encoder: nobody is let in who asks for an answer
        discriminative = generative = bound(Discriminative, EMBEDDING_BUSY)
    elif args.layout == "colocated":
        discriminative = generative = bound(Colocated, COLOCATED_BUSY)
    else:
        answering = VllmGenerative if args.engine == "vllm" else Generative
        discriminative, generative = bound(Discriminative, EMBEDDING_BUSY), bound(answering, ANSWERING_BUSY)
    entrance: Any = Ingress  # what the decorators made of it
    ingress = entrance.options(
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_cpus},
        max_ongoing_requests=INGRESS_REQUESTS,
        max_queued_requests=INGRESS_REQUESTS,
        backpressure_config=full,
        **update,
    )
    digests = ([key_digest(key) for key in keys(variable)] for variable in (API_KEYS, WRITE_KEYS))
    return ingress.bind(args, *digests, discriminative, generative, int(time.time()))


def keys(*variables: str) -> list[str]:
    """The keys that environment variables hold."""
    return [key.strip() for name in variables for key in os.environ.get(name, "").split(",") if key.strip()]


def api_keys() -> list[str]:
    """All configured keys."""
    return keys(API_KEYS, WRITE_KEYS)


def start(args: ServeArgs, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Start Serve and the application on this Ray cluster; returns the base URL once it is ready.

    Raises ValueError where the address cannot be had, and where it is not loopback and no API key is configured.
    """
    if not api_keys() and not ip_address(host).is_loopback:
        raise ValueError(f"host is {host} and no API key is configured: set {API_KEYS}, or serve on 127.0.0.1")
    check_port(host, port)
    check_model(args)
    if serve.status().proxies:
        raise ValueError("Serve already runs on this Ray cluster, on another port: stop it with `serve shutdown`")
    serve.start(
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING"},
        controller_options=proxy_errors.controller_options(),
    )
    serve.run(application(args), name="vladva", logging_config={"log_level": "WARNING"})
    url = f"http://{host}:{port}"
    wait_until_ready(url)
    return url


def stop() -> None:
    """Stop the application and Serve; Ray stays."""
    serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Raise ValueError where nothing can listen on the port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ValueError(f"port {port} on {host} cannot be used ({reason}); choose another port") from None


def wait_until_ready(url: str) -> None:
    """Return when /ready answers 200. Raises TimeoutError when it does not."""
    request = urllib.request.Request(f"{url}/ready", headers={"Authorization": f"Bearer {(api_keys() or [''])[0]}"})
    end = time.monotonic() + START_S
    while not answers(request):
        if time.monotonic() > end:
            raise TimeoutError(f"{url}/ready did not answer 200 within {START_S} s")
        time.sleep(0.2)


def answers(request: urllib.request.Request) -> bool:
    """Whether a request is answered with a success."""
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
