"""Held-out images: drawn per class, from names and a seed alone, or as saved."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from heterodiff.data.findings import show
from heterodiff.errors import DataError


def _draw(seed: int, name: str) -> bytes:
    """A random rank for ``name``: by hash, so it stays the same when files are added, on any platform."""
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def draw_split(names: Sequence[str], labels: np.ndarray, val_fraction: float, seed: int) -> np.ndarray:
    """Return a boolean mask (N,) of the images held out.

    Every class (and the unlabelled images, -1) gives its rounded share, at least one image and never all; a class
    of one image gives none.
    """
    mask = np.zeros(len(names), dtype=bool)
    if val_fraction == 0:
        return mask
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[int(label)].append(index)
    for indices in members.values():
        if len(indices) > 1:
            count = min(max(1, round(len(indices) * val_fraction)), len(indices) - 1)
            mask[sorted(indices, key=lambda index: _draw(seed, names[index]))[:count]] = True
    return mask


def draw_group_split(groups: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Return a boolean mask (N,) of the images held out, such that images of a group, such as a patient, stay together.

    The rounded share of the groups is held out, at least one and never all.
    """
    unique = sorted(set(groups))
    chosen = draw_split(unique, np.zeros(len(unique)), fraction, seed)
    held_out = {group for group, out in zip(unique, chosen, strict=True) if out}
    return np.array([group in held_out for group in groups], dtype=bool)


def _names(split: dict[str, Any], part: str) -> list[str]:
    names = split.get(part) if isinstance(split, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"saved split: expected a list of image names under '{part}'; delete it to split again")
    return names


def split_names(split: dict[str, Any]) -> frozenset[str]:
    """Return the names of all images of a saved split.

    Raises:
        DataError: the split is malformed.
    """
    return frozenset((*_names(split, "train"), *_names(split, "val")))


def _in_part(
    names: Sequence[str], split: dict[str, Any], part: str, others: list[str], groups: Sequence[str] | None, fix: str
) -> np.ndarray:
    """Return the mask (N,) of the images of ``part``; `DataError` if a group is in one of the ``others`` too."""
    inside = set(_names(split, part))
    mask = np.array([name in inside for name in names], dtype=bool)
    if groups is None:
        return mask
    outside = {name for other in others for name in _names(split, other)}
    groups_outside = {group for group, name in zip(groups, names, strict=True) if name in outside}
    if both := groups_outside.intersection(group for group, chosen in zip(groups, mask, strict=True) if chosen):
        raise DataError(
            f"saved split: images of {show(min(both))} are both in '{part}' and in {' or '.join(map(repr, others))}, "
            f"so what is learned of one would be tested on the other; {fix}"
        )
    return mask


def saved_test(
    names: Sequence[str], split: dict[str, Any], where: str, groups: Sequence[str] | None = None
) -> np.ndarray | None:
    """Return the mask (N,) of the images that the saved ``split`` keeps for testing; ``None`` where it names none.

    Args:
        groups: (N,) of each image, such as its patient, who may not be in another part too.

    Raises:
        DataError: the split is malformed, images are missing, or a group is in another part too.
    """
    if not (isinstance(split, dict) and "test" in split):
        return None
    kept = set(_names(split, "test"))
    if missing := sorted(kept - set(names)):
        raise DataError(
            f"{where}: {len(missing):,} of the {len(kept):,} images that the saved split keeps for testing are "
            f"missing, such as {show(missing[0])}; restore them"
        )
    return _in_part(names, split, "test", ["train", "val"], groups, "restore the split as it was written")


def apply_split(
    names: Sequence[str], split: dict[str, Any], where: str, groups: Sequence[str] | None = None
) -> np.ndarray:
    """Return the mask (N,) of the images that the saved ``split`` holds out.

    Args:
        groups: (N,) of each image, such as its patient, who may be in one part only.

    Raises:
        DataError: the split is malformed, does not name exactly the images found, or has a group in both parts.
    """
    saved = Counter([*_names(split, "train"), *_names(split, "val")])
    name, count = max(saved.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise DataError(f"saved split: {show(name)} appears twice; delete the split to draw it again")
    missing, new = sorted(saved.keys() - set(names)), sorted(set(names) - saved.keys())
    if missing or new:
        examples = [f"missing {show(name)}" for name in missing[:3]] + [f"new {show(name)}" for name in new[:3]]
        raise DataError(
            f"{where}: the saved split does not fit the {len(set(names)):,} usable images found: {len(missing):,} are "
            f"missing, {len(new):,} are new ({', '.join(examples)}). Restore the images, or start a new run, "
            "which splits again"
        )
    return ~_in_part(names, split, "train", ["val"], groups, "delete the split to draw it again")
