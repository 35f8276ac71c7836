"""Engine: the only file that knows DeepSpeed. Forward, backward and optimizer step of a model under ZeRO 0 to 3.

Optimizer state goes in and out as full tensors under the parameters' names, so a checkpoint does not depend on the ZeRO
stage or on the number of workers.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vladva.config import OptimConfig, RunConfig
from vladva.losses.contrastive import find_loss
from vladva.models.packed.inference import keep_freed_memory
from vladva.models.packed.training import pack_training
from vladva.train.collectives import rank_and_world
from vladva.train.compile_lock import extensions_folder, wait_for_locks

if TYPE_CHECKING:
    from vladva.models.embedding_model import EmbeddingModel

BUCKET_ELEMENTS = 50_000_000  # gradients that are reduced at once: DeepSpeed's own 500 million would take 1 GB
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then cosine to zero."""
    warmup = max(1, round(optim.warmup_fraction * steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def zero_stage(config: RunConfig) -> int:
    """The stage that a run has: 2 for 1 where the model is in bfloat16.

    DeepSpeed's stage 1 adds up such gradients in bfloat16, or with an optimizer that keeps its state in another form;
    at stage 2 they are float32, and take less memory.
    """
    stage = config.train.zero_stage
    return 2 if stage == 1 and config.model.dtype == "bfloat16" else stage


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a run."""
    micro_steps = config.chunks_per_worker if config.caches_gradients else 1
    zero: dict[str, Any] = {"stage": zero_stage(config), "reduce_bucket_size": BUCKET_ELEMENTS}
    if config.train.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # At stage 0 DeepSpeed has no float32 copy of bfloat16 weights: there the adapter itself is float32.
    bf16 = config.model.dtype == "bfloat16" and config.train.zero_stage > 0
    return {
        "train_micro_batch_size_per_gpu": config.train.chunk_size,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": bf16},
        # Gradients of bfloat16 weights are reduced and added up over chunks in float32, 40 to 80 MB for an adapter.
        **({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if bf16 else {}),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def prepare_to_compile() -> None:
    """DeepSpeed compiles an operator at its first start: it looks for ninja on PATH, and waits for whoever compiles."""
    import ninja

    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ['PATH']}"
    wait_for_locks(extensions_folder())


def compile_operators() -> None:
    """Compile now what training on CPUs needs of DeepSpeed's operators, where that has not been done."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    prepare_to_compile()
    ShareMemCommBuilder().load(verbose=False)


def partition_layers(model: EmbeddingModel, config: RunConfig, device: torch.device) -> None:
    """ZeRO-3: take the weights of a model from its files, those of the layers cut up as they come.

    A worker has whole weights of one parameter at a time beside its share of the layers, and the few that are in none,
    which DeepSpeed partitions when it starts. What a file holds is in the memory of the host once for a node.
    """
    import deepspeed

    prepare_to_compile()
    dtype = getattr(torch, config.model.dtype)
    lists = [module for module in model.lvlm.modules() if isinstance(module, nn.ModuleList)]
    of_layers = {parameter: None for layers in lists for parameter in layers.parameters()}
    first: Any = None
    for parameter in of_layers:
        parameter.requires_grad_(False)
        # A copy: what the first worker sends must not be written into the pages of the file.
        parameter.data = parameter.data.to(dtype, copy=True)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=deepspeed_config(config))
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for parameter in model.lvlm.parameters():
        if parameter not in of_layers:
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for tensor in (*model.buffers(), *(model.get_parameter(name) for name in model.scalar_names)):
        tensor.data = tensor.data.to(device)
    model.lvlm.config.dtype = dtype


class Engine:
    """One worker's share of the model, its gradients and its optimizer."""

    def __init__(self, model: EmbeddingModel, config: RunConfig) -> None:
        import deepspeed
        from deepspeed.utils import logger

        prepare_to_compile()
        logger.setLevel("WARNING")
        self.config = config
        self.stage = zero_stage(config)
        settings = deepspeed_config(config)
        self.micro_steps: int = settings["gradient_accumulation_steps"]
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.bounds = find_loss(config.loss).scalars()
        # DeepSpeed rounds the model to bfloat16, where a log scale of 4.6 moves in steps of 0.03: not these.
        self.exact_scalars = {name: getattr(model, name).detach().float().clone() for name in self.bounds}
        optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        if settings["bf16"]["enabled"] and self.stage == 3:
            for parameter in self.trainable.values():  # DeepSpeed rounds no model that is partitioned already
                parameter.data = parameter.data.bfloat16()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.device = torch.device(self.engine.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        pack_training(self.model, config)
        if settings["bf16"]["enabled"]:
            for name in self.bounds.keys() & self.trainable.keys():
                self._set_partition(self.trainable[name], self.exact_scalars[name].to(self.device), WEIGHT)

    @property
    def model(self) -> EmbeddingModel:
        """The model itself."""
        return cast("EmbeddingModel", self.engine.module)

    @property
    def scalars(self) -> Tensor:
        """[S] the contrastive loss's scalars as the optimizer has them, in float32."""
        return torch.cat([value.to(self.device) for value in self.exact_scalars.values()] or [torch.zeros(0)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.engine(*args, **kwargs)

    def vision_features(self, pixels: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Images as the model's frozen vision tower gives them, where it can go on from those."""
        return self.model.vision_features(pixels)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the step's gradient is the sum over its calls, averaged over the workers."""
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the number of accumulation steps, for losses that are means.
        self.engine.backward(loss * self.micro_steps)

    def step(self, rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self.stage == 0:  # DeepSpeed clips there without telling the norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
        self.engine.step()
        self._hold_scalars()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _hold_scalars(self) -> None:
        """Read the scalars from the optimizer; those that have left their range go back to its edge."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, bounds in self.bounds.items():
            parameter = self.trainable.get(name)
            if parameter is None:
                continue
            value = parameter.detach().clone() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            held = value.clamp(bounds.lowest, bounds.highest)
            if not torch.equal(held, value):
                if self.stage == 0:
                    parameter.data.copy_(held)
                else:
                    self._set_partition(parameter, held, WEIGHT)
            self.exact_scalars[name] = held

    def gathered(self) -> AbstractContextManager[Any]:
        """Within it every rank sees the whole of each trainable parameter (ZeRO-3 partitions them)."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.trainable.values()))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments under `NAME.exp_avg` and `NAME.exp_avg_sq`, whole; every rank must call it.

        Of a bfloat16 model also the float32 weights that the optimizer works on, under `NAME.weight`.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {}
        for name, parameter in self.trainable.items():
            if self.config.model.dtype == "bfloat16":
                value = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
                state[f"{name}.{WEIGHT}"] = value.detach().float().cpu().clone()
            for moment in MOMENTS:
                value = (
                    self.optimizer.state[parameter][moment]
                    if self.stage == 0
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                state[f"{name}.{moment}"] = value.detach().float().cpu().clone()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Restore what `optimizer_state` gave after `step` optimizer steps."""
        inner = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        for part in self.optimizer_parts():
            # Before the first step there is no state; the count of steps sets AdamW's bias correction.
            inner.state[part] = {moment: torch.zeros_like(part) for moment in MOMENTS}
            inner.state[part]["step"] = torch.tensor(float(step))
        if self.stage in (1, 2):
            # DeepSpeed finds a parameter's part of the state after a first step only, unless it is told to look.
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trainable.items():
            if self.stage == 0:
                for moment in MOMENTS:
                    inner.state[parameter][moment].copy_(state[f"{name}.{moment}"])
                parameter.data.copy_(state.get(f"{name}.{WEIGHT}", parameter))
                continue
            for kind in (*MOMENTS, WEIGHT):
                if f"{name}.{kind}" in state:
                    self._set_partition(parameter, state[f"{name}.{kind}"].to(self.device), kind)
        self._hold_scalars()

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Take the float32 weights of what `optimizer_state` gave, if any; its moments are left."""
        for name, parameter in self.trainable.items():
            value = state.get(f"{name}.{WEIGHT}")
            if value is None or name in self.bounds:
                continue
            if self.stage == 0:
                parameter.data.copy_(value)
            else:
                self._set_partition(parameter, value.to(self.device), WEIGHT)

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        """Give this rank its share of a whole moment, or of the float32 weight, by the name of either."""
        from deepspeed import utils

        kind = "full"
        if self.stage == 3:
            # DeepSpeed's own cutting fails where the ranks' shares are not all whole: the last one's must be padded.
            kind, share = "local", cast("Any", parameter).ds_tensor.numel()
            rank, world = rank_and_world()
            value = pad(value.flatten(), (0, share * world - value.numel()))[rank * share : (rank + 1) * share]
        if name == WEIGHT:
            getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, name)

    def optimizer_parts(self) -> list[Tensor]:
        """The tensors that AdamW keeps state for: under ZeRO, flat parts of many parameters."""
        if self.stage == 0:
            return list(self.trainable.values())
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [part for group in self.optimizer.optimizer.param_groups for part in group["params"]]
