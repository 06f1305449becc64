"""Images drawn of condition images, measured beside the true ones."""

from collections.abc import Mapping
from typing import Any

from heterodiff.report.content import Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, number, part_of
from heterodiff.report.metrics import Metric, MetricTable, value_of

KINDS = ("generated", "mean of draws", "baseline")
EXPLANATIONS = {
    "psnr": "Peak signal-to-noise ratio to the true image, higher is better. One image drawn shows one of several "
    "possible details; the mean of several is nearer to the truth, and blurred.",
    "ssim": "Structural similarity to the true image, 1 for equal ones.",
    "mae": "Mean absolute difference of pixel values in [0, 1].",
    "frechet": "How far the images' features lie from those of training images. Lower is better; a blurred estimate "
    "is far, however close its pixels are.",
}
ROWS = (("psnr", "PSNR", "{:.2f} dB"), ("ssim", "SSIM", "{:.4f}"), ("mae", "Mean absolute error", "{:.4f}"))


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """The metrics of drawn images, beside those of their mean and of the simplest estimate."""
    found = part_of(evaluation, "translation")
    rows = []
    for key, name, pattern in ROWS:
        if values := part_of(found, key):
            each = [value_of(part_of(values, kind).get("mean"), pattern, found.get("n")) for kind in KINDS]
            rows.append(Metric(name, each, EXPLANATIONS[key], tag=name if len(name) < 8 else "error"))
    if frechet := part_of(found, "frechet"):
        note = f"Real held-out images: {number(frechet.get('real'))}"
        rows.append(
            Metric(
                "Fréchet distance",
                [value_of(frechet.get(kind)) for kind in KINDS],
                EXPLANATIONS["frechet"],
                note,
                tag="Fréchet",
            )
        )
    columns = ("Drawn", f"Mean of {count(found.get('draws'))}", str(found.get("baseline", MISSING)).capitalize())
    return [MetricTable("Metric", columns, rows)]


def sections(files: RunFiles) -> list[Section]:
    """The section on images drawn of condition images."""
    found = part_of(files.evaluation, "translation")
    if not found:
        return []
    path = part_of(files.evaluation, "held_out").get("path", MISSING)
    text = f"{count(found.get('n'))} condition images of images that were not trained on: {path}."
    tables = [table.table() for table in metrics(files.evaluation)]
    return [Section("Beside the true images", [*tables, Text(text, soft=True)])]
