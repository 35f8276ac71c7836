"""Run configuration: a recipe plus overrides gives one frozen, validated `RunConfig`, saved with the run as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from vladva.core.mixture import check_mix, mix_shares, mix_uris

IMAGE_PROMPT = "Summarize the provided image in one word:"
TEXT_PROMPT = "Summarize the provided text in one word:"


@dataclass(frozen=True)
class ModelConfig:
    """Which LVLM, and what is learned on it."""

    checkpoint: str
    """Hugging Face name (or NAME@REVISION) or folder of the base model; `tiny` is the one that ships with vladva."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer: int | None = None
    """Layer whose hidden state is the embedding, counted from 1; None is the last."""
    image_prompt: str = IMAGE_PROMPT
    text_prompt: str = TEXT_PROMPT
    soft_prompts: bool = True
    """Learn the prompts' token embeddings, starting from those of the hand-written prompts."""
    lora_rank: int = 16
    """Rank of the adapter on every linear layer of the language model; 0 for none."""
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    max_image_tokens: int | None = None
    """Larger images are made smaller (Qwen families); None: as the checkpoint's own files say."""
    chat_template: str = ""
    """Jinja template in place of the checkpoint's own, for models that were trained with another; empty: its own.

    As in transformers, a newline at its very end is dropped: write `{{ '\\n' }}` for one that counts."""


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how they are read."""

    uri: str
    """Folder of shards: a path or s3://..."""
    mix: tuple[str, ...] = ()
    """Several folders in place of `uri`, each as URI=WEIGHT: their samples come in exactly these proportions."""
    run_length: int = 8
    """Neighbouring samples that are read with one request."""
    order: str = ""
    """File of an order of the samples, in which neighbours are alike (`jobs/mine.py --order`); empty: as they are."""
    neighbourhood: int = 16
    """With `order`: so many neighbours of it are in the same global batch."""
    short_below: int = 30
    """Captions of fewer tokens are short, and contrasted; the others are long, and generated."""
    long_below: int = 500
    """Longer captions are not used; they are counted by the scan."""
    texts_only: bool = False
    """The samples are texts without images (NLI triplets); the model is used on images all the same."""
    mixed_inputs: bool = False
    """Samples may have words beside their image, instructions, and images as positives ("query" and "positive" in their
    JSON). Memory is planned for words and instructions of `short_below` tokens each."""
    hard_negatives: int = 0
    """Hard-negative captions ("negatives" in a sample's JSON) used of each pair, at most."""
    max_text_tokens: int | None = None
    """Short captions, hard negatives and texts in the stead of images are cut to so many tokens."""
    validation_uri: str = ""
    """Folder of the benchmark that `train.validate_on` names."""
    max_bad_fraction: float = 0.05
    """Stop when the scan quarantines more than this fraction of the samples, or training cannot use more of them."""

    def __post_init__(self) -> None:
        check_mix(self.mix)

    @property
    def uris(self) -> tuple[str, ...]:
        """The folders of shards."""
        return mix_uris(self.mix) or (self.uri,)

    @property
    def shares(self) -> tuple[int, ...]:
        """The proportions of the folders' samples, in whole numbers."""
        return mix_shares(self.mix) if self.mix else (1,)


