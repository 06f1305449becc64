"""Class names to class indices."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.findings import show
from heterodiff.errors import DataError

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Return class names in their order: by number if all are integers, else by text."""
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _refuse_useless(found: set[str], where: str, config: DataConfig) -> None:
    if not found and config.labels == "required":
        raise DataError(
            f"{where}: data.labels=required but no image has a label; put the images into one subfolder per class, "
            "add metadata.csv with columns file_name and label, or set data.labels=auto"
        )
    if len(found) == 1:
        raise DataError(
            f"{where}: only one class found ({show(next(iter(found)))}); conditioning on labels needs at least two. "
            "Add another class, or set data.labels=none to train without labels"
        )


def index_labels(
    class_of: Sequence[str | None], where: str, config: DataConfig, spec: ImageSpec | None
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Return class names, labels (N,) int64 with -1 = unlabelled, and warnings.

    ``spec`` fixes the class order of an earlier run, of which fewer classes may be present now.

    Raises:
        DataError: labels are required and missing, a single class, or a class that ``spec`` does not know.
    """
    found = {name for name in class_of if name is not None}
    if spec is None or (not found and config.labels == "required"):
        _refuse_useless(found, where, config)
    if spec is None:
        classes = sort_classes(found)
    elif spec.class_names:
        classes = spec.class_names
    else:
        return (), np.full(len(class_of), -1, dtype=np.int64), []
    unknown = sort_classes(found - set(classes))
    if unknown:
        raise DataError(
            f"{where}: classes {', '.join(map(show, unknown[:5]))} are not among those of the run "
            f"({', '.join(map(show, classes[:20]))}); rename or remove them, or set data.labels=none"
        )
    index = {name: number for number, name in enumerate(classes)}
    labels = np.array([-1 if name is None else index[name] for name in class_of], dtype=np.int64)
    counts = Counter(name for name in class_of if name is not None)
    single = [show(name) for name in classes if counts[name] == 1]
    warnings = [f"classes with a single image: {', '.join(single[:10])}"] if single and spec is None else []
    return classes, labels, warnings
