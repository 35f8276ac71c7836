"""Every file form a benchmark is published in, written small by hand and read back."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vladva.benchmarks.readers.captions import CaptionedImage, read_caption_tables, read_captioned_images
from vladva.benchmarks.readers.files import AnnotationFile, check_hash, read_first
from vladva.benchmarks.readers.images import find_images, parquet_images, pick_images
from vladva.benchmarks.readers.labels import read_labelled
from vladva.benchmarks.readers.sugar_crepe import read_choice_rows
from vladva.benchmarks.readers.winoground import read_examples
from vladva.data.image_refs import read_images

OFFICIAL = Path(__file__).parent / "sugar_crepe"  # RAIVNLab/sugar-crepe@0047054, MIT


def picture(colour: tuple[int, ...], *, mode: str = "RGB", form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (4, 4), colour).save(data, form)
    return data.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_captions(name: str, data: bytes) -> list[CaptionedImage]:
    """The annotations in a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        return read_captioned_images(folder, name)


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


# Captions -------------------------------------------------------------------------------------------------------------


def test_karpathy_flickr30k_takes_one_split() -> None:
    sentences = [{"raw": " A dog .", "tokens": ["a", "dog"]}, {"raw": "A cat", "tokens": ["a", "cat"]}]
    images = [
        {"filename": "1.jpg", "split": "test", "sentences": sentences, "imgid": 0},
        {"filename": "2.jpg", "split": "train", "sentences": sentences, "imgid": 1},
        {"filename": "3.jpg", "split": "test", "sentences": sentences[:1], "imgid": 2},
    ]
    rows = read_captions("dataset_flickr30k.json", as_json({"images": images, "dataset": "flickr30k"}))
    assert rows == [CaptionedImage("1.jpg", (" A dog .", "A cat")), CaptionedImage("3.jpg", (" A dog .",))]


def test_karpathy_coco_keeps_the_folder() -> None:
    image = {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "test", "cocoid": 42}
    images = [image | {"sentences": [{"raw": f"caption {n}"} for n in range(6)]}]
    [row] = read_captions("dataset_coco.json", as_json({"images": images, "dataset": "coco"}))
    assert row.name == "val2014/COCO_val2014_000000000042.jpg"
    assert len(row.captions) == 6


def test_coco_captions_join_ids_from_zero_in_any_order() -> None:
    content = {
        "images": [{"id": 0, "file_name": "a.jpg", "domain": "in-domain"}, {"id": 7, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 0, "image_id": 7, "caption": "b1"},
            {"id": 1, "image_id": 0, "caption": "a1"},
            {"id": 2, "image_id": 7, "caption": "b2"},
        ],
    }
    rows = read_captions("nocaps_val_4500_captions.json", as_json(content))
    assert rows == [CaptionedImage("a.jpg", ("a1",), "in-domain"), CaptionedImage("b.jpg", ("b1", "b2"))]


def test_blip_list_with_lists_or_single_captions() -> None:
    content = [{"image": "x/1.jpg", "caption": ["one", "two"]}, {"image": "2.jpg", "caption": "three"}]
    rows = read_captions("flickr30k_test.json", as_json(content))
    assert rows == [CaptionedImage("x/1.jpg", ("one", "two")), CaptionedImage("2.jpg", ("three",))]


def test_clip_benchmark_lines_have_commas_in_captions() -> None:
    lines = "image,caption\n1.jpg,A man, a dog\n2.jpg,B\n1.jpg,C\n"
    rows = read_captions("flickr30k_test_karpathy.txt", lines.encode())
    assert rows == [CaptionedImage("1.jpg", ("A man, a dog", "C")), CaptionedImage("2.jpg", ("B",))]


def test_csv_with_a_json_list_in_a_cell() -> None:
    lines = 'raw,filename\n"[""A man, a """"dog"""""", ""B""]",1.jpg\n"[""C""]",2.jpg\n'.replace('""""', '\\""')
    rows = read_captions("test_1k_flickr.csv", lines.encode())
    assert rows == [CaptionedImage("1.jpg", ('A man, a "dog"', "B")), CaptionedImage("2.jpg", ("C",))]


