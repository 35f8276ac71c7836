"""Row linear: linear layers whose adapter is on for some rows and off for others, over one copy of the base weights.

    y = x W^T + b                                of every row
    y[on] += (x[on] A^T) (s B)^T                 of the rows whose adapter is on: LoRA's two products of rank r

A row whose adapter is off is computed as if there were no adapter at all: by the same operation on the same tensors.

Small batches on a GPU take as long as their kernels take to launch. So layers with one input (queries, keys and values;
gate and up) are one product of weights that lie below each other, which the model's own modules see as views. The A of
all of them lie below these: where every row has its adapter on, W and A are one product, too, and (s B) another.

N rows (tokens), D width, R ranks of all layers together, E outputs of all layers together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional

from vladva.models.packed.cpu_linear import can_prepack, concat_bias, free_plain, prepack, rms_normalize

if TYPE_CHECKING:
    from vladva.models.embedding_model import EmbeddingModel

AdapterRows = bool | Tensor
"""Where the adapter is on: in all rows, in none, or in those whose numbers [n] a tensor holds."""


class RowLinear:
    """x [N, D] -> the outputs of linear layers side by side, of x after a norm where there is one."""

    def __init__(self, *linears: Any, norm: Any = None) -> None:
        self.norm = norm
        self.bases = [base_layer(linear) for linear in linears]
        self.prepacked: Tensor | None = None
        self.bias = concat_bias(*self.bases)
        gain = None
        if can_prepack(*self.bases):
            weight = torch.cat([base.weight for base in self.bases]).float()
            if norm is not None:  # the norm's weight goes into the product after it
                gain = norm.weight.detach().float()
                weight *= gain
            self.prepacked = prepack(weight.bfloat16())
        self.lora = LoraFactors.of(linears, gain)
        if self.prepacked is None:
            self._lay_out()

    def _lay_out(self) -> None:
        """The weights, and A, below each other; what the modules had becomes views of that."""
        sizes = [base.out_features for base in self.bases]
        parts = [base.weight.detach() for base in self.bases]
        if self.lora is not None:
            parts.append(self.lora.down)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        self.weight_ED = whole[: sum(sizes)]
        for base, rows in zip(self.bases, self.weight_ED.split(sizes), strict=True):
            base.weight.data = rows
        if self.lora is not None:
            self.lora.down = whole[sum(sizes) :]
            self.weight_and_down = whole
            self.long_bias = None if self.bias is None else functional.pad(self.bias, (0, len(self.lora.down)))

    def __call__(self, x: Tensor, adapter: AdapterRows) -> Tensor:
        """The outputs [N, E]."""
        return self.of_normed(self.normed(x), adapter)

    def normed(self, x: Tensor) -> Tensor:
        """What the products take: x after the norm."""
        if self.norm is None:
            return x
        if self.prepacked is None:  # on a GPU one kernel, where the module's own formula has eight
            return functional.rms_norm(x, self.norm.weight.shape, self.norm.weight, self.norm.variance_epsilon)
        return rms_normalize(x, self.norm.variance_epsilon)

    def of_normed(self, x: Tensor, adapter: AdapterRows) -> Tensor:
        """The outputs [N, E], of an x that has been through the norm."""
        if self.prepacked is not None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.prepacked, self.bias, "none", [], "")
        elif self.lora is not None and adapter is True:
            y, low = functional.linear(x, self.weight_and_down, self.long_bias).tensor_split(
                [len(self.weight_ED)], dim=1
            )
            return y.addmm_(low, self.lora.up)
        else:
            y = functional.linear(x, self.weight_ED, self.bias)
        return self.adapted(y, x, adapter)

    def residual(self, x: Tensor, residual: Tensor, adapter: AdapterRows) -> Tensor:
        """The output of the one layer, and `residual`, in whose memory it may be."""
        if self.prepacked is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.prepacked, self.bias, "add")
        else:
            y = residual.addmm_(x, self.weight_ED.t())
            if self.bias is not None:
                y += self.bias
        return self.adapted(y, x, adapter)

    def adapted(self, y: Tensor, x: Tensor, adapter: AdapterRows) -> Tensor:
        """y, with the adapter's share of the rows for which it is on."""
        return y if self.lora is None or adapter is False else self.lora.add(y, x, adapter)


