"""``heterodiff check``: would this configuration, folder of images or run work? Each answer with its numbers."""

import math
from pathlib import Path
from typing import Any, cast

from heterodiff.codecs.scaling import LatentCodec
from heterodiff.config import DataConfig, RunConfig
from heterodiff.config.file import apply_override, load_config, parse_config
from heterodiff.data.check import DataSummary, check_data
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import load_data
from heterodiff.data.sources.recognise import source_hint
from heterodiff.devices import default_device, free_memory
from heterodiff.errors import HeterodiffError, RunError
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import load, pipeline_task
from heterodiff.progress import duration
from heterodiff.run_folder import RunFolder
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.codec_stage import check_denoiser, codec_run
from heterodiff.training.preflight.latents import check_latent_setup
from heterodiff.training.preflight.memory_plan import advice
from heterodiff.training.preflight.trial import from_scratch, timed_steps, trial

MAX_LISTED = 50


class Findings:
    """Prints one line a check and remembers whether any failed."""

    def __init__(self) -> None:
        self.passed = True

    def add(self, passed: bool, name: str, text: str) -> None:
        self.passed &= passed
        print(f"{'pass' if passed else 'FAIL'}  {name:10} {text}")


def check_target(target: Path, overrides: list[str]) -> bool:
    """Check a configuration file, a folder of images, or a run folder, and print what was found.

    Returns:
        Whether everything passed.

    Raises:
        HeterodiffError: ``target`` is none of these.
    """
    findings = Findings()
    if RunFolder(target).has_config or RunFolder(target).index_file.is_file():
        _check_run(target, findings)
    elif target.is_dir() or target.suffix == ".npz":
        content: dict[str, Any] = {"data": {"source": "images", "path": str(target)}}
        for override in overrides:
            apply_override(content, override)
        config = parse_config(content).data
        _note_source(config)
        _report_data(config, check_data(config), findings)
    elif target.is_file():
        _check_config(load_config(target, overrides), findings)
    else:
        raise RunError(f"{target}: no such configuration file, folder of images or run folder")
    return findings.passed


def _note_source(config: DataConfig) -> None:
    if hint := source_hint(config):
        print(f"note  {'source':10} {hint}", flush=True)


def _report_data(config: DataConfig, summary: DataSummary, findings: Findings) -> None:
    spec = summary.spec
    count = sum(summary.class_counts.values())
    shape = f"{spec.channels}x{spec.height}x{spec.width}" if spec else "see below"
    findings.add(count > 0, "images", f"{count} usable; each {shape}; stored as {_list(summary.dtypes)}")
    sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in summary.sizes)
    findings.add(True, "sizes", f"height x width: {sizes}")
    classes = ", ".join(f"{name or 'unlabelled'} {n}" for name, n in summary.class_counts.items())
    if summary.captions:
        findings.add(True, "captions", f"{summary.captions} of {count} images")
    else:
        findings.add(True, "classes", classes or "none")
    if math.isfinite(summary.mean):
        text = f"{summary.minimum:g} to {summary.maximum:g}, mean {summary.mean:.4g}, std {summary.std:.4g}"
        findings.add(
            True,
            "values",
            text + (f"; {spec.value_range[0]:g} becomes 0 and {spec.value_range[1]:g} 1" if spec else ""),
        )
    fatal = config.on_bad == "error"
    for finding in summary.bad[:MAX_LISTED]:
        findings.add(not fatal, "bad file", f"{finding.name}: {finding.problem}")
    if len(summary.bad) > MAX_LISTED:
        findings.add(not fatal, "bad files", f"{len(summary.bad) - MAX_LISTED} more")
    for problem in summary.problems:
        findings.add(False, "data", problem)
    for warning in summary.warnings:
        print(f"note  {'':10} {warning}")


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in counts.items()) or "nothing"


def _check_config(config: RunConfig, findings: Findings) -> None:
    if config.data.source == "latents":
        spec = _report_latents(config.data, findings)
    else:
        _note_source(config.data)
        summary = check_data(config.data)
        _report_data(config.data, summary, findings)
        if not findings.passed or summary.spec is None:
            return
        spec = summary.spec
    config, notes = from_scratch(config)
    for note in notes:
        print(f"note  {'':10} {note}")
    try:
        if (needed := codec_run(config)) is not None:
            print(f"note  {'':10} {needed.output} holds no finished codec; it is trained first, as checked here")
            findings.add(True, "denoiser", check_denoiser(config, spec))
            config = needed
        free, where = free_memory(default_device())
        fits, text = advice(config, spec, free)
        findings.add(fits, "memory", f"{free / 1e9:.1f} GB free {where}; training needs {text}")
        if not fits:  # then trying it would end this process
            return
        trainer, recipe = trial(config)
        result = timed_steps(trainer, recipe)
        findings.add(True, "network", f"{result.network}, {result.parameters:,} parameters")
        if isinstance(recipe.codec, LatentCodec):
            check_latent_setup(config, cast(Any, recipe), trainer, findings.add)
        else:
            findings.add(math.isfinite(result.loss), "loss", f"{result.loss:.4f} at the second step")
        cached = isinstance(recipe.codec, LatentCodec) and config.codec.cache
        encoding = cached and trainer.data.latents is None
        note = "; with its images encoded, which the run does once, before" if encoding else ""
        step, total = duration(result.step_seconds), duration(result.total_seconds)
        findings.add(True, "time", f"{step} a step, about {total} in all{note}")
    except HeterodiffError as error:
        findings.add(False, "set-up", str(error))


def _report_latents(config: DataConfig, findings: Findings) -> ImageSpec:
    data = load_data(config)
    assert data.latents is not None
    findings.add(
        True, "latents", f"{len(data.train)} to train on, {len(data.val)} held out, of {data.latents.vae_path}"
    )
    findings.add(True, "classes", ", ".join(data.spec.class_names) or "none")
    return data.spec


def _check_run(run: Path, findings: Findings) -> None:
    if RunFolder(run).has_config:
        config = RunFolder(run).config()
        findings.add(True, "config", f"recipe {config.recipe}, {config.training.steps} steps")
    for path in list_checkpoints(RunFolder(run).checkpoints):
        try:
            checkpoint = read_checkpoint(path)
            findings.add(True, "checkpoint", f"step {checkpoint.step}, every file as its checksum says")
        except HeterodiffError as error:
            findings.add(False, "checkpoint", str(error))
    try:
        loaded(pipeline_task(run).try_out)(load(run), findings.add)
    except HeterodiffError as error:
        findings.add(False, "sample", str(error))