@pytest.mark.parametrize("column", ["text", "annotations_captions"])
def test_parquet_with_images_and_lists_of_captions(column: str, tmp_path: Path) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    for part in (0, 1):
        rows = [
            {"image": {"bytes": bytes([part, row]), "path": None}, column: [f"{part}{row}a", f"{part}{row}b"]}
            for row in range(2)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"set/data/test-{part}.parquet")
    pq.write_table(pa.table({"image": [b"x"], "other": ["y"]}), tmp_path / "set/data/validation-0.parquet")
    found = read_caption_tables(str(tmp_path), ("absent/*.parquet", "set/data/test-*.parquet"))
    assert [row.captions for row in found.rows] == [
        (f"{part}{row}a", f"{part}{row}b") for part in (0, 1) for row in (0, 1)
    ]
    assert read_images(found.images) == [bytes([part, row]) for part in (0, 1) for row in (0, 1)]
    assert [row.name for row in found.rows] == [image.name for image in found.images]
    assert read_caption_tables(str(tmp_path), ("absent/*.parquet",)) is None
    with pytest.raises(ValueError, match=r"validation-0\.parquet: holds no captions in a column"):
        read_caption_tables(str(tmp_path), ("set/data/validation-*.parquet",))


def test_files_without_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="no list of objects 'annotations'"):
        read_captions("nocaps_val_image_info.json", as_json({"images": [{"id": 0, "file_name": "a.jpg"}]}))
    with pytest.raises(ValueError, match="nocaps_val.json: holds no captions"):
        read_captions("nocaps_val.json", as_json([{"image": "val/a.jpg", "img_id": 0}]))


COCO = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
BROKEN = {
    "a line without a comma": ("t.txt", b"image,caption\n1.jpg,a\n2.jpg\n", r"t.txt, line 3: expected .* a comma"),
    "a line without a name": ("t.txt", b"image,caption\n,a\n", "t.txt, line 2: expected an image's name"),
    "an annotation of no image": (
        "c.json", as_json(COCO | {"annotations": [*COCO["annotations"], {"image_id": 7, "caption": "b"}]}),
        "c.json, annotation 1: unknown image",
    ),
    "a caption that is null": (
        "c.json", as_json(COCO | {"annotations": [{"image_id": 1, "caption": None}]}),
        "c.json, annotation 0: no caption",
    ),
    "a row too short": ("t.csv", b'filename,raw\n1.jpg,"[""a""]"\n2.jpg\n', "t.csv, line 3: broken row; 1 cell"),
    "a list of captions with a number": (
        "b.json", as_json([{"image": "1.jpg", "caption": ["a", 7]}]), r"b.json, row 0: caption is not text; 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_by_file_and_line_with_what_was_expected(case: str) -> None:
    name, content, told = BROKEN[case]
    with pytest.raises(ValueError, match=told) as refused:
        read_captions(name, content)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_utf_8_are_named_by_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"t.txt, line 3: expected UTF-8"):
        read_captions("t.txt", b"image,caption\n1.jpg,a dog\n2.jpg,No\xebl\n")
    with pytest.raises(ValueError, match=r"c.json, annotation 1: caption is not UTF-8"):
        read_captions(
            "c.json",
            b'{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": ['
            b'{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "No\xebl"}]}',
        )
    with pytest.raises(ValueError, match=r"w.jsonl, line 1: expected UTF-8"):
        read_examples("w.jsonl", b'{"id": 1, "caption_0": "No\xebl"}')
    assert read_captions("t.txt", "\N{BOM}image,caption\r\n1.jpg,a dog\r\n".encode()) == [
        CaptionedImage("1.jpg", ("a dog",))
    ]


# SugarCrepe, SugarCrepe++, Winoground ---------------------------------------------------------------------------------


def test_sugar_crepe_dict_with_a_gap() -> None:
    row = {"filename": "1.jpg", "caption": "yes", "negative_caption": "no"}
    rows = read_choice_rows("swap_obj.json", as_json({"0": row, "2": row | {"caption": "indeed"}}))
    assert [(row.key, row.image, row.caption, row.negative) for row in rows] == [
        ("0", "1.jpg", "yes", "no"),
        ("2", "1.jpg", "indeed", "no"),
    ]


def test_broken_files_are_named() -> None:
    with pytest.raises(ValueError, match=r"add_obj\.json: not a JSON file"):
        read_choice_rows("add_obj.json", b"{")
    with pytest.raises(ValueError, match=r"add_obj\.json: row 3 has no filename, negative_caption"):
        read_choice_rows("add_obj.json", as_json({"3": {"caption": "c"}}))


def test_official_sugar_crepe_files() -> None:
    expected = {
        "replace_obj": 1652,
        "replace_att": 788,
        "replace_rel": 1406,
        "swap_obj": 245,
        "swap_att": 666,
        "add_obj": 2062,
        "add_att": 692,
    }
    rows = {name: read_choice_rows(f"{name}.json", (OFFICIAL / f"{name}.json").read_bytes()) for name in expected}
    assert {name: len(found) for name, found in rows.items()} == expected
    assert sum(map(len, rows.values())) == 7511
    assert len({row.image for found in rows.values() for row in found}) == 1560
    assert "108" not in {row.key for row in rows["swap_obj"]}
    assert rows["swap_obj"][-1].key == "245"
    assert all(row.caption != row.negative for found in rows.values() for row in found)


def test_sugar_crepe_pp_list_and_parquet() -> None:
    content = [
        {"id": n, "filename": f"{n}.jpg", "caption": "p1", "caption2": "p2", "negative_caption": "n"} for n in range(3)
    ]
    rows = read_choice_rows("swap_att.json", as_json(content))
    assert [(row.key, row.image, row.caption2) for row in rows] == [(str(n), f"{n}.jpg", "p2") for n in range(3)]
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content), data)
    assert read_choice_rows("swap_attribute.parquet", data.getvalue()) == rows


