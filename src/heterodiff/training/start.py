"""From a configuration to a trained run folder: checks first, then the loop."""

import gc
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import heterodiff
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import LoadedData, image_captions, load_data, with_captions
from heterodiff.data.volumes import known_fingerprint
from heterodiff.devices import device_name
from heterodiff.errors import (
    CheckpointError,
    ConfigError,
    HeterodiffError,
    RunError,
    compile_error,
    is_out_of_memory,
)
from heterodiff.models.variants import VARIANTS
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.run_folder import RunFolder
from heterodiff.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, read_newest
from heterodiff.training.codec_stage import check_denoiser, codec_run, resting_keys
from heterodiff.training.latents import prepare_latents, stored_latents
from heterodiff.training.loop import OnStep, Trainer, TrainingResult, check_batch, learning_rate_at
from heterodiff.training.memory_plan import advice, check_fits, training_memory_bytes
from heterodiff.training.precision import precision_of
from heterodiff.training.recipes.alignment import AlignmentRecipe
from heterodiff.training.recipes.base import Recipe
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from heterodiff.training.recipes.text_image import JointRecipe, TextImageRecipe
from heterodiff.training.recipes.vae import VAERecipe
from heterodiff.training.run_folder import check_run_folder

TEXT_RECIPES = (AlignmentRecipe, TextImageRecipe)
MAX_TEXT_NOTES = 3
TRIAL = Path("runs/dry-run")
"""Stands for the folder of a run that is tried out; nothing is written there."""
WITH_MASKS = ("brain-phantom", "volumes")
"""Sources of images whose anomalies can be found."""


def train(
    config: RunConfig,
    resume: str = "auto",
    stop_after: int | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
    data: LoadedData | None = None,
) -> TrainingResult:
    """Train the run that ``config`` describes, or go on with it where it stopped.

    Args:
        config: with ``output`` set to the run folder.
        resume: ``auto``: from the newest checkpoint in the folder, if there is one; ``never``: refuse a folder that
            holds a run; a path: from that checkpoint of the run.
        stop_after: stop, with a checkpoint, once so many steps are done in all.
        on_step: called after each step with its number (1-based) and loss.
        quiet: print nothing.
        data: of the run, where they are loaded already.

    Raises:
        HeterodiffError: input that cannot be used; found before the first step, and nothing is lost.
    """
    if config.output is None:
        raise RunError("output: no run folder given; set output=runs/<name>")
    folder = config.output
    resuming = check_run_folder(folder, config, resume)
    checkpoint, notes = _find_checkpoint(folder, resume) if resuming else (None, [])
    if not resuming and resume not in ("auto", "never"):
        raise RunError(f"--resume {resume}: {folder} holds no run to go on with; set output= to the run's folder")
    if checkpoint is not None:
        notes = [*notes, *_new_length(folder, config, checkpoint.step)]
    current = checkpoint is not None and RunFolder(folder).weights_step() == checkpoint.step
    if checkpoint is not None and current and checkpoint.step >= config.training.steps:
        if is_main_process():
            RunFolder(folder).save_config(config)  # how the run is used may have changed
        return TrainingResult(checkpoint.step, None, 0.0)
    _check_training(config)
    if (needed := codec_run(config)) is not None:
        _check_training(needed)
        data = load_run_data(needed)
        check_denoiser(config, data.spec)
        result = train(needed, quiet=quiet, data=data)
        if result.step < needed.training.steps or result.stopped_by is not None:
            return result
        gc.collect()  # what trained the codec refers to itself, and waits to be freed
        if resuming:
            data = None  # the run has a split of its own, and maybe latents
    data = load_run_data(config) if data is None else data
    with _explaining(config, data.spec):
        recipe = build_recipe(config, data)
        trainer = Trainer(config, recipe, data)
    trainer.accelerator.wait_for_everyone()  # all processes have looked at the folder before one writes to it
    alone = RunFolder(folder).locked() if trainer.accelerator.is_main_process else nullcontext()
    with alone, _explaining(config, data.spec):
        if isinstance(recipe, DiffusionRecipe):  # images that were encoded need no memory any more
            data = trainer.data = prepare_latents(config, recipe, data, trainer.accelerator, quiet)
        if checkpoint is None and isinstance(recipe, TextImageRecipe):
            error = recipe.fit_guess(data, quiet or not trainer.accelerator.is_main_process)
            notes = [*notes, f"a text's map can be guessed with {error:.2f} of the error of the mean map"]
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            if not current:  # stopped between the checkpoint and the weights made from it
                trainer.save_weights()
        if trainer.accelerator.is_main_process:
            _write_facts(folder, config, data, trainer)
        if not quiet and trainer.accelerator.is_main_process:
            _say_start(config, data, trainer, notes)
        return trainer.run(stop_after, on_step, quiet)


