"""Captions of scenes: claims that hold, their wordings, and hard negatives that do not hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random

from vladva.data.scenes.scene import COLOURS, IMAGE_SIZE, SHAPES, Scene, SceneObject, relation

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
    return PLACES[int(3 * thing.y / IMAGE_SIZE)][int(3 * thing.x / IMAGE_SIZE)]


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
