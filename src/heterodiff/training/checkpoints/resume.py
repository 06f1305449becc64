"""Whether a run folder may be started or resumed: configurations compared."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from heterodiff.config import RunConfig
from heterodiff.errors import RunError
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of

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
    "training.keep_checkpoints",
    "training.log_every",
    "training.max_nonfinite_steps",
    "training.num_workers",
    "training.preview_every",
    "training.steps",
    "training.tensorboard",
    "codec.path",
    "codec.training",
    "segmentation",
)
"""Keys (and sections) that a resumed run may change: they do not alter what the steps done so far have learned."""


def parts_are_alike(config: RunConfig) -> bool:
    """Whether a batch in parts teaches what it teaches at once; texts are told apart within a part."""
    return not task_of(config).contrastive


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changed_keys(before: RunConfig, now: RunConfig, reached: int = 0) -> list[str]:
    """Differences that would make a resumed run another run, as ``key: before -> now``.

    Args:
        reached: steps that are done; a run can be made longer, but not shorter than that.
    """
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    free = [key for key in FREE_TO_CHANGE if key != "training.accumulation_steps" or parts_are_alike(now)]
    changes = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]
    if now.training.steps < reached:
        changes.append(f"training.steps: {before.training.steps} -> {now.training.steps}; {reached} steps are done")
    return changes


def check_run_folder(folder: Path, config: RunConfig, resume: str) -> bool:
    """Decide whether ``folder`` is to be started (False) or resumed (True); nothing is written.

    Raises:
        RunError: it holds another run, something else, or cannot be written.
    """
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
    reached = (run.weights_step() or 0) if resume == "auto" else 0
    if changes := changed_keys(run.config(), config, reached):
        raise RunError(
            f"{folder}: holds a run with another configuration; set output=... to a new folder, go on with it as it is "
            f"(heterodiff train {run.config_file}), or undo:\n  " + "\n  ".join(changes)
        )
    return True


def fingerprint(config: RunConfig) -> str:
    """A hash of all that defines what is learned and is not the default; a checkpoint carries that of its run.

    Without the defaults, so that a setting that a later version adds does not make earlier runs strangers.
    """
    flat, default = (flatten(c.model_dump(mode="json")) for c in (config, RunConfig()))
    fixed = {
        k: v
        for k, v in flat.items()
        if (k not in default or v != default[k]) and not any(k == f or k.startswith(f"{f}.") for f in FREE_TO_CHANGE)
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]
