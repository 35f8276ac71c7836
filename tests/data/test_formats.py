"""Sources: every format gives the same samples, byte for byte, and says what it could not use."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.source_variants import CAPTIONS, IMAGES, VARIANTS, write_variant
from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.data.image_refs import fetch_images, read_cells
from vladva.data.source import (
    Entry,
    LeftOut,
    Rejected,
    SourceOptions,
    ahead,
    find_format,
    format_names,
    open_source,
)


def test_every_format_is_among_the_variants() -> None:
    # Class folders have no captions of their own: test_class_folders_give_their_names.
    assert {form for form, _, _ in VARIANTS.values()} == set(format_names()) - {"class_folders"}


@pytest.mark.parametrize("name", format_names())
def test_a_format_says_what_it_is_and_refuses_an_empty_folder(name: str, tmp_path: Path) -> None:
    form = find_format(name)
    assert form.__doc__
    assert "\n" not in form.TITLE
    assert len({find_format(other).PRIORITY for other in format_names()}) == len(format_names())
    with pytest.raises(ValueError, match=f"nothing of the format {name}"):
        open_source(str(tmp_path), SourceOptions(format=name))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "webdataset"])  # its listing is a scan
def test_every_format_lists_the_same_samples(variant: str, tmp_path: Path) -> None:
    options = write_variant(variant, tmp_path / "source")
    source = open_source(str(tmp_path / "source"), options)
    assert source.format == VARIANTS[variant][0]
    found = list(source.entries())
    assert all(isinstance(each, (Entry, LeftOut)) for each in found), found
    entries = [each for each in found if isinstance(each, Entry)]
    captions: dict[str, list[str]] = {}
    for entry in entries:
        captions.setdefault(entry.id, []).extend(entry.captions)
    if variant != "folder, texts":  # those are read when the shards are written
        assert list(captions.values()) == list(CAPTIONS.values())
    first = list({entry.id: entry for entry in entries}.values())
    bytes_of = fetch_images([entry.image_ref(source.images_uri) for entry in first], folder_uri=source.images_uri)
    assert bytes_of == list(IMAGES.values())
    assert [each.reason for each in found if isinstance(each, LeftOut)] == ["split test"] * (variant == "karpathy")


def test_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    options = write_variant("csv", tmp_path / "source")
    (tmp_path / "source/second.csv").write_text("path,caption\nnowhere.jpg,not asked for\n")
    whole = list(open_source(str(tmp_path / "source"), options).entries())
    one = list(open_source(str(tmp_path / "source/pairs.csv"), options).entries())
    assert (len(whole), len(one)) == (11, 10)
    assert one == whole[:10]


def test_listing_parquet_leaves_the_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = [Random(number).randbytes(50_000) for number in range(40)]
    pq.write_table(pa.table({"image": big, "text": ["a caption"] * 40}), tmp_path / "x.parquet", row_group_size=10)
    read = []
    whole = storage._read_range
    monkeypatch.setattr(storage, "_read_range", lambda part: read.append(part.length) or whole(part))
    assert sum(isinstance(each, Entry) for each in open_source(str(tmp_path), SourceOptions()).entries()) == 40
    assert sum(read) < 100_000 < 2_000_000 < (tmp_path / "x.parquet").stat().st_size


def test_ahead_keeps_the_order_and_waits_for_few() -> None:
    started: list[int] = []
    results = ahead(lambda number: started.append(number) or number, range(100), count=4)
    assert next(results) == 0
    assert len(started) <= 4
    assert list(results) == list(range(1, 100))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def entries_of(folder: Path, **options: Any) -> list[Entry | Rejected | LeftOut]:
    return list(open_source(str(folder), SourceOptions(**options)).entries())


def test_bad_rows_of_a_table_are_named_by_their_line(tmp_path: Path) -> None:
    lines = [
        b"path,caption",
        b"a.jpg,good",
        b"b.jpg",
        b"c.jpg,gr\xfcn",
        b"",
        b",no path",
        b'd.jpg,"two\nlines"',
        b"e.jpg,",
    ]
    (tmp_path / "pairs.csv").write_bytes(b"\n".join([*lines, b"f\xff.jpg,name"]))
    found = entries_of(tmp_path)
    assert [(each.source_location, each.reason) for each in found if isinstance(each, Rejected)] == [
        ("pairs.csv, line 3", "broken row"),
        ("pairs.csv, line 4", "caption is not UTF-8"),
        ("pairs.csv, line 6", "no id or path"),
    ]
    good = [each for each in found if isinstance(each, Entry)]
    assert [(each.id, list(each.captions)) for each in good[:3]] == [
        ("a.jpg", ["good"]), ("d.jpg", ["two\nlines"]), ("e.jpg", [""]),
    ]  # fmt: skip
    assert good[2].source_location == "pairs.csv, line 9"


def test_bad_cells_and_files_of_parquet_are_named_by_their_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", "gr\xfcn".encode("latin-1"), None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg", "c.jpg"], "text": texts}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(whole[:4] + bytes(40) + whole[44:])  # its footer is whole
    found = entries_of(tmp_path)
    assert [list(each.captions) for each in found if isinstance(each, Entry)] == [["good"], []]
    assert [(each.source_location, each.reason) for each in found if isinstance(each, Rejected)] == [
        ("a.parquet, row 1", "caption is not UTF-8"),
        ("b.parquet", "unreadable Parquet"),
        *[(f"c.parquet, row {number}", "unreadable Parquet") for number in range(3)],
    ]


def test_images_in_a_damaged_page_are_named_and_the_others_read(tmp_path: Path) -> None:
    pictures = [Random(number).randbytes(5_000) for number in range(4)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "x.parquet", row_group_size=2, use_dictionary=False)
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:4] + bytes(40) + whole[44:])
    cells = [data for data, _ in read_cells(str(tmp_path / "x.parquet"), "image", [0, 1, 3])]
    assert cells[2] == pictures[3]
    assert [each.reason for each in cells[:2] if isinstance(each, InvalidSampleError)] == ["unreadable Parquet"] * 2


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1.5], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="the column image is of type double; bytes, {bytes, path} or paths are need"):
        entries_of(tmp_path)


def test_annotations_without_their_image_are_named(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2}]
    notes = [{"image_id": 1, "caption": "good"}, {"image_id": 3, "caption": "whose?"}, {"image_id": 1, "caption": 5}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": notes}))
    found = entries_of(tmp_path)
    assert [(each.source_location, each.reason) for each in found if isinstance(each, Rejected)] == [
        ("x.json, image 1", "no id or path"),
        ("x.json, annotation 1", "unknown image"),
        ("x.json, annotation 2", "caption is not text"),
    ]


def test_class_folders_give_their_names(tmp_path: Path) -> None:
    for name in ("train/tabby_cat/1.jpg", "train/dog/1.jpg", "top.jpg", "train/dog/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(IMAGES["a.jpg"])
    found = entries_of(tmp_path)
    named = {each.id: list(each.captions) for each in found if isinstance(each, Entry)}
    assert named == {"top.jpg": [], "train/dog/1.jpg": ["dog"], "train/tabby_cat/1.jpg": ["tabby cat"]}
    assert LeftOut("not an image") in found


@pytest.mark.parametrize(
    ("file", "content", "options", "told"),
    [
        ("a.tar.gz", b"", {}, "a.tar.gz is compressed with gzip.*`gunzip a.tar.gz`"),
        ("a.tgz", b"", {}, "gunzip a.tgz` and give it the ending .tar"),
        ("a.tar", b"\x1f\x8b\x08", {}, "a.tar is compressed with gzip"),
        ("a.csv", b"", {}, "a header line"),
        ("a.csv", b"a,a\n1,2\n", {}, "a name for every column"),
        (
            "a.csv",
            b"who,what\n1,2\n",
            {},
            r"no column any of path, .* for the images: name one with --image-column; it has \['who'",
        ),
        ("a.csv", b"path,what\n1,2\n", {"caption_columns": ("text",)}, "no column text .*--caption-column"),
        ("a.csv", b"path,what\n1,2\n", {"id_column": "key"}, "no column key .*--id-column"),
        ("a.tsv", b"path\tcaption\nhttps://127.0.0.1/a.jpg\ta\n", {}, "holds links .*img2dataset"),
        ("a.json", b'{"images": [{"sentids": [1', {}, "a.json is no JSON"),
        (
            "a.json",
            b'{"images": [], "annotations": 5}',
            {},
            "no list of objects 'annotations', which the format",
        ),
        ("a.json", b'{"info": {}, "images": [], "annotations": [{"bbox": []}]}', {}, "a.json holds no captions: name"),
        ("a.json", b'{"images": [{"sentids": [], "split": "val"}]}', {"splits": ("train",)}, "a.json has only val"),
        ("a.json", b'{"images": [{"sentids": [], "filename": "a"}]}', {"id_column": "id"}, "no field id"),
        ("a.csv", b"path,caption\n", {"splits": ("val",)}, "--split means nothing for the format table"),
        ("a.tar", b"", {"caption_columns": ("x",)}, "--caption-column means nothing for the format webdataset"),
        ("notes.md", b"", {}, "nothing of a known format. There are: webdataset"),
        ("a.csv", b"", {"format": "excel"}, "--format 'excel' is unknown"),
    ],
)
def test_what_cannot_be_used_at_all_is_refused_with_the_fix(
    tmp_path: Path, file: str, content: bytes, options: dict[str, Any], told: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        entries_of(tmp_path, **options)


def test_images_that_cannot_be_read_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    refs = [Entry(name, name, name).image_ref(str(tmp_path)) for name in ("missing.jpg", "folder.jpg")]
    assert [each.reason for each in fetch_images(refs) if isinstance(each, InvalidSampleError)] == [
        "missing file",
        "unreadable file",
    ]
