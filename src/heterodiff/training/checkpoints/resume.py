"""Starting or resuming a run: its folder, configuration and checkpoint."""

import hashlib
import json
import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from heterodiff.config import RunConfig
from heterodiff.config.base import Section
from heterodiff.errors import CheckpointError, RunError
from heterodiff.models.variants import alike
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of
from heterodiff.training.checkpoints.checkpoint import (
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_newest,
    read_weights,
)
from heterodiff.training.optimization import learning_rate_at

FREE_TO_CHANGE = (
    "output",
    "sampling",
    "data.keep_on_device",
    "data.memory_limit_gb",
    "model.gradient_checkpointing",
    "model.memory_optimization",
    "training.accumulation_steps",
    "training.checkpoint_every",
    "training.compile",
    "training.deterministic",
    "training.fsdp",
    "training.keep_checkpoints",
    "training.log_every",
    "training.max_nonfinite_steps",
    "training.minutes",
    "training.num_workers",
    "training.preview_every",
    "training.steps",
    "training.tensorboard",
    "codec.path",
    "codec.training",
    "segmentation",
)
"""Keys (and sections) that a resumed run may change: they do not alter what the steps done so far have learned."""

EARLIER_DEFAULTS: dict[str, Any] = {
    "data.volumes.normalization": "slice",
    "alignment.latent_channels": 256,
    "diffusion.prediction": "epsilon",
    "diffusion.schedule": "linear",
    "model.channel_mult": None,
    "model.model_channels": 64,
    "model.norm_groups": 32,
    "model.num_heads": 4,
    "model.use_scale_shift_norm": False,
    "model.variant": "hae-v2",
    "text.captioner_layers": 4,
    "text.captioner_width": 256,
    "text.embedding_dim": 512,
    "text.layers": 4,
    "text.width": 256,
    "training.learning_rate": 2e-4,
    "training.warmup_steps": 500,
    "training.ema_decay": 0.9999,
}
"""Keys whose default has changed, and what it was; a run that began with it goes on with it."""


VARIANT = "model.variant"
WEIGHTS_ONLY = "weights-only"
"""Value of ``--resume`` that goes on from weights alone."""


def parts_are_alike(config: RunConfig) -> bool:
    """Return whether parts of a batch give the gradient of the whole, as contrastive losses do not."""
    return not task_of(config).contrastive


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changed_keys(before: RunConfig, now: RunConfig, reached: int = 0) -> list[str]:
    """Return the changes that would make a resumed run another run, as ``key: before -> now``.

    Args:
        reached: steps that are done; a run can be made longer, but not shorter than that.
    """
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    free = [key for key in FREE_TO_CHANGE if key != "training.accumulation_steps" or parts_are_alike(now)]
    changes = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
        and not _is_in(key, free)
        and not (key == VARIANT and new[key] in alike(old[key]))
    ]
    if before.training.minutes is None and now.training.minutes is not None:
        changes.append(
            f"training.minutes: none -> {now.training.minutes:g}; set training.steps, with which the run began"
        )
    if now.training.steps < reached:
        changes.append(f"training.steps: {before.training.steps} -> {now.training.steps}; {reached} steps are done")
    return changes


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _replaced(section: Section, path: Sequence[str], value: Any) -> Any:
    """Return ``section`` with ``value`` at ``path``, the names of sections and at last of a key."""
    inner = value if len(path) == 1 else _replaced(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})


def as_begun(config: RunConfig) -> RunConfig:
    """Return ``config`` with what the run in its folder began with, where ``config`` leaves it open.

    The number of steps is in proportion to ``training.minutes``, where the run began with them.

    Raises:
        HeterodiffError: the folder's configuration cannot be read.
    """
    if config.output is None or not RunFolder(config.output).has_config:
        return config
    before = RunFolder(config.output).config()
    for key in EARLIER_DEFAULTS:
        section, _, name = key.rpartition(".")
        now, begun = attrgetter(section)(config), attrgetter(key)(before)
        chosen = getattr(now, name) is None and begun is not None  # chosen when the run began
        if chosen or (name not in now.model_fields_set and begun == EARLIER_DEFAULTS[key]):
            config = _replaced(config, key.split("."), begun)
    minutes, measured = config.training.minutes, before.training.minutes
    if minutes is not None and measured is not None:
        steps = {"steps": max(1, round(before.training.steps * minutes / measured))}
        config = config.model_copy(update={"training": config.training.model_copy(update=steps)})
    return config


