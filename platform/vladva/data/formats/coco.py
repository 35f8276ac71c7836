"""COCO's caption files (captions_train2017.json, nocaps) beside a folder of images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from vladva.core.errors import InvalidSampleError
from vladva.data.formats.karpathy import HAS_SENTENCES
from vladva.data.json_documents import one_caption, read_document, to_entries
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source, file_by_file

TITLE = "COCO captions JSON (images and annotations) and the folder of its images"
PRIORITY = 4
OPTIONS = ("images", "id_column")
BEGINS = re.compile(rb'^(\xef\xbb\xbf)?\s*\{\s*"(info|images|licenses|annotations|type)"\s*:')


def match(files: FileSet) -> list[str]:
    """JSON files at the top that begin as COCO's do; of several, those with "caption" in their name."""
    found = [
        name
        for name in files.with_suffix(".json")
        if "/" not in name and BEGINS.match(head := files.head(name)) and not HAS_SENTENCES.search(head)
    ]
    return [name for name in found if "caption" in name.lower()] or found


split = file_by_file


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image, with the captions that the annotations give it, in their order.

    Named are also those annotations whose image is not listed, and those whose caption is no text.
    """
    for file in source.files:
        content = read_document(source, file, "images", "annotations")
        if not any("caption" in annotation for annotation in content["annotations"]):
            raise ValueError(
                f"{file} holds no captions: name the file that does as SOURCE, captions_train2017.json say"
            )
        listed = {_hashable(image.get("id")) for image in content["images"]}
        captions: dict[Any, list[str]] = defaultdict(list)
        unusable = []
        for number, annotation in enumerate(content["annotations"]):
            image_id, location = _hashable(annotation.get("image_id")), f"{file}, annotation {number}"
            if image_id not in listed:
                unusable.append(Rejected(str(image_id), location, "unknown image", "not among its images"))
                continue
            try:
                captions[image_id] += one_caption(annotation.get("caption"))
            except InvalidSampleError as problem:
                unusable.append(Rejected(str(image_id), location, problem.reason, problem.detail))
        for number, image in enumerate(content["images"]):
            path = image.get("file_name") or ""
            found = captions.get(_hashable(image.get("id")), [])
            yield from to_entries(source, f"{file}, image {number}", image, path, found, "caption")
        yield from unusable


def _hashable(image_id: Any) -> Any:
    return image_id if isinstance(image_id, (int, str)) else repr(image_id)
