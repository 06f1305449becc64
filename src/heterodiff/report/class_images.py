"""Generated images of classes, measured beside real held-out images."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from heterodiff.report import augmentation
from heterodiff.report.content import Block, Card, Notice, Section, Table, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, is_number, number, part_of, percent, rows_of, texts
from heterodiff.report.metrics import Metric, MetricTable, value_of

MAX_CLASS_ROWS = 100
CLASSIFIERS = {"svm": "SVM", "cnn": "CNN"}
KINDS = ("generated", "real")
EXPLANATIONS = {
    "svm": "Share of images that a support vector machine on pixels, trained on the real training images, assigns to "
    "the requested class. Higher is better; the real value is its accuracy on real held-out images.",
    "cnn": "The same with a small convolutional network: a second opinion of another kind.",
    "frechet_distance": "How far the generated images' features lie from the training images' (mean and "
    "covariance). Lower is better; real held-out images do not reach 0 either. Compare runs on the same data only.",
    "kid": "Kernel distance between the same features, unbiased: around 0 means that no difference is visible. "
    "± is the spread over random subsets.",
    "diversity": "Mean pixel difference between two images of one class. Far below the real value the model "
    "repeats itself; far above it draws noise.",
    "nearest": "Median pixel distance to the nearest training image. Far below the real value: copies.",
}
DIVERSITY_NOTICES = {
    "collapsed": "Mode collapse: the images of a class are far more alike than real ones.",
    "less varied": "The images are less varied than real ones; a lower guidance scale usually helps.",
    "noisy": "The images are far more varied than real ones: noise, or images of wrong classes?",
}
MEMORISATION = {
    "copies": "many",
    "unlike": "cannot tell, the images are too unlike the data",
    "unknown": "cannot tell without held-out images",
}
SIZE_NAMES = {"generated": "generated", "train": "training", "val": "held out"}


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """The metrics of generated images, each beside that of real held-out ones."""
    rows: list[Metric] = []

    def add(found: Mapping[str, Any], key: str, label: str, pattern: str = "", note: str = "", tag: str = "") -> None:
        if found:
            values = [value_of(found.get(kind), pattern) for kind in KINDS]
            rows.append(Metric(label, values, EXPLANATIONS[key], note, tag))

    for key, name in CLASSIFIERS.items():
        add(part_of(evaluation, "fidelity", key), key, f"Class accuracy ({name})", tag=name)
    frechet, nearest = part_of(evaluation, "frechet_distance"), part_of(evaluation, "nearest")
    n, features = frechet.get("n"), evaluation.get("features")
    compared = [f"{count(n)} images each"] if is_number(n) else []
    compared += [f"{features} features"] if features else []
    add(frechet, "frechet_distance", "Fréchet distance", note=", ".join(compared), tag="Fréchet")
    add(part_of(evaluation, "kid"), "kid", "Kernel distance (KID)")
    add(part_of(evaluation, "diversity"), "diversity", "Variety within a class", "{:.3f}")
    medians = {kind: nearest.get(f"{kind}_median") for kind in KINDS} if nearest else {}
    verdict = str(nearest.get("verdict", MISSING))
    note = f"Copies: {MEMORISATION.get(verdict, verdict)}"
    add(medians, "nearest", "Distance to training images", "{:.3f}", note, "copies")
    return [MetricTable("Metric", ("Generated", "Real"), rows)]


def cards(evaluation: Mapping[str, Any]) -> Iterable[Card]:
    """Yield the headline numbers."""
    rows = {row.label: row for table in metrics(evaluation) for row in table.rows}
    yield from _class_accuracy(evaluation, rows)
    if row := rows.get("Fréchet distance"):
        yield row.card(f"real images: {row.values[1].text}")
    nearest = part_of(evaluation, "nearest")
    if nearest.get("copy_share") is not None:
        unlike = nearest.get("verdict") == "unlike"
        note = "unlike the data: not meaningful yet" if unlike else "expected by chance: about 1 %"
        yield Card("Near copies of training images", percent(nearest["copy_share"]), note)
    yield from _variety(part_of(evaluation, "diversity"))


def _class_accuracy(evaluation: Mapping[str, Any], rows: Mapping[str, Metric]) -> Iterable[Card]:
    """Yield the card of the stricter classifier, with its worst class: a mean hides a class that is pure noise."""
    shares = {
        key: share
        for key in CLASSIFIERS
        if is_number(share := part_of(evaluation, "fidelity", key, "generated").get("share"))
    }
    if not shares:
        return
    key = min(shares, key=lambda each: shares[each])
    row = rows[f"Class accuracy ({CLASSIFIERS[key]})"]
    note = f"real held-out images: {row.values[1].text}"
    classes = [
        (share, str(found.get("name", found.get("label", MISSING))))
        for found in rows_of(evaluation.get("per_class"))
        if is_number(share := part_of(found, f"{key}_generated").get("share"))
    ]
    if len(classes) > 1:
        share, worst = min(classes)
        note += f"; worst class, {worst}: {percent(share)}"
    yield row.card(note)


def _variety(diversity: Mapping[str, Any]) -> Iterable[Card]:
    """Yield the card of the variety, with the class that is least like real images."""
    if not is_number(diversity.get("ratio")):
        return
    noisy = diversity.get("verdict") == "noisy"
    note = "far more varied than real: noise?" if noisy else "100 %: as varied as real images"
    ratios = [
        (abs(math.log(row["ratio"])), str(row.get("name")), row["ratio"])
        for row in rows_of(diversity.get("per_class"))
        if is_number(row.get("ratio")) and row["ratio"] > 0
    ]
    if len(ratios) > 1:
        _, name, ratio = max(ratios)
        note += f"; class {name}: {percent(ratio)}"
    yield Card("Variety against real", percent(diversity["ratio"]), note)


def sections(files: RunFiles) -> list[Section]:
    """The sections on a run that draws images of classes, and on these as training data."""
    evaluation = files.evaluation
    diversity = part_of(evaluation, "diversity")
    quality: list[Block] = []
    for table in metrics(evaluation):
        if table.rows:
            quality += [table.table(), _diversity_notice(diversity), Text(_footnote(evaluation), soft=True)]
    return [
        Section("Quality, beside real held-out images", quality),
        _classes(evaluation),
        augmentation.section(files),
        _memorisation(files),
    ]


def _diversity_notice(diversity: Mapping[str, Any]) -> Notice:
    text = DIVERSITY_NOTICES.get(str(diversity.get("verdict")), "")
    collapsed = texts(diversity.get("collapsed"))
    if not text and collapsed:
        text = f"Far more alike than real images: class {', '.join(collapsed[:20])}."
    return Notice(text, "bad")


def _footnote(evaluation: Mapping[str, Any]) -> str:
    parts = []
    sizes = part_of(evaluation, "sizes")
    if sizes:
        counts = [f"{count(sizes[key])} {name}" for key, name in SIZE_NAMES.items() if is_number(sizes.get(key))]
        parts.append(f"Images: {', '.join(counts)}.")
    held_out = part_of(evaluation, "held_out")
    if held_out.get("path"):
        parts.append(f"Held-out images: {held_out['path']} ({held_out.get('part', MISSING)}).")
        parts += [f"{note}." for note in texts(held_out.get("notes"))]
    if note := part_of(evaluation, "frechet_distance").get("note"):
        parts.append(f"Fréchet distance: {note}.")
    parts += [f"Left out: {key}: {reason}." for key, reason in part_of(evaluation, "skipped").items()]
    return " ".join(parts)


def _classes(evaluation: Mapping[str, Any]) -> Section:
    """Class accuracy by both classifiers, variety and number of training images of each class."""
    classes, text = rows_of(evaluation.get("per_class")), ""
    if len(classes) > MAX_CLASS_ROWS:
        text = f"The {MAX_CLASS_ROWS} classes of lowest accuracy, of {len(classes):,}."
        classes = sorted(classes, key=_cnn_accuracy)[:MAX_CLASS_ROWS]
    varied = rows_of(part_of(evaluation, "diversity").get("per_class"))
    ratios = {str(row.get("name")): row.get("ratio") for row in varied}
    rows = [
        (
            str(row.get("name", row.get("label", MISSING))),
            *(value_of(part_of(row, f"{key}_{kind}")).cell for key in CLASSIFIERS for kind in KINDS),
            percent(ratios.get(str(row.get("name")))),
            count(row.get("train_images")),
        )
        for row in classes
    ]
    header = ("Class", "SVM, generated", "SVM, real", "CNN, generated", "CNN, real", "Variety", "Training images")
    return Section("By class", [Text(text), Table(header, rows, range(1, 7))])


def _cnn_accuracy(row: Mapping[str, Any]) -> float:
    share = part_of(row, "cnn_generated").get("share")
    return share if is_number(share) else 2.0


def _memorisation(files: RunFiles) -> Section:
    """The check for memorised training images."""
    nearest = part_of(files.evaluation, "nearest")
    if not nearest:
        return Section("Does it memorise?", [])
    tone = {"none": "good", "copies": "bad"}.get(str(nearest.get("verdict")), "")
    method = ""
    if is_number(nearest.get("threshold")):
        method = (
            "Measured as the root mean square pixel difference to the nearest training image. 1 % of the real "
            f"held-out images are nearer than {number(nearest['threshold'], '{:.3f}')}; that is the threshold."
        )
    picture = files.figure(files.folder.nearest_picture, "Generated images above their nearest training images")
    return Section(
        "Does it memorise?",
        [Notice(str(nearest.get("explanation", "")), tone), Text(method, soft=True), picture],
    )