@dataclass(frozen=True)
class LossConfig:
    """L = L_c + next_token_weight * L_AR."""

    contrastive: str = "info_nce"
    """The contrastive loss: the name of a file in vladva/losses/, as info_nce or sigmoid."""
    options: tuple[str, ...] = ()
    """Settings of that loss alone, each as NAME=VALUE, as `directions=one-way` of info_nce; they are in its file."""
    temperature: float = 0.07
    learn_temperature: bool = True
    matryoshka: tuple[int, ...] = ()
    """The contrastive loss is also taken of the first d coordinates, for each d: embeddings can then be cut to d."""
    next_token_weight: float = 1.0
    """0 leaves the caption loss out."""
    next_token_every: int = 1
    """Take the caption loss at every n-th step only: the captions are most of a step's tokens."""
    mask_duplicates: bool = True
    """Pairs with the same image or the same caption are not negatives of each other."""
    false_negatives_above: float | None = None
    """Nor are pairs whose captions have so high a cosine, or a higher one, by the teacher; None: all others are."""
    teacher: str = ""
    """Run or model whose embeddings of the captions say so; empty: the run's own base model, zero-shot."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; it must be positive")
        if min(self.matryoshka, default=1) < 1:
            raise ValueError(f"loss.matryoshka is {self.matryoshka}; each must be at least 1")
        above = self.false_negatives_above
        if above is not None and not 0 < above <= 1:
            raise ValueError(f"loss.false_negatives_above is {above}; it must be above 0, and at most 1")
        if self.teacher and above is None:
            raise ValueError("loss.teacher says which pairs are no negatives: set loss.false_negatives_above as well")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine to zero."""

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_fraction: float = 0.03
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, and what is kept."""

    steps: int
    global_batch: int = 1024
    """Pairs in one optimizer step, over all workers: every pair is contrasted with all others."""
    chunk_size: int = 32
    """Pairs in one forward pass."""
    gradient_cache: bool | None = None
    """Recompute chunks instead of keeping their activations; None: when a worker has more than one chunk a step."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Of DeepSpeed. With a bfloat16 model 1 is 2, which adds up gradients in float32."""
    offload: bool = False
    """Keep the optimizer's state, and update the weights, in the memory of the host (ZeRO 1 to 3)."""
    activation_checkpointing: bool = False
    """Keep only the input of every layer of the language model, and compute the rest again in backward."""
    checkpoint_every: int = 500
    audit: bool = False
    """Keep the ids of all samples that were trained on, for `jobs/audit.py`."""
    keep_last: int = 2
    keep_best: str = ""
    """Also keep the checkpoint with the highest such score of the validation, as it is named in the metrics."""
    validate_on: str = ""
    """Benchmark that the workers score every `validate_every` steps, and after the last; its files are under
    `data.validation_uri`."""
    validate_every: int = 500


