"""Images: the bytes that a source's entries point at, or what keeps them from being read.

An image is a file, a range of bytes in one, or a cell of a Parquet column.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.core.storage import ByteRange
from vladva.data.image_refs import read_cells

READS = 16  # of whole files at a time


def read_images(images_uri: str, samples: list[dict[str, Any]]) -> list[bytes | InvalidSampleError]:
    """The bytes of every image, or what keeps them from being read."""
    images: list[bytes | InvalidSampleError] = [b""] * len(samples)
    columns: dict[tuple[str, str], list[int]] = {}
    parts, files = [], []
    for place, sample in enumerate(samples):
        if sample["column"]:
            columns.setdefault((sample["file"], sample["column"]), []).append(place)
        else:
            (parts if sample["offset"] >= 0 else files).append(place)
    ranges = [
        ByteRange(place_of(images_uri, samples[place]["file"]), samples[place]["offset"], samples[place]["length"])
        for place in parts
    ]
    for place, data in zip(parts, storage.read_ranges(ranges), strict=True):
        images[place] = data
    for (file, column), places in columns.items():
        rows = [samples[place]["offset"] for place in places]
        for place, (data, path) in zip(places, read_cells(file, column, rows), strict=True):
            images[place] = data or b""
            if not data and path:  # Hugging Face's way of leaving an image where it is
                samples[place]["file"] = path
                files.append(place)
    with ThreadPoolExecutor(READS) as pool:
        uris = [place_of(images_uri, samples[place]["file"]) for place in files]
        for place, data in zip(files, pool.map(read_file, uris), strict=True):
            images[place] = data
    return images


def place_of(folder_uri: str, file: str) -> str:
    """URI of a file that is named relative to a folder, or absolutely."""
    return file if file.startswith("/") or "://" in file else storage.join(folder_uri, file)


def read_file(uri: str) -> bytes | InvalidSampleError:
    """A whole file, or what keeps it from being read."""
    return fetch(lambda: storage.read_bytes(uri))


def fetch(read: Callable[[], bytes]) -> bytes | InvalidSampleError:
    """What `read` gives; a storage that fails for the moment is no fault of the sample and is raised."""
    try:
        return read()
    except TransientStorageError:
        raise
    except FileNotFoundError as error:
        return InvalidSampleError("missing file", str(error))
    except (OSError, ValueError) as error:
        return InvalidSampleError("unreadable file", str(error))
