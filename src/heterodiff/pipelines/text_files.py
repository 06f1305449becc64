"""Files of text to image and back: pictures of prompts, and images to caption."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import DataError
from heterodiff.files import write_text
from heterodiff.pipelines.image_files import GRID_FILE, UNSAFE, save_images
from heterodiff.pipelines.output_folder import writing
from heterodiff.pipelines.text_to_image import TextImagePipeline

PROMPTS_FILE = "prompts.jsonl"
MAX_NAME_LENGTH = 60


def write_pictures(images: Tensor, prompts: Sequence[str], folder: Path, spec: ImageSpec | None) -> list[Path]:
    """Write pictures of ``prompts``, the same number of each in order, and their list; see :func:`save_images`."""
    each = len(images) // len(prompts)
    texts = [prompt for prompt in prompts for _ in range(each)]
    short = [UNSAFE.sub("_", text.strip())[:MAX_NAME_LENGTH].strip("_.") or "no_condition" for text in texts]
    names = [f"{number:04d}_{name}" for number, name in enumerate(short)]
    written = save_images(images, names, texts, folder, spec, columns=each if len(prompts) > 1 else None)
    rows = [{"file_name": path.name, "text": text} for path, text in zip(written, texts, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(folder):  # characters that no encoding can express become \udcff, which JSON reads back as it was
        write_text(folder / PROMPTS_FILE, lines, "backslashreplace")
    return [*written, folder / GRID_FILE]


def read_usable(
    pipeline: TextImagePipeline, paths: Sequence[Path], at_once: int = 64
) -> Iterator[tuple[list[Path], Tensor, list[str]]]:
    """Yield, for every ``at_once`` paths, the readable ones, their images (B, C, H, W) in [0, 1], and the errors."""
    for start in range(0, len(paths), at_once):
        usable, images, problems = [], [], []
        for path in paths[start : start + at_once]:
            try:
                images.append(pipeline.read([path]))
                usable.append(path)
            except DataError as error:
                problems.append(str(error))
        yield usable, torch.cat(images) if images else torch.empty(0), problems