@dataclass(frozen=True)
class ClusterConfig:
    """What each training worker gets."""

    workers: int = 1
    min_workers: int | None = None
    """Go on with as few when nodes are lost, and with more again when they are back; None: with all `workers` only."""
    cpus_per_worker: float = 1
    gpus_per_worker: int = 0
    device_memory_gib: float | None = None
    """Memory of the device of each worker; a run that does not fit is refused."""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """PACK: as many workers on a node as it holds, which keeps their traffic off the network. SPREAD: on as many nodes
    as there are, where one node's memory, disk or network would be too little."""
    max_failures: int = 3
    """Failures with no new checkpoint between them after which the run gives up; announced preemptions do not count."""
    wait_s: float = 600.0
    """How long to wait for machines that are not there or in use; then the run gives up, and says what is missing."""
    resize_every_s: float = 600.0
    """How often a run with `min_workers` looks whether it can have more: each change costs the steps since the last
    checkpoint."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides the run's own folder. Addresses and keys are each client's environment variables."""

    mlflow: bool = False
    """Log to MLflow (pip install 'vladva[mlflow]'), at MLFLOW_TRACKING_URI."""
    wandb: bool = False
    """Log to Weights & Biases (pip install 'vladva[wandb]'), with WANDB_API_KEY, or WANDB_MODE=offline."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    name: str
    storage: str
    """Where the run's folder is made: a path or s3://..."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    init_from: str = ""
    """Run or checkpoint whose weights a new run starts from, with its own recipe, schedule and fresh optimizer."""

    def __post_init__(self) -> None:
        train, cluster = self.train, self.cluster
        for name, value in (
            ("train.steps", train.steps),
            ("train.global_batch", train.global_batch),
            ("train.chunk_size", train.chunk_size),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.keep_last", train.keep_last),
            ("train.validate_every", train.validate_every),
            ("loss.next_token_every", self.loss.next_token_every),
            ("data.run_length", self.data.run_length),
            ("cluster.workers", cluster.workers),
            ("cluster.min_workers", cluster.workers if cluster.min_workers is None else cluster.min_workers),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if train.global_batch % train.chunk_size:
            raise ValueError(
                f"train.global_batch {train.global_batch} is not a multiple of train.chunk_size {train.chunk_size}; "
                f"use {train.global_batch // train.chunk_size * train.chunk_size or train.chunk_size}"
            )
        if train.chunk_size % self.data.run_length:
            raise ValueError(
                f"data.run_length {self.data.run_length} does not divide train.chunk_size {train.chunk_size}; "
                f"a chunk is made of whole runs"
            )
        self._check_order()
        self._check_workers()
        self._check_data()
        if train.keep_best and (not train.validate_on or train.checkpoint_every % train.validate_every):
            raise ValueError(
                f"train.keep_best {train.keep_best!r} needs a score of every checkpoint: set train.validate_on, and "
                f"train.checkpoint_every {train.checkpoint_every} to a multiple of train.validate_every"
            )
        if train.offload and train.zero_stage == 0:
            raise ValueError("train.offload needs ZeRO: set train.zero_stage to 1, 2 or 3")
        if self.model.max_image_tokens is not None and self.model.max_image_tokens < 1:
            raise ValueError(f"model.max_image_tokens is {self.model.max_image_tokens}; it must be at least 1")
        if not self.model.soft_prompts and not self.model.lora_rank:
            raise ValueError("nothing to train: set model.soft_prompts or model.lora_rank")
        if self.model.layer is not None and self.model.layer < 1:
            raise ValueError(f"model.layer is {self.model.layer}; layers are counted from 1, None is the last")

    def _check_data(self) -> None:
        data = self.data
        if not 0 <= data.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {data.max_bad_fraction}; it must be between 0 and 1")
        if data.hard_negatives < 0:
            raise ValueError(f"data.hard_negatives is {data.hard_negatives}; it must be 0 or more")
        if data.mixed_inputs and self.train.zero_stage == 3:
            # A rank whose positives are all texts would not gather the vision tower's weights, as the others do.
            raise ValueError("data.mixed_inputs needs a whole vision tower on each worker: set train.zero_stage to 2")
        if data.mixed_inputs and self.loss.false_negatives_above is not None:
            raise ValueError(
                "loss.false_negatives_above compares captions: with data.mixed_inputs, some pairs have none"
            )

    def _check_order(self) -> None:
        chunk, near = self.train.chunk_size, self.data.neighbourhood
        if self.data.order and self.data.mix:
            raise ValueError("data.order is of one data set, and data.mix names several: leave one of them out")
        whole = near > 0 and (chunk % near == 0 or (near % chunk == 0 and self.train.global_batch % near == 0))
        if self.data.order and not whole:
            raise ValueError(
                f"data.neighbourhood {near} must divide train.chunk_size {chunk}, or be a multiple of it that divides "
                f"train.global_batch {self.train.global_batch}"
            )

    def _check_workers(self) -> None:
        workers, fewest = self.cluster.workers, self.cluster.min_workers
        if workers > self.chunks_per_batch:
            raise ValueError(
                f"cluster.workers {workers} is more than the {self.chunks_per_batch} chunks of a global batch "
                f"(train.global_batch / train.chunk_size); use {self.chunks_per_batch} or a smaller train.chunk_size"
            )
        if (fewest or 0) > workers:
            raise ValueError(
                f"cluster.min_workers {fewest} is more than cluster.workers {workers}, the most that the run can have"
            )
        if self.chunks_per_batch % workers and fewest is None:
            options = [str(w) for w in range(1, self.chunks_per_batch + 1) if self.chunks_per_batch % w == 0]
            raise ValueError(
                f"cluster.workers {workers} does not divide the {self.chunks_per_batch} chunks of a global batch "
                f"(train.global_batch / train.chunk_size); use {', '.join(options)} workers or a smaller chunk_size"
            )

    @property
    def chunks_per_batch(self) -> int:
        """M: chunks that make one global batch."""
        return self.train.global_batch // self.train.chunk_size

    @property
    def chunks_per_worker(self) -> int:
        """Chunks that a worker runs in one step, at most: where W does not divide M, some have one less."""
        return -(-self.chunks_per_batch // self.cluster.workers)

    @property
    def uri(self) -> str:
        """The run's folder."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def caches_gradients(self) -> bool:
        """Whether chunks are embedded twice (gradient cache) rather than kept (single pass)."""
        if self.train.gradient_cache is not None:
            return self.train.gradient_cache
        return self.chunks_per_worker > 1

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; `from_json` gives the equal config back."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunConfig:
        """The config that `to_json` gave. Raises ValueError for a key that no config has."""
        return _build(cls, _with_loss_options(content), "")


def _with_loss_options(content: dict[str, Any]) -> dict[str, Any]:
    """A config as it is saved now: before losses had options, those of the two losses of then were fields."""
    loss = dict(content.get("loss", {}))
    directions, bias = loss.pop("directions", "symmetric"), loss.pop("bias", -10.0)
    options = []
    if loss.get("contrastive") == "info_nce" and directions != "symmetric":
        options.append(f"directions={directions}")
    if loss.get("contrastive") == "sigmoid" and bias != -10.0:
        options.append(f"bias={bias}")
    return {**content, "loss": {**loss, "options": loss.get("options", options)}}


def _build(cls: type, content: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for key in content:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key}; known here: {', '.join(sorted(known))}")
    values = {}
    for key, value in content.items():
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
