"""Pictures of prompts and captions of pictures as files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import DataError, RunError
from heterodiff.files import write_text
from heterodiff.pictures import image_grid, save_image
from heterodiff.pipelines.image_files import GRID_FILE, MAX_GRID_IMAGES, UNSAFE
from heterodiff.pipelines.text_to_image import TextImagePipeline

PROMPTS_FILE = "prompts.jsonl"
MAX_NAME_LENGTH = 60


def write_pictures(images: Tensor, prompts: Sequence[str], folder: Path, spec: ImageSpec | None) -> list[Path]:
    """Write pictures of ``prompts``, equally many of each in order, with a grid and a list of which is of what.

    Args:
        images: (N, C, H, W) in [0, 1].
        spec: of the training images, in whose number type and range files are written.

    Raises:
        RunError: ``folder`` cannot be written.
    """
    each = len(images) // len(prompts)
    texts = [prompt for prompt in prompts for _ in range(each)]
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            name = UNSAFE.sub("_", text.strip())[:MAX_NAME_LENGTH].strip("_.") or "no_condition"
            stem = folder / f"{number:04d}_{name}"
            written.append(save_image(image, stem, spec.dtype, spec.value_range) if spec else save_image(image, stem))
        rows = [{"file_name": path.name, "text": text} for path, text in zip(written, texts, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # What no encoding can express becomes \udcff, which JSON reads back as it was.
        write_text(folder / PROMPTS_FILE, lines, "backslashreplace")
        columns = each if len(prompts) > 1 else None
        grid = image_grid(images[:MAX_GRID_IMAGES], texts[:MAX_GRID_IMAGES], columns=columns)
        grid.save(folder / GRID_FILE)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; choose another --out") from None
    return [*written, folder / GRID_FILE]


def read_usable(
    pipeline: TextImagePipeline, paths: Sequence[Path], at_once: int = 64
) -> Iterator[tuple[list[Path], Tensor, list[str]]]:
    """Yield, of each ``at_once`` of ``paths``, those that can be read, their images, and what is wrong with the rest.

    Images are (B, C, H, W) in [0, 1].
    """
    for start in range(0, len(paths), at_once):
        usable, images, problems = [], [], []
        for path in paths[start : start + at_once]:
            try:
                images.append(pipeline.read([path]))
                usable.append(path)
            except DataError as error:
                problems.append(str(error))
        yield usable, torch.cat(images) if images else torch.empty(0), problems
