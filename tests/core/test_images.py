"""Images: what is accepted, and which pixels it has."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from tests.support.shards import JPEG, PNG, WEBP, bomb, image, scanned, tar_of
from vladva.core import errors, images
from vladva.core.images import decode_image


@pytest.mark.parametrize(
    ("data", "reason", "without_verify"),
    [
        pytest.param(JPEG[:-50], "corrupt image", None, id="JPEG cut at the end"),
        pytest.param(JPEG[:20], "corrupt image", "corrupt image", id="JPEG cut in its header"),
        pytest.param(PNG[: len(PNG) // 2], "corrupt image", None, id="PNG cut"),
        pytest.param(PNG[:500] + bytes(40) + PNG[540:], "corrupt image", None, id="PNG with a hole"),
        pytest.param(WEBP[: len(WEBP) // 2], "corrupt image", "corrupt image", id="WebP cut"),
        pytest.param(b"GIF89a", "corrupt image", "corrupt image", id="GIF cut"),
        pytest.param(image("BMP"), None, None, id="BMP"),
        pytest.param(image("TIFF"), None, None, id="TIFF"),
        pytest.param(bomb(20_000, 20_000), "too many pixels", "too many pixels", id="bomb"),
        pytest.param(bomb(1, 50_000_001), "too many pixels", "too many pixels", id="one pixel too many"),
        pytest.param(bomb(0, 10), "corrupt image", "corrupt image", id="no pixels"),
        pytest.param(image("JPEG", mode="CMYK"), None, None, id="CMYK JPEG"),
        pytest.param(image("JPEG", mode="L"), None, None, id="grey JPEG"),
        pytest.param(image("JPEG", (1, 1)), None, None, id="tiny JPEG"),
        pytest.param(image("PNG", mode="RGBA"), None, None, id="transparent PNG"),
        pytest.param(image("PNG", mode="1"), None, None, id="black and white PNG"),
        pytest.param(image("GIF", mode="P"), None, None, id="GIF"),
        pytest.param(image("WEBP"), None, None, id="WebP"),
    ],
)
def test_the_scan_accepts_what_training_can_decode(data: bytes, reason: str | None, without_verify: str | None) -> None:
    def verdict(verify: bool) -> str | None:
        try:
            images.check_image(data, verify=verify, max_pixels=images.MAX_PIXELS)
        except errors.InvalidSampleError as problem:
            return problem.reason
        return None

    assert verdict(verify=True) == reason
    assert verdict(verify=False) == without_verify
    if reason:
        with pytest.raises(ValueError, match="image"):
            decode_image(data)
    else:
        assert decode_image(data).mode == "RGB"


def encoded(opened: Image.Image, kind: str, **options: Any) -> bytes:
    body = io.BytesIO()
    opened.save(body, kind, **options)
    return body.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_as_pillows_exif_transpose_turns_it(kind: str, orientation: int) -> None:
    lying = Image.open(io.BytesIO(image("PNG", (24, 16), seed=3))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(lying, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = decode_image(data)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))
    facts = images.check_image(data, verify=False)
    assert (facts.width, facts.height) == found.size == ((16, 24) if orientation >= 5 else (24, 16))
    if orientation > 1:  # what equality is worth: not turned, it is another image
        untouched = np.asarray(Image.open(io.BytesIO(encoded(lying, kind))).convert("RGB"))
        assert untouched.shape != np.asarray(found).shape or (untouched != np.asarray(found)).any()


def test_what_is_transparent_lies_on_white() -> None:
    """A colour c with opacity a on white is c * a + 255 * (1 - a)."""
    half = Image.new("RGBA", (4, 4), (200, 100, 0, 51))  # a fifth
    for kind in ("PNG", "WEBP"):
        found = np.asarray(decode_image(encoded(half, kind, **({"lossless": True} if kind == "WEBP" else {}))))
        assert np.abs(found.astype(int) - [244, 224, 204]).max() <= 1, kind
    grey = np.asarray(decode_image(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")))
    assert (grey == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    assert (np.asarray(decode_image(encoded(palette, "PNG", transparency=1))) == 255).all()
    assert (np.asarray(decode_image(encoded(palette, "PNG", transparency=0))) == 0).all()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bits_become_eight(kind: str, mode: str) -> None:
    values = np.array([[0, 256, 32_768, 65_535]], ">u2" if mode == "I;16B" else "<u2")
    found = np.asarray(decode_image(encoded(Image.frombytes(mode, (4, 1), values.tobytes()), kind)))
    assert found[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_a_jpeg_without_its_end_marker_is_taken_if_it_is_whole() -> None:
    assert JPEG.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(np.asarray(decode_image(JPEG[:-2])), np.asarray(decode_image(JPEG)))
    assert images.check_image(JPEG[:-2], verify=True).note == "JPEG without end marker"
    with pytest.raises(ValueError, match="corrupt"):
        decode_image(JPEG[: len(JPEG) // 2])


def test_of_several_frames_the_first_is_taken_and_counted() -> None:
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        found = np.asarray(decode_image(data)).astype(int)
        assert np.abs(found - [255, 0, 0]).max() <= 5, kind
        assert images.check_image(data, verify=True).note == "several frames, the first is taken", kind
        assert images.check_image(encoded(first, kind), verify=True).note == "", kind


@pytest.mark.parametrize("metadata", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_larger_than_pillow_reads_costs_no_image(metadata: bytes) -> None:
    text = b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)
    packed = zlib.compress(text)
    body = {
        b"tEXt": b"Comment\0" + text,
        b"zTXt": b"Comment\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
        b"iCCP": b"profile\0\0" + packed,
    }[metadata]
    chunk = struct.pack(">I", len(body)) + metadata + body + struct.pack(">I", zlib.crc32(metadata + body))
    header = len(b"\x89PNG\r\n\x1a\n") + 25
    for place in (header, len(PNG) - 12):  # before the pixels, and after them
        data = PNG[:place] + chunk + PNG[place:]
        np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(decode_image(PNG)))
        assert images.check_image(data, verify=True)[:2] == (60, 60)


def test_a_side_is_at_most_so_many_times_the_other() -> None:
    assert images.check_image(encoded(Image.new("L", (images.MAX_RATIO, 1)), "PNG"), verify=True).width == 200
    for size in ((images.MAX_RATIO + 1, 1), (1, 60_000)):
        with pytest.raises(errors.InvalidSampleError, match="extreme shape"):
            images.check_image(encoded(Image.new("L", size), "PNG"), verify=False)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
        ("JPEG XL", b"\xff\x0a\0\0"),
        ("SVG", b"<?xml version='1.0'?><svg/>"),
        ("PDF", b"%PDF-1.7"),
    ],
)
def test_a_format_that_is_refused_is_named(name: str, head: bytes) -> None:
    with pytest.raises(errors.InvalidSampleError, match=f"the image is {name}: convert it") as caught:
        images.check_image(head + bytes(100), verify=False)
    assert caught.value.reason == "format not accepted"


# --- whatever Pillow writes -------------------------------------------------------------------------------------------

Image.init()
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]
REFUSED_MODES = {"LAB", "I", "F", "PA"}  # in a file of a format that is accepted
SIDES = st.integers(1, 40)


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """An image with random bytes for pixels; one with a palette has random colours."""
    made = Image.new(mode, size)
    made.frombytes(Random(seed).randbytes(len(made.tobytes())))
    if mode in ("P", "PA"):
        made.putpalette(Random(seed).randbytes(768))
    return made


def can_be_written(kind: str, mode: str) -> bool:
    try:
        encoded(noise(mode, (8, 8), 0), kind)
    except Exception:  # Pillow's encoders raise whatever they stumble over
        return False
    return True


@pytest.fixture(scope="module")
def writable() -> list[tuple[str, str]]:
    """(format, mode) of all that Pillow writes here."""
    return [(kind, mode) for kind in sorted(Image.SAVE) for mode in MODES if can_be_written(kind, mode)]


def on_white(opened: Image.Image) -> np.ndarray:
    """RGB [H, W, 3] of what Pillow has opened: 16-bit grey by its upper byte, the rest blended in floating point."""
    if opened.mode.startswith("I"):
        return np.repeat((np.asarray(opened).astype(int) >> 8)[..., None], 3, axis=2)
    rgba = np.asarray(opened.convert("RGBA")).astype(float)
    opacity = rgba[..., 3:] / 255
    return rgba[..., :3] * opacity + 255 * (1 - opacity)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some of the formats are going
@settings(max_examples=200, deadline=None)
@given(drawing=st.data(), width=SIDES, height=SIDES, seed=st.integers(0, 99), clear=st.booleans())
@pytest.mark.slow
def test_what_pillow_writes_has_pillows_pixels_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, writable: list[tuple[str, str]], drawing: st.DataObject,
    width: int, height: int, seed: int, clear: bool,
) -> None:  # fmt: skip
    kind, mode = drawing.draw(st.sampled_from(writable))
    drawn = noise(mode, (width, height), seed)
    clear_level = {"1": 0, "L": 7, "P": 7, "RGB": drawn.getpixel((0, 0))}.get(mode)
    options = {"transparency": clear_level} if clear and clear_level is not None and kind == "PNG" else {}
    try:
        data = encoded(drawn, kind, **options)
    except Exception:  # a size that this format has not
        assume(False)
    rows, quarantined = scanned(tmp_path_factory.mktemp("image"), tar_of([("a.png", data), ("a.txt", b"words")]))
    if quarantined:
        with pytest.raises(errors.InvalidSampleError) as refused:
            decode_image(data)
        assert quarantined == {"#a": refused.value.reason}
        assert refused.value.reason in ("format not accepted", "not an image")
        assert kind not in (*images.FORMATS, "MPO") or mode in REFUSED_MODES
        return
    found = decode_image(data)
    assert [(row["width"], row["height"]) for row in rows] == [found.size]
    opened = Image.open(io.BytesIO(data))
    assert found.size == opened.size == (width, height)
    np.testing.assert_allclose(np.asarray(found), on_white(opened), atol=1)
