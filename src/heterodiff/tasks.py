"""The tasks: a row for each, with what every other room needs to know about it.

A row names objects as ``module:name``, imported when asked for (:mod:`heterodiff.lazy`), so the table itself is light.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
        pipeline: class of the pipeline that the run folder holds, as ``model_index.json`` names it.
        load: (folder, :class:`heterodiff.pipelines.load.Placing`) -> the pipeline.
        try_out: (pipeline, add) reports through ``add(passed, name, text)`` what a finished run makes of little input.
        commands: what the run can be used for, beside ``evaluate``.
        no_classes: what to say where images of classes are asked for in vain, with ``{run}``.
        build: (config, data) -> :class:`heterodiff.training.recipes.base.Recipe`.
        memory: the :class:`heterodiff.training.preflight.memory_costs.MemoryTerms`.
        fits: which runs of ``recipe`` the row is for; None for all that no other row is for.
        codec: kind of codec that the run trains for others, see ``codec.kind``.
        contrastive: whether images of a batch are told apart, so that a batch in parts teaches something else.
        doubts: each (config, data) -> notes on settings that work but hardly mean what they say.
        evaluate: (run folder, :class:`heterodiff.evaluation.class_images.Request`) -> (evaluation, its main numbers).
        next_steps: commands to use a finished run with, with ``{run}``.
        cards: evaluation -> the numbers to read first, each (label, value, note).
        report: :class:`heterodiff.report.writing.RunFiles` -> sections of the report that show the evaluation.
        first_stage: the networks that a run of their own trains first, whose curves the report shows too.
        scattered: whether single losses scatter, as noise levels are drawn at random.
        reproduce: commands that use the run again, beside ``train`` and ``evaluate``, with ``{run}``.
        demo: (config, run folder, seed) -> lines to end with; shows what a finished run can do.
    """

    recipe: str
    sections: tuple[str, ...]
    pipeline: str
    load: str
    try_out: str
    commands: tuple[str, ...]
    build: str
    memory: str
    evaluate: str
    fits: "Callable[[RunConfig], bool] | None" = None
    codec: str | None = None
    contrastive: bool = False
    no_classes: str = "draws no images of classes"
    doubts: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    cards: str | None = None
    report: str | None = None
    first_stage: str = ""
    scattered: bool = True
    reproduce: tuple[str, ...] = ()
    demo: str | None = None

    def next_lines(self, run: object) -> list[str]:
        """The commands to use the finished run in folder ``run`` with, a line each."""
        commands = [command.format(run=run) for command in self.next_steps]
        return [f"{'' if number else 'next':8} {command}" for number, command in enumerate(commands)]


_DENOISER_DOUBTS = "heterodiff.training.recipes.diffusion:doubts"
_ALIGNMENT_DOUBTS = "heterodiff.training.recipes.alignment:doubts"

