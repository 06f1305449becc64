"""Prompts, pictures and captions of the built-in shapes: does a picture or caption show the scene?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heterodiff.config import ShapesConfig
from heterodiff.metrics.intervals import proportion, seed_words
from heterodiff.metrics.shapes_classifier import ShapesClassifier, draw_renders
from heterodiff.simulators.shapes import scene_of
from heterodiff.simulators.shapes.scenes import Scene, matches, unseen_things
from heterodiff.simulators.shapes.words import complete_caption, read_caption

PROMPT_SCENES, UNSEEN_SCENES = (2, 20_240_229), (3, 20_240_229)
"""Seed words of prompted scenes, beside the seed: no data set of any seed has them."""


@dataclass(frozen=True)
class Asked:
    """Scenes to prompt for, their complete captions, and a real render (N, 3, H, W) in [0, 1] of each."""

    scenes: list[Scene]
    prompts: list[str]
    real: Tensor


def draw_asked(config: ShapesConfig, number: int, size: tuple[int, int], seed: int, unseen: bool = False) -> Asked:
    """Draw fresh scenes, of no data set, that a run of ``config`` could have seen; with ``unseen`` could not have.

    Args:
        size: (height, width) of the renders.
    """
    things = unseen_things(config)
    left_out, needed, purpose = (frozenset(), things, UNSEEN_SCENES) if unseen else (things, frozenset(), PROMPT_SCENES)
    scenes, images = draw_renders((*seed_words(seed), *purpose), number, size, config.pairs, left_out, needed)
    return Asked(scenes, [complete_caption(scene) for scene in scenes], images / 255)


def scenes_of(config: ShapesConfig, names: Sequence[str]) -> list[Scene]:
    """Return the scenes of pictures of the data set of ``config``, by their names."""
    return [scene_of(config, int(name)) for name in names]


def sharpness(images: Tensor) -> Tensor:
    """Root mean square gradient of each image (N, C, H, W): (N,), in units of values in [0, 1] a pixel.

    Squares, because the sum of magnitudes over a blurred edge is that over a sharp one, and invisibly faint noise,
    which is everywhere, would count more than all edges.
    """
    down, across = (images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1])
    return (down.square().mean(dim=(1, 2, 3)) + across.square().mean(dim=(1, 2, 3))).sqrt()


def _same_things(scene: Scene, seen: Scene) -> bool:
    return matches(Scene(scene.things, None), seen)


def following(asked: Asked, pictures: Tensor, reader: ShapesClassifier, seed: int) -> dict[str, Any]:
    """Measure how well pictures (N, 3, H, W) follow their prompts.

    Returns:
        Proportions ``things`` (all colours and shapes are right) and ``scene`` (the place or relation, too), and
        ``sharpness`` over that of real renders of the same scenes: 1 is as sharp.
    """
    pairs = list(zip(asked.scenes, reader.read(pictures), strict=True))
    return {
        "things": proportion([_same_things(scene, seen) for scene, seen in pairs], seed),
        "scene": proportion([matches(scene, seen) for scene, seen in pairs], seed),
        "sharpness": float(sharpness(pictures).mean() / sharpness(asked.real).mean()),
    }


def caption_truth(captions: Sequence[str], scenes: Sequence[Scene], seed: int) -> dict[str, Any]:
    """Compare captions with the ``scenes`` of their pictures; one that cannot be parsed is wrong.

    Returns:
        Proportions ``things`` (all colours and shapes are right), ``true`` (so is the place or relation, if one is
        named), and ``scene`` (the place or relation is named, and right).
    """
    pairs = list(zip(map(read_caption, captions), scenes, strict=True))
    hits = {
        "things": [found is not None and _same_things(found, scene) for found, scene in pairs],
        "true": [found is not None and matches(found, scene) for found, scene in pairs],
        "scene": [found is not None and found.place is not None and matches(found, scene) for found, scene in pairs],
    }
    return {name: proportion(values, seed) for name, values in hits.items()}
