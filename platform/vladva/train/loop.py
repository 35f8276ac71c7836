"""Training: the loop, from shards to checkpoints, readable top to bottom.

The driver checks everything that can be checked before any worker starts, then hands over to Ray Train: W workers, each
with its share of every global batch, under DeepSpeed. A run that was interrupted goes on from its last complete
checkpoint when the same command is given again, with the same or another number of workers, and is the same run.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.models import checkpoint

if TYPE_CHECKING:
    import ray.data
    from ray.train.torch import TorchTrainer
    from torch import Tensor

    from vladva.config import LossConfig
    from vladva.losses.pairs import PairLoss
    from vladva.models.batch import MicroBatch
    from vladva.train.engine import Engine
    from vladva.train.grad_cache import Contrastive, StepLoss

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption without making it another run.
MAY_CHANGE = (
    "cluster",
    "storage",
    "train.zero_stage",
    "train.checkpoint_every",
    "train.audit",
    "train.keep",
    "train.validate",
    "data.validation_uri",
    "train.gradient_cache",
    "train.offload",
    "train.activation_checkpointing",
)


# ------------------------------------------------------------------------------------------------------------- driver


def train(config: RunConfig) -> dict[str, Any]:
    """Run a training run, or go on with it; returns its last metrics. Raises ValueError for what users can fix."""
    from vladva.core.ray_tasks import connect
    from vladva.train.tracking import follow, read_metrics

    connect()
    check_data(config)
    claim_run(config)
    if finished_steps(config) < config.train.steps:
        with follow(config.uri, config.train.steps):
            fit(config)
    return read_metrics(config.uri)[-1]


def claim_run(config: RunConfig) -> None:
    """Write the run's config.json, or compare with the one that is there: a run never changes its own recipe."""
    uri = storage.join(config.uri, "config.json")
    if not storage.exists(uri):
        storage.write_json(uri, config.to_json())
        return
    before, now = (flatten(c.to_json()) for c in (RunConfig.from_json(storage.read_json(uri)), config))
    changed = [key for key in now if now[key] != before[key] and not key.startswith(MAY_CHANGE)]
    if changed:
        what = ", ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        raise ValueError(f"{config.uri} holds a run with another configuration ({what}); choose another --name")


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check_data(config: RunConfig) -> None:
    """Scan the shards (only those that are new or changed), load nothing else; fail now rather than on the cluster."""
    from vladva.data.sampler import SampleFinder
    from vladva.data.scan import scan
    from vladva.models.packed.training import packing_unsupported
    from vladva.train.data_loader import preprocessor_of
    from vladva.train.memory_plan import check_memory
    from vladva.train.validation import Validation

    preprocessor = preprocessor_of(config)
    width = preprocessor.config.get_text_config().hidden_size
    if max(config.loss.matryoshka, default=0) >= width:
        raise ValueError(f"loss.matryoshka {config.loss.matryoshka}: the model's embeddings have {width} dimensions")
    backbone = import_module(f"vladva.models.backbones.{preprocessor.config.model_type}")
    if reason := packing_unsupported(backbone, preprocessor.config.get_text_config(), config):
        print(f"training with padding, which takes longer: {reason}")
    for uri in config.data.uris:
        print(scan(uri, preprocessor.count_tokens, max_bad_fraction=config.data.max_bad_fraction))
    found = SampleFinder(config).fingerprint
    newest = checkpoint.latest(config.uri)
    if newest and storage.read_json(storage.join(newest, checkpoint.STATE))["data_fingerprint"] != found:
        raise ValueError(
            f"{', '.join(config.data.uris)}: the samples are not those that {newest} was trained on, so the run cannot "
            f"go on with each of them once; put them back as they were, or choose another --name"
        )
    if config.cluster.device_memory_gib is not None:
        check_memory(config)
    if config.train.validate_on:
        Validation(config)


