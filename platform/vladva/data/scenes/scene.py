"""Scenes: generated pictures of two or three coloured shapes, with captions whose truth is known exactly.

The corpus of the demo and of the tests. Every picture has several short captions in different wordings, one long
caption, and hard negatives of the seven SugarCrepe kinds. Everything follows from a seed.

The test split holds out *combinations*: one pair of (colour, shape) objects in five never appears together in a
training picture, and every test picture contains such a pair. Colours and shapes themselves are all seen in training.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from random import Random
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable

PICTURE_SIZE = 64  # pixels, width and height
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
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
NUMBER_WORDS = {2: "two", 3: "three"}
PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
HARD_NEGATIVES = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


@dataclass(frozen=True)
class SceneObject:
    """One shape in a picture; x, y and radius in pixels, angle in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. No two objects share both colour and shape, so `the red circle` is one object."""

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
        places = [
            (random.uniform(r + 1, PICTURE_SIZE - r - 1), random.uniform(r + 1, PICTURE_SIZE - r - 1)) for r in radii
        ]
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
        and all(o.radius <= min(o.x, o.y, PICTURE_SIZE - o.x, PICTURE_SIZE - o.y) for o in objects)
        and all(is_clear(*pair) for pair in combinations([((o.x, o.y), o.radius) for o in objects], 2))
    )


def is_clear(a: tuple[tuple[float, float], float], b: tuple[tuple[float, float], float]) -> bool:
    """Whether two discs (centre, radius) are apart, and apart along one axis clearly more than along the other."""
    (ax, ay), ar = a
    (bx, by), br = b
    dx, dy = abs(ax - bx), abs(ay - by)
    return math.hypot(dx, dy) > ar + br + 2 and abs(dx - dy) > 5


# ---------------------------------------------------------------------------------------------------------- pictures


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
    """The picture of a scene: RGB, 64 x 64, drawn four times as large and averaged down."""
    scale = 4
    canvas = Image.new("RGB", (PICTURE_SIZE * scale, PICTURE_SIZE * scale), BACKGROUNDS[scene.background])
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


def png(picture: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Mention:
    """An object as a caption names it; size None when the caption does not say it."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a short caption states: the objects it names, and relations (i, relation, j) between them."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...] = ()


