"""Dialogues about scenes: what the tiny LVLM is trained to say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

from vladva.data.scenes.captions import (
    NUMBER_WORDS,
    OPPOSITE,
    RELATION_WORDS,
    claim_of,
    long_caption,
    place,
    short_caption,
)
from vladva.data.scenes.scene import COLOURS, Scene, SceneObject, relation

DETAILED = ("Give a detailed description of the image.", "Describe the image in detail.")
BRIEF = ("Describe the image briefly.", "Provide a concise description of this image.")
VERY_BRIEF = ("Describe the image very briefly.", "List the objects in the image.")
Turn = tuple[str, str]  # what the user says, what the assistant answers
Dialogue = tuple[Scene | None, list[Turn]]  # the scene whose image is shown, if one is


def questions(scene: Scene, random: Random) -> list[Turn]:
    """Three questions about a scene, with answers of a few words."""
    a, b = random.sample(scene.objects, 2)
    named = f"the {a.colour} {a.shape}"
    stated = relation(a, b)
    asked = random.choice((stated, OPPOSITE[stated]))
    other = random.choice([c for c in COLOURS if c != a.colour])
    present = any((o.colour, o.shape) == (other, a.shape) for o in scene.objects)
    turns = [
        ("How many objects are there?", NUMBER_WORDS[len(scene.objects)]),
        (f"How large is {named}?", a.size),
        (
            f"Is {named} {random.choice(RELATION_WORDS[asked])} the {b.colour} {b.shape}?",
            "yes" if asked == stated else "no",
        ),
        (f"Is there a {other} {a.shape}?", "yes" if present else "no"),
        (f"Where is {named}, seen from the {b.colour} {b.shape}?", RELATION_WORDS[stated][0]),
    ]
    if sum(o.shape == a.shape for o in scene.objects) == 1:
        turns.append((f"What color is the {a.shape}?", a.colour))
    if sum(o.colour == b.colour for o in scene.objects) == 1:
        turns.append((f"What shape is the {b.colour} object?", b.shape))
    return random.sample(turns, 3)


def place_questions(scene: Scene, random: Random) -> Dialogue:
    """Where each object is in the image: what has to be looked up before two objects can be compared."""
    order = random.sample(scene.objects, len(scene.objects))
    return scene, [(f"Where is the {thing.colour} {thing.shape}?", place(thing)) for thing in order]


def relation_question(a: SceneObject, b: SceneObject, random: Random) -> Turn:
    """Where a is, seen from b: asked openly, or to be answered with yes or no."""
    stated = relation(a, b)
    if random.random() < 0.6:
        return f"Where is the {a.colour} {a.shape}, seen from the {b.colour} {b.shape}?", RELATION_WORDS[stated][0]
    asked = random.choice((stated, OPPOSITE[stated]))
    words = random.choice(RELATION_WORDS[asked])
    answer = "yes" if asked == stated else "no"
    return f"Is the {a.colour} {a.shape} {words} the {b.colour} {b.shape}?", answer


def relation_questions(scene: Scene, random: Random) -> Dialogue:
    """Where each object is, seen from each other one, in both directions."""
    pairs = list(permutations(scene.objects, 2))
    return scene, [relation_question(a, b, random) for a, b in random.sample(pairs, len(pairs))]


def image_questions(scene: Scene, random: Random) -> Dialogue:
    """Questions about an image."""
    return scene, questions(scene, random)


def caption_questions(scene: Scene, random: Random) -> Dialogue:
    """The same questions about a complete short caption: reading, without an image."""
    caption = short_caption(claim_of(scene, random), random)
    (first, answer), *rest = (turn for turn in questions(scene, random))
    return None, [(f"{caption}. {first}", answer), *rest]


def detailed_caption(scene: Scene, random: Random) -> Dialogue:
    """A long caption."""
    return scene, [(random.choice(DETAILED), long_caption(scene, random))]


def brief_caption(scene: Scene, random: Random) -> Dialogue:
    """A short caption, with or without relations as the prompt asks."""
    brief = random.random() < 0.7
    claim = claim_of(scene, random, sizes=brief, relations=brief)
    return scene, [(random.choice(BRIEF if brief else VERY_BRIEF), short_caption(claim, random))]


# Kinds of dialogue and how many of each make one optimizer step.
MIXTURE: tuple[tuple[Callable[[Scene, Random], Dialogue], int], ...] = (
    (detailed_caption, 22),
    (brief_caption, 6),
    (place_questions, 6),
    (relation_questions, 14),
    (image_questions, 6),
    (caption_questions, 6),
)