def finished_steps(config: RunConfig) -> int:
    """Steps of the newest complete checkpoint; 0 without one."""
    newest = checkpoint.latest(config.uri)
    return int(newest.rsplit("-", 1)[1]) if newest else 0


def remaining_chunks(config: RunConfig) -> ray.data.Dataset:
    """The chunk stream from the newest checkpoint on. Ray Train evaluates it anew whenever workers (re)start."""
    from vladva.train.data_loader import chunk_stream

    return chunk_stream(config, finished_steps(config))


def fit(config: RunConfig) -> None:
    """Run the workers to the end; after a failure on from the newest checkpoint, as long as there are new ones."""
    import ray.train

    before_ray = signal.getsignal(signal.SIGINT)
    while (before := finished_steps(config)) < config.train.steps:
        try:
            trainer_of(config).fit()
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


def trainer_of(config: RunConfig) -> TorchTrainer:
    """Ray's trainer of a run: workers that it starts again, as many as there are machines for, when one is lost."""
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchTrainer

    filesystem, path = storage.open_storage(storage.join(config.uri, "ray"))
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config.to_json()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers,
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


# ------------------------------------------------------------------------------------------------------------- worker


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker runs: set up, resume, then one pass over its share of the chunk stream."""
    import ray.train
    import torch

    from vladva.train.engine import learning_rate
    from vladva.train.training_log import TrainingLog
    from vladva.train.validation import Validation

    config = RunConfig.from_json(settings["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = replace(config, cluster=replace(config.cluster, workers=world))  # as many as there are
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))

    # --- data: the stream starts where the newest checkpoint ends, and says so itself
    chunks = numbered_chunks(ray.train.get_dataset_shard("train").iter_rows(), config, rank, world)
    start, batch = next(chunks)

    # --- model and engine
    engine = build_engine(config, start)
    backward = backward_of(config)
    validation = Validation(config) if config.train.validate_on else None

    # --- loop
    leaving: list[str] = []  # nodes that are about to be taken away
    with TrainingLog(config, rank, world, start) as log:
        for step in range(start, config.train.steps):
            began = time.perf_counter()
            if step > start:
                _, batch = next(chunks)
            waited = time.perf_counter() - began

            torch.manual_seed((config.seed * 1_000_003 + step) * 1_000_003 + rank)  # dropout, the same when resumed
            losses = backward(engine, batch)
            rate = learning_rate(step, config.train.steps, config.optim)
            norm = engine.step(rate)

            seconds = time.perf_counter() - began
            last = step + 1 == config.train.steps
            scores = {}
            if validation is not None and (last or (step + 1) % config.train.validate_every == 0):
                scores = validation(engine)
            log.step(step, losses, batch, rate=rate, norm=norm, waited=waited, seconds=seconds, scores=scores)
            notice = ray.train.get_preemption_info()  # the same on every rank
            warned = notice is not None and notice.preempted_node_ids != leaving
            if last or warned or (step + 1) % config.train.checkpoint_every == 0:
                log.write_audit(step + 1)
                save_checkpoint(engine, log.saver, config, step + 1, scores)
            if warned:
                leaving = notice.preempted_node_ids
                log.flush()  # the node may be gone before the next checkpoint waits for this one


def numbered_chunks(
    rows: Iterator[dict[str, Any]], config: RunConfig, rank: int, world: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this worker's chunks of its global batch). Chunk i of the stream must be on worker i % W.

    Ray Data deals them so. Where W does not divide the chunks of a batch, some workers have one less than others.
    """
    from vladva.models.batch import MicroBatch

    expected = None
    share: list[MicroBatch] = []
    for row in rows:
        chunk = MicroBatch.from_row(row)
        step = chunk.number // config.chunks_per_batch
        if expected is None:
            expected = step * config.chunks_per_batch + rank
        assert chunk.number == expected, (chunk.number, expected, world, rank)
        expected += world
        share.append(chunk)
        if expected >= (step + 1) * config.chunks_per_batch:
            yield step, share
            share = []


