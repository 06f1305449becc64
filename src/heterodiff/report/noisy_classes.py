"""Accuracy of a classifier of noisy images, by the level of their noise."""

from collections.abc import Mapping
from typing import Any

from heterodiff.report.content import Card, Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import number, rows_of
from heterodiff.report.metrics import Metric, MetricTable, Value, value_of


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """The accuracy at each noise level; at the first, beside that of always naming the most common class."""
    guess, rows = value_of(evaluation.get("most_common")), list[Metric]()
    for row in rows_of(evaluation.get("noise_levels")):
        label = f"Class accuracy at noise level {number(row.get('level'), '{:.2f}')}"
        rows.append(Metric(label, [value_of(row.get("accuracy")), Value() if rows else guess], tag="classes"))
    return [MetricTable("Metric", ("Held out", "Most common class"), rows)] if rows else []


def cards(evaluation: Mapping[str, Any]) -> list[Card]:
    """The accuracy on images with hardly any noise."""
    return [table.rows[0].card("held-out images", "Class accuracy, hardly noised") for table in metrics(evaluation)]


def sections(files: RunFiles) -> list[Section]:
    """The section on the classifier."""
    tables = [table.table() for table in metrics(files.evaluation)]
    text = "Noise level 0 is the image nearly as it is, 1 is pure noise, which tells no class."
    return [Section("Classes of noisy images", [*tables, Text(text, soft=True)])] if tables else []