WINOGROUND = [{"id": n, "caption_0": f"a {n}", "caption_1": f"b {n}", "collapsed_tag": "Object"} for n in range(3)]


def test_winoground_lines_and_pngs(tmp_path: Path) -> None:
    rows = [row | {"image_0": f"ex_{row['id']}_img_0", "image_1": f"ex_{row['id']}_img_1"} for row in WINOGROUND]
    examples = read_examples("examples.jsonl", b"\n".join(map(as_json, rows)))
    assert [example.captions for example in examples] == [(f"a {n}", f"b {n}") for n in range(3)]
    assert examples[2].images == ("ex_2_img_0.png", "ex_2_img_1.png")


def test_winoground_parquet_with_a_transparent_image(tmp_path: Path) -> None:
    rows = [
        row
        | {"image_0": {"bytes": picture((row["id"], 0, 0, 128), mode="RGBA"), "path": None}}
        | {"image_1": {"bytes": picture((0, row["id"], 0)), "path": "x.png"}}
        for row in WINOGROUND
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet", row_group_size=2)
    examples = read_examples("test.parquet", (tmp_path / "test.parquet").read_bytes())
    assert [example.id for example in examples] == [0, 1, 2]
    refs = parquet_images(str(tmp_path), "test.parquet", "image_0", [example.images[0] for example in examples])
    assert len({ref.id for ref in refs}) == 3
    assert read_images([refs[2], refs[0]]) == [rows[2]["image_0"]["bytes"], rows[0]["image_0"]["bytes"]]


# Images and labels --------------------------------------------------------------------------------------------------


def test_images_in_folders_and_tars(tmp_path: Path) -> None:
    red, blue, green = picture((255, 0, 0)), picture((0, 0, 255)), picture((0, 255, 0), form="JPEG")
    (tmp_path / "set/images/val").mkdir(parents=True)
    (tmp_path / "set/images/val/red.PNG").write_bytes(red)
    (tmp_path / "set/images/notes.txt").write_text("not an image")
    members = [("b.png", blue), ("b.json", b"{}"), ("g.jpeg", green)]
    write_tar(tmp_path / "set/images/000000.tar", members)
    refs = pick_images(str(tmp_path), ("absent", "set/images"), ["g.jpeg", "elsewhere/red.PNG", "b.png"], "Set")
    assert read_images(refs) == [green, red, blue]
    assert [ref.name for ref in refs] == ["g.jpeg", "elsewhere/red.PNG", "b.png"]
    assert len(find_images(str(tmp_path), ("set/images",))) == 3


def test_a_changed_file_is_a_new_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "images/1.png"
    ids = set()
    for size in (4, 8, 16):
        Image.new("RGB", (size, size)).save(file)
        ids.add(pick_images(str(tmp_path), ("images",), ["1.png"], "Set")[0].id)
    assert len(ids) == 3


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(picture((0, 0, 0)))
    with pytest.raises(ValueError, match=r"Set: expected 3 images .* found 1; missing 2.png, 3.png"):
        pick_images(str(tmp_path), ("images",), ["1.png", "2.png", "3.png"], "Set")


def test_a_name_that_two_images_have_is_refused_unless_its_folder_is_given(tmp_path: Path) -> None:
    for folder, colour in (("train", 0), ("val", 255)):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "0.png").write_bytes(picture((colour, 0, 0)))
    with pytest.raises(ValueError, match=r"Set: 0.png stands for 2 images \(images/train/0.png, images/val/0.png\)"):
        pick_images(str(tmp_path), ("images",), ["0.png"], "Set")
    refs = pick_images(str(tmp_path), ("images",), ["val/0.png", "train/0.png"], "Set")
    assert read_images(refs) == [picture((255, 0, 0)), picture((0, 0, 0))]


