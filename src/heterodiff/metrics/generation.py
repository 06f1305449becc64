"""Quality of generated images; every number stands beside what real held-out images get."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import DataError
from heterodiff.metrics.classifiers import ConvClassifier, SvmClassifier
from heterodiff.metrics.distances import KID_SUBSETS, frechet_distance, kernel_distance, mean_pairwise_rmse
from heterodiff.metrics.intervals import wilson_share
from heterodiff.metrics.memorising import NOISY_RATIO, memorising, nearest_picture

__all__ = ["evaluate_generation", "nearest_picture"]

MAX_REFERENCE = 10_000
MAX_DIVERSITY_IMAGES = 200
RANGE_TOLERANCE = 1e-3
COLLAPSED_RATIO = 0.5
LESS_VARIED_RATIO = 0.8
MIN_CLASS_IMAGES = 5  # fewer images of one class tell nothing about its variety

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
        - ``fidelity``: ``{svm, cnn}``, each ``{generated, real}``: class accuracy on generated and on held-out images
          by the same classifier, as proportions; ``chance``: 1 over the number of classes.
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
    sets = {
        "generated": checked_images("generated images", generated, labels),
        "train": checked_images("training images", *train),
        "val": checked_images("held-out images", *val),
    }
    images = {kind: part[0] for kind, part in sets.items()}
    for kind, name in (("generated", "generated images"), ("train", "training images")):
        if len(images[kind]) == 0:
            raise DataError(f"{name}: there are none to evaluate")
    refuse_other_shape("training images", images["train"], "generated", images["generated"])
    refuse_other_shape("held-out images", images["val"], "generated", images["generated"])

    reader = ConvClassifier(seed).fit(*sets["train"])
    skipped: dict[str, str] = {}
    result: dict[str, Any] = {
        "sizes": {**{kind: len(part) for kind, part in images.items()}, "image": list(images["generated"].shape[1:])},
        "seed": seed,
        "features": "trained convolution" if reader.trained else "random convolution",
        **_fidelity(reader, **sets, class_names=class_names, seed=seed, skipped=skipped),
        **_distribution(reader, **sets, seed=seed, skipped=skipped),
        **_diversity(sets["generated"], sets["train"], class_names, seed, skipped),
    }
    variety = result["diversity"]["ratio"] if "diversity" in result else None
    result["nearest"] = memorising(**images, variety=variety)
    if len(images["val"]) == 0:
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


def refuse_other_shape(name: str, images: Tensor, others_name: str, others: Tensor) -> None:
    """Raise a DataError if two sets of images (N, C, H, W), neither of them empty, differ in shape."""
    if len(images) and len(others) and images.shape[1:] != others.shape[1:]:
        raise DataError(f"{name} are {tuple(images.shape[1:])}, {others_name} ones {tuple(others.shape[1:])}")


def class_name(class_names: Sequence[str], label: int) -> str:
    """Name of a class, or its number where it has none."""
    return str(class_names[label]) if label < len(class_names) else str(label)


def draw_rows(labels: Tensor, label: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` of the rows where ``labels`` (N,) equal ``label``."""
    rows = (labels == label).nonzero().squeeze(1)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _proportion(hits: Tensor) -> dict[str, Any]:
    return wilson_share(int(hits.sum()), len(hits))