def check_run_folder(folder: Path, config: RunConfig, resume: str) -> bool:
    """Return whether ``folder`` holds this run, to be resumed, or may be started; nothing is written.

    Raises:
        RunError: it holds another run, something else, or cannot be written.
    """
    if not str(folder).isascii() and str(folder).encode("utf-8", "replace") != os.fsencode(folder):
        raise RunError(f"{folder}: its name is not UTF-8, which reports cannot hold; set output=... to another folder")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: expected a folder for the run, found a file; set output=...")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise RunError(f"{folder}: cannot be written (no permission on {existing}); set output=... elsewhere")
    run = RunFolder(folder)
    if not run.has_begun:
        return False  # what it may hold is compared with what the run needs
    if not run.has_config:
        name = run.config_file.name
        raise RunError(f"{folder}: holds files but no run ({name} is missing); set output=... to a new folder")
    if resume == "never":
        raise RunError(
            f"{folder}: already holds a run; set output=... to a new folder, or use --resume auto to go on with it"
        )
    reached = _reached(run) if resume in ("auto", WEIGHTS_ONLY) else 0
    if changes := changed_keys(run.config(), config, reached):
        raise RunError(
            f"{folder}: holds a run with another configuration; set output=... to a new folder, go on with it as it is "
            f"(heterodiff train {run.config_file}), or undo:\n  " + "\n  ".join(changes)
        )
    return True


def _reached(run: RunFolder) -> int:
    """The step of the run's weights; 0 where they are damaged and made again from a checkpoint."""
    try:
        return run.weights_step() or 0
    except CheckpointError:
        return 0


def fingerprint(config: RunConfig) -> str:
    """Return a hash of all settings that decide what is learned; a checkpoint carries that of its run.

    Defaults are left out, so that a setting that a later version adds does not change the hash of earlier runs.
    """
    flat, default = (flatten(c.model_dump(mode="json")) for c in (config, RunConfig()))
    default |= EARLIER_DEFAULTS
    fixed = {k: v for k, v in flat.items() if (k not in default or v != default[k]) and not _is_in(k, FREE_TO_CHANGE)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def fingerprints(config: RunConfig) -> set[str]:
    """Return the hashes of all runs whose checkpoints this one may go on from: those of networks with equal weights."""
    path = VARIANT.split(".")
    return {fingerprint(_replaced(config, path, variant)) for variant in alike(config.model.variant)}


def find_checkpoint(run: RunFolder, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to go on from, if there is one, and notes on newer ones that are damaged.

    Args:
        resume: ``auto`` for the newest undamaged one, ``weights-only`` for the newest undamaged weights, or the path
            of one.

    Raises:
        CheckpointError: no checkpoint of this run, or none that is undamaged.
    """
    if resume not in ("auto", WEIGHTS_ONLY):
        path, known = Path(resume), list_checkpoints(run.checkpoints)
        if path.resolve() not in [p.resolve() for p in known]:
            names = ", ".join(map(str, known)) or "none"
            raise CheckpointError(
                f"--resume {path}: not a checkpoint of this run; expected auto, never, {WEIGHTS_ONLY} or one of: "
                f"{names}"
            )
        return read_checkpoint(path), []
    found = read_newest(run.checkpoints, read_weights if resume == WEIGHTS_ONLY else read_checkpoint)
    if found is None:
        return None, []
    checkpoint, problems = found
    notes = [f"{problem}; using the checkpoint of step {checkpoint.step} instead" for problem in problems]
    if checkpoint.weights_only:
        notes.append(
            f"goes on with the weights of step {checkpoint.step} and a new optimiser, so not as it would have without "
            "the interruption"
        )
    return checkpoint, notes


def new_length(run: RunFolder, config: RunConfig, step: int) -> list[str]:
    """Return a note if a run that goes on after ``step`` is to have another number of steps than before.

    Raises:
        RunError: it is to be shorter than ``step``.
    """
    before, now = run.config().training, config.training
    if now.steps < step:
        raise RunError(f"{run}: {step} steps are done, more than training.steps={now.steps}; set it to at least {step}")
    if now.steps == before.steps:
        return []
    note = f"training.steps is {now.steps}, before {before.steps}"
    old, new = (learning_rate_at(step, training) for training in (before, now))
    if old != new:
        note += f"; the learning rate follows the schedule of the new length from here: {new:.2g} in place of {old:.2g}"
    return [note]