class LoraFactors:
    """The factors of LoRA on layers with one input: A [R, D], and sB [R, outputs] with a block for every layer."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up

    @classmethod
    def of(cls, linears: tuple[Any, ...], gain: Tensor | None) -> LoraFactors | None:
        """The factors; None where no layer has LoRA. `gain` [D] multiplies the input in the base weights as well."""
        adapted = [linear for linear in linears if has_lora(linear)]
        if not adapted:
            return None
        dtype, device = base_layer(linears[0]).weight.dtype, base_layer(linears[0]).weight.device
        down = torch.cat([linear.lora_A["default"].weight.detach().float() for linear in adapted])
        if gain is not None:
            down = down * gain
        up = torch.zeros(len(down), sum(base_layer(linear).out_features for linear in linears), device=device)
        rank = column = 0
        for linear in linears:
            outputs = base_layer(linear).out_features
            if has_lora(linear):
                factor = linear.lora_B["default"].weight.detach().float() * linear.scaling["default"]
                up[rank : rank + factor.shape[1], column : column + outputs] = factor.t()
                rank += factor.shape[1]
            column += outputs
        return cls(down.to(dtype).contiguous(), up.to(dtype).contiguous())

    def add(self, y: Tensor, x: Tensor, adapter: AdapterRows) -> Tensor:
        """y [N, outputs], with x's products added where the adapter is on."""
        if isinstance(adapter, bool):
            return y.addmm_(x @ self.down.t(), self.up) if adapter else y
        return y.index_add_(0, adapter, (x[adapter] @ self.down.t()) @ self.up) if len(adapter) else y


class GatedRowMLP:
    """x [N, D] -> down(act(gate(y)) * up(y)) + x of y = norm(x)."""

    def __init__(self, norm: Any, mlp: Any) -> None:
        inner = mlp.gate_proj, mlp.up_proj
        if can_prepack(*map(base_layer, inner)):  # apart: there the activation can be in the gate's product
            self.inner = [RowLinear(one, norm=norm) for one in inner]
        else:
            self.inner = [RowLinear(*inner, norm=norm)]
        self.down = RowLinear(mlp.down_proj)
        self.activation = mlp.act_fn
        # With the activation in the product: rounded once less, so not beside rows whose adapter is on.
        self.fusible = len(self.inner) == 2 and self.inner[0].bias is None and mlp.config.hidden_act == "silu"

    def __call__(self, x: Tensor, adapter: AdapterRows) -> Tensor:
        """Hidden states [N, D] after the MLP, in whose memory x may have been."""
        normed = self.inner[0].normed(x)
        if adapter is False and self.fusible:
            gate, up = self.inner
            pointwise = torch.ops.mkldnn._linear_pointwise
            gated = pointwise(normed, gate.prepacked, None, "swish", [], "")
            gated = pointwise.binary(normed, gated, up.prepacked, up.bias, "mul")
        else:
            outputs = [one.of_normed(normed, adapter) for one in self.inner]
            gate_NF, up_NF = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=1)
            gated = self.activation(gate_NF).mul_(up_NF)
        return self.down.residual(gated, x, adapter)


class RowEmbedding:
    """Token ids [N] -> hidden states [N, D]; the rows of the table that the adapter trained only where it is on."""

    def __init__(self, table: Any) -> None:
        trained = getattr(table, "token_adapter", table)  # PEFT wraps the table, or stands in its place
        delta = getattr(trained, "trainable_tokens_delta", None)
        self.weight: Tensor = trained.base_layer.weight if delta is not None else base_layer(table).weight
        self.trained: Tensor | None = None
        if delta is not None:
            ids = torch.tensor(trained.token_indices["default"], device=self.weight.device)
            self.row = torch.full((len(self.weight),), -1, device=self.weight.device)
            self.row[ids] = torch.arange(len(ids), device=self.weight.device)
            self.trained = delta["default"].detach().to(self.weight.dtype)

    def __call__(self, ids: Tensor, adapter: AdapterRows) -> Tensor:
        """Hidden states [N, D]."""
        hidden_ND = self.weight[ids]
        if self.trained is None or adapter is False:
            return hidden_ND
        row = self.row[ids]
        on = row >= 0
        if adapter is not True:
            on &= torch.zeros_like(on).index_fill_(0, adapter, True)
        # Of all rows: to find those that are on, the host would have to wait for the device.
        return torch.where(on[:, None], self.trained[row.clamp_(min=0)], hidden_ND)


def base_layer(linear: Any) -> Any:
    """The layer under PEFT's."""
    return getattr(linear, "base_layer", linear)


def has_lora(linear: Any) -> bool:
    """Whether the layer carries LoRA."""
    return "default" in getattr(linear, "lora_A", {})


def rows_unsupported(decoder: torch.nn.Module) -> str | None:
    """Why the adapter of a decoder cannot be on for some rows and off for others; None where it can."""
    layers: list[Any] = [module for module in decoder.modules() if hasattr(module, "lora_A")]
    if any(layer.merged for layer in layers):
        return "the adapter is merged into the weights"
    if any(layer.lora_variant or set(layer.lora_A) - {"default"} for layer in layers):
        return "an adapter other than plain LoRA"
    return None


