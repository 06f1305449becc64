"""Table of tasks: one row per task, with everything the rest of the package needs to know about it.

A row names objects as ``module:name``, imported on demand (:mod:`heterodiff.lazy`), so that the table itself is light.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heterodiff.config import RunConfig

WITH_MASKS = ("brain-phantom", "volumes")
"""Sources with masks of anomalies."""


@dataclass(frozen=True)
class Task:
    """A kind of run, from its configuration to its report.

    Attributes:
        recipe: value of the key ``recipe``.
        sections: sections of the configuration that the run reads, besides ``data`` and ``training``.
        pipeline: class name of the pipeline in the run folder, as in ``model_index.json``.
        load: (folder, :class:`heterodiff.pipelines.load.Placing`) -> the pipeline.
        try_out: (pipeline, add) tests a finished run on little input, and reports through ``add(passed, name, text)``.
        commands: commands for a finished run, besides ``evaluate``.
        no_classes: end of the error message where the run cannot draw images of classes, with ``{run}``.
        build: (config, data) -> :class:`heterodiff.training.recipes.base.Recipe`.
        memory: the :class:`heterodiff.training.preflight.memory_costs.MemoryTerms`.
        fits: config -> whether the row applies; None for the row of all other runs of ``recipe``.
        defaults: content of a configuration -> the same with the defaults of this recipe filled in.
        codec: value of ``codec.kind`` for runs that use the network trained here.
        contrastive: whether the loss compares the images of a batch, so that accumulation steps change it.
        doubts: each (config, data) -> notes on valid settings that are hardly meant.
        evaluate: (run folder, Request) -> Evaluation, see :mod:`heterodiff.evaluation.runs`.
        next_steps: commands to suggest after training, with ``{run}``.
        metrics: evaluation -> each :class:`heterodiff.report.metrics.MetricTable`, whose rows the terminal shows.
        cards: evaluation -> the headline numbers, each a :class:`heterodiff.report.content.Card`.
        report: :class:`heterodiff.report.files.RunFiles` -> each Section of the report that shows the evaluation.
        first_stage: networks trained first, in a run of their own, whose curves the report shows, too.
        scattered: whether losses scatter between steps, since noise levels are random.
        reproduce: commands to reproduce results, besides ``train`` and ``evaluate``, with ``{run}``.
        demo: (config, run folder, seed) -> last lines to print; demonstrates a finished run.
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
    defaults: str | None = None
    codec: str | None = None
    contrastive: bool = False
    no_classes: str = "draws no images of classes"
    doubts: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    metrics: str | None = None
    cards: str | None = None
    report: str | None = None
    first_stage: str = ""
    scattered: bool = True
    reproduce: tuple[str, ...] = ()
    demo: str | None = None

    def next_lines(self, run: object) -> list[str]:
        """Lines that suggest commands for the finished run in folder ``run``."""
        commands = [command.format(run=run) for command in self.next_steps]
        return [f"{'' if number else 'next':8} {command}" for number, command in enumerate(commands)]


_DENOISER_DOUBTS = "heterodiff.training.recipes.diffusion:doubts"
_ALIGNMENT_DOUBTS = "heterodiff.training.recipes.alignment:doubts"

