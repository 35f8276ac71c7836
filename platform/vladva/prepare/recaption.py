"""Recaption: shards -> shards in which every image has a short and a long caption, the missing ones by a generator.

    SHARDS --an actor that holds the model, a shard at a time--> OUT/SHARD.tar, OUT/_recaption/SHARD.json

The paper had its short captions from BLIP-2 and its long ones from ShareGPT-4V; here any LVLM writes them, its adapter
off. What it wrote comes after the captions that a sample has, and is marked: in the JSON, `generated` lists those
captions and `generated_by` the model. All else is copied byte for byte. The same call goes on where it was interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa

from vladva.config import DataConfig
from vladva.core import storage
from vladva.core.devices import assigned_device
from vladva.core.errors import InvalidSampleError
from vladva.core.images import MAX_PIXELS, decode_image
from vladva.core.progress import Progress
from vladva.core.ray_tasks import actor_cpus, actor_pool
from vladva.data.shard_copy import Additions, copy_shard
from vladva.data.source import SourceOptions, open_source
from vladva.data.tar_members import split_name, tar_members
from vladva.data.tar_reader import ROLES, Sample
from vladva.models.resolve import describe, dtype_for, pin

RECAPTIONED = "_recaption"  # folder in OUT: what is no shard
REQUESTS = {"short": "Describe the image very briefly.", "long": "Give a detailed description of the image."}


@dataclass(frozen=True)
class RecaptionConfig:
    """Which captions are written, and what counts as short and long; as in training, in tokens of the model."""

    kinds: tuple[str, ...] = ("short", "long")
    short_below: int = DataConfig.short_below
    long_below: int = DataConfig.long_below
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(REQUESTS):
            raise ValueError(f"{', '.join(sorted(unknown))} is no kind of caption; use short, long or short,long")

    def kind_of(self, tokens: int) -> str:
        """What a caption of so many tokens is to training."""
        return "short" if tokens < self.short_below else "long" if tokens < self.long_below else "unused"


@dataclass(frozen=True)
class RecaptionSummary:
    """What was written, now and before; `unfit` are answers that were not of the kind asked for."""

    uri: str
    images: int
    short: int
    long: int
    unfit: int
    unreadable: int  # members of tars that are no files, or damaged: they are in no copy
    written_shards: int  # now

    def __str__(self) -> str:
        told = f"{self.uri}: {self.images:,} images, {self.short:,} short and {self.long:,} long captions written"
        told += f", {self.unfit:,} answers not used: too long for a short one, or too short for a long one" * bool(
            self.unfit
        )
        unreadable = f", {self.unreadable:,} members of tars could not be read and are left out"
        return told + unreadable * bool(self.unreadable)


def recaption(
    data_uri: str,
    out_uri: str,
    model: str,
    config: RecaptionConfig,
    *,
    actors: int = 2,
    gpus_per_actor: float = 0,
) -> RecaptionSummary:
    """Copy tar shards with the captions that are missing; needs a Ray cluster. They need not have been scanned.

    Raises ValueError for what is no tar shards, and where `out_uri` holds shards that another model has captioned.
    """
    import ray.data

    source, out_uri = open_source(data_uri, SourceOptions()), storage.absolute(out_uri)
    if source.format != "webdataset":
        raise ValueError(f"{source.uri} holds no tar shards but {source.format}: write it as shards first, with --out")
    if f"{out_uri}/".startswith(f"{source.uri}/"):
        raise ValueError(f"--recaption {out_uri} is inside the source {source.uri}: choose a folder outside it")
    model = pin(model)
    dtype = dtype_for(model, gpus_per_actor)
    description = describe(model, adapter=False, dtype=dtype)[1]
    claim_captions(out_uri, source.uri, description["fingerprint"], config)
    missing = [shard for shard in source.files if not storage.exists(captioned_uri(out_uri, shard))]
    if missing:
        rows = ray.data.from_arrow([pa.table({"shard": [shard]}) for shard in missing])
        rows.context.enable_progress_bars = False
        written = rows.map_batches(
            Recaptioner,
            fn_constructor_args=({"model": model, "dtype": dtype}, source.uri, out_uri, config),
            batch_size=1,
            batch_format="pyarrow",
            compute=actor_pool(min(actors, len(missing)), 1, gpus_per_actor),
            num_cpus=actor_cpus(1),
            num_gpus=gpus_per_actor,
        )
        with Progress("captioning shards", len(missing)) as progress:
            for _ in written.iter_rows():
                progress.advance(1)
    return summarize(out_uri, source.files, len(missing))


def summarize(out_uri: str, shards: Sequence[str], written: int) -> RecaptionSummary:
    """The results of all shards, added up."""
    found: Counter[str] = Counter()
    for shard in shards:
        found.update(storage.read_json(captioned_uri(out_uri, shard)))
    names = ("images", "short", "long", "unfit", "unreadable")
    return RecaptionSummary(out_uri, **{name: found[name] for name in names}, written_shards=written)


def claim_captions(out_uri: str, data_uri: str, fingerprint: str, config: RecaptionConfig) -> None:
    """Write down what is made at `out_uri`. Raises ValueError where that was something else."""
    file = storage.join(out_uri, RECAPTIONED, "config.json")
    stamp = {"data": data_uri, "model": fingerprint, **asdict(config), "kinds": list(config.kinds)}
    if storage.exists(file):
        before = storage.read_json(file)
        changed = [f"{key} was {before.get(key)}, is {stamp[key]}" for key in stamp if before.get(key) != stamp[key]]
        if changed:
            raise ValueError(f"{out_uri} holds shards captioned otherwise ({'; '.join(changed)}); give another folder")
    storage.write_json(file, stamp)


def captioned_uri(out_uri: str, shard: str) -> str:
    """What became of a shard; written after it."""
    return storage.join(out_uri, RECAPTIONED, f"{shard}.json")


class Recaptioner:
    """Ray Data stage: rows of a shard -> its copy with the captions that were missing. It holds the model."""

    def __init__(self, load: dict[str, Any], data_uri: str, out_uri: str, config: RecaptionConfig) -> None:
        device = assigned_device()

        from vladva.models.embedder import load_lvlm

        self.model = load["model"]
        self.lvlm = load_lvlm(**load, device=device)
        self.data_uri, self.out_uri, self.config = data_uri, out_uri, config

    def __call__(self, rows: pa.Table) -> pa.Table:
        for shard in rows["shard"].to_pylist():
            self.copy(shard)
        return rows

    def copy(self, shard: str) -> None:
        """Write the copy of a shard, and what became of it."""
        counts: Counter[str] = Counter()
        uri = storage.join(self.data_uri, shard)
        additions: dict[str, Additions] = {}
        with storage.open_stream(uri) as file:
            for sample in read_samples_of(file):
                counts["images"] += 1
                if written := self.captions_for(sample, file, counts):
                    by = [self.model]
                    additions[sample.key] = {"captions": written, "generated": written, "generated_by": by}
        counts["unreadable"] = copy_shard(uri, storage.join(self.out_uri, shard), additions)
        storage.write_json(captioned_uri(self.out_uri, shard), dict(counts))

    def captions_for(self, sample: Sample, file: IO[bytes], counts: Counter[str]) -> list[str]:
        """What the model writes for the kinds of caption that a sample lacks; none of the wrong length."""
        tokens = self.lvlm.preprocessor.count_tokens(sample.captions)
        lacking = [kind for kind in self.config.kinds if kind not in map(self.config.kind_of, tokens)]
        if not lacking or sample.image is None:
            return []
        file.seek(sample.offset)
        image = decode_image(file.read(sample.image.length))
        written = []
        for kind in lacking:
            content = [{"type": "image"}, {"type": "text", "text": REQUESTS[kind]}]
            messages = [{"role": "user", "content": content}]
            pieces = self.lvlm.generate(messages, [image], max_tokens=self.config.max_tokens, adapter=False)
            caption = "".join(pieces).strip()
            fits = bool(caption) and self.config.kind_of(self.lvlm.preprocessor.count_tokens([caption])[0]) == kind
            counts[kind if fits else "unfit"] += 1
            written += [caption] * fits
        return written


def read_samples_of(file: IO[bytes]) -> list[Sample]:
    """The samples of a tar that have an image that can be read, with their captions, or with none."""
    samples: dict[str, Sample] = {}
    try:
        for member in tar_members(file):
            key, ending = split_name(member.name)
            role = ROLES.get(ending)
            sample = samples.setdefault(key, Sample(key))
            if role is None or role in sample.seen or member.problem:
                continue
            sample.seen.add(role)
            file.seek(member.offset)
            try:
                data = file.read(member.length)
                sample.add(role, member.offset, data, Counter(), verify=True, max_pixels=MAX_PIXELS)
            except InvalidSampleError as problem:
                sample.problem = sample.problem or problem
    except InvalidSampleError:  # what comes before the damage is good; `copy_shard` counts the rest
        pass
    return [sample for sample in samples.values() if sample.image is not None and sample.problem is None]
