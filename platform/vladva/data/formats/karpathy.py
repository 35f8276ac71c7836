"""Karpathy's split files (dataset_coco.json, dataset_flickr30k.json) beside a folder of images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vladva.data.json_documents import read_document, to_entries
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source, file_by_file

TITLE = "Karpathy JSON (dataset_coco.json) and the folder of its images; --split picks"
PRIORITY = 3
OPTIONS = ("images", "id_column", "splits")
HAS_SENTENCES = re.compile(rb'"(sentids|sentences)"\s*:')


def match(files: FileSet) -> list[str]:
    """JSON files at the top whose images have sentences."""
    return [name for name in files.with_suffix(".json") if "/" not in name and HAS_SENTENCES.search(files.head(name))]


split = file_by_file


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image; those of other splits are left out. Sentences that are no text are named on their own."""
    options = source.options
    for file in source.files:
        known = set()
        for number, image in enumerate(read_document(source, file, "images")["images"]):
            known.add(image.get("split"))
            path = "/".join(str(part) for part in (image.get("filepath"), image.get("filename")) if part)
            if options.splits and image.get("split") not in options.splits:
                yield LeftOut(f"split {image.get('split')}", path)
                continue
            # `raw` and not `tokens`: the published numbers are on the captions as written.
            sentences = image.get("sentences") or []
            raw = [each.get("raw") if isinstance(each, dict) else each for each in sentences]
            yield from to_entries(source, f"{file}, image {number}", image, path, raw, "sentence")
        if missing := set(options.splits) - known:
            raise ValueError(f"--split {', '.join(sorted(missing))}: {file} has only {', '.join(map(str, known))}")
