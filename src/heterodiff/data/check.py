"""Look at every image and report all that is wrong, instead of stopping at the first."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heterodiff.config import DataConfig
from heterodiff.data.assemble import assemble
from heterodiff.data.collection import Collection
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.findings import DataFinding
from heterodiff.data.inspection import Inspection, Measured
from heterodiff.data.labels import sort_classes
from heterodiff.data.sources import inspect_source
from heterodiff.errors import DataError


@dataclass(frozen=True)
class DataSummary:
    """Result of `check_data`.

    Attributes:
        spec: as training would use it; ``None`` while ``problems`` prevent training.
        class_counts: usable images by class name; unlabelled images count under "".
        sizes: the most common stored (height, width) with their number of images.
        dtypes: number types seen with their number of images.
        minimum, maximum, mean, std: statistics of the stored values, all images weighted alike; NaN without images.
        bad: every image, folder and metadata row that cannot be used.
        problems: errors beyond single images that training would stop with.
        warnings: those that training would give.
        captions: number of captions of all usable images.
    """

    spec: ImageSpec | None
    class_counts: dict[str, int]
    sizes: tuple[tuple[tuple[int, int], int], ...]
    dtypes: dict[str, int]
    minimum: float
    maximum: float
    mean: float
    std: float
    bad: tuple[DataFinding, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    captions: int = 0


def _class_counts(collection: Collection, inspection: Inspection) -> dict[str, int]:
    counts = Counter(collection.class_of[image.row] for image in inspection.images)
    unlabelled = counts.pop(None, 0)
    names = sort_classes({name for name in counts if name is not None})
    return {name: counts[name] for name in names} | ({"": unlabelled} if unlabelled else {})


def _statistics(images: Sequence[Measured]) -> tuple[float, float, float, float]:
    if not images:
        return math.nan, math.nan, math.nan, math.nan
    mean = math.fsum(image.mean for image in images) / len(images)
    mean_square = math.fsum(image.mean_square for image in images) / len(images)
    low, high = min(image.low for image in images), max(image.high for image in images)
    return low, high, mean, math.sqrt(max(0.0, mean_square - mean * mean))


def check_data(config: DataConfig) -> DataSummary:
    """Read every image of ``config`` and list what is wrong with each, keeping none in memory.

    Raises:
        DataError: there is nothing to look at: unknown source, missing or empty folder, unreadable metadata file.
    """
    found = inspect_source(config, "all", keep=False, moments=True)
    config, collection, inspection = found.config, found.collection, found.inspection
    spec: ImageSpec | None = None
    problems: tuple[str, ...] = ()
    warnings, captions = collection.warnings, 0
    if inspection.images:
        lenient = config.model_copy(update={"on_bad": "skip"})
        collection_of_good_rows = replace(collection, problems=())
        try:
            loaded = assemble(collection_of_good_rows, inspection, lenient)
            spec, warnings, captions = loaded.spec, loaded.warnings, sum(map(len, loaded.captions))
        except DataError as error:
            problems = (str(error),)
    else:
        problems = (f"{collection.where}: no usable image",)
    return DataSummary(
        spec,
        _class_counts(collection, inspection),
        tuple(inspection.sizes.most_common(5)),
        dict(inspection.dtypes.most_common()),
        *_statistics(inspection.images),
        bad=(*inspection.bad, *collection.problems),
        problems=problems,
        warnings=warnings,
        captions=captions,
    )
