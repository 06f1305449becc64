"""Checkpoints that survive a crash: written beside, flushed, listed with checksums, renamed, and only then trusted."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heterodiff.errors import CheckpointError
from heterodiff.files import fingerprint, flush_to_disk, read_json, remove, share_files, write_text

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
COPY_OR_REMOVE = "copy the checkpoint again, or remove it"


@dataclass
class Checkpoint:
    """State from which a run goes on exactly: groups of named tensors, a file each, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


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
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{checkpoint.step:08d}"
    temporary = target.with_suffix(".tmp")
    for leftover in folder.glob("step_*.tmp"):
        remove(leftover)
    needed = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    try:
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
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free
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
            found = fingerprint(path / name)
            if found != expected:
                sizes = f"{expected.get('bytes')} bytes, found {found['bytes']}"
                raise CheckpointError(f"{path / name}: damaged (checksum differs; expected {sizes})")
        state = read_json(path / STATE, way_out=COPY_OR_REMOVE)
        tensors = {Path(n).stem: load_file(path / n) for n in manifest if n.endswith(".safetensors")}
    except (OSError, SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: written by another version of the checkpoint format; expected {FORMAT}")
    if sorted(tensors) != state.pop("groups", None):
        raise CheckpointError(f"{path}: incomplete: it holds {', '.join(sorted(tensors)) or 'no tensors'}")
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def read_newest(folder: Path) -> tuple[Checkpoint, list[str]] | None:
    """Return the newest undamaged checkpoint in ``folder`` and the problems of newer ones; None if there is none.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    problems: list[str] = []
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if paths:
        raise CheckpointError(
            "no usable checkpoint: " + "; ".join(problems) + f"; remove {folder} to start from the beginning"
        )
    return None


def _no_room(target: Path, needed: int, free: int) -> str:
    return (
        f"{target}: could not write the checkpoint: about {needed:,} bytes needed, {free:,} free; "
        "earlier checkpoints are untouched; make room and start the same command again"
    )
