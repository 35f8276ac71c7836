"""Scenes: generated images of two or three coloured shapes, with captions whose truth is known exactly.

The corpus of the demo and of the tests. Every image has several short captions in different wordings, one long
caption, and hard negatives of the seven SugarCrepe kinds. Everything follows from a seed.

The test split holds out *combinations*: one pair of (colour, shape) objects in five never appears together in a
training image, and every test image contains such a pair. Colours and shapes themselves are all seen in training.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels, width and height
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 40, 40),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (240, 205, 35),
    "purple": (135, 50, 170),
    "orange": (245, 135, 25),
    "pink": (245, 130, 195),
    "black": (30, 30, 30),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (190, 190, 190),
    "beige": (235, 220, 190),
    "blue": (200, 222, 245),
    "mint": (205, 240, 215),
}
RADII = {"small": (6.0, 7.0), "large": (10.0, 11.5)}  # pixels


@dataclass(frozen=True)
class SceneObject:
    """One shape in an image; x, y and radius in pixels, angle in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What an image shows. No two objects share both colour and shape, so `the red circle` is one object."""

    objects: tuple[SceneObject, ...]
    background: str


def relation(a: SceneObject, b: SceneObject) -> str:
    """Where a is, seen from b: the axis along which they are further apart decides."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def is_held_out(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether the pair of (colour, shape) combinations is kept for the test split: one pair in five, by hash."""
    pair = "+".join(sorted((" ".join(a), " ".join(b))))
    return hashlib.sha256(pair.encode()).digest()[0] % 5 == 0


def random_scene(random: Random, split: str) -> Scene:
    """A random scene of the split, `train` (no held-out pair of objects) or `test` (at least one)."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    while True:
        chosen = random.sample(kinds, random.choice((2, 3)))
        if any(is_held_out(a, b) for a, b in combinations(chosen, 2)) == (split == "test"):
            break
    sizes = [random.choice(("small", "large")) for _ in chosen]
    radii = [random.uniform(*RADII[size]) for size in sizes]
    while True:
        places = [(random.uniform(r + 1, IMAGE_SIZE - r - 1), random.uniform(r + 1, IMAGE_SIZE - r - 1)) for r in radii]
        if all(is_clear(*pair) for pair in combinations(zip(places, radii, strict=True), 2)):
            break
    objects = tuple(
        SceneObject(shape, colour, size, round(x, 2), round(y, 2), round(radius, 2), round(random.uniform(-10, 10), 1))
        for (colour, shape), size, (x, y), radius in zip(chosen, sizes, places, radii, strict=True)
    )
    return Scene(objects, random.choice(tuple(BACKGROUNDS)))


def siblings(scene: Scene, random: Random) -> list[Scene]:
    """Scenes that differ from this one in what is easily confused: two objects change places, or their colours.

    They stand beside it in the training shards, so that they meet in one batch as each other's hard negatives. Those
    that would show a held-out pair, two objects of one kind or touching objects are left out.
    """
    a, b, *rest = random.sample(scene.objects, len(scene.objects))
    candidates = (
        (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)),
        (replace(a, colour=b.colour), replace(b, colour=a.colour)),
    )
    return [
        Scene((*pair, *rest), scene.background) for pair in candidates if pair != (a, b) and is_possible((*pair, *rest))
    ]


def is_possible(objects: tuple[SceneObject, ...]) -> bool:
    """Whether objects make a training scene: kinds differ, none of their pairs is held out, all inside and apart."""
    kinds = [(o.colour, o.shape) for o in objects]
    return (
        len(set(kinds)) == len(kinds)
        and not any(is_held_out(a, b) for a, b in combinations(kinds, 2))
        and all(o.radius <= min(o.x, o.y, IMAGE_SIZE - o.x, IMAGE_SIZE - o.y) for o in objects)
        and all(is_clear(*pair) for pair in combinations([((o.x, o.y), o.radius) for o in objects], 2))
    )


def is_clear(a: tuple[tuple[float, float], float], b: tuple[tuple[float, float], float]) -> bool:
    """Whether two discs (centre, radius) are apart, and apart along one axis clearly more than along the other."""
    (ax, ay), ar = a
    (bx, by), br = b
    dx, dy = abs(ax - bx), abs(ay - by)
    return math.hypot(dx, dy) > ar + br + 2 and abs(dx - dy) > 5


# ---------------------------------------------------------------------------------------------------------- images


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape inside the unit circle."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0, -1), (0.92, 0.75), (-0.92, 0.75)]
    if shape == "star":
        tips = [(math.pi * k / 5 - math.pi / 2, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(r * math.cos(angle), r * math.sin(angle)) for angle, r in tips]
    assert shape == "cross"
    w = 0.32
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


def render(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, 64 x 64, drawn four times as large and averaged down."""
    scale = 4
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif thing.shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=round(r * 0.38))
        else:
            cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
            corners = [(x + r * (cos * u - sin * v), y + r * (sin * u + cos * v)) for u, v in outline(thing.shape)]
            draw.polygon(corners, fill=colour)
    return canvas.reduce(scale)


def png(image: Image.Image) -> bytes:
    """The image as PNG bytes."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
