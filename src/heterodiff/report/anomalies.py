"""Anomalies that a run found in test images, measured against the true masks."""

from collections.abc import Iterable, Mapping
from typing import Any

from heterodiff.report.content import Block, Card, Section, Table, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, is_number, number, part_of, percent, rows_of, texts
from heterodiff.report.metrics import Metric, MetricTable, Value, value_of

MAX_PATIENT_ROWS = 100
GROUPS = {"unhealthy": "Images with a lesion", "mixed": "All images"}
OVERLAPS = {
    "dice": ("Dice", "Overlap of found and true masks: 2 |both| / (|found| + |true|); 1 for two empty masks."),
    "iou": ("IoU", "|both| / |either|."),
    "auprc": (
        "AUPRC",
        "Area under the precision-recall curve over the foreground's pixels of the smoothed map; no threshold is "
        "involved.",
    ),
}
METHOD = (
    "The model and its thresholds were learned from image labels alone. All images: masks of those judged healthy are "
    "emptied. Images with a lesion: masks as they are. Intervals: 95 % of resamples of patients. Not a medical device."
)


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """Overlap with the true masks, overlap by size of the lesion, and decisions on whole images."""
    groups = {name: part_of(evaluation, name) for name in GROUPS}
    if not any(groups.values()):
        return []
    masks = [
        Metric(title, [value_of(group.get(key), "{:.1%}") for group in groups.values()], explanation, tag=title)
        for key, (title, explanation) in OVERLAPS.items()
    ]
    if baseline := part_of(evaluation, "threshold"):
        values = [value_of(baseline.get("dice"), "{:.1%}"), Value()]
        explanation = "Dice of the intensity threshold that is best on these images, chosen on the true masks."
        note = f"{baseline.get('of', MISSING)} {number(baseline.get('threshold'), '{:.2f}')}"
        note = f"{note[:1].upper()}{note[1:]}; AUPRC {percent(baseline.get('auprc'))}{_gain(baseline)}"
        masks.append(Metric("Best threshold", values, explanation, note, "compare"))
    if baseline := part_of(evaluation, "intensity"):
        values = [value_of(baseline.get("dice"), "{:.1%}"), Value()]
        explanation = "Dice of intensities alone, weighted as the labels of the validation images teach."
        auroc = number(baseline.get("auroc"), "{:.3f}")
        note = f"AUPRC {percent(baseline.get('auprc'))}; AUROC of whole images {auroc}{_gain(baseline)}"
        masks.append(Metric("Intensities alone", values, explanation, note, "compare"))
    sizes = [
        Metric(
            f"{row.get('size', MISSING)} lesions",
            [Value(_range(row.get("pixels"))), value_of(row.get("dice"))],
            tag="sizes",
        )
        for row in rows_of(evaluation.get("sizes"))
    ]
    return [
        MetricTable("Metric", tuple(GROUPS.values()), masks),
        MetricTable("By size", ("Pixels", "Dice"), sizes),
        MetricTable("Whole images", ("",), list(_whole_images(evaluation))),
    ]


def _gain(baseline: Mapping[str, Any]) -> str:
    """The difference of the run's Dice from that of a baseline, with its interval, in points."""
    gain = part_of(baseline, "gain")
    if not all(is_number(gain.get(key)) for key in ("mean", "low", "high")):
        return ""
    mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
    return f"; the run {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _range(pixels: Any) -> str:
    if not (isinstance(pixels, list) and len(pixels) == 2):
        return MISSING
    return f"{count(pixels[0])}–{count(pixels[1])}"


def _whole_images(evaluation: Mapping[str, Any]) -> Iterable[Metric]:
    image = part_of(evaluation, "image")
    if is_number(image.get("auroc")):
        note = ", ".join(f"{key} {percent(image.get(key))}" for key in ("precision", "recall", "accuracy"))
        if is_number(equal := image.get("auroc_at_equal_heights")):
            height = number(image.get("auroc_of_height"), "{:.3f}")
            note += f"; at equal heights {equal:.3f}; the height of a slice alone has {height}"
        yield Metric("AUROC of whole images", [value_of(image["auroc"], "{:.3f}")], note=note, tag="images")
    area = part_of(evaluation, "healthy", "false_positive_area")
    if is_number(area.get("mean")):
        value, note = value_of(area["mean"], "{:.2%}"), f"{count(area.get('n'))} healthy images"
        yield Metric("Area marked in healthy images", [value], note=note, tag="healthy")
    which = "Segmentation network" if evaluation.get("found_by") == "segmentation network" else "Network"
    yield Metric(f"{which} calls an image", [value_of(evaluation.get("calls_per_image"), "{:,.0f}")], tag="calls")


def cards(evaluation: Mapping[str, Any]) -> Iterable[Card]:
    """Yield the headline numbers."""
    rows = {row.label: row for table in metrics(evaluation) for row in table.rows}
    if part_of(evaluation, "unhealthy", "dice"):
        best = percent(part_of(evaluation, "threshold").get("dice"))
        yield rows["Dice"].card(f"best intensity threshold: {best}", "Dice of images with a lesion")
        yield from (row.card() for row in _whole_images(evaluation) if row.note)


def sections(files: RunFiles) -> list[Section]:
    """The section on a run that finds anomalies."""
    evaluation = files.evaluation
    tables = metrics(evaluation)
    if not tables:
        return []
    patients = [
        (str(row.get("patient", MISSING)), count(row.get("n")), percent(row.get("dice")))
        for row in sorted(rows_of(evaluation.get("patients")), key=_dice)[:MAX_PATIENT_ROWS]
    ]
    data, words = part_of(evaluation, "data"), [METHOD]
    if data.get("part") == "all":
        words.append(f"All images at {data.get('path')} were measured.")
    words += [f"Note: {note}." for note in texts(data.get("notes"))]
    picture = files.figure(files.folder.anomalies_picture, "Images, true masks, found masks and anomaly maps")
    by_patient = Table(("Patient, worst first", "Images with a lesion", "Dice"), patients, (1, 2))
    blocks: list[Block] = [picture, *(table.table() for table in tables), by_patient, Text(" ".join(words), soft=True)]
    return [Section("Anomalies found in test images", blocks)]


def _dice(patient: Mapping[str, Any]) -> float:
    return patient["dice"] if is_number(patient.get("dice")) else 2.0
