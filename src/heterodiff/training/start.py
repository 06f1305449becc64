"""From a configuration to a trained run folder: checks first, then the loop."""

import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import heterodiff
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import LoadedData, image_captions, load_data, with_captions
from heterodiff.data.sources.volumes import known_fingerprint
from heterodiff.devices import deterministic_kernels, device_name
from heterodiff.errors import (
    CheckpointError,
    ConfigError,
    HeterodiffError,
    RunError,
    compile_error,
    is_out_of_memory,
)
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of
from heterodiff.training.checkpoints.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, read_newest
from heterodiff.training.checkpoints.resume import check_run_folder
from heterodiff.training.codec_stage import check_denoiser, codec_run
from heterodiff.training.latents import stored_latents
from heterodiff.training.loop import OnStep, Trainer, TrainingResult, check_batch, learning_rate_at
from heterodiff.training.precision import precision_of
from heterodiff.training.preflight.memory_plan import advice, check_fits, training_memory_bytes
from heterodiff.training.recipes.base import Recipe

MAX_TEXT_NOTES = 3


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
    check_training(config)
    if (needed := codec_run(config)) is not None:
        check_training(needed)
        data = load_run_data(needed)
        check_denoiser(config, data.spec)
        result = train(needed, quiet=quiet, data=data)
        if result.step < needed.training.steps or result.stopped_by is not None:
            return result
        gc.collect()  # what trained the codec refers to itself, and waits to be freed
        if resuming:
            data = None  # the run has a split of its own, and maybe latents
    data = load_run_data(config) if data is None else data
    with explaining(config, data.spec):
        recipe = build_recipe(config, data)
        trainer = Trainer(config, recipe, data)
    trainer.accelerator.wait_for_everyone()  # all processes have looked at the folder before one writes to it
    alone = RunFolder(folder).locked() if trainer.accelerator.is_main_process else nullcontext()
    with alone, explaining(config, data.spec), deterministic_kernels(config.training.deterministic):
        data, found = recipe.before_training(config, data, trainer.hosts, checkpoint is None, quiet)
        trainer.data, notes = data, [*notes, *found]  # images that were encoded need no memory any more
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            if not current:  # stopped between the checkpoint and the weights made from it
                trainer.save_weights()
        if trainer.accelerator.is_main_process:
            _write_facts(folder, config, data, trainer)
        if not quiet and trainer.accelerator.is_main_process:
            _say_start(config, data, trainer, notes)
        return trainer.run(stop_after, on_step, quiet)


def check_training(config: RunConfig) -> None:
    """Refuse settings that cannot work on this machine before data are read.

    Raises:
        ConfigError: a precision that the device does not have, or batches that do not split.
    """
    precision_of(config.training)
    check_batch(config.training, int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def explaining(config: RunConfig, spec: ImageSpec) -> Iterator[None]:
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
    recipe: Recipe = loaded(task_of(config).build)(config, data)
    return recipe


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
    return doubts + [note for name in task_of(config).doubts for note in loaded(name)(config, data)]


def next_steps(config: RunConfig) -> list[str]:
    """Commands to use a finished run with, a line each."""
    return task_of(config).next_lines(config.output)


def _say_start(config: RunConfig, data: LoadedData, trainer: Trainer, notes: list[str]) -> None:
    spec = data.spec
    texts = sum(map(len, data.captions))
    condition = f"{texts} captions" if texts else f"{len(spec.class_names) or 'no'} classes"
    print(
        f"data     {len(data.train)} training and {len(data.val)} held-out images, "
        f"{spec.channels}x{spec.height}x{spec.width}, {condition}"
    )
    of_texts = trainer.recipe.warnings
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
