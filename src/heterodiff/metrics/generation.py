"""How good are generated images? Every number stands beside what real held-out images get."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import DataError
from heterodiff.metrics.classifiers import ConvReader, SvmReader
from heterodiff.metrics.distances import (
    KID_SUBSETS,
    frechet_distance,
    kernel_distance,
    mean_pairwise_rmse,
    wilson_interval,
)
from heterodiff.metrics.memorising import NOISY_RATIO, memorising, nearest_picture

__all__ = ["evaluate_generation", "nearest_picture"]

MAX_REFERENCE = 10_000
MAX_DIVERSITY_IMAGES = 200
RANGE_TOLERANCE = 1e-3
COLLAPSED_RATIO = 0.5
LESS_VARIED_RATIO = 0.8
MIN_CLASS_IMAGES = 5  # fewer images of one class say nothing about its variety

Labelled = tuple[Tensor, Tensor]


def evaluate_generation(
    generated: Tensor,
    labels: Tensor,
    train: Labelled,
    val: Labelled,
    class_names: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Measure generated images: class fidelity, distribution, memorising, diversity.

    The classifiers see the training images only: neither held-out nor generated images touch their fit.

    Args:
        generated: (N, C, H, W), values in [0, 1].
        labels: (N,), the class asked for; -1 where none was.
        train: images (M, C, H, W) in [0, 1] and labels (M,) the model was trained on.
        val: real images (K, C, H, W) and labels (K,) held out; may be empty.
        class_names: the name of each label.
        seed: seed of the classifiers and of every subsample.

    Returns:
        A dictionary ready for JSON. A *proportion* is ``{n, share, low, high}`` with a 95 % Wilson interval
        (``share`` is None for n = 0). Keys whose data are missing are left out, and ``skipped`` says why.

        - ``sizes``: counts of ``generated``, ``train``, ``val`` images; ``image``: [C, H, W]; ``seed``.
        - ``fidelity``: ``{svm, cnn}``, each ``{generated, real}``: proportion of images read as the class
          asked for, and of held-out images read as their class, by the same classifier; ``chance``: 1 over
          the number of classes.
        - ``per_class``: one row per class: ``label``, ``name``, ``train_images``, and ``svm_generated``,
          ``svm_real``, ``cnn_generated``, ``cnn_real`` (proportions).
        - ``features``: "trained convolution", or "random convolution" where there are no labels to train on.
        - ``frechet_distance``: ``generated``, ``real`` (held-out images: the floor), both against the same
          ``n_reference`` training images; ``n``: size of both compared sets, drawn with equal counts of every
          class, because the distance grows as sets shrink; ``note`` where n is small.
        - ``kid``: ``generated`` and ``real``, each ``{mean, std}`` over ``subsets`` of ``subset_size``, from
          the same sets.
        - ``nearest``: see :func:`heterodiff.metrics.memorising.memorising`.
        - ``diversity``: mean pairwise pixel RMSE within a class, ``generated`` and ``real`` (equal counts of
          training images), their ``ratio``, ``verdict`` (ok, less varied, collapsed, noisy: above 1.3),
          ``collapsed`` class names (ratio below 0.5 over at least 5 images), and ``per_class`` rows.
        - ``skipped``: reasons by key.

    Raises:
        DataError: shapes that do not fit together, no generated or training images, NaN among them,
            or values outside [0, 1].
    """
    generated, labels = checked_images("generated images", generated, labels)
    train = checked_images("training images", *train)
    val = checked_images("held-out images", *val)
    for name, images in (("generated images", generated), ("training images", train[0])):
        if len(images) == 0:
            raise DataError(f"{name}: there are none to evaluate")
    for name, (images, _) in (("training images", train), ("held-out images", val)):
        if len(images) and images.shape[1:] != generated.shape[1:]:
            raise DataError(f"{name} are {tuple(images.shape[1:])}, generated ones {tuple(generated.shape[1:])}")

    reader = ConvReader(seed).fit(*train)
    skipped: dict[str, str] = {}
    result: dict[str, Any] = {
        "sizes": {
            "generated": len(generated),
            "train": len(train[0]),
            "val": len(val[0]),
            "image": list(generated.shape[1:]),
        },
        "seed": seed,
        "features": "trained convolution" if reader.trained else "random convolution",
    }
    result |= _fidelity(reader, (generated, labels), train, val, class_names, seed, skipped)
    result |= _distribution(reader, (generated, labels), train, val, seed, skipped)
    result |= _diversity((generated, labels), train, class_names, seed, skipped)
    variety = result["diversity"]["ratio"] if "diversity" in result else None
    result["nearest"] = memorising(generated, train[0], val[0], variety)
    if len(val[0]) == 0:
        skipped["real"] = "no held-out images: the numbers lack what real images get"
    return result | {"skipped": skipped}


