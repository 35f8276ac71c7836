"""Claim: whose a run's folder is. A run keeps its recipe; it may get longer, and begin with another's weights."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.models import checkpoint
from vladva.models.backbones import checkpoint_source, pinned

if TYPE_CHECKING:
    from vladva.train.preflight import Tell

# What may differ between a run and its resumption without making it another run.
MAY_CHANGE = {
    "storage",
    "cluster.workers",
    "cluster.min_workers",
    "cluster.cpus_per_worker",
    "cluster.gpus_per_worker",
    "cluster.device_memory_gib",
    "cluster.max_failures",
    "cluster.placement",
    "cluster.wait_s",
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


CONFIG, STEPS = "config.json", "train.steps"
MODEL_MAY_CHANGE = {"dtype", "layer", "lora_dropout", "max_image_tokens"}  # the weights fit all the same


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with its paths as they read from any folder: every worker has one of its own."""

    def absolute(uri: str) -> str:
        return storage.absolute(uri) if uri else ""

    data = replace(
        config.data,
        uri=absolute(config.data.uri),
        mix=tuple(f"{absolute(uri)}={weight}" for uri, _, weight in (part.rpartition("=") for part in config.data.mix)),
        validation_uri=absolute(config.data.validation_uri),
        order=absolute(config.data.order),
    )
    base = config.model.checkpoint
    if base != "tiny" and os.path.isdir(base):  # else a name of Hugging Face's
        config = replace(config, model=replace(config.model, checkpoint=os.path.abspath(base)))
    teacher = config.loss.teacher
    if teacher.startswith("s3://") or (teacher != "tiny" and os.path.isdir(teacher)):
        config = replace(config, loss=replace(config.loss, teacher=absolute(teacher)))
    return replace(config, storage=absolute(config.storage), data=data)


def claim_run(config: RunConfig, *, extend: bool = False, tell: Tell = lambda line: None) -> None:
    """Write the run's config.json, or compare with the one that is there: a run never changes its own recipe.

    Only its number of steps may grow, with `extend`.
    """
    before = check_claim(config, extend=extend)
    if before is not None and before.train.steps == config.train.steps:
        return
    if before is not None:
        tell(
            f"{config.uri} goes on from {before.train.steps:,} to {config.train.steps:,} steps. From here on its "
            f"learning rate is that of the longer schedule, so it rises again where it had come down: the run is not "
            f"the one that {config.train.steps:,} steps from the start would have given"
        )
    storage.write_json(storage.join(config.uri, CONFIG), config.to_json())


def check_claim(config: RunConfig, *, extend: bool) -> RunConfig | None:
    """The configuration of the run that is there, if any. Raises ValueError where it is another run."""
    uri = storage.join(config.uri, CONFIG)
    if not storage.exists(uri):
        return None
    run = absolute_paths(RunConfig.from_json(storage.read_json(uri)))  # earlier versions kept them as they were given
    before, now = flatten(run.to_json()), flatten(absolute_paths(config).to_json())
    changed = [key for key in now if now[key] != before[key] and key not in MAY_CHANGE]
    if run.train.steps < config.train.steps and extend:
        changed.remove(STEPS)
    if changed:
        what = ", ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        advice = "choose another --name"
        if changed == [STEPS]:
            longer = run.train.steps < config.train.steps
            advice = (
                "add --extend to go on to more steps, or " + advice if longer else "a run gets no shorter; " + advice
            )
        elif "init_from" not in changed:
            advice += f", with --init-from {config.uri} to begin with its weights"
        raise ValueError(f"{config.uri} holds a run with another configuration ({what}); {advice}")
    return run


def pin_base_model(config: RunConfig) -> RunConfig:
    """With `model.checkpoint` as the commit of the hub that the run began with, or begins with now.

    A branch of the hub may move between the starts of two workers, or of two attempts.
    """
    uri, given = storage.join(config.uri, CONFIG), config.model.checkpoint
    if storage.exists(uri):
        begun = RunConfig.from_json(storage.read_json(uri)).model.checkpoint
    elif config.init_from:  # its weights are those of an adapter on that commit
        begun = storage.read_json(storage.join(config.init_from, checkpoint.STATE))["config"]["model"]["checkpoint"]
    else:
        begun = pinned(given)
    same = checkpoint_source(begun).name == checkpoint_source(given).name and checkpoint_source(given).revision is None
    return replace(config, model=replace(config.model, checkpoint=begun if same else given))


def pin_initial_weights(config: RunConfig) -> RunConfig:
    """With `init_from` as the checkpoint that the run began with, or begins with now.

    Raises ValueError where those weights are not of this run's model.
    """
    if not config.init_from:
        return config
    uri, given = storage.join(config.uri, CONFIG), storage.absolute(config.init_from)
    if storage.exists(uri):  # begun: the other run may have newer checkpoints since, or be gone
        begun = RunConfig.from_json(storage.read_json(uri)).init_from
        same = begun == given or begun.startswith(f"{given}/checkpoints/")
        return replace(config, init_from=begun if same else given)
    if given == storage.absolute(config.uri):
        raise ValueError(f"init_from {config.init_from} is this run itself; choose another --name")
    newest = given if "/checkpoints/" in given else checkpoint.latest(given)
    if newest is None or not storage.exists(storage.join(newest, checkpoint.STATE)):
        raise ValueError(f"init_from {config.init_from} has no complete checkpoint")
    there = storage.read_json(storage.join(newest, checkpoint.STATE))["config"]["model"]
    now = flatten(config.to_json()["model"])
    if checkpoint_source(there["checkpoint"]).name == now["checkpoint"]:
        now["checkpoint"] = there["checkpoint"]  # at whatever commit, if the user named none
    changed = [key for key in now if key not in MODEL_MAY_CHANGE and now[key] != there.get(key)]
    if changed:
        what = ", ".join(f"model.{key} is {there.get(key)} there and {now[key]} here" for key in changed)
        raise ValueError(f"init_from {config.init_from}: its weights do not fit this run's model ({what})")
    return replace(config, init_from=newest)


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
