"""Demos: from images to a report in minutes on a laptop."""

import time
from collections.abc import Sequence
from pathlib import Path

from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.errors import ConfigError
from heterodiff.evaluation import calibration, captions, runs
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import load_generation
from heterodiff.progress import duration
from heterodiff.report.writing import summary_lines, write_report
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of
from heterodiff.training.start import train

IMAGES_PER_CLASS = 20


def run_demo(config_file: Path, out: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """Train the run of ``config_file`` in ``out`` or resume it, draw samples, evaluate and write the report.

    A run on the latents of a VAE first trains the VAE in the folder ``<out>_vae``, and evaluates it too.

    Args:
        overrides: ``key.path=value``, as for ``heterodiff train``.

    Raises:
        HeterodiffError: ``out`` holds something else, or an override cannot be used.
    """
    start = time.perf_counter()
    config = _demo_config(config_file, out, seed, overrides)
    assert config.output is not None
    out = config.output
    if (demo := task_of(config).demo) is None:
        raise ConfigError(f"recipe {config.recipe}: has no demo; leave recipe out, or use heterodiff train")
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    lines = loaded(demo)(RunFolder(out).config(), out, seed)
    print(f"time     {duration(time.perf_counter() - start)}")
    for line in lines:
        print(line)


def _demo_config(config_file: Path, out: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of ``config_file`` in ``out``; ``overrides`` come last."""
    own = [f"output={out}", f"training.seed={seed}"]
    config = load_config(config_file, [*own, *overrides])
    if config.codec.training is not None:
        own.append(f"codec.training.seed={seed}")
    if config.codec.kind == "kl-vae":
        assert config.output is not None
        own.append(f"codec.path={config.output.with_name(f'{config.output.name}_vae')}")
    return load_config(config_file, [*own, *overrides])


def class_images(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run that draws images of classes, and the VAE that it was trained with first."""
    print(f"trained  {config.training.steps} steps; evaluating {IMAGES_PER_CLASS} images of each class", flush=True)
    if config.codec.kind == "kl-vae":
        assert config.codec.path is not None
        _evaluated(config.codec.path, runs.Request(seed=seed), prefix="vae      ")
    _evaluated(out, runs.Request(IMAGES_PER_CLASS, seed=seed))
    return [f"next     heterodiff sample {out} --class {load_generation(out).class_names[-1]} -n 8 --seed 0"]


def find_anomalies(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Calibrate and evaluate a run that finds anomalies."""
    print(f"trained  {config.training.steps} steps; learning thresholds, finding anomalies", flush=True)
    for line in calibration.calibrate_run(out):
        print(line, flush=True)
    _evaluated(out, runs.Request(seed=seed))
    return task_of(config).next_lines(out)


def text_image(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run on captioned images."""
    print(f"trained  {config.training.steps} steps; evaluating pictures of {captions.PROMPTS} prompts", flush=True)
    _evaluated(out, runs.Request(seed=seed))
    return task_of(config).next_lines(out)


def _evaluated(run: Path, request: runs.Request, prefix: str = "") -> None:
    """Evaluate a run, write its report and print the main numbers."""
    found = runs.evaluate_task(run, request)
    report = write_report(run)
    for line in summary_lines(found.metrics):
        print(f"{prefix}{line}")
    if not prefix:
        print(f"picture  {found.picture}\nreport   {report}")
