"""Evaluation of a run with images as conditions: what it draws of held-out conditions, beside the true images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.data.conditions import split_condition
from heterodiff.data.dataset import ImageDataset
from heterodiff.devices import Device
from heterodiff.errors import DataError
from heterodiff.evaluation.held_out import held_out_set, images_of
from heterodiff.evaluation.runs import Evaluation, Request, run_data
from heterodiff.evaluation.vae import spread
from heterodiff.image_spec import ImageSpec
from heterodiff.metrics.classifiers import ConvClassifier
from heterodiff.metrics.distances import frechet_distance
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.pictures import image_grid
from heterodiff.pipelines.conditions import pictured
from heterodiff.pipelines.drawing import explaining_memory
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_generation, pipeline_kind
from heterodiff.pipelines.sharing import team
from heterodiff.run_folder import RunFolder

IMAGES = 100
DRAWS = 4
"""Images drawn of each condition: the first is judged as it is, and their mean as an estimate."""
SHOWN = 8


def evaluate_translation(
    run: Path,
    number: int = IMAGES,
    seed: int = 0,
    data_path: Path | None = None,
    device: Device | None = None,
    batch_size: int = 100,
    **options: Any,
) -> Evaluation:
    """Draw images of held-out conditions and compare them with the true ones.

    Writes ``samples.png`` (condition, drawn, mean of the draws, true) and ``evaluation.json`` into the run.

    Args:
        number: most images to compare.
        data_path: images to use instead of the validation split.
        batch_size: images drawn at once.
        **options: of :class:`heterodiff.pipelines.generate.GenerationPipeline`, such as guidance_scale.

    Raises:
        HeterodiffError: no usable run, no held-out images, or data that are not there any more.
    """
    data = run_data(run)
    held_out, record = held_out_set(run, data, data_path)
    if not len(held_out):
        raise DataError(f"{run}: no held-out images; name some with --data, or train with data.val_fraction above 0")
    rows = torch.linspace(0, len(held_out) - 1, min(number, len(held_out))).long().tolist()
    images, conditions = conditioned_images(held_out, rows)
    pipeline = load_generation(run, device)
    at_once = max(1, batch_size // DRAWS)
    parts = []
    for start in team().own(range(0, len(rows), at_once)):
        part = slice(start, start + at_once)
        count = len(rows[part])
        with explaining_memory(count * DRAWS, pipeline.device):
            drawn = pipeline(
                held_out.labels_of(rows[part]).repeat_interleave(DRAWS),
                condition_images=conditions[part].repeat_interleave(DRAWS, dim=0),
                conditions=_attributes(held_out, rows[part]),
                generator=[g for row in range(count) for g in seeded_generators(seed, DRAWS, (start + row) * DRAWS)],
                batch_size=count * DRAWS,
                **options,
            ).images
        parts.append(drawn.unflatten(0, (count, DRAWS)))
    drawn = torch.cat(team().collect(parts))
    train, labels = images_of(data.train)
    found = {
        "generated": drawn[:, 0],
        "mean of draws": drawn.mean(dim=1),
        "baseline": baseline(data.spec, conditions, train),
    }
    reader = ConvClassifier(seed).fit(train, labels)
    reference = reader.features(train)
    metrics: dict[str, Any] = {
        "held_out": record,
        "seed": seed,
        "sampling": {
            **pipeline.defaults.model_dump(mode="json"),
            **{k: v for k, v in options.items() if v is not None},
        },
        "translation": {
            "n": len(images),
            "draws": DRAWS,
            "condition": data.spec.condition.kind if data.spec.condition else None,
            "baseline": baseline_name(data.spec),
            "psnr": {name: spread(psnr(images, others)) for name, others in found.items()},
            "ssim": {name: spread(ssim(images, others)) for name, others in found.items()},
            "mae": {name: spread((others - images).abs().mean(dim=(1, 2, 3))) for name, others in found.items()},
            "frechet": {
                name: frechet_distance(reader.features(others), reference)
                for name, others in {**found, "real": images}.items()
                if len(others) > 1
            },
        },
    }
    folder, shown = RunFolder(run), slice(0, SHOWN)
    lines = {"condition": pictured(conditions, images.shape[1]), **found, "true": images}
    lines.pop("baseline")
    titles = [name for name in lines for _ in range(len(images[shown]))]
    grid = image_grid(torch.cat([line[shown] for line in lines.values()]), titles, columns=len(images[shown]))
    folder.write_picture(folder.samples_picture, grid)
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.samples_picture)


def evaluate(run: Path, request: Request) -> Evaluation:
    """Evaluate a run with images as conditions as asked for on the command line."""
    pipeline_kind(run)  # a run without weights is refused before its data are read
    number = IMAGES if request.number is None else request.number
    return evaluate_translation(run, number, request.seed, request.data, **request.options())


def _attributes(data: ImageDataset, rows: list[int]) -> Tensor | None:
    """Attributes (B * DRAWS, A) of images ``rows``, if the run has any."""
    if not data.spec.attributes:
        return None
    return data.conditions_of(rows)[:, 1:].repeat_interleave(DRAWS, dim=0)


def conditioned_images(data: ImageDataset, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return images ``rows`` (B, C, H, W) of ``data`` and their condition images (B, C', H, W), in [0, 1]."""
    images, conditions = split_condition(data.inputs(rows)[0], data.spec)
    assert conditions is not None
    return images, conditions


def baseline(spec: ImageSpec, conditions: Tensor, train: Tensor) -> Tensor:
    """Return the simplest estimates (B, C, H, W) of the images with these conditions.

    These are the enlarged low resolution, the mean of the given channels, or else the mean training image.
    """
    assert spec.condition is not None
    if spec.condition.kind == "downscale":
        return conditions
    if spec.condition.given:
        return conditions.mean(dim=1, keepdim=True).expand(-1, spec.channels, -1, -1)
    return train.mean(dim=0, keepdim=True).expand(len(conditions), -1, -1, -1)


def baseline_name(spec: ImageSpec) -> str:
    """Return the name of :func:`baseline`."""
    assert spec.condition is not None
    if spec.condition.given:
        return "mean of the given channels"
    return "bicubic" if spec.condition.kind == "downscale" else "mean training image"
