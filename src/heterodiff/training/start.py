"""Training a run from its configuration: checks first, then the loop."""

import gc
import platform
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import heterodiff
from heterodiff.config import RunConfig
from heterodiff.data.sources import LoadedData
from heterodiff.data.sources.volumes import known_fingerprint
from heterodiff.devices import deterministic_kernels, device_name
from heterodiff.errors import RunError
from heterodiff.lazy import loaded
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of
from heterodiff.training.build import build_recipe, explaining, load_run_data
from heterodiff.training.checkpoints.checkpoint import RECIPE
from heterodiff.training.checkpoints.resume import (
    as_begun,
    check_run_folder,
    find_checkpoint,
    new_length,
)
from heterodiff.training.codec_stage import check_denoiser, codec_run
from heterodiff.training.loop import OnStep, Trainer, TrainingResult
from heterodiff.training.optimization import check_training
from heterodiff.training.preflight.trial import in_its_minutes
from heterodiff.training.processes import is_main_process
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from heterodiff.training.recipes.initial import refuse_other_arguments

MAX_TEXT_NOTES, MAX_SKIPPED = 3, 10


def train(
    config: RunConfig,
    resume: str = "auto",
    stop_after: int | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
    data: LoadedData | None = None,
) -> TrainingResult:
    """Train the run that ``config`` describes, or resume it where it stopped.

    Args:
        config: with ``output`` set to the run folder.
        resume: ``auto``: from the newest checkpoint in the folder, if there is one; ``never``: refuse a folder that
            holds a run; ``weights-only``: from the newest undamaged weights, with a new optimiser; a path: from that
            checkpoint of the run.
        stop_after: stop, with a checkpoint, once this number of steps is done in all.
        on_step: called after each step with its number (1-based) and loss.
        quiet: print nothing.
        data: of the run, if they are loaded already.

    Raises:
        HeterodiffError: input that cannot be used; found before the first step, and nothing is lost.
    """
    if config.output is None:
        raise RunError("output: no run folder given; set output=runs/<name>")
    run = RunFolder(config.output)
    config = as_begun(config)
    resuming = check_run_folder(run.path, config, resume)
    if not resuming and resume not in ("auto", "never"):
        raise RunError(f"--resume {resume}: {run} holds no run to go on with; set output= to the run's folder")
    checkpoint, notes = find_checkpoint(run, resume) if resuming else (None, [])
    problem = run.facts_problem() if checkpoint is not None else None
    if problem is not None:
        notes.append(f"{problem.partition(';')[0]}; made again from the images")
    if quiet and is_main_process():
        for note in notes:
            print(f"note     {note}", file=sys.stderr)
    if checkpoint is not None:
        notes += new_length(run, config, checkpoint.step)
    current = checkpoint is not None and run.sound_step() == checkpoint.step
    if checkpoint is not None and current and problem is None and checkpoint.step >= config.training.steps:
        if is_main_process():
            run.save_config(config)  # how the run is used may have changed
        return TrainingResult(checkpoint.step, config.training.steps, None, 0.0)
    check_training(config.training)
    if (needed := codec_run(config)) is not None:
        check_training(needed.training)
        data = load_run_data(needed)
        check_denoiser(config, data.spec)
        result = train(needed, quiet=quiet, data=data)
        if result.step < result.steps or result.stopped_by is not None:
            return result
        gc.collect()  # the networks that trained the codec are in reference cycles
        if resuming:
            data = None  # the run has a split of its own, and maybe latents
    data = load_run_data(config) if data is None else data
    if not resuming:
        config = in_its_minutes(config, data)
    with explaining(config, data.spec):
        recipe = build_recipe(config, data)
        trainer = Trainer(config, recipe, data)
    main = trainer.accelerator.is_main_process
    trainer.accelerator.wait_for_everyone()  # all processes have looked at the folder before one writes to it
    alone = run.locked() if main else nullcontext()
    with alone, explaining(config, data.spec), deterministic_kernels(config.training.deterministic):
        begins = checkpoint is None or RECIPE not in checkpoint.tensors
        data, found = recipe.before_training(config, data, trainer.hosts, begins, quiet)
        trainer.data = data  # images that were encoded need no memory any more
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            if not current:  # stopped between the checkpoint and the weights made from it
                trainer.save_weights()
        if main:
            _write_facts(run, trainer)
            if not quiet:
                _print_start(trainer, [*notes, *found])
        return trainer.run(stop_after, on_step, quiet)


