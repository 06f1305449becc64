"""The parts of the report that show ``evaluation.json``: each number beside what real images get."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterodiff.report import page
from heterodiff.report.curves import is_number
from heterodiff.report.formatting import MISSING, distance, number, part_of, percent, share_of, texts
from heterodiff.report.writing import RunFiles

MAX_CLASS_ROWS = 100

EXPLANATIONS = {
    "svm": "Share of images that a support vector machine on pixels, trained on the real training images, reads "
    "as the class asked for. Higher is better; the real value is how well it reads real held-out images.",
    "cnn": "The same with a small convolutional network: a second opinion of another kind.",
    "frechet_distance": "How far the generated images' features lie from the training images' (mean and "
    "covariance). Lower is better; real held-out images do not reach 0 either. Compare runs on the same data only.",
    "kid": "Kernel distance between the same features, unbiased: around 0 means no difference can be seen. "
    "± is the spread over random subsets.",
    "diversity": "Mean pixel difference between two images of one class. Far below the real value the model "
    "repeats itself; far above it draws noise.",
    "nearest": "Median pixel distance to the nearest training image. Far below the real value: copies.",
}


def _rows(content: Any) -> list[Mapping[str, Any]]:
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _class_accuracy(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield the card of the stricter classifier, with its worst class: a mean hides a class that is pure noise."""
    shares = {
        name: share
        for name in ("svm", "cnn")
        if is_number(share := part_of(evaluation, "fidelity", name, "generated").get("share"))
    }
    if not shares:
        return
    name = min(shares, key=lambda each: shares[each])
    note = f"real held-out images: {percent(part_of(evaluation, 'fidelity', name, 'real').get('share'))}"
    classes = [
        (share, str(row.get("name", row.get("label", MISSING))))
        for row in _rows(evaluation.get("per_class"))
        if is_number(share := part_of(row, f"{name}_generated").get("share"))
    ]
    if len(classes) > 1:
        share, worst = min(classes)
        note += f"; worst class, {worst}: {percent(share)}"
    yield f"Class accuracy ({name.upper()})", percent(shares[name]), note


