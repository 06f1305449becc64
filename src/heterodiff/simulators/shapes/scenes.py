"""Scenes of the source ``shapes``: one or two coloured things, and their place or relation."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from heterodiff.config import ShapesConfig
from heterodiff.errors import DataError, unknown_name

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
RELATIONS = ("above", "left of")


@dataclass(frozen=True)
class Thing:
    """A coloured shape, of `COLOURS` and `SHAPES`."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two different ones.

    Attributes:
        things: one or two; ``things[0]`` is above or left of ``things[1]``.
        place: one of `PLACES` for one thing, of `RELATIONS` for two; ``None`` where a text does not say, and then two
            things are in the order of the text.
    """

    things: tuple[Thing, ...]
    place: str | None


ALL_THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


def parse_thing(text: str) -> Thing:
    """Read a colour and a shape, such as ``purple triangle``.

    Raises:
        DataError: anything else.
    """
    words = text.lower().split()
    if len(words) != 2:
        raise DataError(f"data.shapes.unseen: expected a colour and a shape, such as 'purple triangle', found '{text}'")
    for kind, word, known in (("colour", words[0], COLOURS), ("shape", words[1], SHAPES)):
        if word not in known:
            raise DataError(f"data.shapes.unseen: '{text}': {unknown_name(kind, word, known)}")
    return Thing(*words)


def unseen_things(config: ShapesConfig) -> frozenset[Thing]:
    """Return the things that no picture shows.

    Raises:
        DataError: one that cannot be read, or too few are left to draw.
    """
    unseen = frozenset(parse_thing(text) for text in config.unseen)
    needed, left = (2 if config.pairs > 0 else 1), len(ALL_THINGS) - len(unseen)
    if left < needed:
        raise DataError(
            f"data.shapes.unseen: leaves {left} of {len(ALL_THINGS)} combinations of colour and shape, expected at "
            f"least {needed}; list fewer"
        )
    return unseen


def draw_scene(rng: np.random.RandomState, pairs: float, forbidden: Collection[Thing] = frozenset()) -> Scene:
    """Draw a scene; all things, and all places and relations, are equally likely.

    Args:
        pairs: probability of two things; they differ in colour, shape or both.
        forbidden: things that are not drawn.
    """
    allowed = [thing for thing in ALL_THINGS if thing not in forbidden]
    pair = rng.random_sample() < pairs
    chosen = rng.choice(len(allowed), size=1 + pair, replace=False)
    places = RELATIONS if pair else PLACES
    return Scene(tuple(allowed[k] for k in chosen), places[rng.randint(len(places))])


def matches(asked: Scene, seen: Scene) -> bool:
    """Return True if ``seen`` has the things of ``asked`` and, if it names one, the place or relation."""
    if asked.place is not None:
        return asked == seen
    return len(asked.things) == len(seen.things) and set(asked.things) == set(seen.things)