def build_engine(config: RunConfig, start: int) -> Engine:
    """The engine of a run after `start` steps, with all that its checkpoint holds, from whatever W and ZeRO stage."""
    from vladva.train.engine import Engine

    engine = Engine(build_model(config, start), config)
    if start:
        saved = checkpoint.load(storage.join(config.uri, "checkpoints", f"step-{start}"))
        engine.load_optimizer_state(saved.optimizer, start)
    return engine


def build_model(config: RunConfig, start: int) -> Any:
    """The model with a new adapter, or with the one that was saved after `start` steps."""
    import math

    import torch

    from vladva.models.adapter import add_adapter, load_adapter
    from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations
    from vladva.train.data_loader import preprocessor_of

    torch.manual_seed(config.seed)
    loss = config.loss
    scalars = {"log_scale": -math.log(loss.temperature), "bias": loss.bias if loss.contrastive == "sigmoid" else 0.0}
    if start:
        uri = storage.join(config.uri, "checkpoints", f"step-{start}")
        state = checkpoint.load(uri).state
        scalars = {name: state.get(name, value) for name, value in scalars.items()}
    model = EmbeddingModel(config.model, preprocessor_of(config), **scalars)
    model.log_scale.requires_grad_(loss.learn_temperature)
    model.bias.requires_grad_(loss.contrastive == "sigmoid")
    model.lvlm.requires_grad_(False)
    if start:
        load_adapter(model, checkpoint.load_adapter(uri), trainable=True)
    else:
        add_adapter(model, config.model)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def backward_of(config: RunConfig) -> Callable[[Engine, list[MicroBatch]], StepLoss]:
    """Forward and backward of one global batch, by the configured losses and path."""
    from vladva.train import grad_cache

    options = {"contrastive": contrastive_of(config.loss), "next_token_weight": config.loss.next_token_weight}
    if config.caches_gradients:
        return partial(grad_cache.cached, **options, dropout=config.model.lora_dropout > 0)
    return partial(grad_cache.single_pass, **options)


def contrastive_of(loss: LossConfig) -> Contrastive:
    """The contrastive loss of a run, on gathered embeddings."""
    from vladva.losses.info_nce import info_nce
    from vladva.losses.sigmoid import sigmoid

    def contrastive(images: Tensor, texts: Tensor, scalars: Tensor, **columns: Tensor | None) -> PairLoss:
        if not loss.mask_duplicates:
            columns = {name: column for name, column in columns.items() if not name.endswith("_keys")}
        if loss.contrastive == "sigmoid":
            return sigmoid(images, texts, *scalars, **columns, dims=loss.matryoshka)
        scale = {"log_scale": scalars[0]} if loss.learn_temperature else {"temperature": loss.temperature}
        return info_nce(
            images, texts, **scale, **columns, symmetric=loss.directions == "symmetric", dims=loss.matryoshka
        )

    return contrastive


def save_checkpoint(
    engine: Engine, saver: checkpoint.AsyncSaver | None, config: RunConfig, step: int, scores: dict[str, float]
) -> None:
    """Save after `step` steps. Every rank gathers, rank 0 (with the saver) writes; the upload goes on in training."""
    from vladva.data.sampler import SampleFinder
    from vladva.models.adapter import save_adapter

    optimizer = engine.optimizer_state()
    with engine.gathered(), tempfile.TemporaryDirectory() as folder:
        if saver is None:
            return
        save_adapter(engine.model, config.model, Path(folder))
        state = {
            "next_chunk": step * config.chunks_per_batch,
            "seed": config.seed,
            "log_scale": engine.model.log_scale.item(),
            "bias": engine.model.bias.item(),
            "config": config.to_json(),
            "data_fingerprint": SampleFinder(config).fingerprint,
            "metrics": scores,
        }
        saver.save(step, adapter_files=Path(folder), optimizer=optimizer, state=state)
