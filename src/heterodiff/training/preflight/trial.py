"""Trying a run out in memory before it is started: shapes, parameters, memory, the time of a step."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import HeterodiffError
from heterodiff.progress import duration
from heterodiff.training.checkpoints.resume import check_run_folder
from heterodiff.training.codec_stage import check_denoiser, codec_run
from heterodiff.training.loop import Trainer
from heterodiff.training.preflight.memory_plan import training_memory_bytes
from heterodiff.training.recipes.base import Recipe
from heterodiff.training.start import build_recipe, check_training, explaining, load_run_data

TRIAL = Path("runs/dry-run")
"""Stands for the folder of a run that is tried out; nothing is written there."""


@dataclass(frozen=True)
class DryRun:
    """What one step of a run would be like: shapes, parameters, estimated memory, measured time."""

    spec: ImageSpec
    train_images: int
    val_images: int
    classes: int
    network: str
    parameters: int
    memory_gb: float
    step_seconds: float
    total_seconds: float
    loss: float
    notes: tuple[str, ...] = ()


def from_scratch(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run without those of its folders that hold something that :func:`train` refuses, and notes of what they hold.

    To try a run out, which writes nothing, such folders are no hindrance.
    """
    notes = []
    if config.output is not None:
        try:
            check_run_folder(config.output, config, "auto")
        except HeterodiffError as error:
            notes.append(f"train would refuse {error}")
            config = config.model_copy(update={"output": None})
    try:
        codec_run(config)
    except HeterodiffError as error:
        notes.append(f"train would refuse {error}")
        config = config.model_copy(update={"codec": config.codec.model_copy(update={"path": TRIAL / "codec"})})
    return config, notes


def trial(config: RunConfig) -> tuple[Trainer, Recipe]:
    """A run in memory, for trying out; nothing is written.

    Raises:
        HeterodiffError: as :func:`train`, for anything but the folder that would stop it before the first step.
    """
    config, _ = from_scratch(config)
    check_training(config)
    data = load_run_data(config)
    with explaining(config, data.spec):
        recipe = build_recipe(config, data)
        config = config.model_copy(update={"output": config.output or TRIAL})
        trainer = Trainer(config, recipe, data)
        without_files = config.model_copy(update={"codec": config.codec.model_copy(update={"cache": False})})
        trainer.data, _ = recipe.before_training(without_files, data, trainer.hosts, begins=False, quiet=True)
    return trainer, recipe


def dry_run(config: RunConfig) -> DryRun:
    """Load the data, build the model, do two training steps in memory and time the second; writes nothing.

    Where the run needs a codec that is still to be trained, this is about the codec's training.

    Raises:
        HeterodiffError: as :func:`train`, for anything but the folders that would stop it before the first step.
    """
    config, notes = from_scratch(config)
    check_training(config)
    if (needed := codec_run(config)) is not None:
        check_denoiser(config, load_run_data(needed).spec)
    return replace(timed_steps(*trial(needed or config)), notes=tuple(notes))


def timed_steps(trainer: Trainer, recipe: Recipe) -> DryRun:
    """Two training steps, the second timed, and what else is to be known before a run."""
    config, data = trainer.config, trainer.data
    with explaining(config, data.spec):
        trainer.step_once()
        start = time.perf_counter()
        loss = trainer.step_once()
    seconds = time.perf_counter() - start
    spec = data.spec
    return DryRun(
        spec=spec,
        train_images=len(data.train),
        val_images=len(data.val),
        classes=len(spec.class_names),
        network=recipe.summary,
        parameters=sum(p.numel() for p in recipe.model.parameters()),
        memory_gb=training_memory_bytes(config, spec) / 1e9,
        step_seconds=seconds,
        total_seconds=seconds * config.training.steps,
        loss=loss,
    )


def print_dry_run(result: DryRun) -> None:
    """Print what :func:`dry_run` found."""
    shape = f"{result.spec.channels}x{result.spec.height}x{result.spec.width}"
    for name, text in (
        ("images", f"{shape}, {result.train_images} to train on, {result.val_images} held out"),
        ("classes", str(result.classes or "none")),
        ("model", f"{result.network}, {result.parameters:,} parameters"),
        ("memory", f"about {result.memory_gb:.2f} GB for a training step"),
        ("step", f"{duration(result.step_seconds)}, loss {result.loss:.4f}"),
        ("total", f"about {duration(result.total_seconds)}"),
    ):
        print(f"{name:8} {text}")
    for note in result.notes:
        print(f"note     {note}")
    print("nothing was written")
