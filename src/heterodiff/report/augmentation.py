"""Value of generated images as training data of a classifier (``augmentation.json``)."""

from typing import Any

from heterodiff.report.content import Block, Notice, Section, Table, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import count, part_of, rows_of, texts
from heterodiff.report.metrics import value_of

TITLE = "Generated images as training data"
MAX_CLASS_ROWS = 100
TONES = {"better": "good", "not worse": "good", "worse": "bad"}
METHOD = (
    "A small convolutional network is trained on real training images, on generated ones, and on both, equally long, "
    "and classifies real images that were not trained on. Intervals are at 95 %; they assume independent images."
)


def section(files: RunFiles) -> Section:
    """The section on the augmentation study of a run."""
    study = files.augmentation
    conditions = {key: part_of(study, "conditions", key) for key in ("real", "generated", "both")}
    if not any(conditions.values()):
        return Section(TITLE, [])
    titles = [str(part.get("title", key)) for key, part in conditions.items()]
    overall = [_interval(part_of(part, "accuracy")) for part in conditions.values()]
    svm = [_interval(part_of(study, "svm", "accuracy", key)) for key in conditions]
    rows = [["all classes", count(study.get("n_held_out")), *overall], ["all classes, by an SVM", "", *svm]]
    per_class = [_by_name(part.get("per_class")) for part in conditions.values()]
    for name, row in list(per_class[0].items())[:MAX_CLASS_ROWS]:
        rows.append([name, count(row.get("n")), *(_interval(found.get(name, {})) for found in per_class)])
    path = part_of(study, "held_out").get("path")
    notes = [*([f"Real images classified: {path}"] if path else []), *texts(study.get("notes"))]
    blocks: list[Block] = [
        Notice(str(study.get("summary", "")), TONES.get(str(study.get("verdict")), "")),
        Text(METHOD),
        files.figure(files.folder.augmentation_picture, "Accuracies and confusion matrices"),
        Table(("Accuracy, recall of a class", "Images classified", *titles), rows, range(1, 5)),
        Text(" ".join(f"{note}." for note in notes), soft=True),
    ]
    return Section(TITLE, blocks)


def _interval(found: dict[str, Any]) -> str:
    return value_of({key: value for key, value in found.items() if key != "n"}).cell


def _by_name(rows: Any) -> dict[str, dict[str, Any]]:
    return {str(row.get("name")): row for row in rows_of(rows)}
