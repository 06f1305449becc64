"""Writing a folder of stored latents (see `latents.format`): resumable, and alike for any number of processes."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from heterodiff.codecs.scaling import LatentCodec, LatentMoments
from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.findings import show
from heterodiff.errors import DataError
from heterodiff.files import write_bytes
from heterodiff.latents.format import (
    ENCODE_AGAIN,
    INDEX_FILE,
    PLAN_FILE,
    Index,
    Plan,
    Shard,
    read_record,
    read_shard,
    sha256_of,
    shard_name,
    shard_problem,
)
from heterodiff.latents.plan import SHARD_SIZE, differences, images_at, plan_of
from heterodiff.progress import duration, progress_tasks

MAX_FLOAT16 = 65504.0
LEFTOVER = re.compile(r"(plan\.json|index\.json|shard_\d+\.safetensors)\.[0-9a-f]{8}\.tmp")
"""Unfinished files of a call that was killed."""
ANOTHER_FOLDER = "choose another folder, or delete this one"


def check_out(out: Path) -> None:
    """Check that latents can be written to ``out``, before anything slow.

    Raises:
        DataError: a file, a folder of something else, or one that cannot be written.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise DataError(f"{out}: {existing} is not a folder; {ANOTHER_FOLDER}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"{out}: {existing} cannot be written; change its permissions or choose another --out")
    found = sorted(path.name for path in out.iterdir()) if existing == out else []
    foreign = [name for name in found if not LEFTOVER.fullmatch(name)]
    if foreign and not (out / PLAN_FILE).is_file():  # in this order: another process may be writing its plan
        names = ", ".join(map(show, foreign[:3]))
        raise DataError(f"{out}: holds {len(foreign):,} other files ({names}) and no latents; {ANOTHER_FOLDER}")


def encode_data(
    data: LoadedData,
    data_config: DataConfig,
    codec: LatentCodec,
    out: Path,
    *,
    vae_path: Path,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    quiet: bool = False,
) -> Path:
    """Write the posteriors of all images of ``data`` to the folder ``out``, and return it.

    Needs memory for one batch and one shard. Shards that an earlier, interrupted call finished are kept. Process
    ``rank`` writes every ``world_size``-th shard; the index is written by process 0 once all have met at ``barrier``.

    Args:
        data: images; augmentation does not apply.
        data_config: the settings they were loaded with; stored, so that the images can be found again.
        codec: on the device to encode with.
        vae_path: where its VAE was loaded from; stored.
        shard_size, batch_size: images of a file, and images encoded at once.
        barrier: called by every process; returns when all have called it.

    Raises:
        ConfigError: images that the VAE cannot take.
        DataError: a folder that holds other latents or other files, or cannot be written; too little room
            on the disk; NaN, infinite, or too large latents. No unfinished file is left under its name.
    """
    check_out(out)

    def posteriors(images: range) -> torch.Tensor:
        return codec.posterior(images_at(data, images).to(codec.device)).cpu()

    return write_latents(
        plan_of(data, data_config, codec, vae_path, shard_size),
        posteriors,
        out,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        barrier=barrier,
        quiet=quiet,
    )


def write_latents(
    plan: Plan,
    posteriors: Callable[[range], torch.Tensor],
    out: Path,
    *,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    quiet: bool = False,
) -> Path:
    """Write the latents of ``plan`` to the folder ``out``, see :func:`encode_data`, whose errors it raises.

    Args:
        posteriors: positions in the plan's order -> mean and std (B, 2 c, h, w) of their latents, on the CPU.
    """
    quiet = quiet or rank > 0
    index = _write_or_check_plan(out, plan)
    mine = list(range(rank, len(plan.ranges), world_size))
    todo = [number for number in mine if not _is_complete(out, plan, number, index)]
    if index is not None and world_size == 1 and not todo:
        if not quiet:
            print(f"latents  already complete: {len(plan.names):,} images in {out}, checksums match")
        return out
    images = sum(len(plan.ranges[number]) for number in todo)
    if (free := shutil.disk_usage(out).free) < (needed := images * plan.image_bytes):
        raise DataError(f"{out}: {needed:,} bytes are needed for the latents, {free:,} are free; make room")
    start = time.perf_counter()
    with progress_tasks(quiet) as task:
        done, encoded = task("encoding", images), 0

        def advance(count: int) -> None:
            nonlocal encoded
            encoded += count
            done(encoded)

        for number in todo:
            tensors = _encode(plan, posteriors, plan.ranges[number], batch_size, advance)
            _write(out / shard_name(number), save(tensors))
    seconds = max(time.perf_counter() - start, 1e-9)
    barrier()
    if rank == 0:
        _write_index(out, plan)
    barrier()  # nobody reads before the index is there
    if not quiet:
        kept = f"; {len(mine) - len(todo):,} finished shards were there already" if len(todo) < len(mine) else ""
        share = f", by process 0 of {world_size}" if world_size > 1 else ""
        speed = f"{duration(seconds)}, {images / seconds:.1f} images/s"
        print(f"encoded  {images:,} images in {speed}{share}{kept}", flush=True)
    return out


def _write_or_check_plan(out: Path, plan: Plan) -> Index | None:
    """Write the plan, or compare it with the one there; return the index of an earlier call that finished."""
    path = out / PLAN_FILE
    if not path.is_file():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be created: {error.strerror}; choose another folder (--out)") from None
        _write(path, json.dumps(plan.model_dump(mode="python")).encode())
        return None
    if different := differences(read_record(path, Plan), plan):
        raise DataError(f"{out}: holds other latents ({'; '.join(different)}); {ANOTHER_FOLDER}")
    if not (out / INDEX_FILE).is_file():
        return None
    index = read_record(out / INDEX_FILE, Index)
    if differences(index, plan):
        raise DataError(f"{out}: {INDEX_FILE} and {PLAN_FILE} do not belong to the same latents; {ANOTHER_FOLDER}")
    return index


def _is_complete(out: Path, plan: Plan, number: int, index: Index | None) -> bool:
    """Return True if a shard is there and fits the plan and, once there is an index, its checksum."""
    if shard_problem(out, plan, number) is not None:
        return False
    return index is None or sha256_of(out / shard_name(number)) == index.shards[number].sha256


def _encode(
    plan: Plan,
    posteriors: Callable[[range], torch.Tensor],
    images: range,
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Return the tensors of one shard."""
    channels, height, width = plan.shape
    tensors = {name: np.empty((len(images), channels, height, width), np.float16) for name in ("mean", "std")}
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        posterior = posteriors(part)
        _refuse_unusable(posterior, plan.names[part.start : part.stop])
        for name, values in zip(("mean", "std"), posterior.chunk(2, dim=1), strict=True):
            tensors[name][start : start + len(part)] = values.numpy()
        advance(len(part))
    return tensors | {"label": plan.labels[images.start : images.stop]}


def _refuse_unusable(posterior: torch.Tensor, names: tuple[str, ...]) -> None:
    largest = posterior.abs().flatten(1).amax(dim=1)  # NaN where anything is
    for good, what in (
        (torch.isfinite(largest), "NaN or infinite latents"),
        (largest <= MAX_FLOAT16, f"latents beyond {MAX_FLOAT16:.0f} (the limit of float16)"),
    ):
        bad = [show(name) for name, fine in zip(names, good.tolist(), strict=True) if not fine]
        if bad:
            more = f" and {len(bad) - 3} more of its batch" if len(bad) > 3 else ""
            raise DataError(
                f"the encoder returns {what} for {', '.join(bad[:3])}{more}; check these images, or train it again "
                "with a lower training.learning_rate"
            )


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when all of it is on disk."""
    try:
        write_bytes(path, content, flush=True)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise DataError(
            f"{path}: cannot be written ({error.strerror}): {len(content):,} bytes needed, {free:,} free; "
            "make room, then start the same command again: finished shards are kept"
        ) from None


def _write_index(out: Path, plan: Plan) -> None:
    """List the shards, after reading each once more."""
    moments = LatentMoments(plan.shape[0])
    shards = []
    for number, images in enumerate(plan.ranges):
        path = out / shard_name(number)
        if problem := shard_problem(out, plan, number):
            raise DataError(f"{path}: {problem}; {ENCODE_AGAIN}")
        posteriors = read_shard(path)
        if not np.isfinite(posteriors).all():
            raise DataError(f"{path}: NaN or infinite latents; delete this file, then {ENCODE_AGAIN}")
        training = torch.from_numpy(posteriors[: max(0, len(plan.train.names) - images.start)])
        for part in training.split(64):  # the sums are made in float64
            moments.add(*part.chunk(2, dim=1))
        shards.append(Shard(file=path.name, count=len(images), bytes=path.stat().st_size, sha256=sha256_of(path)))
    classes = ["unlabelled", *plan.spec["class_names"]]
    counts = {}
    for name, images_of in (("train", plan.train), ("val", plan.val)):
        found = Counter(images_of.labels)
        counts[name] = {label: found[k - 1] for k, label in enumerate(classes) if found[k - 1] or k}
    mean, std = tuple(moments.mean.tolist()), tuple(moments.std.tolist())
    index = Index(**plan.model_dump(), shards=tuple(shards), counts=counts, mean=mean, std=std)
    _write(out / INDEX_FILE, json.dumps(index.model_dump(mode="python")).encode())
    for path in out.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