def checked_images(name: str, images: Tensor, labels: Tensor) -> Labelled:
    """Return images (N, C, H, W) and labels (N,) on the CPU, the labels as int64; ``name`` is for messages.

    Raises:
        DataError: shapes that do not fit together, NaN, or values outside [0, 1].
    """
    images, labels = images.detach().cpu(), labels.detach().cpu().long()
    if len(images) == 0:
        return images, labels.new_empty(0)
    if images.ndim != 4:
        raise DataError(f"{name}: expected the shape (N, C, H, W), found {tuple(images.shape)}")
    if labels.shape != (len(images),):
        raise DataError(f"{name}: expected {len(images)} labels, found the shape {tuple(labels.shape)}")
    bad = sum(int((~torch.isfinite(part).flatten(1).all(dim=1)).sum()) for part in images.split(1024))
    if bad:
        raise DataError(f"{name}: {bad} of {len(images)} contain NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise DataError(f"{name}: expected values in [0, 1], found {low:.3g} to {high:.3g}")
    return images, labels


def _proportion(hits: Tensor) -> dict[str, Any]:
    count, successes = len(hits), int(hits.sum())
    low, high = wilson_interval(successes, count)
    return {"n": count, "share": successes / count if count else None, "low": low, "high": high}


def class_name(class_names: Sequence[str], label: int) -> str:
    """The name of a class, or its number where it has none."""
    return str(class_names[label]) if label < len(class_names) else str(label)


def _fidelity(
    reader: ConvReader,
    generated: Labelled,
    train: Labelled,
    val: Labelled,
    class_names: Sequence[str],
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    if not reader.trained:
        skipped["fidelity"] = "fewer than two classes among the training images: nothing to read"
        return {}
    if not (generated[1] >= 0).any():
        skipped["fidelity"] = "the images were generated without a class"
        return {}
    svm = SvmReader(seed).fit(*train)
    fidelity: dict[str, Any] = {"chance": 1 / len(reader.classes)}
    hits: dict[str, Tensor] = {}
    asked = {"generated": generated[1][generated[1] >= 0], "real": val[1][val[1] >= 0]}
    for name, predict in (("svm", svm.predict), ("cnn", reader.predict)):
        for kind, (images, labels) in (("generated", generated), ("real", val)):
            known = labels >= 0
            hits[f"{name}_{kind}"] = predict(images[known]) == labels[known]
        fidelity[name] = {kind: _proportion(hits[f"{name}_{kind}"]) for kind in asked}
    per_class = []
    for label in torch.cat([train[1], *asked.values()]).unique().tolist():
        if label < 0:
            continue
        row = {
            "label": label,
            "name": class_name(class_names, label),
            "train_images": int((train[1] == label).sum()),
        }
        for key, hit in hits.items():
            row[key] = _proportion(hit[asked[key.split("_")[1]] == label])
        per_class.append(row)
    return {"fidelity": fidelity, "per_class": per_class}


def _draw(count: int, limit: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:limit]


def _equal_sets(first: Tensor, second: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows of two label vectors so that both have the same count of every label."""
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in first.unique().tolist():
        rows = [(labels == label).nonzero().squeeze(1) for labels in (first, second)]
        count = min(len(rows[0]), len(rows[1]))
        for part, found in zip(chosen, rows, strict=True):
            part.append(found[_draw(len(found), count, generator)])
    return torch.cat(chosen[0]), torch.cat(chosen[1])


def _distribution(
    reader: ConvReader, generated: Labelled, train: Labelled, val: Labelled, seed: int, skipped: dict[str, str]
) -> dict[str, Any]:
    """Fréchet distance and KID of generated and of held-out images to the same training images."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(generated[0]))
    val_rows = torch.empty(0, dtype=torch.long)
    if len(val[0]):
        both_labelled = bool((generated[1] >= 0).all() and (val[1] >= 0).all())
        labels = [part[1] if both_labelled else torch.zeros_like(part[1]) for part in (generated, val)]
        rows, val_rows = _equal_sets(labels[0], labels[1], generator)
        if len(rows) < 2:
            skipped["frechet_distance.real"] = "generated and held-out images share fewer than two by class"
            rows, val_rows = torch.arange(len(generated[0])), val_rows[:0]
    if min(len(rows), len(train[0])) < 2:
        skipped["frechet_distance"] = skipped["kid"] = "at least two images are needed on either side"
        return {}
    reference = reader.features(train[0][_draw(len(train[0]), MAX_REFERENCE, generator)])
    sets = {"generated": generated[0][rows], "real": val[0][val_rows]}
    frechet: dict[str, Any] = {"n": len(rows), "n_reference": len(reference)}
    kid: dict[str, Any] = {"subsets": KID_SUBSETS}
    for kind, images in sets.items():
        frechet[kind] = kid[kind] = None
        if len(images):
            features = reader.features(images)
            frechet[kind] = frechet_distance(features, reference)
            mean, std, kid["subset_size"] = kernel_distance(features, reference, seed)
            kid[kind] = {"mean": mean, "std": std}
    if len(rows) < 2 * reference.shape[1]:
        frechet["note"] = f"only {len(rows)} images compared: read as rough, and beside the real value only"
    return {"frechet_distance": frechet, "kid": kid}


def _diversity(
    generated: Labelled, train: Labelled, class_names: Sequence[str], seed: int, skipped: dict[str, str]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    # Without a class for every image, all images count as one class.
    labelled = bool((generated[1] >= 0).all() and (train[1] >= 0).any())
    labels, train_labels = (part[1] if labelled else torch.zeros_like(part[1]) for part in (generated, train))
    rows: list[dict[str, Any]] = []
    for label in labels.unique().tolist():
        indices, train_indices = ((part == label).nonzero().squeeze(1) for part in (labels, train_labels))
        count = min(len(indices), len(train_indices), MAX_DIVERSITY_IMAGES)
        if count < 2:
            continue
        found, real = (
            mean_pairwise_rmse(images[part[_draw(len(part), count, generator)]])
            for images, part in ((generated[0], indices), (train[0], train_indices))
        )
        name = class_name(class_names, label) if labelled else "all images"
        ratio = found / real if real > 0 else None
        rows.append({"name": name, "n": count, "generated": found, "real": real, "ratio": ratio})
    if not rows:
        skipped["diversity"] = "no class has two generated and two training images"
        return {}
    found, real = (sum(row[kind] for row in rows) / len(rows) for kind in ("generated", "real"))
    ratio = found / real if real > 0 else None
    collapsed = [
        row["name"]
        for row in rows
        if row["n"] >= MIN_CLASS_IMAGES and row["ratio"] is not None and row["ratio"] < COLLAPSED_RATIO
    ]
    verdict = "ok"
    if ratio is not None and ratio < LESS_VARIED_RATIO:
        verdict = "collapsed" if ratio < COLLAPSED_RATIO else "less varied"
    elif ratio is not None and ratio > NOISY_RATIO:
        verdict = "noisy"
    diversity = {"generated": found, "real": real, "ratio": ratio, "verdict": verdict}
    return {"diversity": diversity | {"collapsed": collapsed, "per_class": rows}}
