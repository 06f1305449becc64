"""Evaluating a run folder: draw images, measure them, and write pictures, numbers and the report."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from heterodiff.config import DataConfig, RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_data
from heterodiff.data.sources.volumes import known_fingerprint
from heterodiff.devices import Device
from heterodiff.errors import DataError, RunError
from heterodiff.latents.reading import read_index
from heterodiff.lazy import loaded
from heterodiff.metrics.generation import evaluate_generation, nearest_picture
from heterodiff.pictures import image_grid
from heterodiff.pipelines.image_files import all_classes, class_title, draw_classes
from heterodiff.pipelines.load import check_preprocessing, load_generation, pipeline_kind, pipeline_task
from heterodiff.report.writing import write_report
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import Task, task_of

IMAGES_PER_CLASS, DEMO_IMAGES_PER_CLASS = 50, 20
MAX_REAL_IMAGES = 10_000


@dataclass(frozen=True)
class Evaluation:
    """Numbers of an evaluated run, and the files that show them."""

    metrics: dict[str, Any]
    picture: Path
    report: Path


@dataclass(frozen=True)
class Request:
    """How a run is to be evaluated; None leaves it to the task or the run.

    Attributes:
        number: images of each class, or prompts.
        data: real images unseen in training, in place of the run's own.
        batch_size: images drawn at once.
        steps, guidance, sampler: how images are drawn.
    """

    number: int | None = None
    data: Path | None = None
    seed: int = 0
    device: Device | None = None
    batch_size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None

    def options(self) -> dict[str, Any]:
        """How to draw, as arguments of the functions that evaluate."""
        drawing = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "sampler": self.sampler}
        batch_size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {**drawing, "device": self.device, **batch_size}


@dataclass(frozen=True)
class HeldOut:
    """Real images that the run was not trained on.

    Attributes:
        images: (N, C, H, W) in [0, 1]; N may be 0.
        labels: (N,), in the run's class order; -1 where unlabelled.
        record: ready for JSON: ``path``, ``part`` ("validation split" or "all"), ``n``, ``notes``.
    """

    images: Tensor
    labels: Tensor
    record: dict[str, Any]


def run_data(run: Path) -> LoadedData:
    """The data of the run in folder ``run``, with the split and value range it was trained with.

    Raises:
        RunError: the folder holds no run that was trained here.
        DataError: the images are not there any more, or not the same.
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder; `heterodiff train` makes one")
    folder = RunFolder(run)
    needed = [folder.config_file, folder.data_file, folder.split_file]
    if missing := [p.name for p in needed if not p.is_file()]:
        raise RunError(f"{run}: {', '.join(missing)} missing, so the training images are not known here")
    check_preprocessing(run, known_fingerprint(folder.config().data))
    return load_data(image_config(run), split=folder.split(), spec=folder.spec())


def image_config(run: Path) -> DataConfig:
    """How the run's images are read; for a run on stored latents, those that they were encoded from.

    Raises:
        DataError: the latents are not there any more.
    """
    config = RunFolder(run).config().data
    if config.source != "latents":
        return config
    assert config.path is not None
    return DataConfig.model_validate(read_index(config.path.expanduser()).data_config)


def held_out_images(run: Path, data: LoadedData, path: Path | None = None) -> HeldOut:
    """Real images to measure the run in folder ``run`` against: those at ``path``, or its validation split.

    Images at ``path`` (a folder or npz file, as ``data.path``) are brought to the run's size, channels, value range
    and class order; classes are matched by name.

    Args:
        data: of the run, see :func:`run_data`.

    Raises:
        DataError: nothing usable at ``path``, images of other channels or number type than the run's, or classes
            that it does not know.
    """
    config = image_config(run)
    if path is None:
        images, labels = images_of(data.val)
        record = {"path": str(config.path or config.source), "part": "validation split", "n": len(images), "notes": []}
        return HeldOut(images, labels, record)
    if not path.expanduser().exists():
        raise DataError(f"{path}: no such folder or npz file; correct --data")
    spec = data.spec
    unseen = config.model_copy(
        update={
            "source": "images",
            "path": path,
            "image_size": (spec.height, spec.width),
            "channels": spec.channels,
            "val_fraction": 0.0,
        }
    )
    loaded = load_data(unseen, spec=spec)
    images, labels = images_of(loaded.train)
    notes = list(loaded.warnings)
    seen = count_seen(images, data.train)
    if seen:
        notes.append(f"{seen:,} of {len(images):,} images at {path} are training images too: they are not held out")
    return HeldOut(images, labels, {"path": str(path), "part": "all", "n": len(images), "notes": notes})


