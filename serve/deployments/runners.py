"""Runners: the ways in which models are run.

`PackedRunner` runs models whose decoder the packed forward knows: one copy of the weights, all conversations in one
forward, the adapter on or off for each. `PlainRunner` runs any other with its Hugging Face forward: conversations take
turns within a step, and the adapter is switched between them. `DualEncoderRunner` runs CLIP and its kin, which embed.

B items, D width, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from serve.deployments.runner import EmbedsBatches, Encoded, OpenConversation, TakesSteps
from vladva.models.batch import Pixels, as_tensors
from vladva.models.packed.cpu_linear import close_weight_files, give_back_freed_memory
from vladva.models.packed.generation import PackedGeneration, Prompt
from vladva.models.packed.inference import PackedInference, packed_unsupported
from vladva.models.packed.kv_cache import Slot, slot_capacity
from vladva.models.packed.row_linear import SharedDecoder

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder
    from vladva.models.interface import Embeds


def runners_of(embedder: "Embeds") -> tuple[EmbedsBatches, TakesSteps | None]:
    """The fastest runner of each mode that can run the model; no second one for a model that only embeds."""
    from vladva.models.embedder import Embedder

    if not isinstance(embedder, Embedder):
        return DualEncoderRunner(embedder), None
    both = PackedRunner(embedder) if packed_unsupported(embedder.model) is None else PlainRunner(embedder)
    return both, both


def tokens_that_end(embedder: "Embeds") -> set[int]:
    """The tokens that end an answer; none of a model that does not answer."""
    from vladva.models.embedder import Embedder
    from vladva.models.generation import end_tokens

    return end_tokens(embedder.model) if isinstance(embedder, Embedder) else set()


class EmbeddingRunner:
    """The half of a runner that embeds."""

    concurrent = False  # the adapter is switched on and off

    def __init__(self, embedder: "Embedder") -> None:
        self.embedder = embedder
        self.model = embedder.model

    @torch.inference_mode()
    def embed(self, items: Sequence[Encoded]) -> np.ndarray:
        """Unit vectors [B, D], float32, adapter on."""
        return self.embedder.forward(*self.tensors(items)).float().cpu().numpy()

    def tensors(self, items: Sequence[Encoded]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Tokens and pixels of a batch, on the device."""
        tokens = self.embedder.preprocessor.pad([(item.ids, []) for item in items])
        parts = [item.pixels for item in items if item.pixels is not None]
        pixels = as_tensors(Pixels.concatenate(parts), self.embedder.device) if parts else None
        return as_tensors(tokens, self.embedder.device), pixels


class PackedRunner(EmbeddingRunner):
    """Runs both modes on packed tokens."""

    concurrent = True  # nothing is switched, and nothing written but the cache, which embedding does not touch

    def __init__(self, embedder: "Embedder") -> None:
        super().__init__(embedder)
        # The weights are kept once, in the layout in which they are used.
        close_weight_files(embedder.model)
        self.decoder = SharedDecoder(embedder.model, keep_plain=False)
        self.inference = PackedInference(embedder.model, self.decoder)
        give_back_freed_memory()

    @cached_property
    def generation(self) -> PackedGeneration:
        """The other mode; made when it is first asked for."""
        return PackedGeneration(self.model, self.decoder, self.inference.vision)

    @torch.inference_mode()
    def embed(self, items: Sequence[Encoded]) -> np.ndarray:
        """Unit vectors [B, D], float32, adapter on."""
        return self.inference(*self.tensors(items)).float().cpu().numpy()

    @torch.inference_mode()
    def next_token_logits(self, items: Sequence[Encoded]) -> torch.Tensor:
        """Logits [B, V] of the token after each prompt, adapter off."""
        begun = [self.begin(item, len(item.ids), adapter=False) for item in items]
        try:
            logits = self.step([(progress, progress.unread) for progress in begun])
        finally:
            for progress in begun:
                self.end(progress)
        return torch.stack([row for row in logits if row is not None])

    def reserved(self, tokens: int) -> int:
        """Tokens of cache that a conversation of `tokens` takes."""
        return slot_capacity(tokens)

    def begin(self, encoded: Encoded, tokens: int, *, adapter: bool) -> OpenConversation:
        """A conversation of up to `tokens` tokens, its images seen, none of its tokens read."""
        prompt = self.generation.prompt(encoded.ids, encoded.pixels)
        return OpenConversation(encoded, adapter, PackedState(prompt, self.generation.cache.take(tokens)))

    def step(self, parts: Sequence[tuple[OpenConversation, int]]) -> list[torch.Tensor | None]:
        """Read so many tokens of each prompt, or each answer's last token: logits [V] of the next, where one is due."""
        chunks = []
        for progress, tokens in parts:
            state: PackedState = progress.state
            if progress.last is None:
                image_token = self.generation.image_token
                chunks.append(state.prompt.chunk(state.slot, image_token, tokens, adapter=progress.adapter))
            else:
                chunks.append(state.prompt.answer(state.slot, progress.last, adapter=progress.adapter))
        logits = iter(self.generation(chunks))
        for progress, _ in parts:
            progress.read = min(progress.state.slot.length, len(progress.encoded.ids))
        return [next(logits) if chunk.ends else None for chunk in chunks]

    def end(self, progress: OpenConversation) -> None:
        """Free what a conversation holds."""
        self.generation.cache.release(progress.state.slot)


