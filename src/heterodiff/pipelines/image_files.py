"""Images of a pipeline as files: one each, and a labelled grid."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import RunError
from heterodiff.models.conditioning import NO_CLASS
from heterodiff.pictures import image_grid, save_image, to_pil
from heterodiff.pipelines.drawing import explaining_memory
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators

GRID_FILE = "grid.png"
MAX_GRID_IMAGES = 400
UNSAFE = re.compile(r"[^\w.+-]+")  # characters of class names that stay out of file names


def all_classes(pipeline: GenerationPipeline) -> list[int]:
    """Every class of the pipeline, or "no condition" where it has none."""
    return list(range(pipeline.unet.config.num_classes or 0)) or [NO_CLASS]


def class_title(pipeline: GenerationPipeline, label: int) -> str:
    """What to call a class in a picture or a file name."""
    if label == NO_CLASS:
        return "none"
    return pipeline.class_names[label] if label < len(pipeline.class_names) else str(label)


def pictures_at_once(device: torch.device) -> int:
    """Number of pictures to draw between two progress updates: few on a CPU, so that progress is seen."""
    return 20 if device.type == "cpu" else 100


def draw_classes(
    pipeline: GenerationPipeline,
    classes: Sequence[int],
    count: int | Sequence[int],
    seed: int,
    batch_size: int = 100,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` images of each class, or a number of its own for each.

    The k-th image of a class depends on (seed, class, k) alone, not on which others are drawn.

    Args:
        batch_size: how many images to draw at once.
        progress: called with the number of images drawn so far, after every batch.

    Returns:
        images (N, C, H, W) in [0, 1] and labels (N,), class after class.

    Raises:
        RunError: out of memory.
    """
    counts = [count] * len(classes) if isinstance(count, int) else count
    labels = [c for c, n in zip(classes, counts, strict=True) for _ in range(n)]
    generators = [
        g for c, n in zip(classes, counts, strict=True) for g in seeded_generators(seed, n, first=(c + 1) * 1_000_000)
    ]
    parts = []
    for start in range(0, max(1, len(labels)), batch_size):  # none at all: the pipeline says so
        chosen = slice(start, start + batch_size)
        some = labels[chosen]
        with explaining_memory(len(some), pipeline.device):
            drawn = pipeline(some, generator=generators[chosen], batch_size=batch_size, **options)
        parts.append(drawn.images)
        if progress is not None:
            progress(min(start + batch_size, len(labels)))
    return torch.cat(parts), torch.tensor(labels)


def write_images(
    images: Tensor, labels: Tensor, pipeline: GenerationPipeline, folder: Path, columns: int | None = None
) -> list[Path]:
    """Write each image as ``<class>_<k>.png`` and all together as ``grid.png``.

    Data that a PNG cannot hold (floats, many channels) are written as ``.npy`` in the units of the training data
    beside a PNG to look at.

    Raises:
        RunError: ``folder`` cannot be written.
    """
    spec = pipeline.spec
    titles = [class_title(pipeline, int(label)) for label in labels]
    written: list[Path] = []
    numbers: dict[str, int] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image, title in zip(images, titles, strict=True):
            name = UNSAFE.sub("_", title)
            k = numbers[name] = numbers.get(name, -1) + 1  # by name: two classes may share one
            stem = folder / f"{name}_{k:04d}"
            path = save_image(image, stem, spec.dtype, spec.value_range) if spec else save_image(image, stem)
            written.append(path)
            if path.suffix != ".png":
                to_pil(image, mosaic=True).save(f"{stem}.png")
        grid = image_grid(images[:MAX_GRID_IMAGES], titles[:MAX_GRID_IMAGES], columns=columns)
        grid.save(folder / GRID_FILE)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; choose another --out") from None
    return [*written, folder / GRID_FILE]
