"""The augmentation study of a run folder: draw images, train the classifiers, write numbers, picture and report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heterodiff.devices import Device
from heterodiff.errors import ConfigError
from heterodiff.evaluation.augmentation import augmentation_study
from heterodiff.evaluation.augmentation_picture import augmentation_picture
from heterodiff.evaluation.augmentation_sets import generated_counts, study_sets
from heterodiff.evaluation.class_images import held_out_images, images_of, run_data
from heterodiff.evaluation.progress import pictures_at_once
from heterodiff.files import write_bytes
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.image_files import draw_classes
from heterodiff.pipelines.load import load_generation
from heterodiff.progress import progress_tasks
from heterodiff.report.writing import write_report
from heterodiff.run_folder import RunFolder

MAX_PER_CLASS = 500


@dataclass(frozen=True)
class AugmentationRun:
    """Numbers of an augmentation study (see :func:`heterodiff.evaluation.augmentation.augmentation_study`), and the
    files that show them."""

    study: dict[str, Any]
    numbers: Path
    picture: Path
    report: Path


def study_run(
    run: Path,
    data_path: Path | None = None,
    per_class: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    device: Device | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> AugmentationRun:
    """Measure what images drawn from the run are worth as training data for a classifier.

    Writes ``augmentation.json``, ``augmentation.png`` and ``report.html`` into the run folder.

    Args:
        data_path: real images unseen in training to read (folder or npz file); default: the validation split.
        per_class: how many images of each class to draw; default: as many as there are real training images of the
            class, scaled down together where one has more than 500.
        seed: of the images.
        seeds: of the classifiers.
        device: see :func:`heterodiff.load`.
        batch_size: images drawn at once; default: as the device likes it.
        **options: of :class:`heterodiff.pipelines.generate.GenerationPipeline`, such as guidance_scale.

    Returns:
        The study, with ``held_out`` (which images were read), ``sampling`` (how images were drawn) and ``images``
        (``seed``, ``seconds``) added.

    Raises:
        ConfigError: the run has no classes.
        HeterodiffError: no usable run, data that are not there any more, or held-out images that cannot be used.
    """
    folder = RunFolder(run)
    spec = folder.spec()
    if spec is not None and len(spec.class_names) < 2:
        raise ConfigError(
            f"{run}: trained without classes, so a classifier has nothing to learn from its images; --augmentation "
            "needs a run with at least two classes"
        )
    data = run_data(run)
    held_out = held_out_images(run, data, data_path)
    train, real = images_of(data.train), (held_out.images, held_out.labels)
    (_, labels), _, _ = study_sets(train, real, data.spec.class_names)  # refuses unusable sets before anything is drawn
    pipeline = load_generation(run, device)
    counts = generated_counts(labels, per_class, MAX_PER_CLASS if per_class is None else None)
    with progress_tasks() as task:
        start = time.perf_counter()
        generated = _draw(pipeline, counts, seed, task("drawing images", sum(counts.values())), batch_size, options)
        seconds = time.perf_counter() - start
        report_fit = task("training classifiers", 3 * (len(dict.fromkeys(seeds)) + 1))
        study = augmentation_study(
            train, generated, real, data.spec.class_names, seeds, per_class, lambda done, _: report_fit(done)
        )
    defaults = pipeline.defaults.model_dump(mode="json")
    study["held_out"] = held_out.record
    study["notes"] += held_out.record["notes"]
    study["sampling"] = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    study["images"] = {"seed": seed, "seconds": seconds}
    folder.write_json(folder.augmentation_file, study)
    with folder.writing(folder.augmentation_picture):
        write_bytes(folder.augmentation_picture, augmentation_picture(study))
    return AugmentationRun(study, folder.augmentation_file, folder.augmentation_picture, write_report(run))


def _draw(
    pipeline: GenerationPipeline,
    counts: dict[int, int],
    seed: int,
    progress: Callable[[int], None],
    batch_size: int | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    at_once = batch_size or pictures_at_once(pipeline.device)
    return draw_classes(pipeline, list(counts), list(counts.values()), seed, at_once, progress, **options)