CLASS_IMAGES = Task(
    recipe="diffusion",
    sections=("codec", "model", "diffusion", "sampling"),
    pipeline="GenerationPipeline",
    load="heterodiff.pipelines.load:read_generation",
    try_out="heterodiff.pipelines.generate:try_out",
    commands=("sample", "edit", "segment", "translate"),
    build="heterodiff.training.recipes.diffusion:build",
    memory="heterodiff.training.preflight.memory_costs:DENOISER",
    evaluate="heterodiff.evaluation.class_images:evaluate",
    defaults="heterodiff.config.networks:condition_defaults",
    doubts=(_DENOISER_DOUBTS,),
    next_steps=("heterodiff sample {run}", "heterodiff evaluate {run}"),
    metrics="heterodiff.report.class_images:metrics",
    cards="heterodiff.report.class_images:cards",
    report="heterodiff.report.class_images:sections",
    reproduce=("heterodiff sample {run} -n 16 --seed 0 --out samples",),
    demo="heterodiff.demo:class_images",
)
ANOMALIES = replace(
    CLASS_IMAGES,
    fits=lambda config: config.data.source in WITH_MASKS,
    sections=(*CLASS_IMAGES.sections, "segmentation"),
    evaluate="heterodiff.evaluation.anomalies:evaluate",
    metrics="heterodiff.report.anomalies:metrics",
    cards="heterodiff.report.anomalies:cards",
    report="heterodiff.report.anomalies:sections",
    demo="heterodiff.demo:find_anomalies",
    next_steps=("heterodiff segment {run} --calibrate", "heterodiff evaluate {run}"),
)
TRANSLATION = replace(
    CLASS_IMAGES,
    fits=lambda config: config.data.condition is not None,
    commands=("translate", "sample", "edit"),
    evaluate="heterodiff.evaluation.translation:evaluate",
    metrics="heterodiff.report.reconstruction:translation_metrics",
    cards=None,
    report="heterodiff.report.reconstruction:translation_sections",
    reproduce=(),
    demo=None,
    next_steps=("heterodiff translate {run} IMAGE", "heterodiff evaluate {run}"),
)
ADAPT = replace(CLASS_IMAGES, recipe="adapt", defaults="heterodiff.config.few_images:adapt_defaults")
"""The short form of a run of recipe ``diffusion``: its defaults make it one."""
VAE = Task(
    recipe="vae",
    sections=("vae",),
    pipeline="ReconstructionPipeline",
    load="heterodiff.pipelines.load:read_reconstruction",
    try_out="heterodiff.pipelines.reconstruct:try_out",
    commands=("encode",),
    no_classes="a VAE, which reconstructs images but draws none; train a run with codec.kind=kl-vae codec.path={run}",
    build="heterodiff.training.recipes.vae:build",
    memory="heterodiff.training.preflight.memory_costs:VAE",
    evaluate="heterodiff.evaluation.vae:evaluate",
    codec="kl-vae",
    doubts=("heterodiff.training.recipes.vae:doubts",),
    next_steps=("heterodiff evaluate {run}", "heterodiff train CONFIG.yaml codec.kind=kl-vae codec.path={run}"),
    metrics="heterodiff.report.reconstruction:vae_metrics",
    report="heterodiff.report.reconstruction:vae_sections",
    scattered=False,
)
CLASSIFIER = Task(
    recipe="classifier",
    sections=("model", "diffusion"),
    pipeline="ClassifierPipeline",
    load="heterodiff.pipelines.load:read_classifier",
    try_out="heterodiff.pipelines.classify:try_out",
    commands=("classify",),
    no_classes="classifies noisy images, but draws none; let it guide a denoiser that finds anomalies: "
    "segmentation.method=classifier-guidance segmentation.classifier={run}",
    build="heterodiff.training.recipes.classifier:build",
    memory="heterodiff.training.preflight.memory_costs:CLASSIFIER",
    evaluate="heterodiff.evaluation.noisy_classes:evaluate",
    next_steps=(
        "heterodiff evaluate {run}",
        "heterodiff train CONFIG.yaml segmentation.method=classifier-guidance segmentation.classifier={run}",
    ),
    metrics="heterodiff.report.noisy_classes:metrics",
    cards="heterodiff.report.noisy_classes:cards",
    report="heterodiff.report.noisy_classes:sections",
)
ALIGNMENT = Task(
    recipe="alignment",
    sections=("text", "alignment"),
    pipeline="TextImagePipeline",
    load="heterodiff.pipelines.load:read_text_image",
    try_out="heterodiff.pipelines.text_to_image:try_out",
    commands=("text2image", "edit", "caption"),
    no_classes='draws images of texts, not of classes; use `heterodiff text2image {run} "a prompt"`',
    build="heterodiff.training.recipes.alignment:AlignmentRecipe",
    memory="heterodiff.training.preflight.memory_costs:ALIGNMENT",
    evaluate="heterodiff.evaluation.captions:evaluate",
    codec="cnn",
    contrastive=True,
    doubts=(_ALIGNMENT_DOUBTS,),
    next_steps=("heterodiff caption {run} PICTURE.png", "heterodiff evaluate {run}"),
    metrics="heterodiff.report.captions:metrics",
    cards="heterodiff.report.captions:cards",
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
    defaults="heterodiff.config.networks:text_image_defaults",
    codec=None,
    contrastive=False,
    doubts=("heterodiff.training.codec_stage:ignored_keys", _DENOISER_DOUBTS),
    next_steps=('heterodiff text2image {run} "a prompt"', *ALIGNMENT.next_steps),
    first_stage="Image codec, text encoder and captioner",
    scattered=True,
    reproduce=('heterodiff text2image {run} "a prompt" --seed 0', *ALIGNMENT.reproduce),
    demo="heterodiff.demo:text_image",
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
    "translation": TRANSLATION,
    "anomalies": ANOMALIES,
    "adapt": ADAPT,
    "vae": VAE,
    "classifier": CLASSIFIER,
    "alignment": ALIGNMENT,
    "text-image": TEXT_IMAGE,
    "text-image-joint": JOINT,
}


def recipes() -> list[str]:
    """Values of the key ``recipe``."""
    return list(dict.fromkeys(task.recipe for task in TASKS.values()))


def task_of(config: "RunConfig") -> Task:
    """Return the row of the run that ``config`` describes."""
    rows = [task for task in TASKS.values() if task.recipe == config.recipe]
    special = (task for task in rows if task.fits is not None and task.fits(config))
    return next(special, None) or next(task for task in rows if task.fits is None)


def task_of_recipe(recipe: str) -> Task:
    """Return the row of ``recipe`` where no more is known of a run, or that of class images for an unknown recipe."""
    rows = (task for task in TASKS.values() if task.recipe == recipe and task.fits is None)
    return next(rows, CLASS_IMAGES)


def task_of_codec(kind: str) -> Task:
    """Return the row of the runs that train codecs of ``kind``."""
    return next(task for task in TASKS.values() if task.codec == kind)


def task_of_pipeline(name: str) -> Task | None:
    """Return the row of the run folders with a pipeline of class ``name``, if any."""
    return next((task for task in TASKS.values() if task.pipeline == name and task.fits is None), None)