def begin_with(
    config: RunConfig, data: LoadedData, weights: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> list[str]:
    """Make the folder of a run whose denoiser has ``weights`` before its first step, to use as it is or to train on.

    Args:
        config: the run; ``config.output`` is its folder, which is empty or not there yet.
        data: of the run.
        arguments: of the network that the weights are from, which the configuration has to give, too.

    Returns:
        Notes to print.

    Raises:
        HeterodiffError: as :func:`train`; nothing of the folder is left.
        ConfigError: an argument that the configuration cannot hold.
    """
    assert config.output is not None
    run = RunFolder(config.output)
    check_training(config.training)
    config = in_its_minutes(config, data)
    recipe: DiffusionRecipe = loaded(task_of(config).build)(config, data)
    refuse_other_arguments(arguments, recipe.model)
    recipe.model.load_state_dict(weights)
    trainer = Trainer(config, recipe, data)
    try:
        with run.locked():
            trainer.data, notes = recipe.before_training(config, data, trainer.hosts, begins=True, quiet=False)
            trainer.save()
            _write_facts(run, trainer)  # last: a folder without a configuration is no run, and starts from nothing
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return notes


def _write_facts(run: RunFolder, trainer: Trainer) -> None:
    config, data, spec = trainer.config, trainer.data, trainer.data.spec
    counts = {"train": len(data.train), "val": len(data.val)}
    facts = {"spec": spec.to_dict(), **counts, "preprocessing": known_fingerprint(config.data)}
    run.save_config(config)  # first: a folder without it is no run
    run.save_data(data.split_to_dict(), facts)
    parameters = _parameters(trainer)
    versions = {"heterodiff": heterodiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
    machine: dict[str, Any] = {
        "versions": versions,
        "parameters": parameters,
        "model_summary": f"{trainer.recipe.summary}, {parameters / 1e6:.2f} M parameters, "
        f"{spec.channels}x{spec.height}x{spec.width} images",
        "device": device_name(trainer.device),
        "class_names": list(spec.class_names),
        "images": counts,
        "command": " ".join(["heterodiff", *sys.argv[1:]]),
    }
    run.write_json(run.machine_file, machine, ensure_ascii=False)


def _parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.recipe.model.parameters())


def _doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Notes on settings that work but are hardly meant."""
    doubts = []
    if len(data.train) < config.training.batch_size:
        doubts.append(f"{len(data.train)} training images are fewer than training.batch_size; images repeat in a batch")
    return doubts + [note for name in task_of(config).doubts for note in loaded(name)(config, data)]


def next_steps(config: RunConfig) -> list[str]:
    """Commands to use a finished run with, a line each."""
    return task_of(config).next_lines(config.output)


def _print_start(trainer: Trainer, notes: list[str]) -> None:
    config, data, spec = trainer.config, trainer.data, trainer.data.spec
    texts = sum(map(len, data.captions))
    condition = f"{texts} captions" if texts else f"{len(spec.class_names) or 'no'} classes"
    shape = f"{spec.channels}x{spec.height}x{spec.width}"
    print(f"data     {len(data.train)} training and {len(data.val)} held-out images, {shape}, {condition}")
    of_texts = trainer.recipe.warnings
    for warning in [*data.warnings, *of_texts[:MAX_TEXT_NOTES]]:
        print(f"note     {warning}")
    if len(of_texts) > MAX_TEXT_NOTES:
        print(f"note     {len(of_texts) - MAX_TEXT_NOTES} more captions like these")
    for name, reason in data.skipped[:MAX_SKIPPED]:
        print(f"skipped  {name}: {reason}")
    if len(data.skipped) > MAX_SKIPPED:
        print(f"skipped  {len(data.skipped) - MAX_SKIPPED} more; `heterodiff check` lists them")
    for note in [*notes, *_doubts(config, data)]:
        print(f"note     {note}")
    print(f"model    {trainer.recipe.summary}, {_parameters(trainer):,} parameters, on {trainer.device}")
    print(f"run      {config.output}" + (f", going on from step {trainer.step}" if trainer.step else ""), flush=True)
