"""Generated images as training data: one classifier, three training sets, real held-out images to classify."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.errors import DataError
from heterodiff.metrics.classifiers import (
    CONV_BATCH_SIZE,
    CONV_MAX_SIDE,
    MAX_TRAIN_IMAGES,
    Classifier,
    ConvClassifier,
    SvmClassifier,
    conv_steps,
    shrink,
)
from heterodiff.metrics.generation import Labelled, checked_images, class_name, draw_rows, refuse_other_shape
from heterodiff.metrics.intervals import crossed_bootstrap, percentile_interval, wilson_interval, wilson_share

CONDITIONS = {"real": "real only", "generated": "generated only", "both": "real + generated"}
MAX_STUDY_IMAGES = MAX_TRAIN_IMAGES // 2  # real and as many generated ones: the classifiers then see them all
MIN_HELD_OUT = 30  # fewer images decide nothing
MARGIN = 0.05  # an interval of the difference that reaches further below 0 does not rule out harm
WAY_OUT = "give labelled real images with --data, or train with data.val_fraction above 0"


def augmentation_study(
    train: Labelled,
    generated: Labelled,
    held_out: Labelled,
    class_names: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    per_class: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train a classifier on real, on generated and on both kinds of images; compare its accuracy on real ones.

    The three conditions share the architecture (:class:`heterodiff.metrics.classifiers.ConvClassifier`), the batch
    size, the number of optimiser steps and the seeds; the training images alone differ. With "generated only" this
    is the classification accuracy score of Ravuri and Vinyals 2019, also called train on synthetic, test on real.

    Intervals are at 95 %. Accuracies of a seed and recalls of a class (mean of seeds) have Wilson's. Means over seeds,
    their ratio and their difference have percentiles of a bootstrap over held-out images crossed with seeds, paired
    between the conditions (:func:`heterodiff.metrics.intervals.crossed_bootstrap`). Where all resamples agree, as when
    every image is classified correctly, a mean has Wilson's interval over the images instead, and ratio and difference
    reach as far to both sides as Wilson's for no success among the images. All of them assume independent images:
    where several come from one recording or patient, the true interval is wider. A few seeds show little of how much
    seeds matter.

    Args:
        train: real images (M, C, H, W) in [0, 1] and labels (M,) that the generating model was trained on.
        generated: generated images (G, C, H, W) and labels (G,), a pool to draw from.
        held_out: real images (N, C, H, W) and labels (N,) that neither model nor classifier was trained on.
        class_names: the name of each label.
        seeds: seeds of the classifier and of the choice from the pool.
        per_class: number of generated images of each class to use; default: as many as real ones. Never more than
            the pool holds, and at most 2,500 real and 2,500 generated ones in all.
        progress: called with the number of classifiers trained, of 3 (len(seeds) + 1).

    Returns:
        A dictionary ready for JSON. An *interval* is ``{value, low, high}``.

        - ``classes``: names, in the order of the rows and columns below; ``n_held_out``; ``seeds``; ``steps`` and
          ``batch_size`` of each classifier; ``chance``: the share of the most frequent held-out class.
        - ``conditions``: ``{real, generated, both}``, each ``title``, ``n_train``, ``accuracy`` (interval of the
          mean over seeds), ``per_seed`` (rows ``{seed, n, value, low, high}``), ``per_class`` (rows ``{name, n,
          value, low, high}``, the recall; value None for n = 0), and ``confusion``: counts summed over seeds, a row
          per true class and a column per predicted class.
        - ``ratio``: interval of the accuracy on generated only over that on real only; None if the latter is 0.
        - ``difference``: interval of the accuracy on both minus that on real only.
        - ``svm``: a second opinion by :class:`heterodiff.metrics.classifiers.SvmClassifier` with the first seed:
          ``accuracy`` (interval by condition), ``ratio``, ``difference``.
        - ``verdict``: effect of adding generated images: "better" or "worse" (the interval of the difference lies
          above or below 0), "not worse" (it holds 0 and ends above -0.05), else "cannot tell", as from fewer than 30
          held-out images, and where real images teach no more than chance; ``notes``: restrictions.

    Raises:
        DataError: shapes or values that cannot be used (see
            :func:`heterodiff.metrics.generation.checked_images`), no seeds, or fewer than two classes among the
            training, the generated or the held-out images.
    """
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise DataError("seeds: expected at least one")
    train, held_out, notes = study_sets(train, held_out, class_names)
    generated = checked_images("generated images", *generated)
    refuse_other_shape("generated images", generated[0], "training", train[0])
    wanted = generated_counts(train[1], per_class)
    notes += _pool_notes(generated[1], wanted, class_names)
    # The classifiers shrink all the same; done here, the sets of a large image size do not fill the memory.
    small, pool, images = (shrink(part[0], CONV_MAX_SIDE) for part in (train, generated, held_out))
    drawn = sum(min(count, int((generated[1] == label).sum())) for label, count in wanted.items())
    n_train = {"real": len(small), "generated": drawn, "both": len(small) + drawn}
    batch_size = min(CONV_BATCH_SIZE, *n_train.values())
    done = itertools.count(1)

    def predictions(make: Callable[[int], Classifier], seeds: Sequence[int]) -> np.ndarray:
        """Train a classifier for each condition and seed and predict labels, (conditions, seeds, N)."""
        found = np.empty((len(CONDITIONS), len(seeds), len(images)), np.int64)
        for column, seed in enumerate(seeds):
            for row, part in enumerate(_training_sets((small, train[1]), (pool, generated[1]), wanted, seed)):
                found[row, column] = make(seed).fit(*part).predict(images).numpy()
                progress(next(done))
        return found

    predicted = predictions(lambda seed: ConvClassifier(seed, batch_size), seeds)
    truth = held_out[1].numpy()
    outcome = _outcome(predicted == truth)
    accuracies = outcome.pop("accuracy")
    classes = train[1].unique().tolist()
    chance = float(np.unique(truth, return_counts=True)[1].max() / len(truth))
    result: dict[str, Any] = {
        "classes": [class_name(class_names, label) for label in classes],
        "n_held_out": len(truth),
        "seeds": seeds,
        "steps": conv_steps(batch_size, small[0, 0].numel()),
        "batch_size": batch_size,
        "chance": chance,
        "conditions": {
            key: {
                "title": CONDITIONS[key],
                "n_train": n_train[key],
                "accuracy": accuracies[key],
                **_by_seed_and_class(found, truth, seeds, classes, class_names),
            }
            for key, found in zip(CONDITIONS, predicted, strict=True)
        },
        **outcome,
        "svm": _outcome(predictions(SvmClassifier, seeds[:1]) == truth),
        "verdict": verdict_of(outcome["difference"], accuracies["real"], chance, len(truth)),
    }
    if len(seeds) == 1:
        notes.append("one seed: the intervals leave out how much the classifier varies from seed to seed")
    return result | {"notes": notes}