def test_labels_of_class_folders_are_sorted(tmp_path: Path) -> None:
    for wnid, names in {"n02": ["x.JPEG"], "n01": ["y.JPEG", "z.JPEG"]}.items():
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for name in names:
            (tmp_path / "val" / wnid / name).write_bytes(picture((0, 0, 0), form="JPEG"))
    found = read_labelled(str(tmp_path), ("val",), "ImageNet")
    assert [(ref.name, label) for ref, label in zip(found.images, found.labels, strict=True)] == [
        ("n01/y.JPEG", 0),
        ("n01/z.JPEG", 0),
        ("n02/x.JPEG", 1),
    ]
    assert found.num_folders == 2


def test_labels_of_webdataset_shards(tmp_path: Path) -> None:
    members = [("a.cls", b"7"), ("a.jpg", picture((1, 1, 1), form="JPEG")), ("b.jpg", b"x"), ("b.cls", b"3\n")]
    write_tar(tmp_path / "val/000000.tar", members)
    found = read_labelled(str(tmp_path), ("val",), "ImageNet")
    assert dict(zip([ref.name for ref in found.images], found.labels, strict=True)) == {"a.jpg": 7, "b.jpg": 3}
    write_tar(tmp_path / "val/000001.tar", [("c.jpg", b"x")])
    with pytest.raises(ValueError, match=r"1 images have no \.cls member, the first is c\.jpg"):
        read_labelled(str(tmp_path), ("val",), "ImageNet")


def test_labels_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in (0, 1):
        rows = [{"image": {"bytes": bytes([part, row]), "path": "x"}, "label": 10 * part + row} for row in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"data/validation-{part}.parquet")
    found = read_labelled(str(tmp_path), ("data",), "ImageNet")
    assert found.labels == [0, 1, 2, 10, 11, 12]
    assert read_images(found.images) == [bytes([part, row]) for part in (0, 1) for row in range(3)]


def test_flat_imagenet_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    with pytest.raises(ValueError, match="lies in no class folder"):
        read_labelled(str(tmp_path), ("val",), "ImageNet")


# Files ----------------------------------------------------------------------------------------------------------------


def test_first_file_that_exists_is_read_and_hashed(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"{}")
    file = read_first(str(tmp_path), ("a.json", "b.json"), "Set")
    assert file == AnnotationFile("b.json", b"{}", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
    with pytest.raises(FileNotFoundError, match=r"Set: no annotations under .*; looked for a\.json, c\.json"):
        read_first(str(tmp_path), ("a.json", "c.json"), "Set")
    check_hash("Set", file, "44136fa355b3678a")
    with pytest.raises(ValueError, match=r"expected sha256 0123\.\.\., found 4413\.\.\."):
        check_hash("Set", file, "0123")
