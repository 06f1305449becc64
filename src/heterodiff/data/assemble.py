"""Training and validation sets of inspected images: policy, labels, split, value range."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.attributes import describe_attributes, encode_attributes
from heterodiff.data.collection import Collection
from heterodiff.data.conditions import describe
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.data.findings import DataFinding, listing, show
from heterodiff.data.inspection import Inspection, Measured
from heterodiff.data.labels import index_labels
from heterodiff.data.split import apply_split, draw_group_split, draw_split
from heterodiff.errors import DataError

Range = tuple[float, float]
_FULL_RANGE: dict[str, Range] = {"uint8": (0.0, 255.0), "bool": (0.0, 1.0)}
MOST_LATENT_SIDE = 96
"""Pixels of a latent's longer side, of images of 768 pixels with a VAE of 8."""
_LEAST_COVERAGE = 0.05


@dataclass(frozen=True)
class LatentsInfo:
    """A folder of stored latents and their origin.

    Attributes:
        folder: the folder of latents.
        vae_fingerprint: fingerprint of the encoder's weights.
        vae_path: where the VAE was when they were encoded.
        shape: (c, h, w) of a latent.
        data_config: the data settings the images were read with, as JSON.
        mean, std: statistics of each channel of the unscaled training latents.
    """

    folder: Path
    vae_fingerprint: str
    vae_path: Path
    shape: tuple[int, int, int]
    data_config: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class LoadedData:
    """A training and a validation set, and warnings about them.

    Attributes:
        latents: set where the sets hold stored latents instead of images.
        captions: captions of each image, if any: label i of ``train`` and ``val`` points at ``captions[i]``.
        left_out: names of the images of the training part that are not among ``data.train_classes``.
        for_test: names of the images that are in neither set, kept for the last measurement.
    """

    spec: ImageSpec
    train: ImageDataset
    val: ImageDataset
    skipped: tuple[DataFinding, ...]
    warnings: tuple[str, ...]
    latents: LatentsInfo | None = None
    captions: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    for_test: tuple[str, ...] = ()

    def split_to_dict(self) -> dict[str, list[str]]:
        """Return the names of the images of each part; JSON-able, read back by ``load_data(split=)``."""
        split = {"train": [*self.train.names, *self.left_out], "val": list(self.val.names)}
        return split | ({"test": list(self.for_test)} if self.for_test else {})


def with_captions(data: LoadedData, captions: Mapping[str, tuple[str, ...]]) -> LoadedData:
    """Return ``data``, of images or of stored latents, with labels that point at captions instead of classes.

    Args:
        captions: captions of each image by its name, perhaps of more images than those of ``data``.

    Raises:
        DataError: an image without a caption.
    """
    names = [*data.train.names, *data.val.names]
    missing = [name for name in names if not captions.get(name)]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images have no caption, for example {show(missing[0])}; restore the "
            "captions these images were loaded with, or add the missing ones"
        )
    spec, count = replace(data.spec, class_names=()), len(data.train)
    return replace(
        data,
        spec=spec,
        train=_relabelled(data.train, spec, np.arange(count)),
        val=_relabelled(data.val, spec, np.arange(count, len(names))),
        captions=tuple(captions[name] for name in names),
    )


def without_captions(data: LoadedData) -> tuple[LoadedData, dict[str, tuple[str, ...]]]:
    """Return ``data`` with every label -1, and the captions by name; the inverse of :func:`with_captions`."""
    parts = (data.train, data.val)
    by_name = {n: data.captions[label] for part in parts for n, label in zip(part.names, part.labels, strict=True)}
    train, val = (_relabelled(part, data.spec, np.full(len(part), -1)) for part in parts)
    return replace(data, train=train, val=val, captions=()), by_name


def with_attributes(data: LoadedData, images: LoadedData) -> LoadedData:
    """Return ``data``, stored latents of ``images``, with the attributes of these."""
    if not images.spec.attributes:
        return data
    of_name: dict[str, np.ndarray] = {}
    for part in (images.train, images.val):
        assert part.attributes is not None
        of_name |= dict(zip(part.names, part.attributes, strict=True))
    train, val = copy(data.train), copy(data.val)
    for part in (train, val):
        part.spec, part.attributes = images.spec, np.stack([of_name[name] for name in part.names])
    return replace(data, spec=images.spec, train=train, val=val)


def _relabelled(dataset: ImageDataset, spec: ImageSpec, labels: np.ndarray) -> ImageDataset:
    """Return the same images, of a subclass too, with other labels (N,) int64."""
    other = copy(dataset)
    other.spec, other.labels = spec, labels
    return other


def refuse_problems(collection: Collection, config: DataConfig) -> None:
    """Raise `DataError` for rows that cannot be used; those of captions may be left out (``on_bad=skip``)."""
    problems, skippable = collection.problems, collection.captions is not None
    if not problems or (skippable and config.on_bad == "skip"):
        return
    what = "captions" if skippable else "metadata rows"
    way_out = "\nCorrect or remove them, or set data.on_bad=skip to leave them out" if skippable else ""
    raise DataError(f"{collection.where}: {len(problems):,} {what} cannot be used:\n{listing(problems)}{way_out}")


