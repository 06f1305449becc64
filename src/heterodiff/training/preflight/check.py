"""``heterodiff check``: try a configuration, a folder of images or a run, and report pass or FAIL with numbers."""

import math
from pathlib import Path
from typing import Any

from heterodiff.config import DataConfig, RunConfig, TrainingConfig
from heterodiff.config.file import apply_override, load_config, parse_config
from heterodiff.data.check import DataSummary, check_data
from heterodiff.data.sources import load_data
from heterodiff.data.sources.recognise import source_hint
from heterodiff.errors import HeterodiffError, RunError
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import load, pipeline_task
from heterodiff.run_folder import RunFolder
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.codec_stage import codec_run
from heterodiff.training.optimization import check_batch
from heterodiff.training.preflight.findings import Findings
from heterodiff.training.preflight.scaling import report_scaling
from heterodiff.training.preflight.trial import prepare, temporary_slices, try_run

MAX_LISTED = 50


def length_of(training: TrainingConfig) -> str:
    """Return the length of a run in words."""
    return f"{training.steps} steps" if training.minutes is None else f"{training.minutes:g} minutes"


def check_target(target: Path, overrides: list[str], devices: int = 1, link: float = 12.0) -> bool:
    """Check a configuration file, a folder of images, or a run folder, and print what was found.

    Args:
        devices: also estimate a configuration's run on so many devices like the one here.
        link: gigabytes per second that each of them can send.

    Returns:
        Whether everything passed.

    Raises:
        HeterodiffError: ``target`` is none of these.
    """
    findings = Findings()
    if devices > 1 and target.exists() and not target.is_file():
        raise RunError(f"{target}: --gpus estimates the run of a configuration file; give one")
    if RunFolder(target).has_config or RunFolder(target).index_file.is_file():
        _check_run(target, findings)
    elif target.is_dir() or target.suffix == ".npz":
        content: dict[str, Any] = {"data": {"source": "images", "path": str(target)}}
        for override in overrides:
            apply_override(content, override)
        with temporary_slices(parse_config(content).data) as config:
            _check_data(config, findings)
    elif target.is_file():
        _check_config(load_config(target, overrides), findings, devices, link)
    else:
        raise RunError(f"{target}: no such configuration file, folder of images or run folder")
    return findings.passed


def _check_data(config: DataConfig, findings: Findings) -> None:
    if hint := source_hint(config):
        findings.note(hint, "source")
    _report_data(config, check_data(config), findings)


def _report_data(config: DataConfig, summary: DataSummary, findings: Findings) -> None:
    spec = summary.spec
    count = sum(summary.class_counts.values())
    shape = f"{spec.channels}x{spec.height}x{spec.width}" if spec else "see below"
    findings.add(count > 0, "images", f"{count} usable; each {shape}; stored as {_list(summary.dtypes)}")
    sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in summary.sizes)
    findings.add(True, "sizes", f"height x width: {sizes}")
    classes = ", ".join(f"{name or 'unlabelled'} {n}" for name, n in summary.class_counts.items())
    if summary.captions:
        findings.add(True, "captions", f"{summary.captions} for {count} images")
    else:
        findings.add(True, "classes", classes or "none")
    if math.isfinite(summary.mean):
        text = f"{summary.minimum:g} to {summary.maximum:g}, mean {summary.mean:.4g}, std {summary.std:.4g}"
        mapped = f"; {spec.value_range[0]:g} becomes 0 and {spec.value_range[1]:g} 1" if spec else ""
        findings.add(True, "values", text + mapped)
    fatal = config.on_bad == "error"
    for finding in summary.bad[:MAX_LISTED]:
        findings.add(not fatal, "bad file", f"{finding.name}: {finding.problem}")
    if len(summary.bad) > MAX_LISTED:
        findings.add(not fatal, "bad files", f"{len(summary.bad) - MAX_LISTED} more")
    for problem in summary.problems:
        findings.add(False, "data", problem)
    for warning in summary.warnings:
        findings.note(warning)


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in counts.items()) or "nothing"


def _check_config(config: RunConfig, findings: Findings, devices: int, link: float) -> None:
    if devices > 1:
        check_batch(config.training, devices)
    with temporary_slices(config.data) as data_config:
        if config.data.source == "latents":
            _report_latents(config.data, findings)
        else:
            _check_data(data_config, findings)
        if not findings.passed:
            return
        try:
            config, data = prepare(config, data_config, findings)
            parts = try_run(config, data, findings, thorough=True)
            if devices > 1 and findings.passed and codec_run(config) is None:
                report_scaling(config, data, parts[-1], findings, devices, link)
            elif devices > 1:
                findings.note("the codec is not trained yet; --gpus estimates the run once it is")
        except HeterodiffError as error:
            findings.add(False, "set-up", str(error))


def _report_latents(config: DataConfig, findings: Findings) -> None:
    data = load_data(config)
    assert data.latents is not None
    findings.add(
        True, "latents", f"{len(data.train)} to train on, {len(data.val)} held out, of {data.latents.vae_path}"
    )
    findings.add(True, "classes", ", ".join(data.spec.class_names) or "none")


def _check_run(run: Path, findings: Findings) -> None:
    if RunFolder(run).has_config:
        config = RunFolder(run).config()
        findings.add(True, "config", f"recipe {config.recipe}, {length_of(config.training)}")
    for path in list_checkpoints(RunFolder(run).checkpoints):
        try:
            checkpoint = read_checkpoint(path)
            findings.add(True, "checkpoint", f"step {checkpoint.step}, all checksums are right")
        except HeterodiffError as error:
            findings.add(False, "checkpoint", str(error))
    try:
        loaded(pipeline_task(run).try_out)(load(run), findings.add)
    except HeterodiffError as error:
        findings.add(False, "sample", str(error))