def study_sets(train: Labelled, held_out: Labelled, class_names: Sequence[str]) -> tuple[Labelled, Labelled, list[str]]:
    """Return the training and the held-out images that a study uses, and notes on those it leaves out.

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
    refuse_other_shape("held-out images", held_out[0], "training", train[0])
    train = _only("training images", train, train[1] >= 0, "without a label", notes)
    classes = train[1].unique()
    if len(classes) < 2:
        raise DataError("training images: fewer than two classes; a classifier needs at least two")
    held_out = _only("held-out images", held_out, held_out[1] >= 0, "without a label", notes)
    known = torch.isin(held_out[1], classes)
    names = _names(held_out[1][~known].unique(), class_names)
    held_out = _only("held-out images", held_out, known, f"of a class without training images ({names})", notes)
    present = held_out[1].unique()
    if len(present) < 2:
        found = f"only class {_names(present, class_names)}" if len(present) else "no class of the run"
        raise DataError(f"held-out images: {found} among them, a comparison needs at least two; {WAY_OUT}")
    absent = classes[~torch.isin(classes, present)]
    if len(absent):
        notes.append(f"no held-out images of {_names(absent, class_names)}: nothing is measured for them")
    if len(train[1]) > MAX_STUDY_IMAGES:
        notes.append(
            f"{MAX_STUDY_IMAGES:,} of {len(train[1]):,} real training images are used, of every class in proportion"
        )
        rows = _draw(train[1], generated_counts(train[1]), seed=0)
        train = (train[0][rows], train[1][rows])
    return train, held_out, notes


def generated_counts(labels: Tensor, per_class: int | None = None, limit: int | None = None) -> dict[int, int]:
    """Return the number of generated images of each class to go with real images of ``labels`` (M,).

    Args:
        per_class: number of each class; default: as many as real ones.
        limit: maximum of any class; more are scaled down together, so that the proportions stay. In any case at most
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
    """Return the images where ``keep`` (N,) is True; a note gives the number of the others."""
    if keep.all():
        return part
    notes.append(f"{int((~keep).sum()):,} of {len(keep):,} {name} {reason}: left out")
    return part[0][keep], part[1][keep]