CLASS_IMAGES = Task(
    recipe="diffusion",
    sections=("codec", "model", "diffusion", "sampling"),
    pipeline="GenerationPipeline",
    load="heterodiff.pipelines.load:read_generation",
    try_out="heterodiff.pipelines.try_out:generation",
    commands=("sample", "segment"),
    build="heterodiff.training.recipes.diffusion:build",
    memory="heterodiff.training.preflight.memory_costs:DENOISER",
    evaluate="heterodiff.evaluation.class_images:evaluate_images",
    doubts=(_DENOISER_DOUBTS,),
    next_steps=("heterodiff sample {run}", "heterodiff evaluate {run}"),
    cards="heterodiff.report.class_images:headline_cards",
    report="heterodiff.report.class_images:sections",
    reproduce=("heterodiff sample {run} -n 16 --seed 0 --out samples",),
    demo="heterodiff.evaluation.class_images:demo",
)
ANOMALIES = replace(
    CLASS_IMAGES,
    fits=lambda config: config.data.source in WITH_MASKS,
    sections=(*CLASS_IMAGES.sections, "segmentation"),
    evaluate="heterodiff.evaluation.anomalies:evaluate",
    cards="heterodiff.report.anomalies:segmentation_cards",
    report="heterodiff.report.anomalies:sections",
    demo="heterodiff.evaluation.anomalies:demo",
    next_steps=("heterodiff segment {run} --calibrate", "heterodiff evaluate {run}"),
)
VAE = Task(
    recipe="vae",
    sections=("vae",),
    pipeline="ReconstructionPipeline",
    load="heterodiff.pipelines.load:read_reconstruction",
    try_out="heterodiff.pipelines.try_out:reconstruction",
    commands=("encode",),
    no_classes="a VAE, which reconstructs images but draws none; train a run with codec.kind=kl-vae codec.path={run}",
    build="heterodiff.training.recipes.vae:build",
    memory="heterodiff.training.preflight.memory_costs:VAE",
    evaluate="heterodiff.evaluation.vae:evaluate",
    codec="kl-vae",
    doubts=("heterodiff.training.recipes.vae:doubts",),
    next_steps=("heterodiff evaluate {run}", "heterodiff train CONFIG.yaml codec.kind=kl-vae codec.path={run}"),
    report="heterodiff.report.class_images:vae_sections",
    scattered=False,
)
ALIGNMENT = Task(
    recipe="alignment",
    sections=("text", "alignment"),
    pipeline="TextImagePipeline",
    load="heterodiff.pipelines.load:read_text_image",
    try_out="heterodiff.pipelines.try_out:text_image",
    commands=("text2image", "caption"),
    no_classes='draws images of texts, not of classes; use `heterodiff text2image {run} "a prompt"`',
    build="heterodiff.training.recipes.alignment:AlignmentRecipe",
    memory="heterodiff.training.preflight.memory_costs:ALIGNMENT",
    evaluate="heterodiff.evaluation.captions:evaluate",
    codec="cnn",
    contrastive=True,
    doubts=(_ALIGNMENT_DOUBTS,),
    next_steps=("heterodiff caption {run} PICTURE.png", "heterodiff evaluate {run}"),
    cards="heterodiff.report.captions:text_cards",
    report="heterodiff.report.captions:sections",
    scattered=False,
    reproduce=("heterodiff caption {run} PICTURE.png",),
)
TEXT_IMAGE = replace(
    ALIGNMENT,
    recipe="text-image",
    sections=("codec", "text", "alignment", "model", "diffusion", "sampling"),
    build="heterodiff.training.recipes.text_image:TextImageRecipe",
    memory="heterodiff.training.preflight.memory_costs:DENOISER",
    codec=None,
    contrastive=False,
    doubts=("heterodiff.training.codec_stage:ignored_keys", _DENOISER_DOUBTS),
    next_steps=('heterodiff text2image {run} "a prompt"', *ALIGNMENT.next_steps),
    first_stage="Image codec, text encoder and captioner",
    scattered=True,
    reproduce=('heterodiff text2image {run} "a prompt" --seed 0', *ALIGNMENT.reproduce),
    demo="heterodiff.evaluation.captions:demo",
)
JOINT = replace(
    TEXT_IMAGE,
    fits=lambda config: config.alignment.joint,
    build="heterodiff.training.recipes.text_image:JointRecipe",
    memory="heterodiff.training.preflight.memory_costs:JOINT",
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


def task_of_recipe(recipe: str) -> Task:
    """The row of runs of ``recipe`` where nothing else is known of them; that of class images for an unknown one."""
    rows = (task for task in TASKS.values() if task.recipe == recipe and task.fits is None)
    return next(rows, CLASS_IMAGES)


def task_of_codec(kind: str) -> Task:
    """The row of the runs that train codecs of ``kind``."""
    return next(task for task in TASKS.values() if task.codec == kind)


def task_of_pipeline(name: str) -> Task | None:
    """The row of the folders that hold a pipeline of class ``name``."""
    return next((task for task in TASKS.values() if task.pipeline == name and task.fits is None), None)
