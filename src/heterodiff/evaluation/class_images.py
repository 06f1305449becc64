"""Evaluation of a run that draws images of classes."""

from pathlib import Path
from typing import Any

from heterodiff.devices import Device
from heterodiff.evaluation.held_out import held_out_images, images_of
from heterodiff.evaluation.runs import Evaluation, Request, run_data
from heterodiff.metrics.generation import evaluate_generation, nearest_picture
from heterodiff.pictures import image_grid
from heterodiff.pipelines.image_files import all_classes, class_title, draw_classes
from heterodiff.pipelines.load import load_generation, pipeline_kind
from heterodiff.run_folder import RunFolder

IMAGES_PER_CLASS = 50


def evaluate_run(
    run: Path,
    per_class: int = 20,
    seed: int = 0,
    data_path: Path | None = None,
    device: Device | None = None,
    batch_size: int = 100,
    **options: Any,
) -> Evaluation:
    """Draw ``per_class`` images of each class from the run and compare them with its real images.

    Writes ``samples.png``, ``nearest.png`` and ``evaluation.json`` into the run folder.

    Args:
        data_path: real images unseen in training to compare with, instead of the validation split.
        device: see :func:`heterodiff.load`.
        batch_size: images drawn at once.
        **options: of :class:`heterodiff.pipelines.generate.GenerationPipeline`, such as guidance_scale.

    Raises:
        HeterodiffError: no usable run, or data that are not there any more.
    """
    data = run_data(run)
    held_out = held_out_images(run, data, data_path)
    pipeline = load_generation(run, device)
    images, labels = draw_classes(pipeline, all_classes(pipeline), per_class, seed, batch_size, **options)
    train = images_of(data.train)
    real = (held_out.images, held_out.labels)
    metrics = evaluate_generation(images, labels, train, real, data.spec.class_names, seed)
    metrics["held_out"] = held_out.record
    defaults = pipeline.defaults.model_dump(mode="json")
    metrics["sampling"] = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    titles = [class_title(pipeline, int(label)) for label in labels]
    shown = [i for i in range(len(images)) if i % per_class < 10]
    folder = RunFolder(run)
    grid = image_grid(images[shown], [titles[i] for i in shown], columns=min(10, per_class))
    folder.write_picture(folder.samples_picture, grid)
    folder.write_picture(folder.nearest_picture, nearest_picture(images, train[0], metrics))
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.samples_picture)


def evaluate(run: Path, request: Request) -> Evaluation:
    """Evaluate a run that draws images of classes as asked for on the command line."""
    pipeline_kind(run)  # a run without weights is refused before its data are read
    number = IMAGES_PER_CLASS if request.number is None else request.number
    return evaluate_run(run, number, request.seed, request.data, **request.options())
