"""The sources of images by name, and loading them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData, assemble, refuse_problems, with_captions
from heterodiff.data.collection import Collection
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.data.findings import show
from heterodiff.data.inspection import Known, survey_images
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
    "load_test",
    "open_part",
    "open_source",
    "with_captions",
]


_SOURCES = {
    "images": "heterodiff.data.sources.images:open_images",
    "captions": "heterodiff.data.captions:open_captions",
    "volumes": "heterodiff.data.sources.volumes:open_volumes",
    "digits": "heterodiff.data.sources.digits:open_digits",
    "microdoppler": "heterodiff.simulators.microdoppler:open_microdoppler",
    "shapes": "heterodiff.simulators.shapes:open_shapes",
    "brain-phantom": "heterodiff.simulators.brain_phantom:open_brain_phantom",
    "latents": "heterodiff.latents.reading:refuse_latents",
}
"""Source -> ``module:name`` of ``DataConfig -> Collection``, imported when the source is asked for."""

STORED_LATENTS = "heterodiff.latents.reading:load_stored"


def list_sources() -> list[str]:
    """Return the names that ``data.source`` accepts."""
    return list(_SOURCES)


def open_source(config: DataConfig) -> Collection:
    """List the images of ``config.source`` without decoding them.

    Raises:
        DataError: unknown source, latents, or nothing usable at ``config.path``.
    """
    if config.source not in _SOURCES:
        raise DataError(f"data.source: {unknown_name('source', config.source, _SOURCES)}")
    collection: Collection = loaded(_SOURCES[config.source])(config)
    return collection


def _is_for_test(collection: Collection, config: DataConfig, split: dict[str, Any] | None) -> np.ndarray:
    """Which images (N,) are kept for the last measurement: as saved, by name, or drawn.

    Raises:
        DataError: images saved or patients named for it that are not there.
    """
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


def open_part(config: DataConfig, part: Literal["train", "test"], split: dict[str, Any] | None = None) -> Collection:
    """List the images to train on and to validate with (``train``), or those kept for the last measurement (``test``).

    Args:
        split: a saved ``LoadedData.split_to_dict()``, whose test images stay those whatever was added since.

    Raises:
        DataError: as `open_source`; no images for testing, or not all that were saved as such.
    """
    return _part_of(open_source(config), config, part, split)


def _part_of(
    collection: Collection, config: DataConfig, part: Literal["train", "test"], split: dict[str, Any] | None
) -> Collection:
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
    """Images kept for the last measurement.

    Attributes:
        images: in the run's size, channels and class order.
        patients: of each image; its own name where the source knows none.
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
        part: of the images of ``config``: those kept for the last measurement, or all, where it was trained on others.
        split: of the run, whose test images stay those whatever was added since.

    Raises:
        DataError: none are kept, or they cannot be used.
    """
    collection = open_source(config) if part == "all" else open_part(config, "test", split)
    whole = config.model_copy(update={"val_fraction": 0.0, "train_classes": None})
    images = assemble(collection, survey_images(collection, whole, keep=True), whole, spec=spec).train
    row_of = {name: row for row, name in enumerate(collection.names)}
    chosen = collection.take([row_of[name] for name in images.names])
    return TestImages(images, chosen.groups or chosen.names, chosen.mask)


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
        stored: LoadedData = loaded(STORED_LATENTS)(config, split, spec)
        return stored
    every = open_source(config)
    collection = _part_of(every, config, "train", split)
    known = None if split is None or spec is None else Known(split_names(split), spec)
    data = assemble(collection, survey_images(collection, config, keep=True, known=known), config, split, spec)
    used = set(collection.names)
    return replace(data, for_test=tuple(name for name in every.names if name not in used))
