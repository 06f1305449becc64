"""Evaluating a run folder: draw images, measure them, and write pictures, numbers and the report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heterodiff.config import load_config
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_data
from heterodiff.errors import RunError
from heterodiff.evaluation.generation import evaluate_generation, nearest_picture
from heterodiff.evaluation.report import write_report
from heterodiff.pictures import image_grid
from heterodiff.pipelines.files import all_classes, class_title, draw_classes
from heterodiff.pipelines.load import CONFIG_FILE, DATA_FILE, SPLIT_FILE, load, load_spec, read_json

MAX_REAL_IMAGES = 10_000


@dataclass(frozen=True)
class Evaluation:
    """Numbers of an evaluated run, and the files that show them."""

    metrics: dict[str, Any]
    picture: Path
    report: Path


def run_data(run: Path) -> LoadedData:
    """The data of the run in folder ``run``, with the split and value range it was trained with.

    Raises:
        RunError: the folder holds no run that was trained here.
        DataError: the images are not there any more, or not the same.
    """
    needed = [run / CONFIG_FILE, run / DATA_FILE, run / SPLIT_FILE]
    if missing := [p.name for p in needed if not p.is_file()]:
        raise RunError(f"{run}: {', '.join(missing)} missing, so the training images are not known here")
    config = load_config(run / CONFIG_FILE)
    return load_data(config.data, split=read_json(run / SPLIT_FILE), spec=load_spec(run))


def evaluate_run(run: Path, per_class: int = 20, seed: int = 0, **options: Any) -> Evaluation:
    """Draw ``per_class`` images of each class from the run and compare them with its real images.

    Writes ``samples.png``, ``nearest.png``, ``evaluation.json`` and ``report.html`` into the run folder.

    Args:
        **options: of :class:`heterodiff.pipelines.generate.GenerationPipeline`, such as guidance_scale.

    Raises:
        HeterodiffError: no usable run, or data that are not there any more.
    """
    data = run_data(run)
    pipeline = load(run)
    images, labels = draw_classes(pipeline, all_classes(pipeline), per_class, seed, **options)
    train = images_of(data.train)
    metrics = evaluate_generation(images, labels, train, images_of(data.val), data.spec.class_names, seed)
    defaults = pipeline.defaults.model_dump(mode="json")
    metrics["sampling"] = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    titles = [class_title(pipeline, int(label)) for label in labels]
    shown = [i for i in range(len(images)) if i % per_class < 10]
    picture = run / "samples.png"
    image_grid(images[shown], [titles[i] for i in shown], columns=min(10, per_class)).save(picture)
    nearest_picture(images, train[0], metrics).save(run / "nearest.png")
    (run / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    return Evaluation(metrics, picture, write_report(run))


def images_of(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,) of ``data``, at most 10,000."""
    return data.batch(range(min(len(data), MAX_REAL_IMAGES)))


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """The main numbers of an evaluation, a line each, real images beside generated ones."""
    lines = []
    for name, title in (("svm", "SVM"), ("cnn", "CNN")):
        reading = metrics.get("fidelity", {}).get(name)
        if reading:
            generated, real = reading["generated"], reading["real"]
            lines.append(
                f"{title:8} reads {_share(generated)} of {generated['n']} generated images as the class asked for; "
                + (f"{_share(real)} of {real['n']} real held-out ones" if real["n"] else "no held-out images")
            )
    frechet = metrics.get("frechet_distance")
    if frechet:
        real = frechet.get("real")
        lines.append(
            f"Fréchet  {frechet['generated']:.3f} generated"
            + (f", {real:.3f} real held-out" if real is not None else "")
            + f" (distance to the training images, {frechet['n']} images each, {metrics['features']} features)"
        )
    lines.append(f"copies   {metrics['nearest']['verdict']} (distance to the nearest training images; see the report)")
    for key, reason in metrics["skipped"].items():
        lines.append(f"skipped  {key}: {reason}")
    return lines


def _share(proportion: dict[str, Any]) -> str:
    return f"{100 * proportion['share']:.1f} %"