def _check_training(config: RunConfig) -> None:
    """Refuse settings that cannot work on this machine before data are read.

    Raises:
        ConfigError: a precision that the device does not have, or batches that do not split.
    """
    precision_of(config.training)
    check_batch(config.training, int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def _explaining(config: RunConfig, spec: ImageSpec) -> Iterator[None]:
    """Say which settings help if memory runs out or compilation fails; other errors stay as they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explained = _explained(config, spec, error)
        if explained is None:
            raise
        raise explained from error


def _explained(config: RunConfig, spec: ImageSpec, error: Exception) -> HeterodiffError | None:
    if (failed := compile_error(error, "training.compile=true")) is not None or not is_out_of_memory(error):
        return failed
    _, text = advice(config, spec, 0.9 * training_memory_bytes(config, spec))  # it was too much, whatever was free
    return RunError(f"out of memory: a training step needs {text}; checkpoints are untouched")


def is_main_process() -> bool:
    """Whether this process is the one of several that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def build_recipe(config: RunConfig, data: LoadedData) -> Recipe:
    """The recipe of a run, its networks with initial weights.

    Raises:
        ConfigError, CheckpointError: no network for these images, or a VAE that cannot be used.
    """
    spec = data.spec
    if config.data.random_crop >= min(spec.height, spec.width):
        raise ConfigError(
            f"data.random_crop={config.data.random_crop}: expected less than the image size, {spec.height}x{spec.width}"
        )
    check_fits(config, spec)
    torch.manual_seed(config.training.seed)  # initial weights
    if config.recipe == "vae":
        if data.latents is not None:
            raise ConfigError("recipe vae needs images, found data.source=latents; name the images it is to encode")
        return VAERecipe(config, spec, data.train, data.val)
    if config.recipe == "alignment":
        return AlignmentRecipe(config, data)
    if config.recipe == "text-image":
        return JointRecipe(config, data) if config.alignment.joint else TextImageRecipe(config, data)
    if data.latents is not None and config.codec.kind != "kl-vae":
        vae = data.latents.vae_path
        raise ConfigError(f"data.source=latents needs the VAE they come from: set codec.kind=kl-vae codec.path={vae}")
    return DiffusionRecipe(config, spec)


def load_run_data(config: RunConfig) -> LoadedData:
    """The data of a run; with the split and value range saved in its folder, if it has them already."""
    folder = config.output
    if folder is not None and (latents := stored_latents(config)) is not None:
        captions = image_captions(config.data) if config.codec.kind == "cnn" else None
        return latents if captions is None else with_captions(latents, captions)
    run = None if folder is None else RunFolder(folder)
    if run is not None and run.split_file.is_file() and run.data_file.is_file():
        check_preprocessing(run.path, known_fingerprint(config.data))
        return load_data(config.data, split=run.split(), spec=run.spec())
    return load_data(config.data)


def _find_checkpoint(folder: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    if resume != "auto":
        path = Path(resume)
        known = list_checkpoints(RunFolder(folder).checkpoints)
        if path.resolve() not in [p.resolve() for p in known]:
            names = ", ".join(map(str, known)) or "none"
            raise CheckpointError(f"--resume {path}: not a checkpoint of this run; it has: {names}")
        return read_checkpoint(path), []
    found = read_newest(RunFolder(folder).checkpoints)
    if found is None:
        return None, []
    checkpoint, problems = found
    return checkpoint, [f"{problem}; using the checkpoint of step {checkpoint.step} instead" for problem in problems]


def _new_length(folder: Path, config: RunConfig, step: int) -> list[str]:
    """A note, if a run that goes on after ``step`` is to have another number of steps than before.

    Raises:
        RunError: it is to be shorter than ``step``.
    """
    before, now = RunFolder(folder).config().training, config.training
    if now.steps < step:
        raise RunError(
            f"{folder}: {step} steps are done, more than training.steps={now.steps}; set it to at least {step}"
        )
    if now.steps == before.steps:
        return []
    note = f"training.steps is {now.steps}, before {before.steps}"
    old, new = (learning_rate_at(step, training) for training in (before, now))
    if old != new:
        note += f"; the learning rate follows the schedule of the new length from here: {new:.2g} in place of {old:.2g}"
    return [note]


def _write_facts(folder: Path, config: RunConfig, data: LoadedData, trainer: Trainer) -> None:
    run = RunFolder(folder)
    facts = {"spec": data.spec.to_dict(), "train": len(data.train), "val": len(data.val)}
    run.save_data(data.split_to_dict(), facts | {"preprocessing": known_fingerprint(config.data)})
    run.save_machine(_facts(trainer, data))
    run.save_config(config)


def _facts(trainer: Trainer, data: LoadedData) -> dict[str, Any]:
    model = trainer.recipe.model
    parameters = sum(p.numel() for p in model.parameters())
    device = device_name(trainer.device)
    spec = data.spec
    return {
        "versions": {
            "heterodiff": heterodiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "parameters": parameters,
        "model_summary": f"{trainer.recipe.summary}, {parameters / 1e6:.2f} M parameters, "
        f"{spec.channels}x{spec.height}x{spec.width} images",
        "device": device,
        "class_names": list(spec.class_names),
        "images": {"train": len(data.train), "val": len(data.val)},
        "command": " ".join(["heterodiff", *sys.argv[1:]]),
    }


def _doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Settings that work but hardly mean what they say."""
    doubts = []
    if len(data.train) < config.training.batch_size:
        doubts.append(f"{len(data.train)} training images are fewer than training.batch_size; images repeat in a batch")
    if config.recipe == "alignment" or config.alignment.joint:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if config.training.batch_size == config.training.accumulation_steps * processes:
            doubts.append("one image at a time: with nothing to tell it from, the contrastive loss teaches nothing")
    if config.recipe == "alignment":
        return doubts
    if config.recipe == "text-image" and config.codec.path is not None and config.codec.training is None:
        doubts += resting_keys(config)
    if config.recipe == "vae":
        if config.vae.init_from is not None:
            doubts.append(
                f"the architecture is that of vae.init_from={config.vae.init_from}; vae's own keys for it rest"
            )
        return doubts
    conditional = data.spec.class_names or data.captions
    if conditional and config.diffusion.p_uncond == 0 and config.sampling.guidance_scale != 1:
        doubts.append("diffusion.p_uncond=0: the unconditional branch is not trained, so guidance will not work")
    if conditional and config.diffusion.p_uncond == 1:
        doubts.append("diffusion.p_uncond=1: the condition is never shown to the network")
    hybrid = config.model.variant in VARIANTS and config.model.variant != "unet"
    if hybrid and config.model.channel_mult is not None and len(config.model.channel_mult) < 2:
        doubts.append(f"model.channel_mult has one level, so {config.model.variant} has no hybrid block: it is a unet")
    return doubts


def next_steps(config: RunConfig) -> list[str]:
    """Commands to use a finished run with, a line each."""
    run = config.output
    if config.recipe in ("text-image", "alignment"):
        caption = f"         heterodiff caption {run} PICTURE.png"
        if config.recipe == "alignment":
            return [f"next{caption[4:]}", f"         heterodiff evaluate {run}"]
        return [f'next     heterodiff text2image {run} "a prompt"', caption, f"         heterodiff evaluate {run}"]
    if config.recipe == "vae":
        use = f"heterodiff train CONFIG.yaml codec.kind=kl-vae codec.path={run}"
        return [f"next     heterodiff evaluate {run}", f"         {use}"]
    if config.data.source in WITH_MASKS:
        return [f"next     heterodiff segment {run} --calibrate", f"         heterodiff evaluate {run}"]
    return [f"next     heterodiff sample {run}", f"         heterodiff evaluate {run}"]


def _say_start(config: RunConfig, data: LoadedData, trainer: Trainer, notes: list[str]) -> None:
    spec = data.spec
    texts = sum(map(len, data.captions))
    condition = f"{texts} captions" if texts else f"{len(spec.class_names) or 'no'} classes"
    print(
        f"data     {len(data.train)} training and {len(data.val)} held-out images, "
        f"{spec.channels}x{spec.height}x{spec.width}, {condition}"
    )
    of_texts = trainer.recipe.captions.warnings if isinstance(trainer.recipe, TEXT_RECIPES) else []
    for warning in [*data.warnings, *of_texts[:MAX_TEXT_NOTES]]:
        print(f"note     {warning}")
    if len(of_texts) > MAX_TEXT_NOTES:
        print(f"note     {len(of_texts) - MAX_TEXT_NOTES} more captions like these")
    for name, reason in data.skipped[:10]:
        print(f"skipped  {name}: {reason}")
    if len(data.skipped) > 10:
        print(f"skipped  {len(data.skipped) - 10} more; `heterodiff check` lists them")
    for note in [*notes, *_doubts(config, data)]:
        print(f"note     {note}")
    parameters = sum(p.numel() for p in trainer.recipe.model.parameters())
    print(f"model    {trainer.recipe.summary}, {parameters:,} parameters, on {trainer.device}")
    print(f"run      {config.output}" + (f", going on from step {trainer.step}" if trainer.step else ""), flush=True)


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
    total_hours: float
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
    _check_training(config)
    data = load_run_data(config)
    with _explaining(config, data.spec):
        recipe = build_recipe(config, data)
        config = config.model_copy(update={"output": config.output or TRIAL})
        trainer = Trainer(config, recipe, data)
        if isinstance(recipe, DiffusionRecipe):
            without_files = config.model_copy(update={"codec": config.codec.model_copy(update={"cache": False})})
            trainer.data = prepare_latents(without_files, recipe, data, trainer.accelerator, quiet=True)
    return trainer, recipe


def dry_run(config: RunConfig) -> DryRun:
    """Load the data, build the model, do two training steps in memory and time the second; writes nothing.

    Where the run needs a codec that is still to be trained, this is about the codec's training.

    Raises:
        HeterodiffError: as :func:`train`, for anything but the folders that would stop it before the first step.
    """
    config, notes = from_scratch(config)
    _check_training(config)
    if (needed := codec_run(config)) is not None:
        check_denoiser(config, load_run_data(needed).spec)
    return replace(timed_steps(*trial(needed or config)), notes=tuple(notes))


def timed_steps(trainer: Trainer, recipe: Recipe) -> DryRun:
    """Two training steps, the second timed, and what else is to be known before a run."""
    config, data = trainer.config, trainer.data
    with _explaining(config, data.spec):
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
        total_hours=seconds * config.training.steps / 3600,
        loss=loss,
    )


def print_dry_run(result: DryRun) -> None:
    """Print what :func:`dry_run` found."""
    shape = f"{result.spec.channels}x{result.spec.height}x{result.spec.width}"
    minutes = result.total_hours * 60
    for name, text in (
        ("images", f"{shape}, {result.train_images} to train on, {result.val_images} held out"),
        ("classes", str(result.classes or "none")),
        ("model", f"{result.network}, {result.parameters:,} parameters"),
        ("memory", f"about {result.memory_gb:.2f} GB for a training step"),
        ("step", f"{result.step_seconds:.2f} s, loss {result.loss:.4f}"),
        ("total", f"about {minutes:.0f} minutes" if minutes < 120 else f"about {minutes / 60:.1f} hours"),
    ):
        print(f"{name:8} {text}")
    for note in result.notes:
        print(f"note     {note}")
    print("nothing was written")
