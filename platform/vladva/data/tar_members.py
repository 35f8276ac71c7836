"""The members of a tar: their names, and where their bytes are. Read by scan, prepare and benchmarks alike.

Tars written by Python, GNU tar and bsdtar, with PAX or GNU names, with links, and several joined by `cat`.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Generator, Iterator
from typing import IO, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGES

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
ENDINGS = frozenset([*IMAGES, "txt", "json"])  # of the members that make a sample
TAR_BLOCK = tarfile.BLOCKSIZE
BYTES_BEHIND_END = 1 << 16  # bytes behind the end of an archive


class TarMember(NamedTuple):
    """A file in a tar; `problem` says why its bytes are not to be had."""

    name: str  # text: bytes that are not UTF-8 as escapes
    offset: int
    length: int
    problem: str = ""


def tar_members(file: IO[bytes]) -> Iterator[TarMember]:
    """The files in the tar, in order; a link stands for the file that it points at, folders are passed over.

    The caller may move `file` between members. Raises InvalidSampleError where the tar is damaged or is none; what
    came before is good.
    """
    start = file.read(6)
    for magic, compression in COMPRESSED.items():
        if start.startswith(magic):
            raise InvalidSampleError(
                "compressed tar", f"{compression}: unpack it, its members cannot be read by position"
            )
    if not start:
        raise InvalidSampleError("empty tar", "the file has zero bytes")
    found: dict[str, TarMember] = {}
    links: list[tarfile.TarInfo] = []
    begin: int | None = 0
    while begin is not None:  # several archives, where tars were joined by `cat`
        end = yield from _archive(file, begin, found, links)
        begin = _next_archive(file)
    if not found and not links and not end:
        raise InvalidSampleError("empty tar", "it has no members")
    yield from _resolved(links, found)


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: `DSC.0012.jpg` is (DSC.0012, jpg), with the ending in lower case.

    An ending that says nothing here is cut at the first dot, as WebDataset does; hidden files and names
    without a dot have none.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.rpartition(".")
    if not dot or ending.lower() not in ENDINGS:
        stem, _, ending = base.partition(".")
    return folder + slash + stem, "" if base.startswith(".") else ending.lower()


def readable_name(name: str) -> str:
    """A member's name as text: bytes that are not UTF-8 as escapes, as ids must be text."""
    if name.isascii():  # nearly always
        return name.removeprefix("./")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")


def _resolved(links: list[tarfile.TarInfo], found: dict[str, TarMember]) -> Iterator[TarMember]:
    """The members that links point at, under the links' names; a link may point at a link, or at what comes later."""
    while links:
        ready = [link for link in links if _target(link) in found]
        for link in ready:
            name = readable_name(link.name)
            found[name] = found[_target(link)]._replace(name=name)
            yield found[name]
        links = [link for link in links if link not in ready]
        if not ready:
            break
    for link in links:
        problem = f"a link to {readable_name(link.linkname)}, which is not in the tar"
        yield TarMember(readable_name(link.name), link.offset, 0, problem)


def _target(link: tarfile.TarInfo) -> str:
    """Name of the member that a link points at: hard links name it, symbolic ones start from their own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return readable_name(posixpath.normpath(posixpath.join(folder, link.linkname)))


def _archive(
    file: IO[bytes], begin: int, found: dict[str, TarMember], links: list[tarfile.TarInfo]
) -> Generator[TarMember, None, int]:
    """The members of the archive from byte `begin` on; returns where the mark at its end is."""
    file.seek(begin)
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (the caller closes the file)
        # Of an archive that holds nothing Python 3.10 would seek the byte before its first.
        while tar.offset and (info := tar.next()):
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
            end = tar.offset
            if info.islnk() or info.issym():
                links.append(info)
            elif not info.isdir():
                problem = "" if info.isreg() and not info.issparse() else "neither a plain file nor a link to one"
                member = TarMember(readable_name(info.name), info.offset_data, info.size, problem)
                found[member.name] = member
                yield member
    except (tarfile.TarError, ValueError) as error:  # ValueError: numbers in a PAX header that are none
        if isinstance(error, InvalidSampleError):
            raise
        reason = "truncated tar" if end else "not a tar" if begin == 0 else "damaged tar"
        raise InvalidSampleError(reason, f"after byte {end or begin}: {error}") from None
    # tarfile stops without a word at a damaged header, and where the file ends too early between two members.
    file.seek(tar.offset)
    block = file.read(TAR_BLOCK)
    if len(block) < TAR_BLOCK and (end or block):
        raise InvalidSampleError("truncated tar", "the mark at its end is missing; what is there is kept")
    if any(block):
        raise InvalidSampleError("damaged tar", f"no valid header at byte {tar.offset}; the samples before it are kept")
    return end


def _next_archive(file: IO[bytes]) -> int | None:
    """Where the next archive begins: at the first block behind the mark that is not empty."""
    while data := file.read(BYTES_BEHIND_END):
        if any(data):
            first = len(data) - len(data.lstrip(b"\0"))
            return (file.tell() - len(data) + first) // TAR_BLOCK * TAR_BLOCK
    return None
