"""Trying a run out before it is started: memory, parameters, and the time that each of its parts takes."""

import gc
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from heterodiff.codecs.scaling import LatentCodec
from heterodiff.config import DataConfig, RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import LoadedData
from heterodiff.data.sources.volumes import slices_folder
from heterodiff.devices import deterministic_kernels, device_name
from heterodiff.errors import CheckpointError, HeterodiffError
from heterodiff.progress import duration
from heterodiff.tasks import task_of
from heterodiff.training.build import build_recipe, explaining, load_run_data
from heterodiff.training.checkpoints.resume import as_begun, check_run_folder
from heterodiff.training.codec_stage import check_denoiser, codec_run
from heterodiff.training.latents import MEASURED_IMAGES
from heterodiff.training.loop import Trainer
from heterodiff.training.optimization import check_training
from heterodiff.training.preflight.findings import Findings, Rows
from heterodiff.training.preflight.latents import check_latent_setup
from heterodiff.training.preflight.memory_plan import memory_check
from heterodiff.training.recipes.base import Recipe

TRIAL = Path("runs/dry-run")
"""Stands for the folder of a run that is tried out; nothing is written there."""
STEPS, ENOUGH_SECONDS = 8, 20.0
"""Training steps that are tried; fewer once those after the first have taken this long."""
TIMED_IMAGES = 64
"""Images that are encoded to time it where the codec is not trained yet."""
HUGE_GB = 1e6
SHARE_FOR_STEPS = 0.95
"""Share of ``training.minutes`` for training steps; the rest is for validation, previews and checkpoints."""
WIDTHS, ENOUGH_STEPS = (32, 64, 128), 4000
"""Base widths for a given time: the largest that leaves this many steps, or else the first."""
COST_OF_DOUBLE = 2
"""A step of twice the width takes at least this many times as long."""


class Trial(NamedTuple):
    """A run in memory, before its first step.

    Attributes:
        data: images of the run, or their stored latents; ``trainer.data`` holds latents of some if the run caches them.
        encoding_seconds: estimated time to encode all images before the first step.
    """

    trainer: Trainer
    recipe: Recipe
    data: LoadedData
    encoding_seconds: float


@dataclass(frozen=True)
class Part:
    """Cost of one training: a run's own, or that of the codec that it trains first.

    Attributes:
        step_seconds: median time of a step, without the first.
        encoding_seconds: time to encode the images once, before the first step.
        loss: of the last step that was tried.
    """

    network: str
    parameters: int
    steps: int
    step_seconds: float
    encoding_seconds: float
    loss: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.encoding_seconds


@dataclass(frozen=True)
class DryRun:
    """Results of :func:`dry_run`: ``rows`` are (name, text), and ``parts`` in the order in which they are trained."""

    spec: ImageSpec
    parts: tuple[Part, ...]
    rows: tuple[tuple[str, str], ...]


