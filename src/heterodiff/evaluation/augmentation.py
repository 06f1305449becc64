"""What generated images are worth as training data: one classifier, three training sets, real images to read."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from heterodiff.errors import DataError
from heterodiff.evaluation.augmentation_sets import (
    CONDITIONS,
    generated_counts,
    pool_notes,
    study_sets,
    training_counts,
    training_sets,
)
from heterodiff.evaluation.augmentation_summary import summary_of, verdict_of
from heterodiff.metrics.bootstrap import crossed_bootstrap, percentile_interval
from heterodiff.metrics.classifiers import CONV_BATCH_SIZE, CONV_MAX_SIDE, ConvReader, SvmReader, conv_steps, shrink
from heterodiff.metrics.distances import wilson_interval
from heterodiff.metrics.generation import Labelled, checked_images, class_name

Progress = Callable[[int, int], None]


class _Reader(Protocol):
    def fit(self, images: Tensor, labels: Tensor) -> "_Reader": ...
    def predict(self, images: Tensor) -> Tensor: ...


def augmentation_study(
    train: Labelled,
    generated: Labelled,
    held_out: Labelled,
    class_names: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    per_class: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a classifier on real, on generated and on both kinds of images; compare how it reads real ones.

    The three conditions share the architecture (:class:`heterodiff.metrics.classifiers.ConvReader`), the batch
    size, the number of optimiser steps and the seeds; the training images alone differ. With "generated only" this
    is the classification accuracy score of Ravuri and Vinyals 2019, also called train on synthetic, test on real.

    Intervals are at 95 %. The accuracy of a seed has Wilson's. Means over seeds, their ratio and their difference
    have percentiles of a bootstrap over held-out images crossed with seeds, paired between the conditions
    (:func:`heterodiff.metrics.bootstrap.crossed_bootstrap`). Where all resamples agree, as when every image is read
    right, a mean has Wilson's interval over the images instead, and ratio and difference reach as far to both sides
    as Wilson's for no success among the images. The recall of a class has Wilson's interval over the class's images
    at the mean over seeds. All of them take images for independent: where several come from one recording or
    patient, the truth is wider. A few seeds show little of how much seeds matter.

    Args:
        train: real images (M, C, H, W) in [0, 1] and labels (M,) that the generating model was trained on.
        generated: generated images (G, C, H, W) and labels (G,), a pool to draw from.
        held_out: real images (N, C, H, W) and labels (N,) that neither model nor classifier was trained on.
        class_names: the name of each label.
        seeds: of the classifier, and of the choice from the pool.
        per_class: how many generated images of each class to use; default: as many as real ones. Never more than
            the pool holds, and at most 2,500 real and 2,500 generated ones in all.
        progress: called with the number of classifiers trained and of all to train.

    Returns:
        A dictionary ready for JSON. An *interval* is ``{value, low, high}``.

        - ``classes``: names, in the order of the rows and columns below; ``n_held_out``; ``seeds``; ``steps`` and
          ``batch_size`` of each classifier; ``chance``: the share of the commonest class held out.
        - ``conditions``: ``{real, generated, both}``, each ``title``, ``n_train``, ``accuracy`` (interval of the
          mean over seeds), ``per_seed`` (rows ``{seed, n, value, low, high}``), ``per_class`` (rows ``{name, n,
          value, low, high}``, the recall; value None for n = 0), and ``confusion``: counts summed over seeds, a row
          per true class and a column per class read.
        - ``ratio``: interval of the accuracy on generated only over that on real only; None if the latter is 0.
        - ``difference``: interval of the accuracy on both minus that on real only.
        - ``svm``: a second opinion by :class:`heterodiff.metrics.classifiers.SvmReader` with the first seed:
          ``accuracy`` (interval by condition), ``ratio``, ``difference``.
        - ``verdict``: what adding generated images does: "better" or "worse" (the interval of the difference lies
          above or below 0), "not worse" (it holds 0 and ends above -0.05), else "cannot tell", as from fewer than 30
          held-out images, and where real images teach no more than chance; ``summary``: the outcome in plain words;
          ``notes``: what to bear in mind.

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
    if len(generated[0]) and generated[0].shape[1:] != train[0].shape[1:]:
        sizes = tuple(generated[0].shape[1:]), tuple(train[0].shape[1:])
        raise DataError(f"generated images are {sizes[0]}, training images {sizes[1]}")
    classes = train[1].unique()
    wanted = generated_counts(train[1], per_class)
    notes += pool_notes(generated[1], wanted, class_names)
    # The readers shrink all the same; done here, the sets of a large image size do not fill the memory.
    small, pool, to_read = (shrink(part[0], CONV_MAX_SIDE) for part in (train, generated, held_out))
    trained_on = training_counts(train[1], generated[1], wanted)
    batch_size = min(CONV_BATCH_SIZE, *trained_on.values())
    done = _counter(progress, len(CONDITIONS) * (len(seeds) + 1))

    def sets_of(seed: int) -> dict[str, Labelled]:
        return training_sets((small, train[1]), (pool, generated[1]), wanted, seed)

    read = _predictions(lambda seed: ConvReader(seed, batch_size), seeds, sets_of, to_read, done)
    svm = _predictions(SvmReader, seeds[:1], sets_of, to_read, done)

    truth = held_out[1].numpy()
    outcome = _outcome(read == truth)
    accuracies = outcome.pop("accuracy")
    conditions = {
        key: {
            "title": title,
            "n_train": trained_on[key],
            "accuracy": accuracies[key],
            "per_seed": [{"seed": seed} | _share(float(hits.sum()), len(truth)) for seed, hits in zip(
                seeds, found == truth, strict=True)],
            "per_class": _recalls(found == truth, truth, classes, class_names),
            "confusion": _confusion(found, truth, classes.numpy()),
        }
        for (key, title), found in zip(CONDITIONS.items(), read, strict=True)
    }  # fmt: skip
    chance = float(np.unique(truth, return_counts=True)[1].max() / len(truth))
    verdict = verdict_of(outcome["difference"], accuracies["real"], chance, len(truth))
    result = {
        "classes": [class_name(class_names, label) for label in classes.tolist()],
        "n_held_out": len(truth),
        "seeds": seeds,
        "steps": conv_steps(batch_size, small[0, 0].numel()),
        "batch_size": batch_size,
        "chance": chance,
        "conditions": conditions,
        **outcome,
        "svm": _outcome(svm == truth),
        "verdict": verdict,
    }
    if len(seeds) == 1:
        notes.append("one seed: the intervals leave out how much the classifier varies from seed to seed")
    return result | {"summary": summary_of(result), "notes": notes}


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance


def _predictions(
    make_reader: Callable[[int], _Reader],
    seeds: Sequence[int],
    sets_of: Callable[[int], dict[str, Labelled]],
    images: Tensor,
    done: Callable[[], None],
) -> np.ndarray:
    """Train a reader for each seed and condition and return the labels it reads, (conditions, seeds, N)."""
    found = np.empty((len(CONDITIONS), len(seeds), len(images)), np.int64)
    for column, seed in enumerate(seeds):
        for row, part in enumerate(sets_of(seed).values()):
            found[row, column] = make_reader(seed).fit(*part).predict(images).numpy()
            done()
    return found


def _interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(resampled)
    return {"value": float(value), "low": low, "high": high}


def _share(successes: float, count: int) -> dict[str, Any]:
    low, high = wilson_interval(successes, count)
    return {"n": count, "value": successes / count if count else None, "low": low, "high": high}


def _outcome(hits: np.ndarray) -> dict[str, Any]:
    """Accuracy by condition, ratio and difference with intervals, from hits (conditions, seeds, N)."""
    count = hits.shape[2]
    means = dict(zip(CONDITIONS, hits.mean(axis=(1, 2)).tolist(), strict=True))
    resampled = dict(zip(CONDITIONS, crossed_bootstrap(hits).T, strict=True))
    accuracy = {key: _interval(means[key], resampled[key]) for key in CONDITIONS}
    difference = _interval(means["both"] - means["real"], resampled["both"] - resampled["real"])
    ratio = None
    if means["real"] > 0:
        readable = resampled["real"] > 0
        ratios = resampled["generated"][readable] / resampled["real"][readable]
        ratio = _interval(means["generated"] / means["real"], ratios)
    # Where the images show no spread at all a bootstrap sees none: what n images can rule out has to say it.
    unseen = wilson_interval(0, count)[1]
    for interval in (difference, ratio):
        if interval is not None and interval["low"] == interval["high"]:
            interval["low"] -= unseen
            interval["high"] += unseen
    for interval in accuracy.values():
        if interval["low"] == interval["high"]:
            interval["low"], interval["high"] = wilson_interval(interval["value"] * count, count)
    return {"accuracy": accuracy, "ratio": ratio, "difference": difference}


def _recalls(hits: np.ndarray, truth: np.ndarray, classes: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Recall of each class over hits (seeds, N) of one condition."""
    rows = []
    for label in classes.tolist():
        chosen = hits[:, truth == label]
        share = _share(float(chosen.sum() / len(hits)), chosen.shape[1])
        rows.append({"name": class_name(class_names, label)} | share)
    return rows


def _confusion(found: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> list[list[int]]:
    """Counts of (true class, class read) summed over seeds, from labels read (seeds, N); ``classes`` are sorted."""
    size = len(classes)
    cells = np.searchsorted(classes, truth) * size + np.searchsorted(classes, found)
    counts: list[list[int]] = np.bincount(cells.ravel(), minlength=size * size).reshape(size, size).tolist()
    return counts
