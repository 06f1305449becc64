"""Captions of scenes: writing true ones, and reading texts."""

import re

import numpy as np

from heterodiff.simulators.shapes.scenes import COLOURS, SHAPES, Scene, Thing

_INVERSE = {"above": "below", "left of": "right of"}
_STARTS = ("there is ", "the picture shows ")

_THING = rf"(?:(?:an?|the|one) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLACE = r"(?:(top|bottom) (left|right)(?: corner)?|(?:centre|center|middle))"
_START = r"(?:there is |(?:the |a )?picture shows )?"
_SINGLE = re.compile(rf"{_START}{_THING}(?: (in|at) (?:the )?{_PLACE})?")
_PAIR = re.compile(rf"{_START}{_THING} (and|above|below|(?:to )?(?:the )?(?:left|right) of) {_THING}")


def _named(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing}"


def complete_caption(scene: Scene) -> str:
    """Describe all of ``scene``: colour, shape and place or relation of each thing."""
    if len(scene.things) == 1:
        return f"{_named(scene.things[0])} in the {scene.place}"
    first, second = map(_named, scene.things)
    return f"{first} {scene.place} {second}"


def captions_of(scene: Scene, rng: np.random.RandomState) -> tuple[str, ...]:
    """Return true captions of a drawn ``scene`` in different words: 3 of one thing, 4 of two.

    The first is complete; the last leaves out the place or relation.
    """
    first, *others = map(_named, scene.things)
    complete = complete_caption(scene)
    if not others:
        start = _STARTS[rng.randint(len(_STARTS))]
        corner = "" if scene.place == "centre" else " corner"
        return complete, f"{start}{first} in the {scene.place}{corner}", first
    (second,) = others
    assert scene.place is not None
    relation, inverse = (
        f"to the {words}" if words.endswith(" of") and rng.randint(2) else words
        for words in (scene.place, _INVERSE[scene.place])
    )
    start = _STARTS[rng.randint(len(_STARTS))]
    both = f"{first} and {second}" if rng.randint(2) else f"{second} and {first}"
    return complete, f"{second} {inverse} {first}", f"{start}{first} {relation} {second}", both


def read_caption(text: str) -> Scene | None:
    """Return the scene that a caption describes, ``None`` if `captions_of` writes no such caption.

    Case, punctuation and blanks do not count, and articles may be missing.
    """
    plain = " ".join(re.sub(r"[.,;:!]", " ", text.lower()).split())
    if found := _SINGLE.fullmatch(plain):
        colour, shape, said, vertical, horizontal = found.groups()
        place = None if said is None else f"{vertical} {horizontal}" if vertical else "centre"
        return Scene((Thing(colour, shape),), place)
    if found := _PAIR.fullmatch(plain):
        colour, shape, relation, other_colour, other_shape = found.groups()
        things = Thing(colour, shape), Thing(other_colour, other_shape)
        if things[0] == things[1]:
            return None
        if relation == "and":
            return Scene(things, None)
        if "below" in relation or "right" in relation:
            things = things[1], things[0]
        return Scene(things, "above" if relation in ("above", "below") else "left of")
    return None
