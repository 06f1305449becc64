"""Reconstruction errors of a VAE on real held-out images, and the scale of their latents."""

from collections.abc import Mapping
from typing import Any

from heterodiff.report.content import Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, number, part_of
from heterodiff.report.metrics import Metric, MetricTable, Value, value_of


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
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


def sections(files: RunFiles) -> list[Section]:
    """The section on reconstructions."""
    found = part_of(files.evaluation, "reconstruction")
    if not found:
        return []
    path = part_of(files.evaluation, "held_out").get("path", MISSING)
    text = f"{count(found.get('n'))} real images that were not trained on: {path}."
    tables = [table.table() for table in metrics(files.evaluation)]
    return [Section("Reconstruction", [*tables, Text(text, soft=True)])]
