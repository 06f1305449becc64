"""The part of the report that shows an evaluated run that finds anomalies."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterodiff.report import page
from heterodiff.report.curves import is_number
from heterodiff.report.formatting import MISSING, number, part_of, percent, texts
from heterodiff.report.writing import ANOMALIES_PICTURE, RunFiles

MAX_PATIENT_ROWS = 100
GROUPS = {"unhealthy": "Images with a lesion", "mixed": "All images"}
EXPLANATIONS = {
    "dice": "Overlap of found and true masks: 2 |both| / (|found| + |true|); two empty masks agree wholly.",
    "iou": "|both| / |either|.",
    "auprc": "Area under precision and recall over the foreground's pixels of the smoothed map; no limit is chosen.",
}
TITLES = {"dice": "Dice", "iou": "IoU", "auprc": "AUPRC"}
METHOD = (
    "The model and its limits were learned from image labels alone. All images: masks of those judged healthy are "
    "emptied. Images with a lesion: masks as they are. Intervals: 95 % of resamples of patients. Not a medical device."
)


def segmentation_cards(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield (label, value, note) of the numbers to read first."""
    dice = part_of(evaluation, "unhealthy", "dice")
    if not dice:
        return
    best = percent(part_of(evaluation, "threshold").get("dice"))
    yield "Dice of images with a lesion", percent(dice.get("mean")), f"best intensity threshold: {best}"
    image = part_of(evaluation, "image")
    if is_number(image.get("auroc")):
        note = f"precision {percent(image.get('precision'))}, recall {percent(image.get('recall'))}"
        yield "AUROC of whole images", number(image["auroc"], "{:.3f}"), note
    area = part_of(evaluation, "healthy", "false_positive_area")
    if is_number(area.get("mean")):
        note = f"{number(area.get('n'), '{:,}')} healthy images"
        yield "Area marked in healthy images", number(100 * area["mean"], "{:.2f} %"), note


def segmentation_section(evaluation: Mapping[str, Any], picture: str) -> str:
    """Return how well anomalies were found; ``picture`` is HTML or empty."""
    groups = {name: part_of(evaluation, name) for name in GROUPS}
    if not any(groups.values()):
        return ""
    rows: list[Sequence[str]] = [
        (title, *(_value(group, name) for group in groups.values()), EXPLANATIONS[name])
        for name, title in TITLES.items()
    ]
    threshold = part_of(evaluation, "threshold")
    if threshold:
        text = f"Dice of {threshold.get('of', MISSING)} {number(threshold.get('threshold'), '{:.2f}')}"
        area = f"its AUPRC is {percent(threshold.get('auprc'))}"
        rows.append(
            ("Best threshold", percent(threshold.get("dice")), "", f"{text}, chosen on the true masks; {area}.")
        )
    sizes = evaluation.get("sizes")
    by_size = [
        (f"{row.get('size', MISSING)} lesions", _range(row.get("pixels")), _interval(part_of(row, "dice")))
        for row in (sizes if isinstance(sizes, list) else [])
        if isinstance(row, dict)
    ]
    patients = evaluation.get("patients")
    known = [row for row in patients if isinstance(row, dict)] if isinstance(patients, list) else []
    by_patient = [
        (str(row.get("patient", MISSING)), number(row.get("n"), "{:,}"), percent(row.get("dice")))
        for row in sorted(known, key=lambda row: row["dice"] if is_number(row.get("dice")) else 2.0)[:MAX_PATIENT_ROWS]
    ]
    words = [METHOD, f"{number(evaluation.get('calls_per_image'), '{:,.0f}')} network calls an image."]
    measured = part_of(evaluation, "data")
    if measured.get("part") == "all":
        words.append(f"All images at {measured.get('path')} were measured.")
    words += [f"Note: {note}." for note in texts(measured.get("notes"))]
    return page.section(
        "Anomalies found in test images",
        picture,
        page.table(("Metric", *GROUPS.values(), "What it says"), rows, numbers=(1, 2), style="explained"),
        page.table(("By size", "Pixels", "Dice"), by_size, numbers=(1, 2)),
        page.table(("Patient, worst first", "Images with a lesion", "Dice"), by_patient, numbers=(1, 2)),
        page.paragraph(" ".join(words), "soft"),
    )


def _value(group: Mapping[str, Any], name: str) -> str:
    found = group.get(name)
    return percent(found) if is_number(found) else _interval(part_of(group, name))


def _interval(found: Mapping[str, Any]) -> str:
    mean, low, high = (found.get(key) for key in ("mean", "low", "high"))
    if not (is_number(mean) and is_number(low) and is_number(high)):
        return MISSING
    return f"{percent(mean)}\n{100 * low:.1f}–{100 * high:.1f} %"


def _range(pixels: Any) -> str:
    if not (isinstance(pixels, list) and len(pixels) == 2):
        return MISSING
    return f"{number(pixels[0], '{:,}')}–{number(pixels[1], '{:,}')}"


def sections(files: RunFiles) -> list[str]:
    """The section on a run that finds anomalies."""
    overlays = page.figure(files.picture(ANOMALIES_PICTURE), "png", "Images, true masks, found masks and anomaly maps")
    return [segmentation_section(files.evaluation, overlays)]
