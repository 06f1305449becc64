"""Images measured beside the true ones: reconstructions of a VAE, and images drawn of condition images."""

from collections.abc import Mapping
from typing import Any

from heterodiff.report.content import Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, number, part_of
from heterodiff.report.metrics import Metric, MetricTable, Value, value_of

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


def translation_metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
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


def translation_sections(files: RunFiles) -> list[Section]:
    """The section on images drawn of condition images."""
    found = part_of(files.evaluation, "translation")
    if not found:
        return []
    path = part_of(files.evaluation, "held_out").get("path", MISSING)
    text = f"{count(found.get('n'))} condition images of images that were not trained on: {path}."
    tables = [table.table() for table in translation_metrics(files.evaluation)]
    return [Section("Beside the true images", [*tables, Text(text, soft=True)])]


def vae_metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """The metrics of reconstructions."""
    found = part_of(evaluation, "reconstruction")
    rows = []
    for key, name, pattern in (("psnr", "PSNR", "{:.2f} dB"), ("ssim", "SSIM", "{:.4f}")):
        if quality := part_of(found, key):
            values = [value_of(quality.get("mean"), pattern, found.get("n")), Value()]
            note = f"A tenth of the images below {number(quality.get('tenth'), pattern)}"
            rows.append(Metric(name, values, note=note, tag=name))
    for key, name in (("svm", "SVM"), ("cnn", "CNN")):
        if shares := part_of(evaluation, "readers", key):
            values = [value_of(shares.get(kind), "{:.1%}") for kind in ("reconstruction", "original")]
            rows.append(Metric(f"Class accuracy ({name})", values, tag=name))
    stds = evaluation.get("latent_std")
    if isinstance(stds, list) and stds:
        values = [Value(", ".join(number(value, "{:.3f}") for value in stds)), Value()]
        rows.append(Metric("Std of the latents", values, note="After scaling; expected 1", tag="latents"))
    return [MetricTable("Metric", ("Reconstructions", "Originals"), rows)]


def vae_sections(files: RunFiles) -> list[Section]:
    """The section on reconstructions."""
    found = part_of(files.evaluation, "reconstruction")
    if not found:
        return []
    path = part_of(files.evaluation, "held_out").get("path", MISSING)
    text = f"{count(found.get('n'))} real images that were not trained on: {path}."
    tables = [table.table() for table in vae_metrics(files.evaluation)]
    return [Section("Reconstruction", [*tables, Text(text, soft=True)])]
