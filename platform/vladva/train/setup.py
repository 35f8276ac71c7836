"""Setup of a worker: its model, its engine and its backward, from the run's configuration and newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from vladva.config import LossConfig, RunConfig
from vladva.core import storage
from vladva.losses.contrastive import contrastive_loss, find_loss
from vladva.losses.pairs import add_nothing
from vladva.models import checkpoint
from vladva.models.adapter import add_adapter, load_adapter
from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations
from vladva.train import grad_cache
from vladva.train.collectives import all_reduce_sum
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import Engine, partition_layers
from vladva.train.memory_plan import check_device

if TYPE_CHECKING:
    from torch import Tensor

    from vladva.losses.pairs import PairLoss, Pairs
    from vladva.models.batch import MicroBatch
    from vladva.train.grad_cache import Contrastive, StepLoss

MakeStep = Callable[[Engine, Sequence["MicroBatch"]], "StepLoss"]
"""Forward and backward of one global batch, from the chunks of this rank."""


def build_engine(config: RunConfig, start: int) -> Engine:
    """The engine of a run after `start` steps, with all that its checkpoint holds, from whatever W and ZeRO stage."""
    if config.cluster.gpus_per_worker and torch.cuda.is_available():
        check_device(config, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    engine = Engine(build_trained_model(config, start), config)
    if start:
        saved = checkpoint.read_checkpoint(checkpoint_uri(config, start))
        engine.load_optimizer_state(saved.optimizer, start)
    elif config.init_from:
        engine.load_weights(checkpoint.read_checkpoint(config.init_from).optimizer)
    return engine


def checkpoint_uri(config: RunConfig, step: int) -> str:
    """Where a run's checkpoint after `step` steps is."""
    return storage.join(config.uri, "checkpoints", f"step-{step}")


def build_trained_model(config: RunConfig, start: int) -> EmbeddingModel:
    """The model with a new adapter, with that of `init_from`, or with the one that was saved after `start` steps."""
    torch.manual_seed(config.seed)
    scalars = find_loss(config.loss).scalars()
    values = {name: scalar.start for name, scalar in scalars.items()}
    saved = checkpoint_uri(config, start) if start else config.init_from
    if saved:
        state = checkpoint.read_checkpoint(saved).state
        # A new run begins with what was learned; a temperature that is fixed is its own.
        kept = [name for name in values if start or scalars[name].learned]
        values |= {name: state.get(name, values[name]) for name in kept}
    # Straight onto the device: a copy on the host for each worker of a node would be several times the model.
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    preprocessor = run_preprocessor(config)
    if config.train.zero_stage == 3:  # of most weights a device holds its share only, from the first moment on
        model = EmbeddingModel(config.model, preprocessor, scalars=values, mapped=True)
        partition_layers(model, config, device)
    else:
        model = EmbeddingModel(config.model, preprocessor, scalars=values, device=device)
    for name, scalar in scalars.items():
        model.get_parameter(name).requires_grad_(scalar.learned)
    model.lvlm.requires_grad_(False)
    if saved:
        load_adapter(model, checkpoint.fetch_adapter(saved), trainable=True)
    else:
        add_adapter(model, config.model)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def make_backward(config: RunConfig) -> MakeStep:
    """Forward and backward of a global batch, by the configured losses and path."""
    contrastive, loss = make_contrastive(config.loss), config.loss
    if config.caches_gradients:
        return partial(
            grad_cache.cached,
            contrastive=contrastive,
            next_token_weight=loss.next_token_weight,
            mask_duplicates=loss.mask_duplicates,
            false_negatives_above=loss.false_negatives_above,
            dropout=config.model.lora_dropout > 0,
        )
    return partial(
        grad_cache.single_pass,
        contrastive=contrastive,
        next_token_weight=loss.next_token_weight,
        mask_duplicates=loss.mask_duplicates,
        false_negatives_above=loss.false_negatives_above,
    )


def make_contrastive(config: LossConfig) -> Contrastive:
    """The contrastive loss of a run, on the pairs of the global batch."""
    loss = find_loss(config)
    names = tuple(loss.scalars())

    def contrastive(pairs: Pairs, scalars: Tensor) -> PairLoss:
        add_up = add_nothing if pairs.share is None else all_reduce_sum
        values = dict(zip(names, scalars, strict=True))
        return contrastive_loss(loss, pairs, values, widths=config.matryoshka, add_up=add_up)

    return contrastive