def _fidelity(
    reader: ConvClassifier,
    generated: Labelled,
    train: Labelled,
    val: Labelled,
    class_names: Sequence[str],
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    if not reader.trained:
        skipped["fidelity"] = "fewer than two classes among the training images: nothing to classify"
        return {}
    if not (generated[1] >= 0).any():
        skipped["fidelity"] = "the images were generated without a class"
        return {}
    fidelity: dict[str, Any] = {"chance": 1 / len(reader.classes)}
    hits: dict[str, Tensor] = {}
    labelled = {
        kind: (images[labels >= 0], labels[labels >= 0])
        for kind, (images, labels) in (("generated", generated), ("real", val))
    }
    for name, classifier in (("svm", SvmClassifier(seed).fit(*train)), ("cnn", reader)):
        found = {kind: classifier.predict(images) == labels for kind, (images, labels) in labelled.items()}
        hits |= {f"{name}_{kind}": values for kind, values in found.items()}
        fidelity[name] = {kind: _proportion(values) for kind, values in found.items()}
    asked = {f"{name}_{kind}": labels for name in ("svm", "cnn") for kind, (_, labels) in labelled.items()}
    every = torch.cat([train[1], *asked.values()]).unique()
    per_class = [
        {
            "label": label,
            "name": class_name(class_names, label),
            "train_images": int((train[1] == label).sum()),
            **{key: _proportion(values[asked[key] == label]) for key, values in hits.items()},
        }
        for label in every[every >= 0].tolist()
    ]
    return {"fidelity": fidelity, "per_class": per_class}


def _equal_sets(first: Tensor, second: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows of two label vectors so that both have the same count of every label."""
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in first.unique().tolist():
        count = min(int((labels == label).sum()) for labels in (first, second))
        for part, labels in zip(chosen, (first, second), strict=True):
            part.append(draw_rows(labels, label, count, generator))
    return torch.cat(chosen[0]), torch.cat(chosen[1])


def _distribution(
    reader: ConvClassifier, generated: Labelled, train: Labelled, val: Labelled, seed: int, skipped: dict[str, str]
) -> dict[str, Any]:
    """Fréchet distance and KID of generated and of held-out images to the same training images."""
    generator = torch.Generator().manual_seed(seed)
    rows, val_rows = torch.arange(len(generated[0])), torch.empty(0, dtype=torch.long)
    if len(val[0]):
        both_labelled = bool((generated[1] >= 0).all() and (val[1] >= 0).all())
        labels = [part[1] if both_labelled else torch.zeros_like(part[1]) for part in (generated, val)]
        equal = _equal_sets(labels[0], labels[1], generator)
        if len(equal[0]) >= 2:
            rows, val_rows = equal
        else:
            skipped["frechet_distance.real"] = "generated and held-out images share fewer than two by class"
    if min(len(rows), len(train[0])) < 2:
        skipped["frechet_distance"] = skipped["kid"] = "at least two images are needed on either side"
        return {}
    reference = reader.features(train[0][torch.randperm(len(train[0]), generator=generator)[:MAX_REFERENCE]])
    frechet: dict[str, Any] = {"n": len(rows), "n_reference": len(reference)}
    kid: dict[str, Any] = {"subsets": KID_SUBSETS}
    for kind, images in (("generated", generated[0][rows]), ("real", val[0][val_rows])):
        frechet[kind] = kid[kind] = None
        if len(images):
            features = reader.features(images)
            frechet[kind] = frechet_distance(features, reference)
            mean, std, kid["subset_size"] = kernel_distance(features, reference, seed)
            kid[kind] = {"mean": mean, "std": std}
    if len(rows) < 2 * reference.shape[1]:
        frechet["note"] = f"only {len(rows)} images compared: a rough value, to be compared with the real one only"
    return {"frechet_distance": frechet, "kid": kid}


def _diversity(
    generated: Labelled, train: Labelled, class_names: Sequence[str], seed: int, skipped: dict[str, str]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    # Without a class for every image, all images count as one class.
    labelled = bool((generated[1] >= 0).all() and (train[1] >= 0).any())
    sets = [(images, labels if labelled else torch.zeros_like(labels)) for images, labels in (generated, train)]
    rows: list[dict[str, Any]] = []
    for label in sets[0][1].unique().tolist():
        count = min(MAX_DIVERSITY_IMAGES, *(int((labels == label).sum()) for _, labels in sets))
        if count < 2:
            continue
        found, real = (
            mean_pairwise_rmse(images[draw_rows(labels, label, count, generator)]) for images, labels in sets
        )
        name = class_name(class_names, label) if labelled else "all images"
        rows.append({"name": name, "n": count, "generated": found, "real": real, "ratio": _ratio(found, real)})
    if not rows:
        skipped["diversity"] = "no class has two generated and two training images"
        return {}
    found, real = (sum(row[kind] for row in rows) / len(rows) for kind in ("generated", "real"))
    ratio = _ratio(found, real)
    verdict = "ok"
    if ratio is not None and ratio < LESS_VARIED_RATIO:
        verdict = "collapsed" if ratio < COLLAPSED_RATIO else "less varied"
    elif ratio is not None and ratio > NOISY_RATIO:
        verdict = "noisy"
    measured = [row for row in rows if row["n"] >= MIN_CLASS_IMAGES and row["ratio"] is not None]
    collapsed = [row["name"] for row in measured if row["ratio"] < COLLAPSED_RATIO]
    diversity = {"generated": found, "real": real, "ratio": ratio, "verdict": verdict, "collapsed": collapsed}
    return {"diversity": diversity | {"per_class": rows}}


def _ratio(found: float, real: float) -> float | None:
    return found / real if real > 0 else None