def _variety(diversity: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield the card of the variety, with the class that is least like real images."""
    if not is_number(diversity.get("ratio")):
        return
    noisy = diversity.get("verdict") == "noisy"
    note = "far more varied than real: noise?" if noisy else "100 %: as varied as real images"
    ratios = [
        (abs(math.log(row["ratio"])), str(row.get("name")), row["ratio"])
        for row in _rows(diversity.get("per_class"))
        if is_number(row.get("ratio")) and row["ratio"] > 0
    ]
    if len(ratios) > 1:
        _, name, ratio = max(ratios)
        note += f"; class {name}: {percent(ratio)}"
    yield "Variety against real", percent(diversity["ratio"]), note


def headline_cards(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield (label, value, note) of the numbers to read first."""
    yield from _class_accuracy(evaluation)
    frechet = part_of(evaluation, "frechet_distance")
    if frechet:
        yield "Fréchet distance", number(frechet.get("generated")), f"real images: {number(frechet.get('real'))}"
    nearest = part_of(evaluation, "nearest")
    if nearest.get("copy_share") is not None:
        note = "unlike the data: says nothing yet" if nearest.get("verdict") == "unlike" else "chance: about 1 %"
        yield "Near copies of training images", percent(nearest["copy_share"]), note
    yield from _variety(part_of(evaluation, "diversity"))


def reconstruction_section(evaluation: Mapping[str, Any]) -> str:
    """Return what a VAE loses of real held-out images, and the scale of their latents."""
    found = part_of(evaluation, "reconstruction")
    if not found:
        return ""
    psnr, ssim = part_of(found, "psnr"), part_of(found, "ssim")
    rows: list[Sequence[str]] = [
        ("PSNR", number(psnr.get("mean"), "{:.2f} dB"), f"a tenth below {number(psnr.get('tenth'), '{:.2f} dB')}"),
        ("SSIM", number(ssim.get("mean"), "{:.4f}"), f"a tenth below {number(ssim.get('tenth'), '{:.4f}')}"),
    ]
    for name, title in (("svm", "Read right by an SVM"), ("cnn", "Read right by a CNN")):
        if reader := part_of(evaluation, "readers", name):
            rows.append((title, percent(reader.get("reconstruction")), f"originals {percent(reader.get('original'))}"))
    stds = evaluation.get("latent_std")
    if isinstance(stds, list) and stds:
        rows.append(("Std of the latents", ", ".join(number(value, "{:.3f}") for value in stds), "expected 1"))
    held_out = part_of(evaluation, "held_out")
    text = f"{number(found.get('n'), '{:,}')} real images that were not trained on: {held_out.get('path', MISSING)}."
    return page.section(
        "Reconstruction",
        page.table(("Metric", "Reconstructions", ""), rows, numbers=(1,)),
        page.paragraph(text, "soft"),
    )


def _kid(value: Mapping[str, Any]) -> str:
    return f"{number(value.get('mean'))}\n± {number(value.get('std'))}" if value else MISSING


def metrics_section(evaluation: Mapping[str, Any]) -> str:
    """Return the table of metrics: generated, real, and what each means in plain words."""
    rows: list[Sequence[str]] = []
    for name, title in (("svm", "Class fidelity (SVM)"), ("cnn", "Class fidelity (CNN)")):
        reader = part_of(evaluation, "fidelity", name)
        if reader:
            shares = (share_of(part_of(reader, "generated")), share_of(part_of(reader, "real")))
            rows.append((title, *shares, EXPLANATIONS[name]))
    frechet, kid = part_of(evaluation, "frechet_distance"), part_of(evaluation, "kid")
    if frechet:
        count = f"\nn = {frechet['n']:,}" if is_number(frechet.get("n")) else ""
        values = [number(frechet.get(kind)) for kind in ("generated", "real")]
        values = [value + count if value != MISSING else value for value in values]
        rows.append(("Fréchet distance", *values, EXPLANATIONS["frechet_distance"]))
    if kid:
        values = [_kid(part_of(kid, kind)) for kind in ("generated", "real")]
        rows.append(("Kernel distance (KID)", *values, EXPLANATIONS["kid"]))
    diversity, nearest = part_of(evaluation, "diversity"), part_of(evaluation, "nearest")
    if diversity:
        values = [distance(diversity.get(kind)) for kind in ("generated", "real")]
        rows.append(("Variety within a class", *values, EXPLANATIONS["diversity"]))
    if nearest:
        values = [distance(nearest.get(f"{kind}_median")) for kind in ("generated", "real")]
        rows.append(("Distance to training images", *values, EXPLANATIONS["nearest"]))
    if not rows:
        return ""
    header = ("Metric", "Generated", "Real", "What it says")
    return page.section(
        "Quality, beside real held-out images",
        page.table(header, rows, numbers=(1, 2), style="explained"),
        _diversity_notice(diversity),
        page.paragraph(_footnote(evaluation, frechet), "soft"),
    )


def _diversity_notice(diversity: Mapping[str, Any]) -> str:
    if diversity.get("verdict") == "collapsed":
        text = "Mode collapse: the images of a class are far more alike than real ones."
    elif diversity.get("verdict") == "less varied":
        text = "The images are less varied than real ones; a lower guidance scale usually helps."
    elif diversity.get("verdict") == "noisy":
        text = "The images are far more varied than real ones: noise, or images of wrong classes?"
    elif isinstance(diversity.get("collapsed"), list) and diversity["collapsed"]:
        text = f"Far more alike than real images: class {', '.join(map(str, diversity['collapsed'][:20]))}."
    else:
        return ""
    return page.notice(text, "bad")


def _footnote(evaluation: Mapping[str, Any], frechet: Mapping[str, Any]) -> str:
    sizes = part_of(evaluation, "sizes")
    parts = []
    if sizes:
        counts = [f"{sizes[key]:,} {name}" for key, name in _SIZE_NAMES.items() if is_number(sizes.get(key))]
        parts.append(f"Images: {', '.join(counts)}.")
    held_out = part_of(evaluation, "held_out")
    if held_out.get("path"):
        parts.append(f"Held-out images: {held_out['path']} ({held_out.get('part', MISSING)}).")
        parts += [f"{note}." for note in texts(held_out.get("notes"))]
    if evaluation.get("features"):
        parts.append(f"Features of the distances: {evaluation['features']}.")
    if frechet.get("note"):
        parts.append(f"Fréchet distance: {frechet['note']}.")
    parts += [f"Left out: {key}: {reason}." for key, reason in part_of(evaluation, "skipped").items()]
    return " ".join(parts)


_SIZE_NAMES = {"generated": "generated", "train": "training", "val": "held out"}


def _worst_first(row: Mapping[str, Any]) -> float:
    share = part_of(row, "cnn_generated").get("share")
    return share if is_number(share) else 2.0


def class_section(evaluation: Mapping[str, Any]) -> str:
    """Return the table of classes: fidelity by both readers, variety, training images."""
    classes = evaluation.get("per_class")
    if not isinstance(classes, list):
        return ""
    classes = [row for row in classes if isinstance(row, dict)]
    text = ""
    if len(classes) > MAX_CLASS_ROWS:
        classes.sort(key=_worst_first)
        text = f"The {MAX_CLASS_ROWS} classes read worst, of {len(classes):,}."
        classes = classes[:MAX_CLASS_ROWS]
    diversity = part_of(evaluation, "diversity").get("per_class")
    varied = [row for row in diversity if isinstance(row, dict)] if isinstance(diversity, list) else []
    ratios = {str(row.get("name")): row.get("ratio") for row in varied}
    rows = [
        (
            str(row.get("name", row.get("label", MISSING))),
            *(
                share_of(part_of(row, f"{reader}_{kind}"))
                for reader in ("svm", "cnn")
                for kind in ("generated", "real")
            ),
            percent(ratios.get(str(row.get("name")))),
            number(row.get("train_images"), "{:,}"),
        )
        for row in classes
    ]
    header = ("Class", "SVM, generated", "SVM, real", "CNN, generated", "CNN, real", "Variety", "Training images")
    return page.section("By class", page.paragraph(text), page.table(header, rows, numbers=(1, 2, 3, 4, 5, 6)))


def _interval(interval: Mapping[str, Any]) -> str:
    """A share with its interval on a second line."""
    value, low, high = (interval.get(key) for key in ("value", "low", "high"))
    if not (is_number(value) and is_number(low) and is_number(high)):
        return MISSING
    return f"{percent(value)}\n{100 * low:.1f}–{100 * high:.1f} %"


_STUDY_TONES = {"better": "good", "not worse": "good", "worse": "bad"}
_STUDY_METHOD = (
    "A small convolutional network is trained on real training images, on generated ones, and on both, equally long, "
    "and reads real images that were not trained on. Intervals are at 95 %; they take images for independent."
)


def augmentation_section(study: Mapping[str, Any], picture: str) -> str:
    """Return what generated images are worth as training data; ``picture`` is HTML or empty."""
    conditions = {key: part_of(study, "conditions", key) for key in ("real", "generated", "both")}
    if not any(conditions.values()):
        return ""
    titles = [str(part.get("title", key)) for key, part in conditions.items()]
    held_out = study.get("n_held_out")
    rows: list[Sequence[str]] = [
        (
            "all classes",
            number(held_out, "{:,}"),
            *(_interval(part_of(part, "accuracy")) for part in conditions.values()),
        ),
        ("all classes, by an SVM", "", *(_interval(part_of(study, "svm", "accuracy", key)) for key in conditions)),
    ]
    per_class = {key: _by_name(part.get("per_class")) for key, part in conditions.items()}
    for name, row in list(per_class["real"].items())[:MAX_CLASS_ROWS]:
        shares = (_interval(found.get(name, {})) for found in per_class.values())
        rows.append((name, number(row.get("n"), "{:,}"), *shares))
    path = part_of(study, "held_out").get("path")
    notes = [*([f"Real images read: {path}"] if path else []), *texts(study.get("notes"))]
    return page.section(
        "Generated images as training data",
        page.notice(str(study.get("summary", "")), _STUDY_TONES.get(str(study.get("verdict")), "")),
        page.paragraph(_STUDY_METHOD),
        picture,
        page.table(("Accuracy, recall of a class", "Images read", *titles), rows, numbers=(1, 2, 3, 4)),
        page.paragraph(" ".join(f"{note}." for note in notes), "soft"),
    )


def _by_name(rows: Any) -> dict[str, dict[str, Any]]:
    return {str(row.get("name")): row for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}


def memorising_section(evaluation: Mapping[str, Any], picture: str) -> str:
    """Return the check for memorised training images; ``picture`` is HTML or empty."""
    nearest = part_of(evaluation, "nearest")
    if not nearest:
        return ""
    tone = {"none": "good", "copies": "bad"}.get(str(nearest.get("verdict")), "")
    method = ""
    if is_number(nearest.get("threshold")):
        method = (
            "Measured as the root mean square pixel difference to the nearest training image. 1 % of the real "
            f"held-out images are nearer than {distance(nearest['threshold'])}; that is the threshold."
        )
    explanation = page.notice(str(nearest.get("explanation", "")), tone)
    return page.section("Does it memorise?", explanation, page.paragraph(method, "soft"), picture)


def sections(files: RunFiles) -> list[str]:
    """The sections on a run that draws images of classes."""
    nearest = page.figure(files.picture("nearest.png"), "png", "Generated images above their nearest training images")
    study = ""
    if files.augmentation:
        study = page.figure(
            files.picture(files.folder.augmentation_picture.name), "png", "Accuracies and confusion matrices"
        )
    return [
        metrics_section(files.evaluation),
        class_section(files.evaluation),
        augmentation_section(files.augmentation, study),
        memorising_section(files.evaluation, nearest),
    ]


def vae_sections(files: RunFiles) -> list[str]:
    """The section on a run that trained a VAE."""
    return [reconstruction_section(files.evaluation)]
