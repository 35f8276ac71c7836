"""Images: what is accepted, and which pixels it has."""

from __future__ import annotations

import pytest

from tests.support.shards import JPEG, PNG, WEBP, bomb, image
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
