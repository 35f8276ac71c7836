"""COCO's caption files (captions_train2017.json, nocaps) beside a folder of images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from vladva.prepare.sources import Entry, FileSet, LeftOut, Rejected, Source
from vladva.prepare.sources.karpathy import entry_of, read_document

TITLE = "COCO captions JSON (images and annotations) and the folder of its images"
PRIORITY = 3
OPTIONS = ("images", "id_column")
BEGINS = re.compile(rb'^\s*\{\s*"(info|images|licenses|annotations|type)"\s*:')


def match(files: FileSet) -> list[str]:
    """JSON files at the top that begin as COCO's do; of several, those with "caption" in their name."""
    found = [
        name
        for name in files.ending(".json")
        if "/" not in name and BEGINS.match(head := files.head(name)) and b'"sentids"' not in head
    ]
    return [name for name in found if "caption" in name.lower()] or found


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image, with the captions that the annotations give it, in their order.

    Counted are the images, and those annotations whose image is not listed.
    """
    for file in source.files:
        content = read_document(source, file, "images", "annotations")
        if not any("caption" in annotation for annotation in content["annotations"]):
            raise ValueError(
                f"{file} holds no captions: name the file that does as SOURCE, captions_train2017.json say"
            )
        captions: dict[Any, list[Any]] = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation.get("image_id")].append(annotation.get("caption"))
        for number, image in enumerate(content["images"]):
            path = image.get("file_name") or ""
            yield entry_of(source, f"{file}, image {number}", image, path, captions.get(image.get("id"), []))
        listed = {image.get("id") for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            if (image_id := annotation.get("image_id")) not in listed:
                yield Rejected(str(image_id), f"{file}, annotation {number}", "unknown image", "not among its images")
