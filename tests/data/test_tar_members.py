"""Tars as people have them: names with dots, links, PAX and GNU names, archives joined by `cat`; nothing is lost."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.shards import count_words, image, scanned, tar_of
from vladva.data.sidecar import scan_shard
from vladva.data.tar_members import split_name, tar_members


@pytest.mark.parametrize(
    ("name", "key", "ending"),
    [
        ("DSC.0012.jpg", "DSC.0012", "jpg"),
        ("a.b/DSC.0012.JPG", "a.b/DSC.0012", "jpg"),
        ("a.b.txt", "a.b", "txt"),
        ("0.stats.json", "0.stats", "json"),
        ("0.cls", "0", "cls"),
        ("0.seg.npy", "0", "seg.npy"),
        (".hidden.jpg", ".hidden", ""),
        ("README", "README", ""),
        ("json", "json", ""),
        ("a.b/JPG", "a.b/JPG", ""),
    ],
)
def test_a_name_is_cut_at_its_last_known_ending(name: str, key: str, ending: str) -> None:
    found = split_name(name)
    assert found[1] == ending
    if ending:
        assert found[0] == key


def test_names_with_dots_are_all_found(tmp_path: Path) -> None:
    """First dots alone would make one key of twenty names."""
    keys = [f"DSC.{number:04d}" for number in range(20)]
    members = [(f"{key}.{kind}", data) for key in keys for kind, data in (("jpg", image("JPEG")), ("txt", b"words"))]
    rows, quarantined = scanned(tmp_path, tar_of(members))
    assert [row["key"] for row in rows] == keys
    assert quarantined == {}


def test_both_halves_of_joined_tars_are_read(tmp_path: Path) -> None:
    halves = [tar_of([(f"{n}.jpg", image("JPEG", seed=n)), (f"{n}.txt", b"words")]) for n in range(3)]
    content = b"".join(halves)
    rows, quarantined = scanned(tmp_path, content)
    assert [row["key"] for row in rows] == ["0", "1", "2"]
    assert quarantined == {}
    for number, row in enumerate(rows):
        assert content[row["offset"] :][: row["length"]] == image("JPEG", seed=number)


def test_links_are_what_they_point_at_or_named(tmp_path: Path) -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, target
            tar.addfile(info, io.BytesIO(content))

        add("sub", kind=tarfile.DIRTYPE)
        add("0.jpg", image("JPEG"))
        add("1.jpg", kind=tarfile.LNKTYPE, target="0.jpg")
        add("sub/2.jpg", kind=tarfile.SYMTYPE, target="../1.jpg")
        add("3.jpg", kind=tarfile.SYMTYPE, target="elsewhere.jpg")
        for key in ("0", "1", "sub/2", "3"):
            add(f"{key}.txt", b"words")
    rows, quarantined = scanned(tmp_path, body.getvalue())
    assert {row["key"] for row in rows} == {"0", "1", "sub/2"}
    assert len({(row["offset"], row["crc32"]) for row in rows}) == 1
    assert list(quarantined) == ["#3"]


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_writes(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    long = "n" * (90 if form in ("ustar", "v7") else 180)
    for key in ("a", "sub/b", long):
        (folder / f"{key}.png").write_bytes(image())
        (folder / f"{key}.txt").write_text("words")
    command = ["tar", f"--format={form}", "-cf", str(tmp_path / "of.tar"), "-C", str(folder), "."]
    subprocess.run(command, check=True)
    rows, quarantined = scanned(tmp_path, (tmp_path / "of.tar").read_bytes())
    assert {row["key"] for row in rows} == {"a", "sub/b", long}
    assert quarantined == {}


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=1, max_size=6, unique=True),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_every_member_of_any_name_comes_out_with_its_bytes(names: list[str], form: int) -> None:
    contents = {f"{name}.jpg": f"{number}".encode() * (number + 1) for number, name in enumerate(names)}
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=form, encoding="utf-8") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = {}
    for member in tar_members(io.BytesIO(body.getvalue())):
        assert not member.problem
        found[member.name] = body.getvalue()[member.offset :][: member.length]
    assert found == contents


# --- bsdtar ----------------------------------------------------------------------------------------------------------

FOLDERS = st.sampled_from(["", "d/", "d.e/f/", " /", "\N{SNOWMAN}/"])
STEMS = st.one_of(
    st.sampled_from(["a", "b.c", "b", "a b", " a", ".a", "\N{SNOWMAN}", "e\N{COMBINING ACUTE ACCENT}", "x" * 110]),
    NAMES,
)
ENDINGS = st.sampled_from([".jpg", ".PNG", ".txt", ".json", ".cls", ".depth.png", ""])
FILES = st.builds("{}{}{}".format, FOLDERS, STEMS, ENDINGS).filter(lambda file: Path(file).name.strip("."))
BSDTAR = shutil.which("bsdtar")
FORMS = [[], ["--format", "ustar"], ["--format", "gnutar"], ["--format", "pax"]]  # the first: PAX where it is needed


def role_of(file: str) -> str:
    """What a file is to a sample, by its name alone; empty for none."""
    suffix = "" if Path(file).name.startswith(".") else Path(file).suffix.lower()
    return {".jpg": "image", ".png": "image", ".txt": "text", ".json": "JSON"}.get(suffix, "")


def lay_out(folder: Path, drawn: dict[str, str]) -> dict[str, bytes]:
    """Files and links of these names, as far as a folder can hold them together; name -> what is to be read there."""
    given_files: dict[str, bytes] = {}
    plain: dict[str, str] = {}  # role -> the last file of it that is no link
    for number, (file, link) in enumerate(drawn.items()):
        path, role = folder / file, role_of(file)
        if path.is_dir() or any((folder / parent).is_file() for parent in Path(file).parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        words = f"number {number}"
        given_files[file] = {"image": image(seed=number), "JSON": f'{{"caption": "{words}"}}'.encode()}.get(
            role, words.encode()
        )
        if link == "dangling":
            path.symlink_to("nowhere.jpg")
        elif link and role in plain:
            given_files[file] = given_files[plain[role]]
            target = folder / plain[role]
            path.hardlink_to(target) if link == "hard" else path.symlink_to(os.path.relpath(target, path.parent))
        else:
            path.write_bytes(given_files[file])
            plain[role] = file
    return given_files


def packed_by_bsdtar(folder: Path, form: list[str], locale: str) -> bytes:
    command = ["bsdtar", *form, "-cf", "-", "-C", str(folder), "."]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"LC_ALL": locale})
    assume(b"too long" not in done.stderr)  # it leaves out what does not fit the form, and says so
    return done.stdout


@pytest.mark.skipif(not BSDTAR, reason="bsdtar is not installed (Debian's package libarchive-tools)")
@settings(max_examples=100, deadline=None)
@given(
    drawn=st.dictionaries(FILES, st.sampled_from(["", "hard", "symbolic", "dangling"]), min_size=1, max_size=8),
    form=st.sampled_from(FORMS),
    locale=st.sampled_from(["C", "C.UTF-8"]),
    joined=st.booleans(),
)
def test_every_file_that_bsdtar_packs_is_delivered_or_named(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, str], form: list[str], locale: str, joined: bool
) -> None:
    folder = tmp_path_factory.mktemp("bsdtar")
    (folder / "given").mkdir()
    given_files = lay_out(folder / "given", drawn)
    content = packed_by_bsdtar(folder / "given", form, locale)
    if joined:
        (folder / "more").mkdir()
        given_files |= {
            f"more/{name}": data for name, data in lay_out(folder / "more", {"l.jpg": "", "l.txt": ""}).items()
        }
        content += packed_by_bsdtar(folder, [*form, "--exclude", "./given", "--exclude", "*.tar"], locale)
    (folder / "of.tar").write_bytes(content)
    table, quarantined, notes = scan_shard(str(folder), "of.tar", count_words)

    roles: dict[str, Counter[str]] = {}  # key -> how many files of each role
    for file in given_files:
        if role_of(file):
            roles.setdefault(file.rpartition(".")[0], Counter())[role_of(file)] += 1
    unused = sum(not role_of(file) for file in given_files)
    further = sum(count for note, count in notes.items() if "a further one" in note)
    second = sum(count for note, count in notes.items() if "a second" in note)
    repeated = [row for row in quarantined if row.reason == "duplicate key"]
    named = {row.id.partition("#")[2] for row in quarantined if row.reason != "duplicate key"}
    delivered = set(table["key"].to_pylist())
    assert delivered | named <= roles.keys()
    assert not delivered & named
    assert len(delivered) + len(named) + further == len(roles)
    assert len(repeated) + second == sum(each.total() - len(each) for each in roles.values())
    assert notes.total() == unused + further + second
    for row in table.to_pylist():
        of_key = [data for file, data in given_files.items() if role_of(file) and file.rpartition(".")[0] == row["key"]]
        assert content[row["offset"] :][: row["length"]] in of_key
        assert len(row["captions"]) == len(roles[row["key"]]) - 1  # one of the text, one of the JSON
        assert all(any(caption.encode() in data for data in of_key) for caption in row["captions"])
