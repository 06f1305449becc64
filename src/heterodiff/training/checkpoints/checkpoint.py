"""Checkpoints that survive a crash: written beside, flushed, listed with checksums, renamed, and only then trusted."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from heterodiff.errors import CheckpointError
from heterodiff.files import (
    fingerprint,
    flush_to_disk,
    is_as_listed,
    read_json,
    refuse_header,
    remove,
    share_files,
    write_text,
)
from heterodiff.run_folder import GONE
from heterodiff.training.processes import HostGroup, own_part

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
OPTIMIZERS, RECIPE = ("optimizer", "adversary_optimizer"), "recipe"
"""Groups of a checkpoint's tensors that hold no weights: moments of optimisers, and what a recipe learns beside."""
GROUP_FILE = re.compile(r"(?P<group>\w+)(-\d+-of-\d+)?\.safetensors")
COPY_OR_REMOVE = "copy the checkpoint again, or remove it"


@dataclass
class Checkpoint:
    """State from which a run goes on exactly: groups of named tensors and plain values.

    A group is a file; where tensors are split over processes, a file of each process with its rows of them.

    ``weights_only`` is true of what is left of a damaged one: weights and their means, from which a run goes on with a
    new optimiser.
    """

    step: int
    tensors: dict[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    weights_only: bool = False


class SplitGroup(Mapping[str, Tensor]):
    """A group in several files, each with some rows of its tensors, in this order; tensors are read when asked for."""

    def __init__(self, files: Sequence[Path]):
        self.parts = [safe_open(file, "pt") for file in files]
        self.owners: dict[str, list[Any]] = {}
        for part in self.parts:
            for name in part.keys():  # noqa: SIM118 (no mapping)
                self.owners.setdefault(name, []).append(part)

    def __getitem__(self, name: str) -> Tensor:
        rows = [part.get_tensor(name) for part in self.owners[name]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, hosts: HostGroup | None = None) -> Path:
    """Write ``checkpoint`` into ``folder`` and delete all but the newest ``keep``.

    Args:
        hosts: the processes that its tensors are split over, all of which call this; the first one writes what is not
            split.

    The new one appears under its name by one rename, after all of its files and a manifest of their sizes and
    checksums are on disk; until then the older ones stay.

    Raises:
        CheckpointError: the disk has too little room (bytes needed and free are named) or refuses the write.
    """
    target = folder / f"step_{checkpoint.step:08d}"
    temporary = target.with_suffix(".tmp")
    needed = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    first = hosts is None or hosts.rank == 0
    try:
        if first:
            _make_room(folder, target, temporary, needed)
        if hosts is not None:
            hosts.wait()
        _write_groups(temporary, checkpoint.tensors, hosts)
        if hosts is not None:
            hosts.wait()
        if not first:
            return target
        groups = sorted(checkpoint.tensors)
        state = {"format": FORMAT, "step": checkpoint.step, "groups": groups, **checkpoint.state}
        write_text(temporary / STATE, json.dumps(state, indent=1))
        share_files(temporary)
        files = sorted(temporary.iterdir())
        with ThreadPoolExecutor() as pool:  # checksums are computed while the disk writes
            sums = pool.map(fingerprint, files)
            for path in files:
                flush_to_disk(path)
            manifest = {path.name: found for path, found in zip(files, sums, strict=True)}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        for path in (temporary / MANIFEST, temporary):
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


def _make_room(folder: Path, target: Path, temporary: Path, needed: int) -> None:
    """Make the folder ``temporary`` in ``folder``, where nothing unfinished is left."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("step_*.tmp"):
        remove(leftover)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(_no_room(target, needed, free))
    temporary.mkdir()


def _write_groups(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], hosts: HostGroup | None) -> None:
    """Write this process's files of ``groups``."""
    for name, group in groups.items():
        split = hosts is not None and any(isinstance(value, DTensor) for value in group.values())
        if hosts is None or not split:
            kept, file = dict(group), f"{name}.safetensors"
        else:
            kept = {k: own_part(v) for k, v in group.items() if isinstance(v, DTensor) or hosts.rank == 0}
            kept = {key: value for key, value in kept.items() if value.numel()}
            file = f"{name}-{hosts.rank + 1:05d}-of-{hosts.count:05d}.safetensors"
        if split or hosts is None or hosts.rank == 0:
            save_file({key: value.contiguous() for key, value in kept.items()}, folder / file)


def _files_of_groups(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Return the files with tensors in ``manifest`` by their group, in the order of their rows."""
    groups: dict[str, list[str]] = {}
    for name in sorted(manifest):
        if match := GROUP_FILE.fullmatch(name):
            groups.setdefault(match["group"], []).append(name)
    return groups


def _read_group(path: Path, files: Sequence[str]) -> Mapping[str, Tensor]:
    return load_file(path / files[0]) if len(files) == 1 else SplitGroup([path / name for name in files])


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
        tensors = {group: _read_group(path, files) for group, files in _files_of_groups(manifest).items()}
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
    tensors: dict[str, Mapping[str, Tensor]] = {}
    try:
        manifest = read_json(path / MANIFEST, way_out=COPY_OR_REMOVE)
        for group, files in _files_of_groups(manifest).items():
            if group in OPTIMIZERS:
                continue
            try:
                for name in files:
                    _compare(path, name, manifest[name])
                tensors[group] = _read_group(path, files)
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
    if not is_as_listed(file, expected):
        sizes = f"{expected.get('bytes')} bytes, found {file.stat().st_size}"
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
