"""The driver of a run: checks everything that can be checked before any worker starts, then hands over to Ray Train.

W workers run the loop (loop.py) under DeepSpeed, each with its share of every global batch. The same call goes on with
a run that was interrupted, and does nothing for one that is complete.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.core.devices import NO_GPU
from vladva.core.errors import refusal
from vladva.core.quiet import is_verbose
from vladva.core.ray_tasks import cause_of
from vladva.models import checkpoint
from vladva.train.run_claim import (
    absolute_paths,
    check_claim,
    claim_run,
    pin_base_model,
    pin_initial_weights,
)

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchTrainer

    from vladva.train.preflight import Tell

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    extend: bool = False,
    tell: Tell = lambda line: None,
    teach: Callable[[RunConfig, Tell], None] = lambda config, tell: None,
) -> dict[str, Any]:
    """Run a training run, or go on with it; returns its last metrics. Raises ValueError for what users can fix.

    extend: whether a run that is there may go on to more steps than it was begun for.
    tell: gets the lines that a user wants to see, such as what was found in the shards.
    teach: makes what `loss.teacher` says of the captions (`mine/teacher.py`), unless it is there.
    """
    from vladva.core.ray_tasks import connect
    from vladva.core.shared_path import check_paths
    from vladva.data.sample_vectors import open_teachers
    from vladva.data.sampler import SampleFinder
    from vladva.losses.contrastive import find_loss
    from vladva.train.capacity import wait_for_room
    from vladva.train.preflight import check_data
    from vladva.train.tracking import follow, read_metrics, tell_what_is_not_logged

    find_loss(config.loss)  # a wrong name is told at once
    config = pin_base_model(pin_initial_weights(absolute_paths(config)))
    check_claim(config, extend=extend)
    connect()
    check_paths(
        reads=[
            ("model.checkpoint", config.model.checkpoint),
            ("loss.teacher", config.loss.teacher),
            *(("data.uri", uri) for uri in config.data.uris),
            ("data.validation_uri", config.data.validation_uri),
            ("data.order", config.data.order),
        ],
        writes=[("storage", config.uri)],
    )
    check_data(config, tell)
    claim_run(config, extend=extend, tell=tell)
    teach(config, tell)
    open_teachers(config, SampleFinder(config).indexes)  # raises where there is nothing to open
    if checkpoint.finished_steps(config.uri) < config.train.steps:
        tell_what_is_not_logged(tell)
        wait_for_room(config.cluster, tell)
        with follow(config.uri, config.train.steps):
            run_workers(config)
    return read_metrics(config.uri)[-1]


def run_workers(config: RunConfig) -> None:
    """Run the workers to the end; after a failure on from the newest checkpoint, as long as there are new ones."""
    import ray.train

    before_ray = signal.getsignal(signal.SIGINT)
    failures = 0  # without a new checkpoint between them
    while (before := checkpoint.finished_steps(config.uri)) < config.train.steps:
        try:
            make_trainer(config).fit()
            if checkpoint.finished_steps(config.uri) == before:
                raise RuntimeError(
                    f"{config.uri}: the workers ended without an error, and without a new checkpoint that the driver "
                    f"can see; check that storage is the same on every node (cluster/doctor.py --all-nodes --storage "
                    f"{config.storage})"
                )
        except ray.train.WorkerGroupError as error:
            if told := user_error(error.worker_failures.values(), config):
                raise told from error
            failures = failures + 1 if checkpoint.finished_steps(config.uri) == before else 1
            if failures > config.cluster.max_failures >= 0:
                raise
            logger.warning(
                "%s; going on from the newest checkpoint", error if is_verbose() else failures_in_short(error)
            )
        except ray.train.ControllerError as error:  # it writes to the run's storage, too
            if told := user_error([error.controller_failure], config):
                raise told from error
            raise
        except SystemExit as interrupted:  # Ray's handler of Ctrl-C stops the workers, then exits without a word
            raise KeyboardInterrupt from interrupted
        finally:
            if signal.getsignal(signal.SIGINT) is not before_ray:  # else Ray's stays, for a run that has ended
                signal.signal(signal.SIGINT, before_ray)


def failures_in_short(error: ray.train.WorkerGroupError) -> str:
    """What became of each worker, the first line of it: the tracebacks of a lost node fill a screen."""
    causes = {rank: str(getattr(each, "cause", each)).strip() for rank, each in error.worker_failures.items()}
    lost = [f"rank {rank}: {cause.splitlines()[0] if cause else 'no word'}" for rank, cause in causes.items()]
    return f"workers lost: {'; '.join(lost[:4])}{'; ...' if len(lost) > 4 else ''}"


def user_error(failures: Iterable[BaseException], config: RunConfig) -> ValueError | None:
    """What the user can mend of what the workers raised, which would only come again; None where there is nothing."""
    found = list(failures)
    if any(hasattr(failure, "health_check_failure") for failure in found):
        return None  # a worker was lost: what the others raised may come of that
    for failure in found:
        cause = cause_of(getattr(failure, "cause", failure))  # Ray wraps what a worker raised
        if line := refusal(cause):
            return ValueError(f"{config.uri}, after step {checkpoint.finished_steps(config.uri)}: {line}")
        if isinstance(cause, ValueError):
            return ValueError(str(cause))
    return None


GROUP_STARTS_WITHIN_S = 30  # of an elastic run: Ray's 60 are a minute lost with every node, before it tries with fewer


def make_trainer(config: RunConfig) -> TorchTrainer:
    """Ray's trainer of a run: workers that it starts again, as many as there are machines for, when one is lost."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from vladva.train.loop import train_worker
    from vladva.train.process_group import RayNetworkConfig

    filesystem, path = storage.open_storage(storage.join(config.uri, "ray"))
    cluster = config.cluster
    if cluster.min_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROUP_STARTS_WITHIN_S))
    # Ray Train asks torch for devices before the loop can hide them.
    hidden = {} if cluster.gpus_per_worker else {"env_vars": NO_GPU}
    workers = (cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config.to_json()},
        # The types that ray.train shows are those of Ray Train V1, which knows no elastic runs.
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
            placement_strategy=cluster.placement,
        ),
        torch_config=RayNetworkConfig(run_uri=config.uri),
        run_config=ray.train.RunConfig(
            # A name of its own each time: where to go on is told by our checkpoints, not by Ray's bookkeeping.
            name=f"attempt-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env=hidden,  # type: ignore[call-arg]  # as above
            # `run_workers` counts failures: it knows those that would come again, and those with checkpoints between.
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
