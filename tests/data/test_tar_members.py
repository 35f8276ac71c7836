"""Tars as people have them: names with dots, links, PAX and GNU names, archives joined by `cat`; nothing is lost."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.shards import image, scanned, tar_of
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
