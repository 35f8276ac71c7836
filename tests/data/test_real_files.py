"""Files as people have them: whatever was given is delivered, or named or counted with its reason; never less."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.source_variants import IMAGES, write_variant
from tests.support.without_ray import count_words, leave_ray_out
from vladva.core.text import clean_captions
from vladva.data.caption_files import read_caption_files
from vladva.data.source import Entry, LeftOut, Rejected, SourceOptions, open_source
from vladva.embed.corpus import text_items
from vladva.embed.source_items import count_items, remarks, source_items
from vladva.prepare.pipeline import prepare
from vladva.prepare.plan import list_source

Outcome = dict[str, list[str]]
JPEG = IMAGES["a.jpg"]
SMALL = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(uri: Path, **options: Any) -> tuple[Outcome, Counter[str], Counter[str]]:
    """(id -> captions, reasons of the rejected, reasons of what is left out) of a source, as `prepare` lists it."""
    source = open_source(str(uri), SourceOptions(**options))
    captions: Outcome = {}
    rejected, left_out = Counter(), Counter()
    for found in list_source(source):
        if isinstance(found, Entry):
            texts = [*read_caption_files(source.images_uri, found), *found.captions]
            captions.setdefault(found.id, []).extend(clean_captions(texts))
        elif isinstance(found, Rejected):
            rejected[found.reason] += 1
        else:
            left_out[found.reason] += 1
    return captions, rejected, left_out


def embedded(uri: Path, kinds: tuple[str, ...] = ("image", "text"), **options: Any) -> list[dict[str, Any]]:
    """The items that `embed` makes of a source."""
    source = open_source(str(uri), SourceOptions(**options), needs_images=False)
    return [item for part in source.split() for items in source_items(kinds, part) for item in items]


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# --- a table of cases -------------------------------------------------------------------------------------------------

TEN = {f"{n}.jpg": text for n, text in enumerate([
    'a 12" nail', "plain", '"an opening quote', "another", 'a 5" pipe"', "more", 'a "quoted" word', '"whole"', "x", "y"
])}  # fmt: skip
ROWS = {"a.jpg": ["a cat"], "b.jpg": ["a dog"]}
CASES: dict[str, tuple[dict[str, bytes | str], Outcome, dict[str, int], dict[str, int]]] = {
    "TSV without quoting, with inch marks and an opening quote": (
        {"x.tsv": "path\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in TEN.items())},
        {name: [text] for name, text in TEN.items()}, {}, {},
    ),
    "TSV as spreadsheets write it": (
        {"x.tsv": 'path\tcaption\na.jpg\t"a 12"" nail"\nb.jpg\t"one\ttwo"\nc.jpg\t"line\nend"\n'},
        {"a.jpg": ['a 12" nail'], "b.jpg": ["one\ttwo"], "c.jpg": ["line\nend"]}, {}, {},
    ),
    "TSV with quotes around everything": (
        {"x.tsv": '"path"\t"caption"\n"a.jpg"\t"a cat"\n"b.jpg"\t"a dog"\n'}, ROWS, {}, {},
    ),
    "CSV whose quote is never closed": (
        {"x.csv": 'path,caption\na.jpg,a cat\nc.jpg,"open\nb.jpg,a dog\n'},
        ROWS | {"c.jpg": ['"open']}, {}, {},
    ),
    "CSV with rows too short and too long": (
        {"x.csv": "path,caption\na.jpg,a cat\nc.jpg\nd.jpg,one,two\nb.jpg,a dog\n"}, ROWS, {"broken row": 2}, {},
    ),
    "CSV of Windows with a byte order mark": (
        {"x.csv": "\N{BOM}path,caption\r\na.jpg,a cat\r\nb.jpg,a dog\r\n"}, ROWS, {}, {},
    ),
    "a line separator of Unicode is no end of a row": (
        {"x.csv": "path,caption\na.jpg,a\u2028cat\n"}, {"a.jpg": ["a\ncat"]}, {}, {},
    ),
    "marks, control characters and Windows' line ends in a table": (
        {"x.csv": "path,caption\r\na.jpg,\N{BOM}a\0 cat\x07\r\nb.jpg,a dog\r\n"}, ROWS, {}, {},
    ),
    "Unicode text as spreadsheets save it": (
        {"x.tsv": "path\tcaption\r\na.jpg\ta cat\r\nb.jpg\ta dog\r\n".encode("utf-16")}, ROWS, {}, {},
    ),
    "one Latin-1 byte in a table costs its row": (
        {"x.csv": b"path,caption\na.jpg,a cat\nc.jpg,No\xebl\nb.jpg,a dog\n"}, ROWS, {"caption is not UTF-8": 1}, {},
    ),
    "one Latin-1 byte in JSON lines costs its row": (
        {"x.jsonl": b'{"path": "a.jpg", "text": "a cat"}\n{"path": "c.jpg", "text": "No\xebl"}\n'},
        {"a.jpg": ["a cat"]}, {"caption is not UTF-8": 1}, {},
    ),
    "one Latin-1 byte in a COCO file costs its caption": (
        {"c.json": b'\xef\xbb\xbf{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ['
                   b'{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "No\xebl"}]}'},
        {"a.jpg": ["a cat"]}, {"caption is not UTF-8": 1}, {},
    ),
    "one Latin-1 byte in a list of objects costs its row": (
        {"c.json": b'[{"image": "a.jpg", "caption": ["a cat"]}, {"image": "c.jpg", "caption": ["No\xebl"]}]'},
        {"a.jpg": ["a cat"]}, {"caption is not UTF-8": 1}, {},
    ),
    "half a character spelled out in JSON": (
        {"x.jsonl": '{"path": "a.jpg", "text": "a cat"}\n{"path": "c.jpg", "text": "half \\ud83d"}\n'},
        {"a.jpg": ["a cat"]}, {"caption is not UTF-8": 1}, {},
    ),
    "caption files of Windows, of old Macintoshes, in UTF-16 and with nothing but a mark": (
        {
            "a.jpg": JPEG, "a.txt": "\N{BOM}a cat\r\na\0 kitten\r\n", "b.jpg": JPEG, "b.txt": "a dog\ra puppy\r",
            "c.jpg": JPEG, "c.txt": "a cow".encode("utf-16"), "d.jpg": JPEG, "d.txt": "\N{BOM}",
        },
        {"a.jpg": ["a cat", "a kitten"], "b.jpg": ["a dog", "a puppy"], "c.jpg": ["a cow"], "d.jpg": []}, {}, {},
    ),
    "JSON lines with one broken and one of other fields": (
        {"x.jsonl": '{"path": "a.jpg", "text": "a cat"}\n{"path"\n{"file": "b.jpg", "txt": "a dog"}\n{"text": 1}\n'},
        ROWS, {"broken JSON": 1, "broken row": 1}, {},
    ),
    "ImageFolder with metadata.jsonl in each split": (
        {
            "train/metadata.jsonl": '{"file_name": "a.jpg", "text": "a cat"}\n', "train/a.jpg": JPEG,
            "test/metadata.csv": "file_name,text\nb.jpg,a dog\n", "test/b.jpg": JPEG, "test/c.jpg": JPEG,
            "README.md": "about",
        },
        {"train/a.jpg": ["a cat"], "test/b.jpg": ["a dog"]}, {"no metadata": 1},
        {"file that the format image_folder does not read": 1},
    ),
    "captions in .txt and .caption, in capitals, and a dot in a name": (
        {
            "a.jpg": JPEG, "a.caption": "a cat", "b.JPG": JPEG, "b.TXT": "a dog", "c.d.jpg": JPEG, "c.d.txt": "a cow",
            "e.jpg": JPEG, "e.txt": "one", "e.caption": "two", "lonely.txt": "whose?",
        },
        {"a.jpg": ["a cat"], "b.JPG": ["a dog"], "c.d.jpg": ["a cow"], "e.jpg": ["one", "two"]}, {},
        {"text without an image": 1},
    ),
    "hidden files are counted": (
        {"a.jpg": JPEG, "a.txt": "a cat", "_b.jpg": JPEG, ".thumbs/c.jpg": JPEG, "_index/x": b"ours"},
        {"a.jpg": ["a cat"]}, {}, {"file whose name, or folder's name, begins with . or _": 2},
    ),
    "class folders only where there is no text": (
        {"cat/1.jpg": JPEG, "dog/2.jpg": JPEG}, {"cat/1.jpg": ["cat"], "dog/2.jpg": ["dog"]}, {}, {},
    ),
    "an image with a text makes the others images without one": (
        {"cat/1.jpg": JPEG, "cat/1.txt": "a cat", "dog/2.jpg": JPEG}, {"cat/1.jpg": ["a cat"], "dog/2.jpg": []}, {}, {},
    ),
    "images that no row names": (
        {"x.csv": "path,caption\na.jpg,a cat\n", "a.jpg": JPEG, "b.jpg": JPEG},
        {"a.jpg": ["a cat"]}, {}, {"image that no row names": 1},
    ),
    "COCO with a null caption and annotations of nothing": (
        {"c.json": json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [
            {"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": None}, {"image_id": 9, "caption": "?"},
        ]})},
        {"a.jpg": ["a cat"]}, {"no caption": 1, "unknown image": 1}, {},
    ),
    "Karpathy with a sentence that is none": (
        {"k.json": json.dumps({"images": [
            {"filename": "a.jpg", "split": "train", "sentids": [1], "sentences": [{"raw": "a cat"}, {"raw": None}]},
        ]})},
        {"a.jpg": ["a cat"]}, {"no caption": 1}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_case(case: str, tmp_path: Path) -> None:
    files, captions, rejected, left_out = CASES[case]
    write(tmp_path, files)
    assert outcome(tmp_path) == (captions, rejected, left_out)
    # Embedding reads the same file alike.
    items = embedded(tmp_path)
    expected = [] if "class folders" in case else [text for texts in captions.values() for text in texts]
    assert sorted(item["text"] for item in items if item["kind"] == "text") == sorted(expected)
    assert sum(item["kind"] == "rejected" for item in items) == sum(rejected.values())
    assert {item["id"] for item in items if item["kind"] == "image"} == set(captions)


def test_one_latin_1_byte_in_a_folder_of_captions_costs_one_sample_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*IMAGES.values()][:3]
    files: dict[str, bytes | str] = {f"{name}.jpg": image for name, image in zip("abc", images, strict=True)}
    write(tmp_path / "in", files | {"a.txt": "a cat\x07", "b.txt": b"fine\nNo\xebl\n", "c.txt": "a\N{BOM} cow"})
    leave_ray_out(monkeypatch)
    prepared = prepare(str(tmp_path / "in"), str(tmp_path / "out"), count_words, max_bad_fraction=0.5)
    assert (prepared.samples, prepared.quarantined) == (2, {"caption is not UTF-8": 1})
    assert prepared.notes == {"caption cleaned of marks and control characters": 2}
    [row] = pq.read_table(prepared.quarantine_uri).to_pylist()
    assert row["id"] == "b.jpg"
    assert row["detail"].startswith("b.txt, line 2: ")
    again = prepare(str(tmp_path / "in"), str(tmp_path / "out"), count_words, max_bad_fraction=0.5)
    assert (again.written, again.notes) == (0, prepared.notes)
    items = embedded(tmp_path / "in")
    assert [item["text"] for item in items if item["kind"] == "text"] == ["a cat", "a cow"]
    assert [item.get("cleaned") for item in items if item["kind"] == "text"] == [1, 1]
    [bad] = [item for item in items if item["kind"] == "rejected"]
    assert "b.txt, line 2: " in bad["text"]


def test_a_file_of_texts_loses_no_line_to_another(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfone\r\nNo\xebl\n\0\nt\xc2\x85wo\rthree \xe2\x80\xa8 lines\n\n")
    rows = text_items(str(tmp_path / "texts.txt"))
    assert [(row["id"], row["kind"]) for row in rows] == [
        ("texts.txt#0", "text"), ("texts.txt#1", "rejected"), ("texts.txt#3", "text"), ("texts.txt#4", "text")
    ]  # fmt: skip
    assert [row["text"] for row in rows if row["kind"] == "text"] == ["one", "t\nwo", "three \n lines"]
    assert [row.get("cleaned") for row in rows if row["kind"] == "text"] == [None, 1, 1]
    assert rows[1]["text"].startswith("caption is not UTF-8: ")
    (tmp_path / "texts.txt").write_text("one\r\ntwo\r\n", encoding="utf-16", newline="")
    assert [row["text"] for row in text_items(str(tmp_path / "texts.txt"))] == ["one", "two"]


def test_what_is_not_embedded_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": JPEG, "a.txt": "a cat", "lonely.txt": "?", "notes.md": "x", "_b.jpg": JPEG})
    told = remarks(open_source(str(tmp_path), SourceOptions()), ("image", "text"))
    assert sorted(told) == [
        "not embedded: 1 x file whose name, or folder's name, begins with . or _",
        "not embedded: 1 x not an image",
        "not embedded: 1 x text without an image",
    ]
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"), SourceOptions(), needs_images=False)
    [told] = remarks(source, ("image", "text"))
    assert told == "t.parquet has no column of images: only its texts are embedded"
    assert remarks(source, ("text",)) == []


def test_a_file_that_is_no_parquet_costs_no_other(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [JPEG] * 3, "text": ["x", "y", "z"]}), tmp_path / "b.parquet", row_group_size=2)
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    items = embedded(tmp_path)
    assert [item["id"] for item in items if item["kind"] == "rejected"] == ["a.parquet"]
    assert sorted(item["text"] for item in items if item["kind"] == "text") == ["x", "y", "z"]
    assert count_items(open_source(str(tmp_path), SourceOptions()), ("image", "text")) == 6


def test_files_beside_tars_are_counted_but_for_those_that_describe_them(tmp_path: Path) -> None:
    write_variant("webdataset", tmp_path / "source")  # with img2dataset's 00000_stats.json and 00000.parquet
    assert open_source(str(tmp_path / "source"), SourceOptions()).others == ()
    write(tmp_path / "source", {"loose.jpg": JPEG, "notes.md": "x", "_later/00009.tar": b"x"})
    left_out = Counter(
        each.reason for each in open_source(str(tmp_path / "source"), SourceOptions()).unused_files(set())
    )
    assert left_out == {
        "file that the format webdataset does not read": 2,
        "file whose name, or folder's name, begins with . or _": 1,
    }


# --- Parquet: ids and schemas -----------------------------------------------------------------------------------------


def test_an_image_of_several_rows_is_one_item_and_each_caption_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"x.csv": "path,caption\na.jpg,one\nb.jpg,two\na.jpg,three\n"})
    items = embedded(tmp_path)
    assert [item["id"] for item in items if item["kind"] == "image"] == ["a.jpg", "b.jpg"]
    texts = {item["id"]: item["text"] for item in items if item["kind"] == "text"}
    assert texts == {"x.csv#2#0": "one", "x.csv#3#0": "two", "x.csv#4#0": "three"}
    assert count_items(open_source(str(tmp_path), SourceOptions()), ("image", "text")) == len(items) == 5


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a", "b", "c"], ["x.parquet#a", "x.parquet#b", "x.parquet#c"]),
        (["a", "b", "a"], ["x.parquet#a@0", "x.parquet#b@1", "x.parquet#a@2"]),
        ([7, None, 7], ["x.parquet#7@0", "x.parquet#1", "x.parquet#7@2"]),
        ([None, None, None], ["x.parquet#0", "x.parquet#1", "x.parquet#2"]),
    ],
)
def test_rows_whose_ids_repeat_or_are_null_are_all_embedded(tmp_path: Path, ids: list, expected: list[str]) -> None:
    table = pa.table({"id": ids, "image": list(IMAGES.values())[:3], "caption": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    items = embedded(tmp_path)
    assert [item["id"] for item in items if item["kind"] == "image"] == expected
    assert [(item["id"], item["text"]) for item in items if item["kind"] == "text"] == [
        (f"{name}#0", text) for name, text in zip(expected, ("one", "two", "three"), strict=True)
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
CAPTION_TYPES: dict[str, Callable[[list[list[str]]], pa.Array]] = {
    "string": lambda rows: pa.array([row[0] if row else None for row in rows], pa.string()),
    "large_string": lambda rows: pa.array([row[0] if row else None for row in rows], pa.large_string()),
    "binary": lambda rows: pa.array([row[0].encode() if row else None for row in rows], pa.binary()),
    "dictionary": lambda rows: pa.array([row[0] if row else None for row in rows], pa.string()).dictionary_encode(),
    "list": lambda rows: pa.array([row or None for row in rows], pa.list_(pa.string())),
    "large_list": lambda rows: pa.array(rows, pa.large_list(pa.large_string())),
    "list of bytes": lambda rows: pa.array([[text.encode() for text in row] for row in rows], pa.list_(pa.binary())),
}
IMAGE_TYPES: dict[str, Callable[[int], pa.Array]] = {
    "binary": lambda count: pa.array([JPEG] * count, pa.binary()),
    "large_binary": lambda count: pa.array([JPEG] * count, pa.large_binary()),
    "struct": lambda count: pa.array([{"bytes": JPEG, "path": None}] * count),
    "struct of paths": lambda count: pa.array(
        [{"bytes": None, "path": "a.jpg"}] * count, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    ),
    "paths": lambda count: pa.array([f"images/{number}.jpg" for number in range(count)]),
    "dictionary of paths": lambda count: pa.array([f"{number}.jpg" for number in range(count)]).dictionary_encode(),
}


@SMALL
@given(
    rows=st.lists(st.lists(TEXT, max_size=3), min_size=1, max_size=6),
    caption_type=st.sampled_from(sorted(CAPTION_TYPES)),
    image_type=st.sampled_from(sorted(IMAGE_TYPES)),
    caption_column=st.sampled_from(["caption", "text", "captions", "raw"]),
    image_column=st.sampled_from(["image", "image_bytes", "jpg", "file_name"]),
    group=st.integers(1, 4),
)
@pytest.mark.slow
def test_any_parquet_schema_of_the_accepted_forms_delivers_every_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], caption_type: str, image_type: str,
    caption_column: str, image_column: str, group: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("parquet")
    columns = {image_column: IMAGE_TYPES[image_type](len(rows)), caption_column: CAPTION_TYPES[caption_type](rows)}
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=group)
    given_texts = rows if "list" in caption_type else [row[:1] for row in rows]
    # A text that is a JSON list is one of captions; nothing else of this alphabet is.
    single = "list" not in caption_type
    expected = [clean_captions(json.loads(t) if single and t == "[]" else t for t in texts) for texts in given_texts]
    if single:
        expected = [[] if texts == ["[]"] else of for texts, of in zip(given_texts, expected, strict=True)]
    captions, rejected, left_out = outcome(folder)
    assert list(captions.values()) == expected
    assert (rejected, left_out) == ({}, {})
    texts = [item["text"] for item in embedded(folder, ("text",))]
    assert texts == [text for texts in expected for text in texts]


# --- text tables ------------------------------------------------------------------------------------------------------

CELL = st.text('"ab ,;\n\N{SNOWMAN}\u2028[', max_size=8)


@SMALL
@given(texts=st.lists(CELL, max_size=8), suffix=st.sampled_from([".csv", ".tsv"]), quoting=st.sampled_from([0, 1]))
def test_what_a_csv_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str, quoting: int
) -> None:
    file = tmp_path_factory.mktemp("table") / f"x{suffix}"
    body = io.StringIO()
    writer = csv.writer(body, delimiter="," if suffix == ".csv" else "\t", quoting=quoting, lineterminator="\n")
    writer.writerows([("path", "caption"), *((f"{number}.jpg", text) for number, text in enumerate(texts))])
    file.write_text(body.getvalue(), encoding="utf-8", newline="")
    captions, rejected, _ = outcome(file) if texts else ({}, {}, {})
    assert rejected == {}
    assert list(captions) == [f"{number}.jpg" for number in range(len(texts))]
    plain = [text for text in texts if not text.lstrip().startswith("[")]
    found = [of for text, of in zip(texts, captions.values(), strict=True) if not text.lstrip().startswith("[")]
    assert found == [clean_captions([text]) for text in plain]


# Few characters, so that quotes often meet the ends of a cell: drawn from all of Unicode they never do.
LINE = st.text('"ab ,\N{SNOWMAN}\u2028', max_size=6)


@SMALL
@given(texts=st.lists(LINE, min_size=1, max_size=8))
def test_every_line_of_a_table_without_quoting_is_a_row(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    file = tmp_path_factory.mktemp("table") / "x.tsv"
    lines = [f"{number}.jpg\t{text}" for number, text in enumerate(texts)]
    file.write_text("\n".join(["path\tcaption", *lines]), encoding="utf-8", newline="")
    captions, rejected, _ = outcome(file)
    assert rejected == {}
    assert list(captions) == [f"{number}.jpg" for number in range(len(texts))]
    # Two quotes in a row may be one that was doubled: such a cell is the only one that can be read in two ways.
    certain = [number for number, text in enumerate(texts) if '""' not in text and not text.lstrip().startswith("[")]
    assert [captions[f"{number}.jpg"] for number in certain] == [clean_captions([texts[number]]) for number in certain]


@SMALL
@given(
    body=st.text('a.jpg",\t\n[]{}\x85\N{SNOWMAN}', max_size=60),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_of_any_text_every_line_is_delivered_or_named(
    tmp_path_factory: pytest.TempPathFactory, body: str, suffix: str
) -> None:
    file = tmp_path_factory.mktemp("table") / f"x{suffix}"
    header = "path,caption\n" if suffix == ".csv" else "path\tcaption\n"
    file.write_text(header + body, encoding="utf-8", newline="")
    found = list(open_source(str(file), SourceOptions()).entries())
    assert not any(isinstance(each, LeftOut) for each in found)
    numbers = [int(each.source_location.rpartition(" ")[2]) for each in found]
    lines = body.split("\n")
    starts = [number for number, line in enumerate(lines, start=2) if line.strip()]
    # A row goes over several lines only where a quote is open; without quotes every line is one.
    assert set(numbers) <= set(starts) | {number for number, _ in enumerate(lines, start=2)}
    assert len(set(numbers)) == len(numbers)
    if '"' not in body:
        assert numbers == starts


# --- folders ----------------------------------------------------------------------------------------------------------

NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "x/", "x/y/", "_x/", ".h/"]),
    st.sampled_from(["a", "b", "c.d", "_e", ".f", "\N{SNOWMAN} g"]),
    st.sampled_from([".jpg", ".JPG", ".webp", ".txt", ".TXT", ".caption", ".json", ".md", ""]),
)


@SMALL
@given(names=st.sets(NAMES, min_size=1, max_size=12))
def test_every_file_of_any_folder_is_delivered_named_or_counted(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    write(folder, {name: b"{}" if name.endswith(".json") else b"a caption" for name in names})
    if not any(name.lower().endswith((".jpg", ".webp")) for name in names - hidden(names)):
        with pytest.raises(ValueError, match="holds nothing of a known format"):
            open_source(str(folder), SourceOptions())
        return
    source = open_source(str(folder), SourceOptions())
    found = list(list_source(source))
    entries = [each for each in found if isinstance(each, Entry)]
    texts = {file for entry in entries for file in entry.caption_files}
    assert len(entries) + len(texts) + sum(not isinstance(each, Entry) for each in found) == len(names)
    assert {entry.file for entry in entries} | texts <= names - hidden(names)
    # Embedding lists the same images, in parts.
    images = {item["id"] for part in source.split() for items in source_items(("image",), part) for item in items}
    assert images == {entry.file for entry in entries}


def hidden(names: set[str]) -> set[str]:
    """Those that begin with a dot or an underscore, or are in a folder that does."""
    return {name for name in names if any(part[:1] in "._" for part in name.split("/"))}