# ----------------------------------------------------------------------------------------------------------- decoder


class SharedLayer:
    """The linear layers of a decoder layer. `split`: queries apart from keys and values, because few are needed."""

    def __init__(self, layer: Any, *, split: bool, keep_plain: bool = True) -> None:
        attention = layer.self_attn
        self.width: int = attention.head_dim
        self.kv_heads: int = base_layer(attention.k_proj).out_features // self.width
        self.num_key_value_groups: int = base_layer(attention.q_proj).out_features // self.width // self.kv_heads
        keys_values, norm = (attention.k_proj, attention.v_proj), layer.input_layernorm
        self.query = RowLinear(attention.q_proj, norm=norm) if split else None
        self.projections = RowLinear(*(() if split else (attention.q_proj,)), *keys_values, norm=norm)
        self.output = RowLinear(attention.o_proj)
        self.mlp = GatedRowMLP(layer.post_attention_layernorm, layer.mlp)
        if not keep_plain:
            linears = (self.query, self.projections, self.output, *self.mlp.inner, self.mlp.down)
            for linear in linears:
                if linear is not None:
                    free_plain(*linear.bases)

    def key_value(self, hidden_ND: Tensor, adapter: AdapterRows) -> Tensor:
        """Keys and values side by side [N, 2K * d], of a layer whose queries are apart."""
        assert self.query is not None
        return self.projections(hidden_ND, adapter)

    def last_query(self, hidden_BD: Tensor, adapter: AdapterRows) -> Tensor:
        """Queries [B, H * d] of the tokens that go on, of a layer whose queries are apart."""
        assert self.query is not None
        return self.query(hidden_BD, adapter)

    def query_key_value(self, hidden_ND: Tensor, adapter: AdapterRows) -> Tensor:
        """Queries, keys and values side by side [N, (H + 2K) * d]."""
        normed = self.projections.normed(hidden_ND)
        if self.query is None:
            return self.projections.of_normed(normed, adapter)
        return torch.cat([self.query.of_normed(normed, adapter), self.projections.of_normed(normed, adapter)], dim=-1)


class SharedDecoder:
    """A decoder's weights once, for embedding with the adapter on and answering with it off, at the same time.

    keep_plain: whether Hugging Face's own forward still has its weights where this has them in another layout.
    """

    def __init__(self, model: EmbeddingModel, *, keep_plain: bool = True) -> None:
        base: Any = model.base
        self.language = base.model.language_model
        self.depth = len(self.language.layers)
        self.keep_plain = keep_plain
        self.embed = RowEmbedding(self.language.embed_tokens)
        self.norm = self.language.norm
        self.head = RowHead(base.lm_head)
        self._split = {model.layer or self.depth, self.depth}  # where one token of a prompt goes on
        self._layers: dict[int, SharedLayer] = {}
        modules = self.language.modules()
        self._switch: Any = next((one for one in modules if isinstance(one, BaseTunerLayer)), None)

    def layer(self, number: int) -> SharedLayer:
        """The layer of this number, counted from 1, made when it is first asked for."""
        if number not in self._layers:
            plain = self.language.layers[number - 1]
            self._layers[number] = SharedLayer(plain, split=number in self._split, keep_plain=self.keep_plain)
        return self._layers[number]

    @property
    def adapter_on(self) -> bool:
        """Whether the model's adapter is switched on, where it has one."""
        return self._switch is not None and not self._switch.disable_adapters

    def logits(self, hidden_RD: Tensor, adapter: AdapterRows) -> Tensor:
        """Logits [R, V], float32, of hidden states after the last layer."""
        return self.head(self.norm(hidden_RD), adapter)


class RowHead:
    """Hidden states [R, D] -> logits [R, V]; a head tied to the embeddings has the tokens that the adapter trained."""

    def __init__(self, head: Any) -> None:
        trained = getattr(head, "token_adapter", head)
        self.trained: Tensor | None = None
        delta = getattr(trained, "trainable_tokens_delta", None)
        weight = base_layer(trained).weight
        if delta is not None:
            self.ids = torch.tensor(trained.token_indices["default"], device=weight.device)
            self.trained = delta["default"].detach().to(weight.dtype)
        self.weight: Tensor = weight

    def __call__(self, hidden_RD: Tensor, adapter: AdapterRows) -> Tensor:
        """Logits, float32."""
        logits_RV = functional.linear(hidden_RD, self.weight).float()
        if self.trained is None or adapter is False:
            return logits_RV
        rows = torch.arange(len(hidden_RD), device=hidden_RD.device) if adapter is True else adapter
        logits_RV[rows[:, None], self.ids] = functional.linear(hidden_RD[rows], self.trained).float()
        return logits_RV