def claim_of(scene: Scene, random: Random, *, sizes: bool = True, relations: bool = True) -> Claim:
    """A true claim that names every object of the scene, in random order, chained by relations."""
    order = random.sample(scene.objects, len(scene.objects))
    mentions = tuple(Mention(o.shape, o.colour, o.size if sizes else None) for o in order)
    if not relations:
        return Claim(mentions)
    links = [(0, relation(order[0], order[1]), 1)]
    if len(order) == 3:
        links.append((2, relation(order[2], order[1]), 1))
    return Claim(mentions, tuple(links))


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether every object and relation that the claim states is in the scene."""
    found = []
    for mention in claim.mentions:
        match = [
            o
            for o in scene.objects
            if (o.shape, o.colour) == (mention.shape, mention.colour) and mention.size in (None, o.size)
        ]
        if not match:
            return False
        found.append(match[0])
    return all(relation(found[i], found[j]) == name for i, name, j in claim.relations)


def noun_phrase(mention: Mention, random: Random, article: str = "a") -> str:
    """`a small red circle`, with one of the wordings of its size."""
    draw = random.random()  # drawn also when no size is named, so that two captions worded by equal generators match
    words = [SIZE_WORDS[mention.size][int(draw * len(SIZE_WORDS[mention.size]))]] if mention.size else []
    phrase = " ".join([*words, mention.colour, mention.shape])
    return f"an {phrase}" if article == "a" and phrase[0] in "aeiou" else f"{article} {phrase}"


def short_caption(claim: Claim, random: Random) -> str:
    """The claim in words, fewer than 30 tokens."""
    opening = random.choice(("", "", "there is ", "a picture of ", "we see "))
    words = [random.choice(RELATION_WORDS[name]) for _, name, _ in claim.relations]
    phrases = [noun_phrase(mention, random) for mention in claim.mentions]
    if not claim.relations:
        return f"{opening}{', '.join(phrases[:-1])} and {phrases[-1]}"
    text = f"{opening}{phrases[0]} {words[0]} {phrases[1]}"
    if len(claim.relations) == 2:
        anchor = claim.mentions[claim.relations[1][2]]
        text += f", with {phrases[2]} {words[1]} the {anchor.colour} {anchor.shape}"
    elif len(phrases) == 3:
        text += f", and {phrases[2]}"
    return text


def place(thing: SceneObject) -> str:
    """Where an object is, on a three by three grid."""
    return PLACES[int(3 * thing.y / PICTURE_SIZE)][int(3 * thing.x / PICTURE_SIZE)]


def long_caption(scene: Scene, random: Random) -> str:
    """A detailed caption of 30 tokens and more: background, then every object from left to right, then relations."""
    order = sorted(scene.objects, key=lambda o: o.x)
    phrases = [noun_phrase(Mention(o.shape, o.colour, o.size), random) + " " + place(o) for o in order]
    text = f"{NUMBER_WORDS[len(order)]} objects on a {scene.background} background: "
    text += f"{', '.join(phrases[:-1])} and {phrases[-1]}."
    for a, b in pairwise(order):
        words = random.choice(RELATION_WORDS[relation(a, b)])
        text += f" the {a.colour} {a.shape} is {words} the {b.colour} {b.shape}."
    return text


def captions(scene: Scene, random: Random) -> list[str]:
    """Four short captions in different wordings, the last one without sizes, and the long one."""
    short = [short_caption(claim_of(scene, random, sizes=number < 3), random) for number in range(4)]
    return [*short, long_caption(scene, random)]


# ---------------------------------------------------------------------------------------------------- hard negatives


def replaced(claim: Claim, i: int, **changes: str | None) -> Claim:
    """The claim with one mention changed."""
    mentions = list(claim.mentions)
    mentions[i] = Mention(**(asdict(mentions[i]) | changes))
    return Claim(tuple(mentions), claim.relations)


def swapped(claim: Claim, *, fields: tuple[str, ...]) -> Claim:
    """The claim with the named fields of its first two mentions exchanged."""
    first, second = (asdict(m) for m in claim.mentions[:2])
    for field in fields:
        first[field], second[field] = second[field], first[field]
    return Claim((Mention(**first), Mention(**second), *claim.mentions[2:]), claim.relations)


def hard_negative(kind: str, scene: Scene, random: Random) -> tuple[str, str] | None:
    """A true caption and a false one that differ as the SugarCrepe kind says; None where the scene does not allow it.

    As in SugarCrepe, swaps only exchange words of the true caption, replacements change one word (or one relation),
    additions add one object or one attribute that is not there.
    """
    claim = claim_of(scene, random, sizes=kind not in ("add_obj", "add_att"))
    wording = random.getrandbits(64)
    if kind == "replace_obj":
        false = replaced(claim, 0, shape=random.choice([s for s in SHAPES if s != claim.mentions[0].shape]))
    elif kind == "replace_att":
        false = replaced(claim, 0, colour=random.choice([c for c in COLOURS if c != claim.mentions[0].colour]))
    elif kind == "replace_rel":
        (i, name, j), *rest = claim.relations
        false = Claim(claim.mentions, ((i, OPPOSITE[name], j), *rest))
    elif kind == "swap_obj":
        exchanged = swapped(claim, fields=("shape", "colour", "size"))
        # The third object stays where it was, which is now seen from mention 0.
        false = Claim(exchanged.mentions, (claim.relations[0], *((i, name, 0) for i, name, _ in claim.relations[1:])))
    elif kind == "swap_att":
        if claim.mentions[0].colour == claim.mentions[1].colour:
            return None
        false = swapped(claim, fields=("colour",))
    elif kind == "add_obj":
        if len(claim.mentions) == 3:
            return None
        present = {(m.colour, m.shape) for m in claim.mentions}
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        colour, shape = random.choice(absent)
        false = Claim((*claim.mentions, Mention(shape, colour)), claim.relations)
    else:
        assert kind == "add_att", kind
        named = next(
            o for o in scene.objects if (o.shape, o.colour) == (claim.mentions[0].shape, claim.mentions[0].colour)
        )
        false = replaced(claim, 0, size="small" if named.size == "large" else "large")
    if holds(false, scene):
        return None
    # The same random wording for both: they differ in what they claim and in nothing else.
    return short_caption(claim, Random(wording)), short_caption(false, Random(wording))


# ------------------------------------------------------------------------------------------------------------ corpus


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, Random]]:
    """Endless scenes of a split with the random generator that words them; the n-th is the same in every run."""
    number = 0
    while True:
        random = Random(f"{seed}/{split}/{number}")
        yield random_scene(random, split), random
        number += 1


def training_scenes(seed: int = 0) -> Iterator[tuple[Scene, Random]]:
    """Endless training scenes, each followed by its siblings."""
    for scene, random in scenes("train", seed):
        for member in (scene, *siblings(scene, random)):
            yield member, random


def pair_facts(scene: Scene) -> set[tuple[object, ...]]:
    """What a caption of two objects can state of the scene: two objects, with sizes, and their relation."""
    things = sorted(scene.objects, key=lambda o: (o.size, o.colour, o.shape))
    return {(*((o.size, o.colour, o.shape) for o in pair), relation(*pair)) for pair in combinations(things, 2)}


def held_out_scenes(count: int, seed: int = 0) -> Iterator[tuple[Scene, list[str], Random]]:
    """Test scenes with captions, such that no caption repeats and no complete caption of one is true of another."""
    pairs: set[tuple[object, ...]] = set()  # facts of every scene
    whole: set[tuple[object, ...]] = set()  # facts that are the whole of a scene: of two objects, or the three objects
    texts: set[str] = set()
    for scene, random in scenes("test", seed):
        if len(texts) == count:
            return
        facts, worded = pair_facts(scene), captions(scene, random)
        three = tuple(sorted((o.size, o.colour, o.shape) for o in scene.objects)) if len(scene.objects) == 3 else None
        ambiguous = facts & (whole if three else pairs) or three in whole
        if not ambiguous and worded[0] not in texts:
            pairs |= facts
            whole |= {three} if three else facts
            texts.add(worded[0])
            yield scene, worded, random


def write_scenes(
    uri: str,
    *,
    train: int = 20_000,
    test: int = 1_000,
    negatives: int = 250,
    seed: int = 0,
    samples_per_shard: int = 1_000,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the corpus under `uri`: train/ and test/ shards, test/retrieval.json, compositionality/KIND.json.

    `retrieval.json` is a list of {"image", "caption": [str]} with one complete caption a picture, the compositionality
    files are in SugarCrepe's own form with `negatives` rows each (fewer where the test scenes do not give as many).
    """
    from vladva import storage
    from vladva.shards import ShardWriter

    done = 0
    with ShardWriter(storage.join(uri, "train"), samples_per_shard) as shards:
        for number, (scene, random) in zip(range(train), training_scenes(seed), strict=False):
            meta = {"captions": captions(scene, random), "scene": asdict(scene)}
            shards.write(f"{number:06d}", {"png": png(render(scene)), "json": json.dumps(meta).encode()})
            done += 1
            progress(done)

    queries: list[dict[str, object]] = []
    rows: dict[str, dict[str, dict[str, str]]] = {kind: {} for kind in HARD_NEGATIVES}
    with ShardWriter(storage.join(uri, "test"), samples_per_shard) as shards:
        for number, (scene, worded, random) in enumerate(held_out_scenes(test, seed)):
            name = f"{number:06d}"
            meta = {"captions": worded, "scene": asdict(scene)}
            shards.write(name, {"png": png(render(scene)), "json": json.dumps(meta).encode()})
            queries.append({"image": f"{name}.png", "caption": [worded[0]]})
            for kind in HARD_NEGATIVES:
                pair = hard_negative(kind, scene, random)
                if pair and len(rows[kind]) < negatives:
                    row = {"filename": f"{name}.png", "caption": pair[0], "negative_caption": pair[1]}
                    rows[kind][str(len(rows[kind]))] = row
            done += 1
            progress(done)
    storage.write_json(storage.join(uri, "test", "retrieval.json"), queries)
    for kind, content in rows.items():
        storage.write_json(storage.join(uri, "compositionality", f"{kind}.json"), content)


def write_triplets(uri: str, *, count: int = 20_000, seed: int = 0, samples_per_shard: int = 1_000) -> None:
    """Write shards of text alone, in the form of NLI data: a sentence, another that follows from it, and a false one.

    All three are captions of a training scene; the false one is a hard negative of the true one.
    """
    from vladva.shards import ShardWriter

    with ShardWriter(uri, samples_per_shard) as shards:
        for number, (scene, random) in zip(range(count), training_scenes(seed), strict=False):
            sentence = captions(scene, random)[0]
            pairs = (hard_negative(random.choice(HARD_NEGATIVES), scene, random) for _ in range(100))
            entailed, contradicted = next(pair for pair in pairs if pair)
            content = {"text": sentence, "captions": [entailed], "negatives": [contradicted]}
            shards.write(f"{number:06d}", {"json": json.dumps(content).encode()})