def _pool_notes(labels: Tensor, wanted: Mapping[int, int], class_names: Sequence[str]) -> list[str]:
    """Return notes on classes of which the pool with ``labels`` (G,) holds fewer images than ``wanted``.

    Raises:
        DataError: the pool holds fewer than two of the wanted classes.
    """
    available = {label: int((labels == label).sum()) for label in wanted}
    missing = [label for label, count in available.items() if count == 0]
    if len(wanted) - len(missing) < 2:
        raise DataError("generated images: fewer than two of the training classes among them; draw all classes")
    notes = [f"no generated images of {_names(torch.tensor(missing), class_names)}"] if missing else []
    used = sum(min(available[label], wanted[label]) for label in wanted)
    if used < sum(wanted.values()):
        notes.append(f"{used:,} generated images where {sum(wanted.values()):,} were wanted")
    return notes


def _draw(labels: Tensor, counts: Mapping[int, int], seed: int) -> Tensor:
    """Draw rows of ``labels`` (N,), at most ``counts`` of each class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([draw_rows(labels, label, count, generator) for label, count in counts.items()])


def _training_sets(train: Labelled, pool: Labelled, counts: Mapping[int, int], seed: int) -> list[Labelled]:
    """Return the training set of each of CONDITIONS; ``seed`` draws ``counts`` images of each class from ``pool``."""
    rows = _draw(pool[1], counts, seed)
    generated = pool[0][rows], pool[1][rows]
    both = torch.cat([train[0], generated[0].to(train[0].dtype)]), torch.cat([train[1], generated[1]])
    return [train, generated, both]


def _interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(resampled)
    return {"value": float(value), "low": low, "high": high}


def _outcome(hits: np.ndarray) -> dict[str, Any]:
    """Accuracy by condition, ratio and difference with intervals, from hits (conditions, seeds, N)."""
    count = hits.shape[2]
    means = dict(zip(CONDITIONS, hits.mean(axis=(1, 2)).tolist(), strict=True))
    resampled = dict(zip(CONDITIONS, crossed_bootstrap(hits).T, strict=True))
    accuracy = {key: _interval(means[key], resampled[key]) for key in CONDITIONS}
    difference = _interval(means["both"] - means["real"], resampled["both"] - resampled["real"])
    ratio = None
    if means["real"] > 0:
        positive = resampled["real"] > 0
        ratios = resampled["generated"][positive] / resampled["real"][positive]
        ratio = _interval(means["generated"] / means["real"], ratios)
    # Without any spread among the images a bootstrap shows none: the interval is what n images cannot rule out.
    unseen = wilson_interval(0, count)[1]
    for interval in [difference] if ratio is None else [difference, ratio]:
        if interval["low"] == interval["high"]:
            interval["low"] -= unseen
            interval["high"] += unseen
    for interval in accuracy.values():
        if interval["low"] == interval["high"]:
            interval["low"], interval["high"] = wilson_interval(interval["value"] * count, count)
    return {"accuracy": accuracy, "ratio": ratio, "difference": difference}


def _by_seed_and_class(
    found: np.ndarray, truth: np.ndarray, seeds: Sequence[int], classes: Sequence[int], class_names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of each seed, recall of each class and confusion matrix of one condition, from labels (seeds, N)."""
    from sklearn.metrics import confusion_matrix

    hits = found == truth
    by_class = [hits[:, truth == label] for label in classes]
    return {
        "per_seed": [
            {"seed": seed, **wilson_share(float(row.sum()), len(truth), "value")}
            for seed, row in zip(seeds, hits, strict=True)
        ],
        "per_class": [
            {
                "name": class_name(class_names, label),
                **wilson_share(float(part.sum() / len(part)), part.shape[1], "value"),
            }
            for label, part in zip(classes, by_class, strict=True)
        ],
        "confusion": confusion_matrix(np.tile(truth, len(found)), found.ravel(), labels=classes).tolist(),
    }


def verdict_of(difference: Mapping[str, float], real: Mapping[str, float], chance: float, held_out: int) -> str:
    """Return the effect of adding generated images, see :func:`augmentation_study`.

    Args:
        difference, real: intervals of the difference and of the accuracy on real images alone.
        chance: share of the most frequent class among the ``held_out`` images, a number.
    """
    if held_out < MIN_HELD_OUT:
        return "cannot tell"
    if difference["low"] > 0:
        return "better"
    if difference["high"] < 0:
        return "worse"
    # A classifier that learns nothing from real images is not harmed by anything.
    return "cannot tell" if real["low"] <= chance or difference["low"] < -MARGIN else "not worse"
