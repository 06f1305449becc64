"""The format of a folder of stored latents.

``plan.json`` describes the latents and is written first; ``shard_00000.safetensors`` and so on hold tensors
``mean`` and ``std`` (n, c, h, w) float16 and ``label`` (n,) int64, training images first; ``index.json``, written last,
repeats the plan and lists the shards with their checksums. Each file appears under its name only when it is complete.
"""

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from heterodiff.data.dataset import ImageSpec
from heterodiff.data.findings import show
from heterodiff.errors import CheckpointError, DataError
from heterodiff.files import MAX_LIST_BYTES, read_json, refuse_header

FORMAT = 1
PLAN_FILE = "plan.json"
INDEX_FILE = "index.json"
ENCODE_AGAIN = (
    "run the same `heterodiff encode` again, which keeps complete shards and writes the others (or, if a run encoded "
    "its images here, delete the folder and start the run again)"
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Part(_Record):
    """Names and class indices (-1 = unlabelled) of the training or the validation images, in order."""

    names: tuple[str, ...]
    labels: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...]


class Plan(_Record):
    """Content of a folder of latents, known before the first image is encoded.

    Attributes:
        vae_fingerprint: hash of the encoder's weights.
        source_fingerprint: hash of names, labels and sampled values of the images, whatever their split.
        transform_fingerprint: hash of the settings that change the values or shape of an image.
        vae_path: where the VAE was loaded from.
        shape: (c, h, w) of a latent.
        spec: specification of the images, as `ImageSpec.to_dict`.
        data_config: the settings the images were read with, as JSON; its path is absolute.
        shard_size: images of each shard but the last.
    """

    format: int = FORMAT
    vae_fingerprint: str
    source_fingerprint: str
    transform_fingerprint: str
    vae_path: str
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    spec: dict[str, Any]
    data_config: dict[str, Any]
    train: Part
    val: Part
    shard_size: PositiveInt

    @cached_property
    def labels(self) -> np.ndarray:
        """Class indices (N,) int64 of all images, training images first."""
        return np.array([*self.train.labels, *self.val.labels], dtype=np.int64)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return (*self.train.names, *self.val.names)

    @cached_property
    def ranges(self) -> list[range]:
        """The images of each shard."""
        total = len(self.names)
        return [range(start, min(start + self.shard_size, total)) for start in range(0, total, self.shard_size)]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image: mean and std in float16, and the label."""
        return 2 * 2 * math.prod(self.shape) + 8


class Shard(_Record):
    """A finished shard."""

    file: str
    count: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class Index(Plan):
    """Content of a complete folder of latents.

    Attributes:
        shards: the files, in order.
        counts: number of images of each class ("unlabelled": without one) in ``train`` and in ``val``.
        mean, std: statistics of each channel of the unscaled training latents.
    """

    shards: tuple[Shard, ...]
    counts: dict[str, dict[str, NonNegativeInt]]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(ge=0)], ...]


_PlanOrIndex = TypeVar("_PlanOrIndex", bound=Plan)


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def read_record(path: Path, kind: type[_PlanOrIndex]) -> _PlanOrIndex:
    """Read a `Plan` or an `Index`.

    Raises:
        DataError: too large, not JSON, of another format, or facts that are missing or contradict each other.
    """
    content = read_json(path, DataError, f"delete {path.parent} and encode again", MAX_LIST_BYTES)
    found = content.get("format")
    if found != FORMAT:
        raise DataError(
            f"{path}: latents of format {found!r:.50}, expected {FORMAT}; encode the images again into another folder"
        )
    try:
        record = kind.model_validate(content)
        problem = _contradiction(record)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except DataError as error:
        problem = str(error)
    if problem:
        raise DataError(f"{path}: damaged: {problem}; delete {path.parent} and encode again")
    return record


def _contradiction(plan: Plan) -> str | None:
    """Return the first contradiction in ``plan``, or ``None``."""
    classes = len(ImageSpec.from_dict(plan.spec).class_names)
    for part, images in (("train", plan.train), ("val", plan.val)):
        if len(images.names) != len(images.labels):
            return f"{part}: expected a label for each of {len(images.names):,} names, found {len(images.labels):,}"
    if not plan.train.names:
        return "expected training images, found none"
    if (greatest := int(plan.labels.max())) >= classes:
        return f"expected labels below the number of classes, {classes}, found {greatest}"
    if not isinstance(plan, Index):
        return None
    found = [(shard.file, shard.count) for shard in plan.shards]
    expected = [(shard_name(number), len(images)) for number, images in enumerate(plan.ranges)]
    for (name, count), (found_name, found_count) in zip(expected, found, strict=False):
        if (name, count) != (found_name, found_count):  # also keeps paths such as ../x out
            return f"expected shard {name} of {count:,} images, found {show(found_name)} of {found_count:,}"
    if len(found) != len(expected):
        return f"expected {len(expected):,} shards, found {len(found):,}"
    if not len(plan.mean) == len(plan.std) == plan.shape[0]:
        return f"expected mean and std of {plan.shape[0]} channels, found {len(plan.mean)} and {len(plan.std)}"
    return None


def shard_problem(folder: Path, plan: Plan, number: int) -> str | None:
    """Return the reason why shard ``number`` in ``folder`` cannot be used, or ``None``, without reading its latents."""
    path, images = folder / shard_name(number), plan.ranges[number]
    labels = plan.labels[images.start : images.stop]
    if path.is_symlink() or not path.is_file():
        return "expected a file, found a link or folder" if path.is_symlink() or path.exists() else "missing"
    latents = ("F16", [len(labels), *plan.shape])
    expected = {"label": ("I64", [len(labels)]), "mean": latents, "std": latents}
    try:
        refuse_header(path, "encode again")
        with safe_open(path, "np") as file:  # refuses headers that do not describe the file
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            if found != expected:
                return f"expected tensors {_describe(expected)}, found {_describe(found)}"
            if not np.array_equal(file.get_tensor("label"), labels):
                return "its labels are not those of the index"
    except (OSError, SafetensorError, CheckpointError) as error:
        return f"truncated or damaged: {error}"
    return None


def _describe(tensors: dict[str, tuple[str, list[int]]]) -> str:
    return ", ".join(f"{name} {kind} {shape}" for name, (kind, shape) in list(tensors.items())[:5]) or "none"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_shard(path: Path) -> np.ndarray:
    """Return mean and std (n, 2 c, h, w) float16 of a shard."""
    with safe_open(path, "np") as file:
        return np.concatenate([file.get_tensor("mean"), file.get_tensor("std")], axis=1)
