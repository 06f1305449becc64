"""The demo: the whole way from images to a report, in minutes on a laptop."""

import time
from collections.abc import Sequence
from pathlib import Path

from heterodiff.config import RunConfig
from heterodiff.config_file import load_config
from heterodiff.evaluation.run import evaluate_run, summary_lines
from heterodiff.evaluation.segmentation_run import (
    calibrate_run,
    evaluate_anomalies,
    finds_anomalies,
    segmentation_summary,
)
from heterodiff.evaluation.text_image_run import evaluate_text_image, text_image_summary
from heterodiff.evaluation.vae_run import evaluate_vae, vae_summary
from heterodiff.pipelines.load import load_generation
from heterodiff.training.start import next_steps, train

IMAGES_PER_CLASS = 20
PROMPTS = 200
DEMOS = {"digits": "digits", "radar": "microdoppler_small", "text": "shapes_small", "brain": "phantom_small"}
"""Names of the shipped configurations."""


def run_demo(config_file: Path, out: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """Train the run of ``config_file`` in ``out`` (or go on with it), draw from it, evaluate, report.

    A run on the latents of a VAE trains that in the folder ``<out>_vae`` first, and evaluates it too.

    Args:
        overrides: ``key.path=value``, as for ``heterodiff train``.

    Raises:
        HeterodiffError: ``out`` holds something else, or an override cannot be used.
    """
    start = time.perf_counter()
    config = _demo_config(config_file, out, seed, overrides)
    assert config.output is not None
    out = config.output
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    if config.recipe == "text-image":
        lines = _text_image(config, out, seed)
    elif finds_anomalies(out):
        lines = _anomalies(config, out)
    else:
        lines = _classes(config, out, seed)
    print(f"time     {time.perf_counter() - start:.0f} s")
    for line in lines:
        print(line)


def _demo_config(config_file: Path, out: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    """The run of ``config_file`` in ``out``; what ``overrides`` say comes last."""
    own = [f"output={out}", f"training.seed={seed}"]
    config = load_config(config_file, [*own, *overrides])
    if config.codec.training is not None:
        own.append(f"codec.training.seed={seed}")
    if config.codec.kind == "kl-vae":
        assert config.output is not None
        own.append(f"codec.path={config.output.with_name(f'{config.output.name}_vae')}")
    return load_config(config_file, [*own, *overrides])


def _classes(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run that draws images of classes; the commands to go on with."""
    steps = config.training.steps
    print(f"trained  {steps} steps; drawing and evaluating {IMAGES_PER_CLASS} images a class", flush=True)
    if config.codec.kind == "kl-vae":
        assert config.codec.path is not None
        for line in vae_summary(evaluate_vae(config.codec.path, seed).metrics):
            print(f"vae      {line}")
    evaluation = evaluate_run(out, IMAGES_PER_CLASS, seed)
    for line in summary_lines(evaluation.metrics):
        print(line)
    print(f"samples  {evaluation.picture}\nreport   {evaluation.report}")
    return [f"next     heterodiff sample {out} --class {load_generation(out).class_names[-1]} -n 8 --seed 0"]


def _anomalies(config: RunConfig, out: Path) -> list[str]:
    """Calibrate and evaluate a run that finds anomalies; the commands to go on with."""
    print(f"trained  {config.training.steps} steps; learning the limits of masks, finding anomalies", flush=True)
    for line in calibrate_run(out):
        print(line, flush=True)
    evaluation = evaluate_anomalies(out)
    for line in segmentation_summary(evaluation.metrics):
        print(line)
    print(f"overlays {evaluation.picture}\nreport   {evaluation.report}")
    return next_steps(config)


def _text_image(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run of recipe ``text-image``; the commands to go on with."""
    print(f"trained  {config.training.steps} steps; drawing and reading {PROMPTS} pictures of prompts", flush=True)
    evaluation = evaluate_text_image(out, seed, PROMPTS)
    for line in text_image_summary(evaluation.metrics):
        print(line)
    print(f"pictures {evaluation.picture}\nreport   {evaluation.report}")
    return next_steps(config)