def _refuse_unusable(where: str, inspection: Inspection, config: DataConfig) -> None:
    bad, total = inspection.bad, len(inspection.images) + len(inspection.bad)
    if not inspection.images:
        raise DataError(f"{where}: none of {total:,} images can be used:\n{listing(bad)}")
    if bad and config.on_bad == "error":
        raise DataError(
            f"{where}: {len(bad):,} of {total:,} images cannot be used:\n{listing(bad)}\n"
            "Repair or remove them (`heterodiff check` lists all), or set data.on_bad=skip to leave them out"
        )
    sizes = inspection.sizes
    if config.image_size is None and len(sizes) > 1:
        common = sizes.most_common(5)
        seen = ", ".join(f"{height}x{width} ({count:,} images)" for (height, width), count in common)
        more = f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""
        raise DataError(
            f"{where}: images differ in size (height x width): {seen}{more}; "
            f"set data.image_size, for example {list(common[0][0])}, to resize them"
        )


def _refuse_unlike_spec(collection: Collection, inspection: Inspection, spec: ImageSpec) -> None:
    if collection.captions is not None and spec.class_names:
        raise DataError(
            f"{collection.where}: the run expects images of {len(spec.class_names)} classes, found images with "
            "captions; use images with class labels, or a run trained on captions"
        )
    expected_channels = spec.channels + (len(spec.condition.given) if spec.condition else 0)
    for what, expected, found, way_out in (
        (
            "channels",
            expected_channels,
            inspection.images[0].shape[0],
            f"use images of {expected_channels} channels",
        ),
        (
            "channels with those of the condition image",
            max(expected_channels, spec.stored_channels),
            inspection.stored_channels,
            "use condition images as at training",
        ),
        ("height and width", (spec.height, spec.width), inspection.size, "set data.image_size to the expected size"),
        ("number type", spec.dtype, inspection.dtype, "store the images as they were for training"),
    ):
        if expected != found:
            raise DataError(f"{collection.where}: {what}: the run expects {expected}, found {found}; {way_out}")


def _extent(images: Sequence[Measured]) -> Range:
    return min(image.low for image in images), max(image.high for image in images)


def _value_range(train: Sequence[Measured], collection: Collection, dtype: str, config: DataConfig) -> Range:
    """Choose the stored values that become 0 and 1: as configured, by number type, or measured on ``train``."""
    low, high = _extent(train)
    if low == high:
        raise DataError(
            f"{collection.where}: all training images hold the single value {low:g}, so there is nothing to learn; "
            "check how they were saved"
        )
    chosen = config.value_range or collection.value_range or _FULL_RANGE.get(dtype, (low, high))
    if not (np.isfinite(chosen).all() and chosen[0] < chosen[1]):
        raise DataError(f"data.value_range: expected two numbers, the lower first, found {list(chosen)}")
    if dtype.startswith("uint") and chosen[1] - chosen[0] <= 1 < high - low:
        full = [round(value) for value in _FULL_RANGE.get(dtype, (low, high))]
        raise DataError(
            f"data.value_range: [{chosen[0]:g}, {chosen[1]:g}] makes images of {dtype} black and white alone, as they "
            f"hold {low:g} to {high:g}; give the stored values that mean 0 and 1, such as {full}, or leave it out"
        )
    return chosen


def _refuse_latents(where: str, spec: ImageSpec) -> None:
    """Refuse what a VAE has most likely encoded already; as pixels it would be learned without any complaint."""
    low, high = spec.value_range
    if spec.channels >= 4 and max(spec.height, spec.width) <= MOST_LATENT_SIDE and low < -1 and high > 1:
        raise DataError(
            f"{where}: images of {spec.channels} channels of {spec.height}x{spec.width}, stored as {spec.dtype} from "
            f"{low:.3g} to {high:.3g}, look like latents of a VAE; give the images themselves with "
            "codec.kind=kl-vae, which encodes them, or, if these are images, set "
            f"data.value_range=[{low:.3g}, {high:.3g}]"
        )


def _held_out(
    collection: Collection, rows: np.ndarray, labels: np.ndarray, config: DataConfig, split: dict[str, Any] | None
) -> np.ndarray:
    """Return the mask (N,) of the images ``rows`` for validation: as saved, as the source has it, or drawn."""
    names = [collection.names[row] for row in rows]
    groups = None
    if collection.groups is not None and config.split_by == "patient":
        groups = [collection.groups[row] for row in rows]
    way_out = "delete the saved split to split again"
    if split is not None:
        mask = apply_split(names, split, collection.where, groups)
    elif collection.held_out is not None:
        mask, way_out = np.array(collection.held_out, dtype=bool)[rows], "add usable images to the training part"
    elif groups is not None:
        mask = draw_group_split(groups, config.val_fraction, config.split_seed)
    else:
        mask = draw_split(names, labels, config.val_fraction, config.split_seed)
    if mask.all():
        raise DataError(f"{collection.where}: no image is left for training; {way_out}")
    return mask


