"""The driver of a run: checks everything that can be checked before any worker starts, then hands over to Ray Train.

W workers run the loop (loop.py) under DeepSpeed, each with its share of every global batch. The same call goes on with
a run that was interrupted, and does nothing for one that is complete.
"""

from __future__ import annotations

import logging
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.models import checkpoint

if TYPE_CHECKING:
    import ray.data
    from ray.train.torch import TorchTrainer

    from vladva.train.preflight import Tell

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption without making it another run.
MAY_CHANGE = {
    "storage",
    "cluster.workers",
    "cluster.min_workers",
    "cluster.cpus_per_worker",
    "cluster.gpus_per_worker",
    "cluster.device_memory_gib",
    "cluster.max_failures",
    "cluster.resize_every_s",
    "tracking.mlflow",
    "tracking.wandb",
    "train.zero_stage",
    "train.checkpoint_every",
    "train.audit",
    "train.keep_last",
    "train.keep_best",
    "train.validate_on",
    "train.validate_every",
    "train.gradient_cache",
    "train.offload",
    "train.activation_checkpointing",
    "data.validation_uri",
}


def train(config: RunConfig, *, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Run a training run, or go on with it; returns its last metrics. Raises ValueError for what users can fix.

    tell: gets the lines that a user wants to see, such as what was found in the shards.
    """
    from vladva.core.ray_tasks import connect
    from vladva.core.shared_path import check_paths
    from vladva.losses.contrastive import find_loss
    from vladva.train.preflight import check_data
    from vladva.train.tracking import follow, read_metrics

    find_loss(config.loss)  # a wrong name is told at once
    connect()
    check_paths(
        reads=[
            ("model.checkpoint", config.model.checkpoint),
            *(("data.uri", uri) for uri in config.data.uris),
            ("data.validation_uri", config.data.validation_uri),
        ],
        writes=[("storage", config.uri)],
    )
    check_data(config, tell)
    claim_run(config)
    if finished_steps(config) < config.train.steps:
        with follow(config.uri, config.train.steps):
            run_workers(config)
    return read_metrics(config.uri)[-1]


def claim_run(config: RunConfig) -> None:
    """Write the run's config.json, or compare with the one that is there: a run never changes its own recipe."""
    uri = storage.join(config.uri, "config.json")
    if not storage.exists(uri):
        storage.write_json(uri, config.to_json())
        return
    before, now = (flatten(c.to_json()) for c in (RunConfig.from_json(storage.read_json(uri)), config))
    changed = [key for key in now if now[key] != before[key] and key not in MAY_CHANGE]
    if changed:
        what = ", ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        raise ValueError(f"{config.uri} holds a run with another configuration ({what}); choose another --name")


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def finished_steps(config: RunConfig) -> int:
    """Steps of the newest complete checkpoint; 0 without one."""
    newest = checkpoint.latest(config.uri)
    return storage.read_json(storage.join(newest, checkpoint.STATE))["step"] if newest else 0


def remaining_chunks(config: RunConfig) -> ray.data.Dataset:
    """The chunk stream from the newest checkpoint on. Ray Train evaluates it anew whenever workers (re)start."""
    from vladva.train.data_loader import chunk_stream

    return chunk_stream(config, finished_steps(config))


def run_workers(config: RunConfig) -> None:
    """Run the workers to the end; after a failure on from the newest checkpoint, as long as there are new ones."""
    import ray.train

    before_ray = signal.getsignal(signal.SIGINT)
    while (before := finished_steps(config)) < config.train.steps:
        try:
            make_trainer(config).fit()
            if finished_steps(config) == before:
                raise RuntimeError(
                    f"{config.uri}: the workers ended without an error, and without a new checkpoint that the driver "
                    f"can see; check that storage is the same on every node (cluster/doctor.py --all-nodes --storage "
                    f"{config.storage})"
                )
        except ray.train.WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "cause", failure)  # Ray wraps what a worker raised
                if isinstance(cause, ValueError):
                    raise ValueError(str(cause)) from error
            if finished_steps(config) == before:
                raise
            logger.warning("%s; there are new checkpoints since, going on from the newest", error)
        except SystemExit as interrupted:  # Ray's handler of Ctrl-C stops the workers, then exits without a word
            raise KeyboardInterrupt from interrupted
        finally:
            if signal.getsignal(signal.SIGINT) is not before_ray:  # else Ray's stays, for a run that has ended
                signal.signal(signal.SIGINT, before_ray)


def make_trainer(config: RunConfig) -> TorchTrainer:
    """Ray's trainer of a run: workers that it starts again, as many as there are machines for, when one is lost."""
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchTrainer

    from vladva.train.loop import train_worker

    filesystem, path = storage.open_storage(storage.join(config.uri, "ray"))
    cluster = config.cluster
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
        ),
        datasets={"train": partial(remaining_chunks, config)},
        dataset_config=ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        run_config=ray.train.RunConfig(
            # A name of its own each time: where to go on is told by our checkpoints, not by Ray's bookkeeping.
            name=f"attempt-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
