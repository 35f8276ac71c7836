"""Captioned pictures, from every form their annotations are published in.

| form | for instance | looks like |
|---|---|---|
| Karpathy | `dataset_coco.json` | `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}` |
| COCO | `nocaps_val_4500_captions.json` | `{"images": [{"id", "file_name"}], "annotations": [{"image_id", ..}]}` |
| BLIP | `coco_karpathy_test.json` | `[{"image", "caption": [..]}]` |
| CLIP benchmark | `flickr30k_test_karpathy.txt` | a header line, then `name.jpg,caption` |
"""

from typing import NamedTuple

from vladva.benchmarks.readers.files import parse_json


class CaptionedImage(NamedTuple):
    """A picture's name and its captions, as written."""

    name: str
    captions: tuple[str, ...]


def read_captions(path: str, data: bytes, *, split: str = "test") -> list[CaptionedImage]:
    """Read annotations of any of the forms above. `split` is what is taken of a Karpathy file."""
    if path.endswith(".txt"):
        return _clip_benchmark_lines(data.decode("utf-8"))
    content = parse_json(path, data)
    if isinstance(content, list):
        return _blip_list(path, content)
    if "annotations" in content:
        return _coco_captions(content)
    if content.get("images") and "sentences" in content["images"][0]:
        return _karpathy(content, split)
    raise ValueError(
        f"{path}: holds no captions; expected a Karpathy, COCO-captions or BLIP file, found the keys "
        f"{sorted(content)} (a list of images without captions, such as nocaps_val_image_info.json, will not do)"
    )


def _karpathy(content: dict, split: str) -> list[CaptionedImage]:
    # `filepath` is there for COCO only. `raw` and not `tokens`: the published numbers are on the captions as written.
    return [
        CaptionedImage(
            "/".join(part for part in (image.get("filepath"), image["filename"]) if part),
            tuple(sentence["raw"] for sentence in image["sentences"]),
        )
        for image in content["images"]
        if image["split"] == split
    ]


def _coco_captions(content: dict) -> list[CaptionedImage]:
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:  # neither grouped nor sorted; ids start at 0
        captions[annotation["image_id"]].append(annotation["caption"])
    return [CaptionedImage(image["file_name"], tuple(captions[image["id"]])) for image in content["images"]]


def _blip_list(path: str, content: list[dict]) -> list[CaptionedImage]:
    if any("caption" not in row for row in content):
        raise ValueError(f"{path}: rows without `caption`; the caption-less nocaps_val.json of BLIP will not do")
    return [CaptionedImage(row["image"], _as_tuple(row["caption"])) for row in content]


def _as_tuple(caption: str | list[str]) -> tuple[str, ...]:
    return (caption,) if isinstance(caption, str) else tuple(caption)


def _clip_benchmark_lines(text: str) -> list[CaptionedImage]:
    captions: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        name, caption = line.split(",", 1)  # captions have commas of their own
        captions.setdefault(name, []).append(caption)
    return [CaptionedImage(name, tuple(lines)) for name, lines in captions.items()]