def from_scratch(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the run without those of its folders that :func:`train` would refuse, and notes that explain why.

    Trying a run writes nothing, so such folders do not matter to it.
    """
    notes = []
    if config.output is not None:
        try:
            check_run_folder(config.output, as_begun(config), "auto")
            config = as_begun(config)
        except HeterodiffError as error:
            notes.append(f"train would refuse {error}")
            config = config.model_copy(update={"output": None})
    try:
        codec_run(config)
    except HeterodiffError as error:
        notes.append(f"train would refuse {error}")
        config = config.model_copy(update={"codec": config.codec.model_copy(update={"path": TRIAL / "codec"})})
    return config, notes


@contextmanager
def temporary_slices(config: DataConfig) -> Iterator[DataConfig]:
    """Settings with which slices of volumes go to a temporary folder, unless a folder is named or has some already."""
    folder = slices_folder(config)
    if folder is None or config.volumes.cache is not None or folder.is_dir():
        yield config
        return
    with TemporaryDirectory(prefix="heterodiff-", ignore_cleanup_errors=True) as temporary:
        volumes = config.volumes.model_copy(update={"cache": Path(temporary)})
        yield config.model_copy(update={"volumes": volumes})


def trial(config: RunConfig, data: LoadedData | None = None, encoded: int = MEASURED_IMAGES) -> Trial:
    """Build a run in memory; nothing is written but temporary files.

    Args:
        data: of the run, where they are loaded already.
        encoded: training images that are encoded, to check the scale of the latents and for the steps to train on.

    Raises:
        HeterodiffError: as :func:`train`, for anything but the folder that would stop it before the first step.
    """
    config, _ = from_scratch(config)
    check_training(config.training)
    data = load_run_data(config) if data is None else data
    with explaining(config, data.spec), TemporaryDirectory(prefix="heterodiff-") as folder:
        recipe = build_recipe(config, data)
        trainer = Trainer(config.model_copy(update={"output": config.output or TRIAL}), recipe, data)
        encodes = isinstance(recipe.codec, LatentCodec) and data.latents is None
        some = _subset(data, encoded) if encodes else data
        in_memory = config.data.model_copy(update={"memory_limit_gb": HUGE_GB})
        in_folder = config.model_copy(update={"output": Path(folder), "data": in_memory})
        start = time.perf_counter()
        prepared, _ = recipe.before_training(in_folder, some, trainer.hosts, begins=False, quiet=True)
        seconds = time.perf_counter() - start
    if prepared is some:
        return Trial(trainer, recipe, data, 0.0)
    trainer.data = prepared
    return Trial(trainer, recipe, data, seconds / len(some.train) * (len(data.train) + len(data.val)))


def _subset(data: LoadedData, count: int) -> LoadedData:
    """Up to ``count`` training images, evenly spread, and no others."""
    rows = np.linspace(0, len(data.train) - 1, min(count, len(data.train))).astype(int)
    return replace(data, train=data.train.take(rows.tolist()), val=data.val.take([]))


def in_its_minutes(config: RunConfig, data: LoadedData) -> RunConfig:
    """Return the run with the number of steps, and a width if none is given, for which ``training.minutes`` are enough.

    A run without ``training.minutes`` is returned as it is.

    Args:
        data: of the run.

    Raises:
        HeterodiffError: as :func:`trial`.
    """
    if config.training.minutes is None:
        return config
    chooses = config.model.model_channels is None and "model" in task_of(config).sections
    found = config
    for width in WIDTHS if chooses else (None,):
        wider = config
        if width is not None:
            wider = config.model_copy(update={"model": config.model.model_copy(update={"model_channels": width})})
        steps = _steps_in(config.training.minutes, wider, data)
        if width is None or width == WIDTHS[0] or steps >= ENOUGH_STEPS:
            found = wider.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
        if steps < COST_OF_DOUBLE * ENOUGH_STEPS:
            break
    return found


def _steps_in(minutes: float, config: RunConfig, data: LoadedData) -> int:
    """Number of training steps in the given time; the same in all processes."""
    trainer = trial(config, data).trainer
    seconds = time_steps(trainer)[0]
    gc.collect()  # the networks that were tried are in reference cycles
    return max(1, int(SHARE_FOR_STEPS * 60 * minutes / trainer.hosts.largest(seconds)))


def try_run(config: RunConfig, data: LoadedData, findings: Findings, thorough: bool = False) -> tuple[Part, ...]:
    """Try each part of a run, and report what it costs.

    Args:
        config: from :func:`from_scratch`.
        data: of the run, or of the codec that it trains first.
        thorough: also try whether latents can be learned, drawn and decoded.

    Returns:
        The parts that were tried: none from the first one on that does not fit into memory.

    Raises:
        HeterodiffError: as :func:`trial`.
    """
    needed = codec_run(config)
    with TemporaryDirectory(prefix="heterodiff-", ignore_cleanup_errors=True) as folder:
        parts = []
        if needed is not None:
            findings.note(f"{needed.output} holds no finished codec; it is trained first")
            check_denoiser(config, data.spec)
            parts.append(_try_part(needed, data, findings, save=Path(folder)))
            codec = {"path": Path(folder), "training": None, "statistics": "measured"}
            config = config.model_copy(update={"codec": config.codec.model_copy(update=codec)})
        if None not in parts:
            gc.collect()  # the networks of the first part are in reference cycles
            untrained = needed is not None
            parts.append(_try_part(config, data, findings, thorough and not untrained, untrained))
    found = tuple(part for part in parts if part is not None)
    if len(found) == len(parts):
        findings.add(True, "total", _total(found))
    return found


def _try_part(
    config: RunConfig,
    data: LoadedData,
    findings: Findings,
    thorough: bool = False,
    untrained: bool = False,
    save: Path | None = None,
) -> Part | None:
    """Cost of a part; None if it does not fit into memory, where trying it would end this process."""
    try:
        fits, text = memory_check(config, data.spec)
    except CheckpointError:  # networks are missing, which is better explained where they are loaded
        build_recipe(config, data)
        raise
    findings.add(fits, "memory", text)
    if not fits:
        return None
    config = in_its_minutes(config, data)
    tried = trial(config, data, TIMED_IMAGES if untrained else MEASURED_IMAGES)
    recipe: Any = tried.recipe
    step_seconds, loss, steps = time_steps(tried.trainer)
    part = Part(
        recipe.summary,
        sum(p.numel() for p in recipe.model.parameters()),
        config.training.steps,
        step_seconds,
        tried.encoding_seconds,
        loss,
    )
    findings.add(True, "network", f"{part.network}, {part.parameters:,} parameters")
    if thorough and isinstance(recipe.codec, LatentCodec):
        check_latent_setup(config, recipe, tried.data, tried.trainer.device, findings.add)
    else:
        findings.add(math.isfinite(loss), "loss", f"{loss:.4f} at step {steps}")
    if part.encoding_seconds:
        findings.add(True, "encoding", f"about {duration(part.encoding_seconds)} for all images, once")
    time_of_all = f"{part.steps:,} steps take about {duration(part.steps * step_seconds)}"
    findings.add(True, "step", f"{duration(step_seconds)} on {device_name(tried.trainer.device)}; {time_of_all}")
    if save is not None:
        recipe.pipeline().save_pretrained(save, safe_serialization=True)
    return part


def time_steps(trainer: Trainer) -> tuple[float, float, int]:
    """Median seconds of a training step after the first, which may compile; the last loss, and the number of steps."""
    training = trainer.config.training
    seconds: list[float] = []
    loss = math.nan
    with explaining(trainer.config, trainer.data.spec), deterministic_kernels(training.deterministic):
        batches = iter(trainer.feed.loader(trainer.step, trainer.step + STEPS))
        while len(seconds) < STEPS and sum(seconds[1:]) < ENOUGH_SECONDS:
            start = time.perf_counter()
            loss = trainer.step_once(next(batches))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), loss, len(seconds)


def _total(parts: tuple[Part, ...]) -> str:
    seconds = [part.seconds for part in parts]
    summands = f" ({' + '.join(map(duration, seconds))})" if len(parts) > 1 else ""
    return f"about {duration(sum(seconds))}{summands}, without start-up, validation, previews and checkpoints"


def prepare(config: RunConfig, data_config: DataConfig, findings: Findings) -> tuple[RunConfig, LoadedData]:
    """Return the run to give to :func:`try_run` and its data, loaded with the settings ``data_config``.

    Raises:
        HeterodiffError: settings that do not work here, or data that cannot be used.
    """
    config, notes = from_scratch(config)
    for note in notes:
        findings.note(note)
    check_training(config.training)
    return config, load_run_data((codec_run(config) or config).model_copy(update={"data": data_config}))


def dry_run(config: RunConfig) -> DryRun:
    """Load the data and try each part of a run for a few training steps; writes nothing but temporary files.

    Raises:
        HeterodiffError: as :func:`train`, for anything but the folders that would stop it before the first step; or
            a part that does not fit into memory.
    """
    findings = Rows()
    with temporary_slices(config.data) as data_config:
        config, data = prepare(config, data_config, findings)
        spec = data.spec
        shape = f"{spec.channels}x{spec.height}x{spec.width}"
        findings.add(True, "images", f"{shape}, {len(data.train)} to train on, {len(data.val)} held out")
        findings.add(True, "classes", str(len(spec.class_names) or "none"))
        parts = try_run(config, data, findings)
    return DryRun(spec, parts, tuple(findings.rows))


def print_dry_run(result: DryRun) -> None:
    """Print what :func:`dry_run` found."""
    for name, text in result.rows:
        print(f"{name:8} {text}")
    print("nothing was written")
