"""The published models on fake tensors, and an engine that takes DeepSpeed's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tests.gpu.rehearsal.fake_cuda import CUDA, FakeCuda
from tests.support.published import Depth, stand_in_preprocessor, with_depth
from vladva.models.backbones import real_config

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.models.embedding_model import EmbeddingModel


def build(mode: FakeCuda, run: RunConfig, depth: Depth, *, train: bool, adapter: bool = True) -> EmbeddingModel:
    """The model of a run on the pretended device, as DeepSpeed leaves it where it is trained."""
    from vladva.losses.contrastive import find_loss
    from vladva.models.adapter import add_adapter
    from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations

    scalars = find_loss(run.loss).scalars()
    config = with_depth(real_config(run.model.checkpoint), depth)
    preprocessor: Any = stand_in_preprocessor(config, soft=run.model.soft_prompts and adapter)
    with torch.device("meta"):
        model = EmbeddingModel(run.model, preprocessor, scalars={name: each.start for name, each in scalars.items()})
        for name, scalar in scalars.items():
            model.get_parameter(name).requires_grad_(scalar.learned)
        model.lvlm.requires_grad_(False)
        if adapter:
            add_adapter(model, run.model)
        if train and run.train.activation_checkpointing:
            checkpoint_activations(model)
    in_bfloat16 = train and run.model.dtype == "bfloat16" and run.train.zero_stage > 0
    put_on_device(mode, model, torch.bfloat16 if in_bfloat16 else None)
    return model.train(train)


def put_on_device(mode: FakeCuda, model: nn.Module, dtype: torch.dtype | None) -> None:
    """Fake tensors in the place of all parameters and buffers; parameters in the dtype, where one is given."""
    made: dict[int, tuple[Any, Any]] = {}  # beside what they stand for, so that no id is used twice

    def stand_in(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            is_parameter = isinstance(tensor, nn.Parameter)
            kind = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
            fake: Any = torch.empty(tensor.shape, dtype=kind, device=CUDA)
            made[id(tensor)] = (nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake), tensor
        return made[id(tensor)][0]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        tensors[name] = stand_in(tensor)


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


class StandInEngine:
    """The engine's side of a step: the memory that DeepSpeed holds for W workers, and gradients that it takes away.

    ZeRO 1 and 2 keep a float32 copy of the trained weights and two moments, a W-th on each worker; gradients go through
    a bucket, and are added up between the passes of a step.
    """

    def __init__(self, mode: FakeCuda, model: EmbeddingModel, run: RunConfig) -> None:
        from vladva.train.engine import deepspeed_config

        self.mode, self.model, self.device = mode, model, CUDA
        settings = deepspeed_config(run)
        self.stage: int = settings["zero_optimization"]["stage"]
        self.bucket = int(settings["zero_optimization"].get("reduce_bucket_size", 5e8))
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        own = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        self.sum_dtype = kinds.get(settings.get("data_types", {}).get("grad_accum_dtype"), own)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self.trained)
        self.share = -(-count // run.cluster.workers)
        self.sums: torch.Tensor | None = None
        with mode:
            self.scalars = torch.zeros(len(model.scalar_names), device=CUDA)
            if self.stage == 0:
                self.state = [torch.empty(2 * count, dtype=torch.float32, device=CUDA)]
            else:
                parts = 2 if run.train.offload else 3
                self.state = [] if parts == 2 else [torch.empty(3 * self.share, dtype=torch.float32, device=CUDA)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def vision_features(self, pixels: Any) -> Any:
        """The vision tower alone."""
        return self.model.vision_features(pixels)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients of the loss; under ZeRO they leave the parameters."""
        bucket = torch.empty(self.bucket, dtype=self.sum_dtype, device=CUDA) if self.stage in (1, 2) else None
        loss.backward()
        if bucket is not None:
            kept = self.share if self.stage == 2 else sum(p.numel() for p in self.trained)
            if self.sums is None:
                self.sums = torch.empty(kept, dtype=self.sum_dtype, device=CUDA)
            for parameter in self.trained:
                parameter.grad = None
        if last:
            self.step()

    def step(self) -> None:
        """What the optimizer takes besides: the gradient of its share in float32, and one temporary as large."""
        if self.stage and self.state:
            taken = torch.empty(2 * self.share, dtype=torch.float32, device=CUDA)
            del taken
        self.sums = None
