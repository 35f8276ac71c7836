"""Retrieval over a collection of the user's own, in any form that `data/formats/` reads: the same scores, no code.

All images that have a caption are the gallery of image retrieval, all their captions that of text retrieval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from vladva.benchmarks.protocols.retrieval import Retrieval, RetrievalTask
from vladva.benchmarks.protocols.unique_items import UniqueItems
from vladva.benchmarks.readers.images import file_version
from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.storage import FileInfo
from vladva.core.text import clean_captions
from vladva.data.caption_files import read_caption_files
from vladva.data.image_refs import ImageRef
from vladva.data.source import Entry, Rejected, Source, SourceOptions, open_source

PROBLEMS_SHOWN = 3  # of what cannot be used, in an error
SAMPLES_PER_READ = 1000


class OwnImage(NamedTuple):
    """An image and the captions that a row gives it."""

    ref: ImageRef
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class OwnRetrieval(Retrieval):
    """Declaration of retrieval over whatever is at the data folder, table or file itself."""

    only_by_name: bool = True

    def read(self, data_uri: str) -> RetrievalTask:
        """See `Benchmark.read`. Raises ValueError, with the fix, where a row or its image cannot be used."""
        try:
            source = open_source(data_uri, SourceOptions())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.title}: {error}; looked for a table, shards or a folder of images"
            ) from None
        captions: dict[str, list[str]] = {}
        refs: dict[str, ImageRef] = {}
        for image in _images(source, self.title):
            refs.setdefault(image.ref.id, image.ref)
            captions.setdefault(image.ref.id, []).extend(image.captions)
        captions = {name: clean_captions(texts) for name, texts in captions.items()}
        described = {name: texts for name, texts in captions.items() if texts}
        if not described:
            raise ValueError(f"{self.title}: no image of {data_uri} has a caption")
        texts = UniqueItems()
        caption_text = texts.add(text for of_image in described.values() for text in of_image)
        owners = np.repeat(np.arange(len(described)), [len(of_image) for of_image in described.values()])
        counts = {
            "images": len(described),
            "captions": len(owners),
            "distinct_captions": len(texts.items),
            "images_without_a_caption": len(captions) - len(described),
        }
        infos = "\n".join(f"{info.uri} {info.size} {info.changed}" for info in source.infos)
        return RetrievalTask(
            texts.items,
            [refs[name] for name in described],
            caption_text,
            owners,
            self.ties,
            counts,
            {source.uri: sha256(infos.encode()).hexdigest()},
            np.full(len(described), ""),
        )


def _images(source: Source, title: str) -> Iterator[OwnImage]:
    """Every image of a source. Raises ValueError naming what cannot be used: it would change the denominators."""
    infos = {info.uri: info for info in source.infos}
    if source.format == "webdataset":
        yield from _shard_images(source, infos, title)
        return
    if source.format not in ("parquet", "folder", "class_folders"):
        infos |= {info.uri: info for info in storage.list_infos(source.images_uri)}
    problems = []
    for found in source.entries():
        if isinstance(found, Rejected):
            problems.append(f"{found.source_location}: {found.reason} {found.detail}".strip())
        elif isinstance(found, Entry):
            ref = found.image_ref(source.images_uri)
            try:
                info = infos.get(ref.uri) or storage.file_info(ref.uri)
                captions = [*read_caption_files(source.images_uri, found), *found.captions]
            except FileNotFoundError:
                problems.append(f"{found.source_location}: missing file {ref.uri}")
            except InvalidSampleError as problem:
                problems.append(f"{found.source_location}: {problem.reason} {problem.detail}".strip())
            else:
                row = f"#{ref.column}/{ref.offset}" if ref.column else ""
                name = f"image/{ref.uri}{row}@{file_version(info)}"
                yield OwnImage(ref._replace(id=name, name=found.id), captions)
    if problems:
        raise ValueError(
            f"{title}: {len(problems)} rows of {source.uri} cannot be used: {'; '.join(problems[:PROBLEMS_SHOWN])}. "
            "Scores without them would be those of another collection: mend them, or let jobs/prepare.py write what is "
            "good as shards and score those"
        )


def _shard_images(source: Source, infos: dict[str, FileInfo], title: str) -> Iterator[OwnImage]:
    """The images of shards that have been scanned, by their index."""
    from vladva.data.shard_index import ShardIndex

    try:
        index = ShardIndex.open(source.uri)
    except ValueError as error:
        raise ValueError(f"{title}: {error} (jobs/prepare.py {source.uri})") from None
    for first in range(0, index.num_samples, SAMPLES_PER_READ):
        for sample in index.samples(first, min(SAMPLES_PER_READ, index.num_samples - first)):
            if sample.width:  # others are text alone
                ref = sample.image(source.uri)
                name = f"image/{sample.id}@{file_version(infos[ref.uri])}"
                yield OwnImage(ref._replace(id=name, name=sample.id), sample.captions)
