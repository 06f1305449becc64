"""Evaluation of a run of recipe ``classifier``: accuracy on held-out images, by the level of their noise."""

from pathlib import Path
from typing import Any

import torch

from heterodiff.errors import DataError
from heterodiff.evaluation.held_out import held_out_images
from heterodiff.evaluation.runs import Evaluation, Request, run_data
from heterodiff.metrics.intervals import wilson_share
from heterodiff.pipelines.classify import LEVELS, noisy_picture
from heterodiff.pipelines.load import load_classifier
from heterodiff.pipelines.sharing import team
from heterodiff.run_folder import RunFolder

SHOWN = 8


def evaluate(run: Path, request: Request) -> Evaluation:
    """Measure the share of held-out images that get their class, at several noise levels.

    Writes ``samples.png`` (images at each level with the classes found) and ``evaluation.json`` into the run.

    Raises:
        HeterodiffError: no usable run, no labelled held-out images, or data that are not there any more.
    """
    team().first_alone()
    pipeline, data = load_classifier(run, request.device), run_data(run)
    held_out = held_out_images(run, data, request.data)
    known = held_out.labels >= 0
    images, labels = held_out.images[known], held_out.labels[known]
    if len(images) == 0:
        raise DataError(
            f"{run}: no labelled held-out images; name some with --data, or train with data.val_fraction above 0"
        )
    levels: list[dict[str, Any]] = []
    for level in LEVELS:
        found = pipeline(images, level, torch.Generator().manual_seed(request.seed))
        hits = int((found.argmax(dim=1) == labels).sum())
        levels.append({"level": level, "accuracy": wilson_share(hits, len(labels))})
    metrics: dict[str, Any] = {
        "held_out": held_out.record,
        "seed": request.seed,
        "noise_levels": levels,
        "most_common": wilson_share(int(labels.bincount().max()), len(labels)),
    }
    rows = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    folder = RunFolder(run)
    folder.write_picture(folder.samples_picture, noisy_picture(pipeline, images[rows], labels[rows], request.seed))
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.samples_picture)
