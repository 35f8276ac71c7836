"""Images from strangers: each gets an answer or a clear refusal, and the replica lives."""

from __future__ import annotations

import base64
import time
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.protocol import images
from serve.protocol.images import image_size, is_data_uri, parse_image_bytes
from tests.support.wire import claiming, data_uri, encode, error_of, noise_image
from vladva.core.images import MAX_RATIO, decode_image

FRAMES = {"save_all": True, "append_images": [noise_image(8), noise_image(9)]}
GOOD = {
    "1x1": encode(Image.new("RGB", (1, 1), "red")),
    "cmyk": encode(noise_image(1).convert("CMYK"), "JPEG"),
    "animated gif": encode(noise_image(1), "GIF", **FRAMES),
    "animated webp": encode(noise_image(1), "WEBP", **FRAMES),
    "16 bit": encode(Image.fromarray(np.full((64, 64), 40_000, np.uint16))),
    "palette": encode(noise_image(1).convert("P")),
    "transparent": encode(noise_image(1).convert("RGBA")),
    "black and white": encode(noise_image(1).convert("1")),
    "bmp": encode(noise_image(1), "BMP"),
}
BAD = {
    "truncated png": encode(Image.effect_noise((64, 64), 50))[:600],
    "truncated jpeg": encode(Image.effect_noise((64, 64), 50), "JPEG")[:600],
    "bomb": claiming(60_000, 60_000),
    "bomb below the cap": claiming(7_000, 7_000),
    "50 million x 1": claiming(50_000_000, 1),
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_images_are_answered(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/embeddings", json={"input": {"image": data_uri(GOOD[name])}})
    assert response.status_code == 200, response.text
    assert np.linalg.norm(response.json()["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(client: httpx.Client, name: str) -> None:
    start = time.monotonic()
    uri = data_uri(BAD[name])
    assert error_of(client.post("/v1/embeddings", json={"input": {"image": uri}}), 422, "invalid_image")
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    assert error_of(client.post("/v1/chat/completions", json={"messages": messages}), 422, "invalid_image")
    assert time.monotonic() - start < 20  # nothing was inflated
    assert client.get("/ready").status_code == 200


def test_only_the_first_frame_counts(client: httpx.Client) -> None:
    still, moving = encode(noise_image(1), "GIF"), GOOD["animated gif"]
    response = client.post("/v1/embeddings", json={"input": [data_uri(still), data_uri(moving)], "modality": "image"})
    first, second = (entry["embedding"] for entry in response.json()["data"])
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_base64_as_people_write_it() -> None:
    data = bytes(range(256)) + b"\xfb\xff"  # its base64 has +, / and padding
    plain = base64.b64encode(data).decode()
    uri = f"data:image/png;base64,{plain}"
    for sent in (
        uri,
        uri.replace("image/png", "image/png;charset=x"),
        uri.upper().replace(plain.upper(), plain),
        f"  {uri}\n",
        uri.rstrip("="),
        base64.encodebytes(data).decode(),
        f"data:image/png;base64,{base64.encodebytes(data).decode()}".replace("\n", "\r\n"),
        f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode().rstrip('=')}",
        f"data:image/png;base64,{quote(plain, safe='')}",
        f"data:image/png;base64,{quote(plain, safe='')}".replace("%2B", "%2b"),
        f"data:image/png;base64,{quote(base64.encodebytes(data).decode())}",
        plain,
    ):
        assert parse_image_bytes(sent, len(data)) == data
    with pytest.raises(ValueError, match="larger than"):
        parse_image_bytes(uri, len(data) - 10)
    with pytest.raises(ValueError, match="larger than"):
        parse_image_bytes("A" * 10_000, 100)


def test_base64_in_slices_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 3
    monkeypatch.setattr(images, "SLICE", 64)
    for text in (base64.b64encode(data), base64.encodebytes(data), base64.b64encode(data[:-1]).rstrip(b"=")):
        assert parse_image_bytes(text.decode(), len(data)) in (data, data[:-1])
    for padded in ("A" * 60 + "AA==" + "A" * 64, "A" * 64 + "AA==" + "A" * 60):  # at the end of a slice, and within one
        with pytest.raises(ValueError, match="not valid base64"):
            parse_image_bytes(padded, 1000)


def test_a_long_text_of_percent_signs_keeps_nobody_waiting() -> None:
    """Taken apart at every sign, it once took seconds, and a gigabyte."""
    began = time.process_time()
    with pytest.raises(ValueError, match="not valid base64"):
        parse_image_bytes("data:image/png;base64," + "%41" * 6_000_000, 20 << 20)
    assert time.process_time() - began < 1.5


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("https://example.com/a.png", "remote URLs are off"),
        ("HTTP://example.com/a.png", "remote URLs are off"),
        ("file:///etc/passwd", "data: URI"),
        ("../etc/passwd", "not valid base64"),
        ("data:image/png,AAAA", "base64 data: URI"),
        ("data:text/html;base64,AAAA", "base64 data: URI"),
        ("data:image/png;base64", "base64 data: URI"),
        ("data:image/png;base64,A", "not valid base64"),
        ("data:image/png;base64,AA=A", "not valid base64"),
        ("data:image/png;base64,AA===", "not valid base64"),
        ("data:image/png;base64,A+A_", "not valid base64"),
        ("data:image/png;base64,\xff", "not valid base64"),
        ("data:image/png;base64,\ud800", "not valid base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,%41AAA", "not valid base64"),
    ],
)
def test_what_is_no_image_or_could_mean_two_is_refused(sent: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_image_bytes(sent, 1000)


def test_only_a_data_uri_of_an_image_is_an_image_rather_than_words() -> None:
    assert is_data_uri("data:image/png;base64,AAAA")
    assert is_data_uri(" DATA:image/png;base64,AAAA")
    assert not is_data_uri("data:text/plain,hello")
    assert not is_data_uri("what is data:image/png?")


def test_size_is_checked_from_the_header() -> None:
    assert image_size(claiming(300, 200), 60_000) == (300, 200)
    with pytest.raises(ValueError, match="300 x 200"):
        image_size(claiming(300, 200), 59_999)
    assert image_size(claiming(MAX_RATIO, 1), 1000) == (MAX_RATIO, 1)
    with pytest.raises(ValueError, match="times the other"):
        image_size(claiming(1, MAX_RATIO + 1), 1000)


def test_the_size_is_that_of_the_upright_image() -> None:
    lying = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(lying, "JPEG", exif=exif)
    assert image_size(data, 1000) == decode_image(data).size == (20, 40)
    assert image_size(encode(lying, "JPEG"), 1000) == (40, 20)