def _trained_on(labels: np.ndarray, class_names: tuple[str, ...], where: str, config: DataConfig) -> np.ndarray:
    """Return the mask (N,) of the images of the classes to train on."""
    if config.train_classes is None:
        return np.ones(len(labels), dtype=bool)
    if unknown := [name for name in config.train_classes if name not in class_names]:
        known = ", ".join(map(show, class_names[:20])) or "none"
        raise DataError(f"data.train_classes: {where} has no class {show(unknown[0])}; its classes are {known}")
    return np.isin(labels, [class_names.index(name) for name in config.train_classes])


def _range_warnings(
    used: Sequence[Measured], train: Sequence[Measured], spec: ImageSpec, measured_here: bool
) -> list[str]:
    warnings = []
    low, high = spec.value_range
    if measured_here:
        warnings.append(
            f"stored values {low:g} to {high:g}, measured on the training images, are mapped to 0 and 1; "
            "set data.value_range to fix them"
        )
    if outside := sum(image.low < low or image.high > high for image in used):
        warnings.append(f"{outside:,} images have values outside {low:g} to {high:g}; these are clamped")
    least, most = _extent(train)
    if min(most, high) - max(least, low) < _LEAST_COVERAGE * (high - low):
        warnings.append(
            f"stored values {least:g} to {most:g} cover less than {_LEAST_COVERAGE:.0%} of the range {low:g} to "
            f"{high:g}: images are nearly uniform; check data.value_range"
        )
    return warnings


def assemble(
    collection: Collection,
    inspection: Inspection,
    config: DataConfig,
    split: dict[str, Any] | None = None,
    spec: ImageSpec | None = None,
) -> LoadedData:
    """Apply policy and configuration to inspected images; arguments and errors as `sources.load_data`."""
    refuse_problems(collection, config)
    _refuse_unusable(collection.where, inspection, config)
    if spec is not None:
        _refuse_unlike_spec(collection, inspection, spec)
    rows = np.array([image.row for image in inspection.images])
    names = [collection.names[row] for row in rows]
    class_names, labels, warnings = index_labels(
        [collection.class_of[row] for row in rows], collection.where, config, spec
    )
    held_out = _held_out(collection, rows, labels, config, split)
    columns = {name: [values[row] for row in rows] for name, values in collection.columns.items()}
    known_classes = class_names if spec is None else spec.class_names
    learned = ~held_out & _trained_on(labels, known_classes, collection.where, config)
    if not learned.any():
        raise DataError(
            f"{collection.where}: no image of data.train_classes, {', '.join(map(show, config.train_classes or ()))}, "
            "is left for training; hold out fewer"
        )
    train = [image for image, chosen in zip(inspection.images, learned, strict=True) if chosen]
    measured_here = False
    if spec is None:
        value_range = _value_range(train, collection, inspection.dtype, config)
        measured_here = not (config.value_range or collection.value_range or inspection.dtype in _FULL_RANGE)
        condition = describe(
            config.condition, inspection.images[0].shape[0], inspection.stored_channels, inspection.size
        )
        channels = inspection.images[0].shape[0] - (len(condition.given) if condition else 0)
        known = {name: [v for v, chosen in zip(columns[name], learned, strict=True) if chosen] for name in columns}
        attributes = describe_attributes(config.conditions or {}, known, collection.where)
        spec = ImageSpec(*inspection.size, channels, class_names, value_range, inspection.dtype, condition, attributes)
        if measured_here and spec.dtype.startswith("float"):
            _refuse_latents(collection.where, spec)
    warnings = [*collection.warnings, *warnings, *_range_warnings(inspection.images, train, spec, measured_here)]
    if bad := inspection.bad:
        warnings.append(f"{len(bad):,} images cannot be used and were skipped: {show(bad[0].name)} ...")
    if collection.problems:
        first = f"{show(collection.problems[0].name)}: {collection.problems[0].problem}"
        warnings.append(f"{len(collection.problems):,} captions cannot be used and were left out: {first} ...")
    if not inspection.fits_memory:
        warnings.append("images are decoded at every access: they need more memory than data.memory_limit_gb")

    attributes_of = encode_attributes(spec.attributes, columns, names, collection.where)

    def part(mask: np.ndarray) -> ImageDataset:
        assert inspection.store is not None
        chosen = np.flatnonzero(mask)
        attributes = None if attributes_of is None else attributes_of[chosen]
        named = [names[i] for i in chosen]
        return ImageDataset(spec, inspection.store, rows[chosen], named, labels[chosen], attributes)

    skipped = (*inspection.bad, *collection.problems)
    left_out = tuple(names[i] for i in np.flatnonzero(~held_out & ~learned))
    data = LoadedData(spec, part(learned), part(held_out), skipped, tuple(warnings), left_out=left_out)
    if collection.captions is None:
        return data
    return with_captions(data, dict(zip(collection.names, collection.captions, strict=True)))