@dataclass
class PackedState:
    """A conversation's prompt, and where its keys and values are."""

    prompt: Prompt
    slot: Slot


@dataclass
class PlainState:
    """What the Hugging Face forward takes next, and its cache of what it has seen."""

    inputs: dict[str, torch.Tensor]
    cache: Any = field(default=None)


class PlainRunner(EmbeddingRunner):
    """Runs a model of any family by its Hugging Face forward."""

    def next_token_logits(self, items: Sequence[Encoded]) -> torch.Tensor:
        """Logits [B, V] of the token after each prompt, adapter off."""
        begun = [self.begin(item, len(item.ids), adapter=False) for item in items]
        return torch.stack([row for row in self.step([(one, one.unread) for one in begun]) if row is not None])

    def reserved(self, tokens: int) -> int:
        """Tokens of cache that a conversation of `tokens` takes."""
        return tokens

    def begin(self, encoded: Encoded, tokens: int, *, adapter: bool) -> OpenConversation:
        """A conversation, its prompt unread: the forward sees images and prompt together."""
        one = self.tensors([encoded])
        return OpenConversation(encoded, adapter, PlainState(self.model.inputs(*one)))

    def step(self, parts: Sequence[tuple[OpenConversation, int]]) -> list[torch.Tensor | None]:
        """Each conversation by itself; a prompt is read as a whole."""
        return [self.advance(progress) for progress, _ in parts]

    def advance(self, progress: OpenConversation) -> torch.Tensor:
        """Logits [V] of the next token."""
        state: PlainState = progress.state
        inputs = state.inputs
        if progress.last is not None:
            mask, positions = inputs["attention_mask"], inputs.get("position_ids")
            inputs = {
                "input_ids": torch.tensor([[progress.last]], device=mask.device),
                "attention_mask": torch.cat([mask, mask.new_ones(1, 1)], dim=1),
            }
            if positions is not None:
                inputs["position_ids"] = positions.amax().expand(3, 1, 1) + 1
        off = self.embedder.adapter is not None and not progress.adapter
        with torch.inference_mode(), self.embedder.adapter_switch.off() if off else nullcontext():
            output = self.model.base(**inputs, past_key_values=state.cache, use_cache=True, logits_to_keep=1)
        state.inputs, state.cache = inputs, output.past_key_values
        progress.read = len(progress.encoded.ids)
        return output.logits[0, -1].float()

    def end(self, progress: OpenConversation) -> None:
        """Free what a conversation holds."""
        progress.state = None


class DualEncoderRunner:
    """Runs a model that has a tower for texts and one for images, which only embeds."""

    concurrent = False  # there is nothing else to do

    def __init__(self, embedder: "Embeds") -> None:
        """Raises ValueError for a model that gives an image several vectors, which no reply and no index holds."""
        if embedder.description().get("vectors_per_image", 1) > 1:
            raise ValueError("the model gives an image several vectors; serve one that gives one")
        self.embedder = embedder

    @torch.inference_mode()
    def embed(self, items: Sequence[Encoded]) -> np.ndarray:
        """Unit vectors [B, D], float32."""
        vectors_BD = np.zeros((len(items), self.embedder.dimension), np.float32)
        texts = [i for i, item in enumerate(items) if item.pixels is None]
        images = [i for i, item in enumerate(items) if item.pixels is not None]
        if texts:
            tokens = self.embedder.preprocessor.pad([(items[i].ids, []) for i in texts])
            vectors_BD[texts] = self.embedder.forward(as_tensors(tokens, self.embedder.device), None).cpu().numpy()
        if images:
            pixels = Pixels.concatenate([pixels for item in items if (pixels := item.pixels) is not None])
            vectors_BD[images] = self.embedder.forward({}, as_tensors(pixels, self.embedder.device)).cpu().numpy()
        return vectors_BD
