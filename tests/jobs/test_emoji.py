"""jobs/emoji.py on packages in the layout of the real ones, with pictures that the test draws."""

from __future__ import annotations

import importlib
import io
import json
import shlex
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import emoji
from tests.support.site_pages import PAGES, blocks_of
from vladva.core.images import decode_image
from vladva.data.emoji.corpus import choose_emoji
from vladva.data.emoji.package import read_names, read_pictures

# Ten plain emoji, a motif of two, and one of each kind that is left out.
PLAIN = [f"1F40{digit}" for digit in range(10)]
PALMS = ["1F926", "1F926-200D-2640-FE0F"]
FLAG, COMPONENT, LACKING, TWINS = "1F1E6-1F1E8", "1F3FB", "1F9FF", ["1F600", "1F601"]
EVERY = [*PLAIN, *PALMS, FLAG, COMPONENT, LACKING, *TWINS]
LAYOUTS = {"google": "img/google/64/{}.png", "twitter": "img/twitter/64/{}.png", "fluent": "assets/{}.webp"}


def picture(vendor: str, number: int, kind: str) -> bytes:
    """A square of one colour in a transparent margin: red says which emoji, green which vendor."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((number * 10, 100 * list(LAYOUTS).index(vendor), 0, 255), (2, 2, 6, 6))
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def name_of(code: str) -> dict[str, object]:
    """What emojibase-data says of an emoji."""
    group = {FLAG: 9, COMPONENT: 2}.get(code, 1)
    named = {"hexcode": code, "label": f"name of {code}", "group": group, "tags": ["one", "two"]}
    return {**named, "skins": [{"hexcode": f"{code}-1F3FB"}] * 5} if code == PALMS[0] else named


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """What `npm pack` writes."""
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            header = tarfile.TarInfo(f"package/{name}")
            header.size = len(content)
            packed.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """The packages of three vendors and of the names, with files that are neither."""
    made = {}
    for vendor, layout in LAYOUTS.items():
        files = {"img/google/sheets/64.png": b"a sheet", "package.json": b"{}"}
        for number, code in enumerate(EVERY):
            # At one vendor the twins look the same, and one has no picture of its own of LACKING.
            shown = EVERY.index(TWINS[0]) if (vendor, code) == ("twitter", TWINS[1]) else number
            if (vendor, code) != ("fluent", LACKING):
                content = picture(vendor, shown, layout.rpartition(".")[2])
                files[layout.format(code.lower().replace("-fe0f", "" if vendor == "fluent" else "-fe0f"))] = content
        made[vendor] = pack(tmp_path / f"{vendor}.tgz", files)
    names = {"en/data.json": json.dumps([name_of(code) for code in EVERY]).encode(), "de/data.json": b"[]"}
    return {**made, "names": pack(tmp_path / "names.tgz", names)}


def arguments(packages: dict[str, Path], out: Path, *more: str) -> list[str]:
    vendors = [f"{vendor}={packages[vendor]}" for vendor in LAYOUTS]
    return [*vendors, "--test-vendors", "fluent", "--names", str(packages["names"]), "--out", str(out), *more]


def run(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/emoji.py", *given])
    emoji.main()


def rows_of(file: Path) -> list[dict[str, object]]:
    return pq.read_table(file).to_pylist()


def test_the_tables(
    packages: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, arguments(packages, tmp_path / "out", "--held-out", "0.25"))
    tables = {file.stem: rows_of(file) for file in (tmp_path / "out").iterdir()}
    unseen = {str(row["id"]).partition("/")[2] for row in tables["unseen-fluent"]}
    # Of 12 emoji, a quarter is 3; one more if the last to come were the motif of two.
    assert len(unseen) in (3, 4)
    trained = {code.lower().replace("-fe0f", "") for code in [*PLAIN, *PALMS]} - unseen
    assert {row["id"] for row in tables["train"]} == {f"{v}/{c}" for v in ("google", "twitter") for c in trained}
    assert len(tables["train"]) == 2 * len(trained)
    for vendor in LAYOUTS:
        assert {row["id"] for row in tables[f"unseen-{vendor}"]} == {f"{vendor}/{code}" for code in unseen}
    seen = {str(row["id"]).partition("/")[2] for row in tables["seen-fluent"]}
    assert len(seen) == len(unseen)
    assert seen <= trained
    assert set(tables) == {"train", "seen-fluent", *(f"unseen-{vendor}" for vendor in LAYOUTS)}

    said = capsys.readouterr().out
    for line in (
        "left out: 5 variants of skin tone",
        "left out: 1 flags",
        "left out: 1 components",
        "left out: 1 without a picture of fluent",
        "left out: 2 with the picture of another emoji",
        f"{12 - len(unseen)} emoji to train on, {len(unseen)} held out",
    ):
        assert line in said


def test_a_row_has_its_own_picture_and_name(
    packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, arguments(packages, tmp_path / "out"))
    codes = {code.lower().replace("-fe0f", ""): code for code in EVERY}
    checked = 0
    for file in (tmp_path / "out").iterdir():
        for row in rows_of(file):
            vendor, _, code = str(row["id"]).partition("/")
            named = f"name of {codes[code]}"
            assert row["captions"] == ([named, f"{named}: one, two"] if file.stem == "train" else [named])
            image = decode_image(row["image"])
            assert image.getpixel((0, 0)) == (255, 255, 255)  # transparent is white
            assert image.getpixel((4, 4)) == (10 * EVERY.index(codes[code]), 100 * list(LAYOUTS).index(vendor), 0)
            checked += 1
    assert checked >= 2 * 9 + 4 * 3


def test_a_motif_is_not_divided(packages: dict[str, Path]) -> None:
    """At whatever share; the control: by emoji instead of by motif it would be, at some."""
    names = read_names(packages["names"])
    pictures = {vendor: read_pictures(packages[vendor]) for vendor in LAYOUTS}
    palms = {"1f926", "1f926-200d-2640"}
    sizes = set()
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        corpus = choose_emoji(names, pictures, share)
        held_out = {one.code for one in corpus.unseen}
        assert not palms & held_out or palms <= held_out
        sizes.add(len(palms & held_out))
        assert share * 12 <= len(held_out) < share * 12 + 2
    assert sizes == {0, 2}
    alone = [{**name, "hexcode": name["hexcode"].replace("1F926-200D-2640-FE0F", "1F3C4")} for name in names]
    others = {vendor: {**of, "1f3c4": of["1f926-200d-2640"]} for vendor, of in pictures.items()}
    apart = [{one.code for one in choose_emoji(alone, others, share).unseen} for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert any(len({"1f926", "1f3c4"} & held_out) == 1 for held_out in apart)


def test_a_folder_is_read_as_its_package_and_the_same_twice(
    packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, arguments(packages, tmp_path / "packed"))
    folders = {}
    for name, package in packages.items():
        folders[name] = tmp_path / f"{name}-folder"
        with tarfile.open(package) as packed:
            packed.extractall(folders[name], filter="data")
    folders["names"] = folders["names"] / "package"  # as in node_modules
    run(monkeypatch, arguments(folders, tmp_path / "unpacked"))
    for file in (tmp_path / "packed").iterdir():
        assert file.read_bytes() == (tmp_path / "unpacked" / file.name).read_bytes()


def test_what_is_wrong_is_said_in_a_line(
    packages: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.tgz").write_bytes(packages["google"].read_bytes()[:300])
    drawings = pack(tmp_path / "svg.tgz", {"color/svg/1F600.svg": b"<svg/>"})
    twice = pack(tmp_path / "twice.tgz", {"color/1F600.png": b"1", "black/1F600.png": b"2"})
    right = arguments(packages, tmp_path / "out")
    for replaced, by, told in (
        (right[0], "google", "'google' is no VENDOR=PACKAGE"),
        (right[1], right[0], "its vendor comes twice"),
        (right[0], "google=absent.tgz", "absent.tgz is not there: `npm pack"),
        (right[0], f"google={tmp_path}/broken.tgz", "is no whole .tgz"),
        (right[0], f"google={drawings}", "SVG must be drawn as PNG"),
        (right[0], f"google={twice}", "unpack it, and give the folder of one of them"),
        (right[0], f"google={packages['names']}", "has no picture that is called by its code points"),
        (right[6], str(packages["google"]), "has no en/data.json: give the package emojibase-data"),
        ("fluent", "apple", "--test-vendors apple names apple; there are google, twitter, fluent"),
        ("fluent", "google,twitter,fluent", "leaves no vendor to train on"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, [by if argument == replaced else argument for argument in right])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert told in said
        assert len(said.splitlines()) == 1
    for share in ("0", "0.6"):
        with pytest.raises(SystemExit):
            run(monkeypatch, [*right, "--held-out", share])
        assert f"--held-out is {float(share)}; it must be above 0, and at most 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_are_understood() -> None:
    """Each by its own parser; none is run, as they need the real packages."""
    lines = [
        shlex.split(line)
        for block in blocks_of(PAGES / "examples/emoji.md")
        if block.language == "bash"
        for line in block.text.splitlines()
        if line.strip().startswith("vladva ")
    ]
    verbs = [words[1] for words in lines]
    assert verbs == ["emoji", "prepare", "train", "evaluate", "embed", "index", "search"]
    for _, verb, *words in lines:
        importlib.import_module(f"jobs.{verb}").parse(words)
    with pytest.raises(SystemExit):
        emoji.parse([*lines[0][2:], "--no-such-option"])
