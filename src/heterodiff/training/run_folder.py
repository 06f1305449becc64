"""A run folder: who may write to it, what it was started with, and where to go on."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from heterodiff.config import RunConfig
from heterodiff.config_file import dump_config, load_config
from heterodiff.errors import RunError
from heterodiff.files import fresh, remove
from heterodiff.pipelines.run_files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_json
from heterodiff.tasks import task_of
from heterodiff.training.checkpoint import share_files

LOCK_FILE = ".lock"
LATENTS = "latents"
ALIGNMENT = "alignment"
"""Folders of the latents that a run encodes for itself and of the codec it trains, before it begins itself."""

NEEDED_FILES = {"scheduler": ("scheduler_config.json",), "tokenizer": ("tokenizer.json",)}
"""Files of the parts of a pipeline that are no networks."""

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
    if not folder.is_dir() or not [p for p in folder.iterdir() if p.name not in (LOCK_FILE, LATENTS, ALIGNMENT)]:
        return False  # these alone: stopped before the run began; they are compared with what it needs
    if not (folder / CONFIG_FILE).is_file():
        raise RunError(f"{folder}: holds files but no run ({CONFIG_FILE} is missing); set output=... to a new folder")
    if resume == "never":
        raise RunError(
            f"{folder}: already holds a run; set output=... to a new folder, or use --resume auto to go on with it"
        )
    reached = (weights_step(folder) or 0) if resume == "auto" else 0
    if changes := changed_keys(load_config(folder / CONFIG_FILE), config, reached):
        raise RunError(
            f"{folder}: holds a run with another configuration; set output=... to a new folder, go on with it as it is "
            f"(heterodiff train {folder / CONFIG_FILE}), or undo:\n  " + "\n  ".join(changes)
        )
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone; the lock goes with the process, however it ends.

    Raises:
        RunError: another process is running in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a file that is there keeps its content
        file = os.fdopen(os.open(folder / LOCK_FILE, flags, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{folder / LOCK_FILE}: a link, expected a file of the run itself; remove it") from None
        raise RunError(f"{folder}: cannot be written: {error.strerror}; set output=... elsewhere") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: another run is training in this folder; wait for it or set output=...") from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    temporary = fresh(path.with_name(path.name + ".tmp"))
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


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


def weights_step(folder: Path) -> int | None:
    """The step whose weights the pipeline in ``folder`` holds; None if there is none, or not all of it."""
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return None
    for name, kind in read_json(folder / INDEX_FILE).items():
        if name.startswith("_") or not isinstance(kind, list) or kind[0] is None:
            continue
        needed = NEEDED_FILES.get(name, ("config.json", SAFETENSORS_WEIGHTS_NAME))
        if not all((folder / name / part).is_file() for part in needed):
            return None
    return read_json(folder / WEIGHTS_FILE).get("step")


def save_config(folder: Path, config: RunConfig) -> None:
    write_text(folder / CONFIG_FILE, dump_config(config))


def save_pipeline(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a pipeline folder of ``step`` and move its parts into ``folder``, each whole or not at all."""
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    staging = folder / ".pipeline"
    remove(staging)
    write(staging)
    share_files(staging)
    for part in staging.iterdir():
        if part.is_dir():
            old = folder / f".{part.name}.old"
            remove(old)
            if (folder / part.name).exists():
                (folder / part.name).rename(old)
            part.rename(folder / part.name)
            remove(old)
        else:
            part.replace(folder / part.name)
    staging.rmdir()
    write_json(folder / WEIGHTS_FILE, {"step": step})
