"""Images as files, one each and a labelled grid: of classes, conditions, edits and prompts; images to caption."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.data.conditions import split_condition
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.errors import DataError
from heterodiff.files import write_text
from heterodiff.models.conditioning import NO_CLASS
from heterodiff.pictures import image_grid, save_image, to_pil
from heterodiff.pipelines.conditions import pictured
from heterodiff.pipelines.drawing import explaining_memory
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.pipelines.output_folder import writing
from heterodiff.pipelines.sharing import team
from heterodiff.pipelines.text_to_image import TextImagePipeline

GRID_FILE, PROMPTS_FILE = "grid.png", "prompts.jsonl"
MAX_NAME_LENGTH = 60
MAX_GRID_IMAGES = 400
PREVIEWED = 8
UNSAFE = re.compile(r"[^\w.+-]+")  # characters of class names that stay out of file names


def all_classes(pipeline: GenerationPipeline) -> list[int]:
    """Return all classes of the pipeline, or "no condition" if it has none."""
    return list(range(pipeline.unet.config.num_classes or 0)) or [NO_CLASS]


def class_title(pipeline: GenerationPipeline, label: int) -> str:
    """Return the name of a class for pictures and file names."""
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
    """Draw ``count`` images of each class; a sequence gives the count of each class.

    The k-th image of a class depends on (seed, class, k) alone, not on which others are drawn. Processes of a team
    share the batches; the first one returns, see :meth:`heterodiff.pipelines.sharing.Team.collect`.

    Args:
        batch_size: number of images to draw at once.
        progress: called with the number of images drawn so far, after every batch of this process.

    Returns:
        images (N, C, H, W) in [0, 1] and labels (N,), class after class.

    Raises:
        RunError: out of memory.
    """
    counts = [count] * len(classes) if isinstance(count, int) else count
    labels: list[int] = []
    generators: list[torch.Generator] = []
    for label, number in zip(classes, counts, strict=True):
        labels += [label] * number
        generators += seeded_generators(seed, number, first=(label + 1) * 1_000_000)
    processes, parts = team(), []
    batch_size = processes.each(len(labels), batch_size)
    for start in processes.own(range(0, max(1, len(labels)), batch_size)):  # without any, the pipeline raises the error
        rows = slice(start, start + batch_size)
        with explaining_memory(len(labels[rows]), pipeline.device):
            drawn = pipeline(labels[rows], generator=generators[rows], batch_size=batch_size, **options)
        parts.append(drawn.images)
        if progress is not None:
            progress(min(start + batch_size, len(labels)))
    return torch.cat(processes.collect(parts)), torch.tensor(labels)


def save_images(
    images: Tensor,
    names: Sequence[str],
    titles: Sequence[str],
    folder: Path,
    spec: ImageSpec | None,
    columns: int | None = None,
) -> list[Path]:
    """Write each image under its name (without suffix), and all of them with their titles as ``grid.png``.

    Args:
        images: (N, C, H, W) in [0, 1].
        spec: of the training images, whose number type and value range the files have.

    Raises:
        RunError: ``folder`` cannot be written.
    """
    types = (spec.dtype, spec.value_range) if spec else ()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [save_image(image, folder / name, *types) for image, name in zip(images, names, strict=True)]
        grid = image_grid(images[:MAX_GRID_IMAGES], titles[:MAX_GRID_IMAGES], columns=columns)
        grid.save(folder / GRID_FILE)
    return written


def save_edited(
    image: Tensor, mask: Tensor | None, edited: Tensor, name: str, folder: Path, spec: ImageSpec | None
) -> list[Path]:
    """Write edited images as ``<name>_<k>``, and a grid that begins with the ``image`` (1, C, H, W) and its mask.

    Raises as :func:`save_images`.
    """
    names = [f"{UNSAFE.sub('_', name)}_{k:04d}" for k in range(len(edited))]
    written = save_images(edited, names, names, folder, spec)
    shown, titles = [image], ["image"]
    if mask is not None:
        shown, titles = [image, mask.expand_as(image)], ["image", "mask"]
    together = torch.cat([*shown, edited])[:MAX_GRID_IMAGES]
    with writing(folder):
        grid = image_grid(together, [*titles, *map(str, range(1, len(edited) + 1))][: len(together)])
        grid.save(folder / GRID_FILE)
    return [*written, folder / GRID_FILE]


def save_translated(
    conditions: Sequence[Tensor], drawn: Sequence[Tensor], names: Sequence[str], folder: Path, spec: ImageSpec | None
) -> list[Path]:
    """Write the images drawn of each condition as ``<name>_<k>``, and a grid of each condition with its images.

    Args:
        conditions: (C', h, w) each.
        drawn: (n, C, H, W) of each.
        names: of the files.

    Raises as :func:`save_images`.
    """
    safe = [UNSAFE.sub("_", name) for name in names]
    unique = [name if safe.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(safe)]
    images = [image for each in drawn for image in each]
    written: list[Path] = []
    for name, each in zip(unique, drawn, strict=True):  # low resolutions may differ in size, and so do their images
        own = [f"{name}_{k:04d}" for k in range(len(each))]
        written += save_images(each, own, own, folder, spec)
    shown, titles = [], []
    largest = max((image.shape[1:] for image in images), key=lambda size: size[0] * size[1])
    for name, condition, each in zip(names, conditions, drawn, strict=True):
        shown += [fitted(image, largest) for image in (pictured(condition[None], each.shape[1])[0], *each)]
        titles += [name, *map(str, range(1, len(each) + 1))]
    with writing(folder):
        grid = image_grid(torch.stack(shown)[:MAX_GRID_IMAGES], titles[:MAX_GRID_IMAGES], columns=1 + len(drawn[0]))
        grid.save(folder / GRID_FILE)
    return [*written, folder / GRID_FILE]


def conditioned_grid(pipeline: GenerationPipeline, data: ImageDataset, seed: int) -> Image:
    """Draw an image of the conditions of each of some images of ``data``; a line of the picture each.

    Lines hold the condition image, if there is one, the image drawn, and the true one.
    """
    rows = torch.linspace(0, len(data) - 1, min(PREVIEWED, len(data))).long().tolist()
    inputs, labels = data.inputs(rows)
    images, conditions = split_condition(inputs, data.spec)
    drawn = pipeline(
        data.labels_of(rows),
        condition_images=conditions,
        conditions=labels[:, 1:] if data.spec.attributes else None,
        generator=seeded_generators(seed, len(rows)),
    ).images
    assert isinstance(drawn, Tensor)
    lines = {"drawn": drawn, "true": images}
    if conditions is not None:
        lines = {"condition": pictured(conditions, images.shape[1]), **lines}
    titles = [name for name in lines for _ in rows]
    return image_grid(torch.cat(list(lines.values())), titles, columns=len(rows))


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image (C, h, w) at ``size``, its pixels repeated, for a picture."""
    return torch.nn.functional.interpolate(image[None], size)[0]


def write_images(
    images: Tensor, labels: Tensor, pipeline: GenerationPipeline, folder: Path, columns: int | None = None
) -> list[Path]:
    """Write each image as ``<class>_<k>.png`` and all together as ``grid.png``.

    Classes whose names differ only in what file names cannot hold get their number, too: ``a_b-class1_0000.png``.

    Data that a PNG cannot hold (floats, many channels) are written as ``.npy`` in the units of the training data, with
    a PNG to look at. Raises as :func:`save_images`.
    """
    titles = [class_title(pipeline, int(label)) for label in labels]
    of_classes = Counter(UNSAFE.sub("_", name).casefold() for name in pipeline.class_names)
    counts: Counter[str] = Counter()
    names = []
    for title, label in zip(titles, labels.tolist(), strict=True):
        name = UNSAFE.sub("_", title)
        if of_classes[name.casefold()] > 1:
            name += f"-class{label}"
        names.append(f"{name}_{counts[name]:04d}")
        counts[name] += 1
    written = save_images(images, names, titles, folder, pipeline.spec, columns)
    with writing(folder):
        for image, path in zip(images, written, strict=True):
            if path.suffix != ".png":
                to_pil(image, mosaic=True).save(path.with_suffix(".png"))
    return [*written, folder / GRID_FILE]


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