def count_seen(images: Iterable[Tensor], train: ImageDataset) -> int:
    """How many of ``images``, each (C, H, W), are training images, bit by bit."""
    known: set[bytes] = set()
    for start in range(0, len(train), 256):
        part, _ = train.batch(range(start, min(start + 256, len(train))))
        known.update(_digest(image) for image in part)
    return sum(_digest(image) in known for image in images)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


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

    Writes ``samples.png``, ``nearest.png``, ``evaluation.json`` and ``report.html`` into the run folder.

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
    return Evaluation(metrics, folder.samples_picture, write_report(run))


def evaluate_images(run: Path, request: Request) -> tuple[Evaluation, list[str]]:
    """Evaluate a run that draws images of classes as asked for on the command line; its main numbers."""
    pipeline_kind(run)  # a run without weights is refused before its data are read
    number = IMAGES_PER_CLASS if request.number is None else request.number
    found = evaluate_run(run, number, request.seed, request.data, **request.options())
    return found, summary_lines(found.metrics)


def task_evaluated(run: Path) -> Task:
    """The task that a run folder is evaluated as; stored latents count as the images they were encoded from.

    Raises:
        RunError, CheckpointError: no run folder, or one that nothing fits.
        DataError: the latents are not there any more.
    """
    folder = RunFolder(run)
    if not folder.has_config:
        return pipeline_task(run)
    return task_of(folder.config().model_copy(update={"data": image_config(run)}))


def evaluate_task(run: Path, request: Request) -> tuple[Evaluation, list[str]]:
    """Evaluate the run in folder ``run`` as its task does it; its main numbers, a line each.

    Raises:
        HeterodiffError: no usable run, data that are not there any more, or options that do not fit.
    """
    found: tuple[Evaluation, list[str]] = loaded(task_evaluated(run).evaluate)(run, request)
    return found


def demo(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run that draws images of classes, and the VAE that it was trained with first; what to go on with."""
    steps = config.training.steps
    print(f"trained  {steps} steps; drawing and evaluating {DEMO_IMAGES_PER_CLASS} images a class", flush=True)
    if config.codec.kind == "kl-vae":
        assert config.codec.path is not None
        for line in evaluate_task(config.codec.path, Request(seed=seed))[1]:
            print(f"vae      {line}")
    evaluation, lines = evaluate_task(out, Request(DEMO_IMAGES_PER_CLASS, seed=seed))
    print(*lines, sep="\n")
    print(f"samples  {evaluation.picture}\nreport   {evaluation.report}")
    return [f"next     heterodiff sample {out} --class {load_generation(out).class_names[-1]} -n 8 --seed 0"]


def images_of(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,) of ``data``, at most 10,000, spread evenly over its order."""
    count = min(len(data), MAX_REAL_IMAGES)
    # Images are sorted by class folder: the first ones alone would leave whole classes out.
    return data.batch(np.linspace(0, len(data) - 1, count).round().astype(np.int64).tolist())


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
    lines += [f"note     {note}" for note in metrics.get("held_out", {}).get("notes", [])]
    for key, reason in metrics["skipped"].items():
        lines.append(f"skipped  {key}: {reason}")
    return lines


def _share(proportion: dict[str, Any]) -> str:
    return f"{100 * proportion['share']:.1f} %"
