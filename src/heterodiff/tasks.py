"""The tasks: a row for each, with what every other room needs to know about it.

What a row names as ``module:name`` is imported when it is asked for, see :func:`loaded`, so the table itself is light.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterodiff.config import RunConfig

WITH_MASKS = ("brain-phantom", "volumes")
"""Sources of images whose anomalies can be found."""


@dataclass(frozen=True)
class Task:
    """A kind of run, from its configuration to its report.

    Attributes:
        recipe: value of the key ``recipe``.
        sections: sections of the configuration that the run reads, beside ``data`` and ``training``.
        build: (config, data) -> :class:`heterodiff.training.recipes.base.Recipe`.
        memory: the :class:`heterodiff.training.memory_costs.MemoryTerms`.
        fits: which runs of ``recipe`` the row is for; None for all that no other row is for.
        codec: kind of codec that the run trains for others, see ``codec.kind``.
        contrastive: whether images of a batch are told apart, so that a batch in parts teaches something else.
        doubts: each (config, data) -> notes on settings that work but hardly mean what they say.
        next_steps: commands to use a finished run with.
    """

    recipe: str
    sections: tuple[str, ...]
    build: str
    memory: str
    fits: "Callable[[RunConfig], bool] | None" = None
    codec: str | None = None
    contrastive: bool = False
    doubts: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


_DENOISER_DOUBTS = "heterodiff.training.recipes.diffusion:doubts"
_ALIGNMENT_DOUBTS = "heterodiff.training.recipes.alignment:doubts"

CLASS_IMAGES = Task(
    recipe="diffusion",
    sections=("codec", "model", "diffusion", "sampling"),
    build="heterodiff.training.recipes.diffusion:build",
    memory="heterodiff.training.memory_costs:DENOISER",
    doubts=(_DENOISER_DOUBTS,),
    next_steps=("heterodiff sample {run}", "heterodiff evaluate {run}"),
)
ANOMALIES = replace(
    CLASS_IMAGES,
    fits=lambda config: config.data.source in WITH_MASKS,
    sections=(*CLASS_IMAGES.sections, "segmentation"),
    next_steps=("heterodiff segment {run} --calibrate", "heterodiff evaluate {run}"),
)
VAE = Task(
    recipe="vae",
    sections=("vae",),
    build="heterodiff.training.recipes.vae:build",
    memory="heterodiff.training.memory_costs:VAE",
    codec="kl-vae",
    doubts=("heterodiff.training.recipes.vae:doubts",),
    next_steps=("heterodiff evaluate {run}", "heterodiff train CONFIG.yaml codec.kind=kl-vae codec.path={run}"),
)
ALIGNMENT = Task(
    recipe="alignment",
    sections=("text", "alignment"),
    build="heterodiff.training.recipes.alignment:AlignmentRecipe",
    memory="heterodiff.training.memory_costs:ALIGNMENT",
    codec="cnn",
    contrastive=True,
    doubts=(_ALIGNMENT_DOUBTS,),
    next_steps=("heterodiff caption {run} PICTURE.png", "heterodiff evaluate {run}"),
)
TEXT_IMAGE = Task(
    recipe="text-image",
    sections=("codec", "text", "alignment", "model", "diffusion", "sampling"),
    build="heterodiff.training.recipes.text_image:TextImageRecipe",
    memory="heterodiff.training.memory_costs:DENOISER",
    doubts=("heterodiff.training.codec_stage:resting_keys", _DENOISER_DOUBTS),
    next_steps=('heterodiff text2image {run} "a prompt"', *ALIGNMENT.next_steps),
)
JOINT = replace(
    TEXT_IMAGE,
    fits=lambda config: config.alignment.joint,
    build="heterodiff.training.recipes.text_image:JointRecipe",
    memory="heterodiff.training.memory_costs:JOINT",
    contrastive=True,
    doubts=(_ALIGNMENT_DOUBTS, _DENOISER_DOUBTS),
)

TASKS: dict[str, Task] = {
    "class-images": CLASS_IMAGES,
    "anomalies": ANOMALIES,
    "vae": VAE,
    "alignment": ALIGNMENT,
    "text-image": TEXT_IMAGE,
    "text-image-joint": JOINT,
}


def recipes() -> list[str]:
    """The values of the key ``recipe``."""
    return list(dict.fromkeys(task.recipe for task in TASKS.values()))


def task_of(config: "RunConfig") -> Task:
    """The row of the run that ``config`` describes."""
    rows = [task for task in TASKS.values() if task.recipe == config.recipe]
    special = (task for task in rows if task.fits is not None and task.fits(config))
    return next(special, None) or next(task for task in rows if task.fits is None)


def task_of_codec(kind: str) -> Task:
    """The row of the runs that train codecs of ``kind``."""
    return next(task for task in TASKS.values() if task.codec == kind)


def loaded(name: str) -> Any:
    """What a row names as ``module:name``."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
