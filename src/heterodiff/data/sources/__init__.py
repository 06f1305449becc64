"""The sources of images by name, and loading them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData, assemble, refuse_problems, with_captions
from heterodiff.data.attributes import with_columns
from heterodiff.data.collection import Collection
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.data.findings import show
from heterodiff.data.inspection import Inspection, inspect_images
from heterodiff.data.sources.beside import with_condition
from heterodiff.data.split import draw_group_split, saved_test, split_names
from heterodiff.errors import DataError, unknown_name
from heterodiff.lazy import loaded

__all__ = [
    "DataConfig",
    "LoadedData",
    "TestImages",
    "encoded_from",
    "image_captions",
    "list_sources",
    "load_data",
    "load_decoded",
    "load_test",
    "open_source",
    "part_of",
    "with_captions",
]


MODES = {1: "grey", 2: "grey with transparency", 3: "RGB", 4: "RGBA"}
COLOURED = (3, 4)
"""Channels that a mixture of 8-bit pictures can be read with without loss."""

_SOURCES = {
    "images": ("heterodiff.data.sources.images:open_images", "a folder of images or an .npz file"),
    "captions": ("heterodiff.data.captions:open_captions", "a folder of images and their captions"),
    "webdataset": ("heterodiff.data.sources.shards:open_webdataset", "tar files of images with classes or captions"),
    "hf-dataset": (
        "heterodiff.data.sources.hf_dataset:open_hf_dataset",
        "a folder that datasets' save_to_disk wrote, or parquet files",
    ),
    "volumes": (
        "heterodiff.data.sources.volumes:open_volumes",
        "a folder of patients with NIfTI volumes or slices, or an npz file",
    ),
    "latents": ("heterodiff.latents.reading:load_stored", "a folder written by `heterodiff encode`"),
    "digits": ("heterodiff.data.sources.digits:open_digits", None),
    "microdoppler": ("heterodiff.simulators.microdoppler:open_microdoppler", None),
    "shapes": ("heterodiff.simulators.shapes:open_shapes", None),
    "brain-phantom": ("heterodiff.simulators.brain_phantom:open_brain_phantom", None),
}
"""``module:name`` of the function that opens each source, imported when it is asked for, and what it needs in
``data.path``: ``DataConfig -> Collection``, for latents to `LoadedData`."""


def list_sources() -> list[str]:
    """Return the names that ``data.source`` accepts."""
    return list(_SOURCES)


def _open(config: DataConfig, *more: Any) -> Any:
    """Call the function that opens the source with ``config`` and ``more``."""
    if config.source not in _SOURCES:
        raise DataError(f"data.source: {unknown_name('source', config.source, _SOURCES)}")
    function, needed = _SOURCES[config.source]
    if needed and config.path is None:
        raise DataError(f"data.source '{config.source}' needs data.path: {needed}")
    return loaded(function)(config, *more)


def open_source(config: DataConfig) -> Collection:
    """List the images of ``config.source`` without decoding them.

    Raises:
        DataError: unknown source, latents, or nothing usable at ``config.path``.
    """
    if config.source == "latents":
        raise DataError(
            f"data.source=latents ({config.path}): these are stored latents, not images; here the images they were "
            "encoded from are needed: set data.source and data.path to those"
        )
    collection: Collection = with_condition(with_columns(_open(config), config), config)
    if config.path is None or _SOURCES[config.source][1]:
        return collection
    unused = f"data.path is not used by data.source '{config.source}'"
    return replace(collection, warnings=(unused, *collection.warnings))


def _is_for_test(collection: Collection, config: DataConfig, split: dict[str, Any] | None) -> np.ndarray:
    """Return the mask (N,) of the images kept for testing: as saved, by name, or drawn."""
    if split is not None:
        saved = saved_test(collection.names, split, collection.where, collection.groups)
        if saved is not None:
            return saved
    groups = collection.names if collection.groups is None else collection.groups
    if config.test_patients:
        known = sorted(set(collection.groups or ()))
        if unknown := sorted(set(config.test_patients).difference(known)):
            raise DataError(
                f"data.test_patients: {collection.where} has no patient {show(unknown[0])}, but "
                f"{', '.join(map(show, known[:10])) or 'images without patients'}"
            )
        return np.isin(groups, config.test_patients)
    return draw_group_split([f"test {group}" for group in groups], config.test_fraction, config.split_seed)


def part_of(
    collection: Collection, config: DataConfig, part: Literal["train", "test"], split: dict[str, Any] | None = None
) -> Collection:
    """Return the images for training and validation (``train``), or those kept for testing (``test``).

    Args:
        split: a saved ``LoadedData.split_to_dict()``, whose test images stay those whatever was added since.

    Raises:
        DataError: no images for testing, or not all that were saved as such.
    """
    if config.test_fraction == 0 and not config.test_patients:
        if part == "test":
            raise DataError("data.test_fraction=0 keeps no images for testing; set it, for example to 0.2, and train")
        return collection
    chosen = np.flatnonzero(_is_for_test(collection, config, split) == (part == "test"))
    if not len(chosen):
        which = "none" if part == "test" else "all"
        raise DataError(
            f"data.test_patients, data.test_fraction: {which} of the images of {collection.where} would be kept for "
            "testing; some are to be trained on and some to be tested with"
        )
    return collection.take(chosen.tolist())


@dataclass(frozen=True)
class TestImages:
    """Images kept for testing.

    Attributes:
        images: in the run's size, channels and class order.
        patients: patient of each image; the image's own name where the source knows none.
        mask: number of an image -> (H, W) bool; ``None`` where the source has none.
    """

    images: ImageDataset
    patients: tuple[str, ...]
    mask: Callable[[int], np.ndarray] | None


def load_test(
    config: DataConfig,
    spec: ImageSpec,
    part: Literal["test", "all"] = "test",
    split: dict[str, Any] | None = None,
) -> TestImages:
    """Load the images that a run with the data settings ``config`` never read.

    Args:
        part: the images of ``config`` that are kept for testing, or all, where the run was trained on others.
        split: saved split of the run, whose test images stay those whatever was added since.

    Raises:
        DataError: none are kept, or they cannot be used.
    """
    found = inspect_source(config, part, split, spec, keep=True)
    collection = found.collection
    unsplit = found.config.model_copy(update={"val_fraction": 0.0, "train_classes": None})
    images = assemble(collection, found.inspection, unsplit, spec=spec).train
    row_of = {name: row for row, name in enumerate(collection.names)}
    chosen = collection.take([row_of[name] for name in images.names])
    return TestImages(images, chosen.groups or chosen.names, chosen.mask)


@dataclass(frozen=True)
class Inspected:
    """Images of a source that have been read once, and the settings that they were read with."""

    config: DataConfig
    every: Collection
    collection: Collection
    inspection: Inspection


def inspect_source(
    config: DataConfig,
    part: Literal["train", "test", "all"],
    split: dict[str, Any] | None = None,
    spec: ImageSpec | None = None,
    **options: Any,
) -> Inspected:
    """Read the images of ``part`` once; pictures of several colour modes are one set of images.

    Args:
        split, spec: as of :func:`load_data`.
        **options: of :func:`heterodiff.data.inspection.inspect_images`.

    Raises:
        DataError: as :func:`open_source` and :func:`part_of`.
    """
    of_run = spec.channels if spec is not None and spec.dtype == "uint8" and spec.channels in COLOURED else None
    if config.channels is None and options.get("trusted"):  # the run's own images, not all of which are read now
        config = config.model_copy(update={"channels": of_run})
    every = open_source(config)
    collection = every if part == "all" else part_of(every, config, part, split)
    inspection = inspect_images(collection, config, spec=spec, **options)
    channels = _common_channels(inspection) if config.channels is None else None
    if channels is None:
        return Inspected(config, every, collection, inspection)
    channels = of_run or channels
    again = inspect_source(config.model_copy(update={"channels": channels}), part, split, spec, **options)
    counts = ", ".join(f"{count:,} {MODES[c]}" for (c, _), count in sorted(inspection.kinds.items()))
    note = f"pictures of several kinds ({counts}) are all read as {MODES[channels]}; data.channels chooses another"
    return replace(again, collection=replace(again.collection, warnings=(*again.collection.warnings, note)))


def _common_channels(inspection: Inspection) -> int | None:
    """Channels that 8-bit pictures of several colour modes have in common; None where they are alike, or others."""
    found = {channels for channels, _ in inspection.kinds}
    if len(found) < 2 or not found <= MODES.keys() or {dtype for _, dtype in inspection.kinds} != {"uint8"}:
        return None
    return 4 if found & {2, 4} else 3


def image_captions(config: DataConfig) -> dict[str, tuple[str, ...]] | None:
    """Return the captions of each image by its name, without decoding any; ``None`` for a source without captions.

    For stored latents, give the settings the images were read with (``LatentsInfo.data_config``).

    Raises:
        DataError: as `open_source`; or captions that cannot be used (with ``on_bad=error``).
    """
    collection = open_source(config)
    if collection.captions is None:
        return None
    refuse_problems(collection, config)
    return dict(zip(collection.names, collection.captions, strict=True))


def encoded_from(config: DataConfig) -> DataConfig:
    """Return the settings of the images that stored latents were encoded from; for images, ``config`` itself.

    Raises:
        DataError: the latents are not there any more.
    """
    if config.source != "latents":
        return config
    assert config.path is not None
    index = loaded("heterodiff.latents.reading:read_index")(config.path.expanduser())
    return DataConfig.model_validate(index.data_config)


def load_decoded(config: DataConfig, run: Path, split: dict[str, Any], spec: ImageSpec | None) -> LoadedData:
    """Load the stored latents of ``config`` as the images that the codec in the folder ``run`` makes of them.

    Raises:
        DataError: as :func:`load_data`.
        CheckpointError: the codec cannot be loaded.
    """
    images: LoadedData = loaded("heterodiff.latents.reading:decoded")(load_data(config, split, spec), run)
    return images


def load_data(config: DataConfig, split: dict[str, Any] | None = None, spec: ImageSpec | None = None) -> LoadedData:
    """Read all images once and return the training and validation sets; for latents, open them as they were stored.

    Args:
        split: a saved ``LoadedData.split_to_dict()`` to reuse instead of drawing the split again.
        spec: a saved specification: its value range and class order are reused instead of measured, and images
            must have its size, channels and number type.

    Raises:
        DataError: nothing to load, images that cannot be used (with ``on_bad=error``), differing sizes without
            ``image_size``, unusable labels or metadata, a single value everywhere, or a split or specification that
            does not fit; latents that are incomplete or damaged. The message names the files and the way out.
    """
    if config.source == "latents":
        if config.train_classes is not None:
            raise DataError("data.train_classes: not for stored latents; encode images of these classes alone")
        stored: LoadedData = _open(config, split, spec)
        return stored
    trusted = split_names(split) if split is not None and spec is not None else frozenset()
    found = inspect_source(config, "train", split, spec, keep=True, trusted=trusted)
    data = assemble(found.collection, found.inspection, found.config, split, spec)
    used = set(found.collection.names)
    return replace(data, for_test=tuple(name for name in found.every.names if name not in used))
