"""The sets of an augmentation study: three to train on, one to read; what is left out, and how many to draw."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heterodiff.errors import DataError
from heterodiff.metrics.classifiers import MAX_TRAIN_IMAGES
from heterodiff.metrics.generation import Labelled, checked_images, class_name

CONDITIONS = {"real": "real only", "generated": "generated only", "both": "real + generated"}
MAX_STUDY_IMAGES = MAX_TRAIN_IMAGES // 2  # real and as many generated ones: the classifiers then see them all
WAY_OUT = "give labelled real images with --data, or train with data.val_fraction above 0"


def study_sets(train: Labelled, held_out: Labelled, class_names: Sequence[str]) -> tuple[Labelled, Labelled, list[str]]:
    """Return the training and the held-out images that a study uses, and notes on what it leaves out.

    Left out are images without a label, held-out images of a class without training images, and training images
    above 2,500, in equal parts of every class.

    Raises:
        DataError: shapes or values that cannot be used, or fewer than two classes on either side.
    """
    notes: list[str] = []
    train = checked_images("training images", *train)
    held_out = checked_images("held-out images", *held_out)
    if len(held_out[0]) == 0:
        raise DataError(f"held-out images: there are none to measure on; {WAY_OUT}")
    if len(train[0]) and train[0].shape[1:] != held_out[0].shape[1:]:
        raise DataError(
            f"held-out images are {tuple(held_out[0].shape[1:])}, training ones {tuple(train[0].shape[1:])}"
        )
    train = _only("training images", train, train[1] >= 0, "without a label", notes)
    if len(train[1].unique()) < 2:
        raise DataError("training images: fewer than two classes; a classifier needs at least two")
    held_out = _only("held-out images", held_out, held_out[1] >= 0, "without a label", notes)
    known = torch.isin(held_out[1], train[1])
    names = _names(held_out[1][~known].unique(), class_names)
    held_out = _only("held-out images", held_out, known, f"of a class without training images ({names})", notes)
    present = held_out[1].unique()
    if len(present) < 2:
        found = f"only class {_names(present, class_names)}" if len(present) else "no class of the run"
        raise DataError(f"held-out images: {found} among them, a comparison needs at least two; {WAY_OUT}")
    absent = train[1].unique()[~torch.isin(train[1].unique(), present)]
    if len(absent):
        notes.append(f"no held-out images of {_names(absent, class_names)}: nothing is measured for them")
    if len(train[1]) > MAX_STUDY_IMAGES:
        notes.append(
            f"{MAX_STUDY_IMAGES:,} of {len(train[1]):,} real training images are used, of every class in proportion"
        )
        rows = _choose(train[1], generated_counts(train[1]), seed=0)
        train = (train[0][rows], train[1][rows])
    return train, held_out, notes


def generated_counts(labels: Tensor, per_class: int | None = None, limit: int | None = None) -> dict[int, int]:
    """Return how many generated images of each class go with real images of ``labels`` (M,).

    Args:
        per_class: so many of each class; default: as many as real ones.
        limit: most of any class; more are scaled down together, so that the proportions stay. In any case at most
            2,500 in all.
    """
    found, real = labels.unique(return_counts=True)
    counts = real.double() if per_class is None else torch.full((len(found),), float(per_class)).double()
    scale = min(1.0, MAX_STUDY_IMAGES / float(counts.sum()))
    if limit is not None:
        scale = min(scale, limit / float(counts.max()))
    # A little is added before rounding down: 3 * (1 / 3) must stay 1.
    return {int(c): max(1, int(n * scale + 1e-9)) for c, n in zip(found, counts, strict=True)}


def _names(labels: Tensor, class_names: Sequence[str]) -> str:
    titles = [class_name(class_names, label) for label in labels.tolist()]
    return ", ".join(titles[:10]) + (f" and {len(titles) - 10} more" if len(titles) > 10 else "")


def _only(name: str, part: Labelled, keep: Tensor, reason: str, notes: list[str]) -> Labelled:
    """Return the images that ``keep`` (N,) marks; the others are named in ``notes``."""
    if keep.all():
        return part
    notes.append(f"{int((~keep).sum()):,} of {len(keep):,} {name} {reason}: left out")
    return part[0][keep], part[1][keep]


def pool_notes(labels: Tensor, wanted: Mapping[int, int], class_names: Sequence[str]) -> list[str]:
    """Return notes on how the pool of generated images with ``labels`` (G,) falls short of the ``wanted`` counts.

    Raises:
        DataError: fewer than two of the wanted classes are there.
    """
    available = {label: int((labels == label).sum()) for label in wanted}
    if sum(count > 0 for count in available.values()) < 2:
        raise DataError("generated images: fewer than two of the training classes among them; draw all classes")
    notes = []
    missing = [label for label, count in available.items() if count == 0]
    if missing:
        notes.append(f"no generated images of {_names(torch.tensor(missing), class_names)}")
    used = sum(min(available[label], wanted[label]) for label in wanted)
    if used < sum(wanted.values()):
        notes.append(f"{used:,} generated images where {sum(wanted.values()):,} were wanted")
    return notes


def _choose(labels: Tensor, counts: Mapping[int, int], seed: int) -> Tensor:
    """Return rows of ``labels`` (N,): of every class as many as ``counts`` says, or all there are, at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label, count in counts.items():
        found = (labels == label).nonzero().squeeze(1)
        rows.append(found[torch.randperm(len(found), generator=generator)[:count]])
    return torch.cat(rows)


def training_counts(real: Tensor, pool: Tensor, counts: Mapping[int, int]) -> dict[str, int]:
    """Return the size of each training set that :func:`training_sets` makes of these labels."""
    generated = sum(min(count, int((pool == label).sum())) for label, count in counts.items())
    return {"real": len(real), "generated": generated, "both": len(real) + generated}


def training_sets(train: Labelled, pool: Labelled, counts: Mapping[int, int], seed: int) -> dict[str, Labelled]:
    """Return the training set of each of CONDITIONS; ``seed`` chooses ``counts`` images of each class from ``pool``."""
    rows = _choose(pool[1], counts, seed)
    generated = pool[0][rows], pool[1][rows]
    both = torch.cat([train[0], generated[0].to(train[0].dtype)]), torch.cat([train[1], generated[1]])
    return {"real": train, "generated": generated, "both": both}
