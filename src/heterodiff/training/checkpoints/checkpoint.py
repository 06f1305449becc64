"""Checkpoints that survive a crash: written beside, flushed, listed with checksums, renamed, and only then trusted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heterodiff.errors import CheckpointError
from heterodiff.files import fingerprint, flush_to_disk, read_json, refuse_header, remove, share_files, write_text
from heterodiff.run_folder import GONE

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
OPTIMIZERS, RECIPE = ("optimizer", "adversary_optimizer"), "recipe"
"""Groups of a checkpoint's tensors that hold no weights: moments of optimisers, and what a recipe learns beside."""
COPY_OR_REMOVE = "copy the checkpoint again, or remove it"


@dataclass
class Checkpoint:
    """State from which a run goes on exactly: groups of named tensors, a file each, and plain values.

    ``weights_only`` is true of what is left of a damaged one: weights and their means, from which a run goes on with a
    new optimiser.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    weights_only: bool = False


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` into ``folder`` and delete all but the newest ``keep``.

    The new one appears under its name by one rename, after all of its files and a manifest of their sizes and
    SHA-256 sums are on disk; until then the older ones stay.

    Raises:
        CheckpointError: the disk has too little room (bytes needed and free are named) or refuses the write.
    """
    target = folder / f"step_{checkpoint.step:08d}"
    temporary = target.with_suffix(".tmp")
    needed = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob("step_*.tmp"):
            remove(leftover)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(_no_room(target, needed, free))
        temporary.mkdir()
        for name, group in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, temporary / f"{name}.safetensors")
        groups = sorted(checkpoint.tensors)
        state = {"format": FORMAT, "step": checkpoint.step, "groups": groups, **checkpoint.state}
        write_text(temporary / STATE, json.dumps(state, indent=1))
        share_files(temporary)
        manifest = {p.name: fingerprint(p) for p in sorted(temporary.iterdir())}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        remove(target)
        temporary.rename(target)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        if not folder.parent.is_dir():
            raise CheckpointError(f"{folder.parent}: {GONE}") from error
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise CheckpointError(f"{_no_room(target, needed, free)} ({error})") from error
    for old in list_checkpoints(folder)[:-keep]:
        remove(old)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: a file is missing, was changed or cut off, or the format is unknown.
    """
    try:
        manifest = read_json(path / MANIFEST, way_out=COPY_OR_REMOVE)
        for name, expected in manifest.items():
            _compare(path, name, expected)
        state = read_json(path / STATE, way_out=COPY_OR_REMOVE)
        tensors = {Path(n).stem: load_file(path / n) for n in manifest if n.endswith(".safetensors")}
    except (OSError, SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: written by another version of the checkpoint format; expected {FORMAT}")
    if sorted(tensors) != state.pop("groups", None):
        raise CheckpointError(f"{path}: incomplete: it holds {', '.join(sorted(tensors)) or 'no tensors'}")
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def read_weights(path: Path) -> Checkpoint:
    """Read the weights of a checkpoint, whatever has happened to the state of its optimiser and its other files.

    The recipe's group is left out where it is damaged.

    Raises:
        CheckpointError: the manifest or a file of weights is missing, was changed or cut off.
    """
    tensors = {}
    try:
        manifest = read_json(path / MANIFEST, way_out=COPY_OR_REMOVE)
        for name in manifest:
            group, _, suffix = name.partition(".")
            if suffix != "safetensors" or group in OPTIMIZERS:
                continue
            try:
                _compare(path, name, manifest[name])
                tensors[group] = load_file(path / name)
            except (OSError, CheckpointError):
                if group != RECIPE:
                    raise
        return Checkpoint(int(path.name.removeprefix("step_")), tensors, {}, weights_only=True)
    except (OSError, SafetensorError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no readable weights: {error}") from error


def _compare(path: Path, name: str, expected: Any) -> None:
    """Compare file ``name`` of the checkpoint in ``path`` with its entry in the manifest."""
    file = path / name
    if name != file.name or file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"{file}: expected a file of the checkpoint itself; {COPY_OR_REMOVE}")
    size = file.stat().st_size
    found = fingerprint(file) if size == expected.get("bytes") else {"bytes": size}
    if found != expected:
        sizes = f"{expected.get('bytes')} bytes, found {found['bytes']}"
        raise CheckpointError(f"{file}: damaged (checksum differs; expected {sizes})")
    if file.suffix == ".safetensors":
        refuse_header(file, COPY_OR_REMOVE)


def read_newest(
    folder: Path, read: Callable[[Path], Checkpoint] = read_checkpoint
) -> tuple[Checkpoint, list[str]] | None:
    """Return the newest undamaged checkpoint in ``folder`` and the problems of newer ones; None if there is none.

    Args:
        read: what is needed of it, :func:`read_checkpoint` or :func:`read_weights`.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    problems: list[str] = []
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return read(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if paths:
        raise CheckpointError(
            "no usable checkpoint: "
            + "; ".join(problems)
            + ("; go on from weights alone with --resume weights-only" if read is read_checkpoint else "")
            + f"; remove {folder} to start from the beginning"
        )
    return None


def _no_room(target: Path, needed: int, free: int) -> str:
    return (
        f"{target}: could not write the checkpoint: about {needed:,} bytes needed, {free:,} free; "
        "earlier checkpoints are untouched; make room and start the same command again"
    )
