"""Evaluation of a run of recipe ``text-image`` or ``alignment``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.devices import Device
from heterodiff.errors import ConfigError
from heterodiff.evaluation.captioned import PART, CaptionedImages, held_out_captioned
from heterodiff.evaluation.prompts import (
    draw_pictures,
    own_recall,
    reconstruction,
    retrieval,
    ways_of,
    write_captions,
)
from heterodiff.evaluation.runs import Evaluation, Request, image_config, run_data
from heterodiff.evaluation.vae import spread
from heterodiff.metrics.captions import caption_likeness
from heterodiff.metrics.scenes import Asked, caption_truth, draw_asked, following, scenes_of
from heterodiff.metrics.shapes_classifier import STEPS, TEST_RENDERS, ShapesClassifier
from heterodiff.pictures import image_grid
from heterodiff.pipelines.load import load_text_image
from heterodiff.pipelines.sharing import team
from heterodiff.pipelines.text_to_image import TextImagePipeline, text_notes
from heterodiff.progress import StartTask, progress_tasks
from heterodiff.run_folder import RunFolder

if TYPE_CHECKING:
    from heterodiff.config import DataConfig

PROMPTS = 200
READER_FILE = "reader.safetensors"
MAX_RETRIEVAL_IMAGES = 2_500
SHOWN_PROMPTS, SHOWN_CAPTIONS = 8, 12
SHOWN_SIDE = 128
GOOD_READER = 0.99
WAYS = {"diffusion": "diffusion", "first": "diffusion, first candidate", "direct": "direct decoding"}
"""Names, in pictures, of the ways from a prompt to a picture."""


def evaluate_text_image(
    run: Path,
    seed: int = 0,
    number: int = PROMPTS,
    data: Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    device: Device | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Measure retrieval, reconstruction, pictures of prompts and captions, on pictures that were not trained on.

    Writes ``evaluation.json`` and the folder ``evaluation`` (pictures; for ``shapes`` the trained classifier, to use it
    again) into the run. A run of recipe ``alignment`` has no denoiser, and no numbers of one.

    Args:
        number: number of prompts to draw and of pictures to caption; half of it for combinations that were never seen,
            and where the model judges itself.
        data: a folder of captioned images to use instead of the validation split.
        num_inference_steps, guidance_scale, sampler: default to the run's ``sampling`` section.
        device: see :func:`heterodiff.load`.
        batch_size: pictures drawn at once; default: a size that suits the device.

    Raises:
        HeterodiffError: no usable run, no held-out images with captions, data that are not there any more, or options
            that do not fit.
    """
    pipeline = load_text_image(run, device)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "sampler": sampler}
    options = {name: value for name, value in given.items() if value is not None}
    if pipeline.unet is None and options:
        raise ConfigError(f"{run}: recipe alignment has no denoiser to sample with; leave out {', '.join(options)}")
    loaded = run_data(run)
    config = image_config(run)
    shapes = config.shapes if config.source == "shapes" else None
    held_out, captions, record = held_out_captioned(run, loaded, data)
    everything = CaptionedImages.choose(held_out, captions, MAX_RETRIEVAL_IMAGES, seed)
    folder = RunFolder(run)
    with progress_tasks() as task, text_notes() as notes:
        measuring = _Measuring(pipeline, options, seed, task, batch_size)
        pictures = _pictures(measuring, everything)  # first: a sampler that does not fit is found before the long part
        metrics: dict[str, Any] = {"held_out": record, "seed": seed, "number": number}
        if pipeline.unet is not None:
            metrics["sampling"] = {**pipeline.defaults.model_dump(mode="json"), **options}
        # Retrieval is harder among more images: as many training images as held-out ones to compare with, then more.
        sets = {"held_out": everything}
        for name, count in (("train", len(everything)), ("train_more", MAX_RETRIEVAL_IMAGES)):
            sets[name] = CaptionedImages.choose(loaded.train, loaded.captions, count, seed)
        metrics["retrieval"] = {
            name: retrieval(pipeline, chosen, task(f"retrieval, {name.replace('_', ' ')}", len(chosen)))
            for name, chosen in sets.items()
        }
        quality = reconstruction(pipeline, everything, task("reconstructing", len(everything)))
        metrics["reconstruction"] = {"n": len(everything), "psnr": spread(quality[0]), "ssim": spread(quality[1])}
        to_caption = CaptionedImages.choose(held_out, captions, number, seed)
        written = measuring.captions(to_caption.parts(), len(to_caption), "captions")
        if shapes is None or data is not None:
            metrics["captions"] = caption_likeness(written, to_caption.captions, seed)
        else:
            metrics["captions"] = caption_truth(written, scenes_of(shapes, to_caption.names), seed)
        if shapes is None:
            metrics["generated_recall"] = _self_judged(measuring, to_caption.spread(-(-number // 2)))
        else:
            size = (loaded.spec.height, loaded.spec.width)
            metrics |= _of_shapes(measuring, config, size, number, folder, record["notes"])
    if notes:
        record["notes"].append(notes[0] + (f" (and {len(notes) - 1:,} others)" if len(notes) > 1 else ""))
    for path, picture in zip((folder.prompts_picture, folder.captions_picture), pictures, strict=True):
        folder.write_picture(path, picture)
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.prompts_picture)


@dataclass(frozen=True)
class _Measuring:
    """Pipeline and settings that all measurements of a run share."""

    pipeline: TextImagePipeline
    options: dict[str, Any]
    seed: int
    task: StartTask
    batch_size: int | None = None

    def pictures(self, prompts: Sequence[str], what: str) -> dict[str, Tensor]:
        """Draw pictures (N, C, H, W) of ``prompts`` in each way that there is."""
        drawn = {}
        for name, options in ways_of(self.pipeline, **self.options).items():
            progress = self.task(f"{what}, {name}", len(prompts))
            drawn[name] = draw_pictures(self.pipeline, prompts, self.seed, progress, self.batch_size, **options)
        return drawn

    def captions(self, parts: Iterator[Tensor], number: int, what: str) -> list[str]:
        """Write a caption of each of ``number`` images."""
        return write_captions(self.pipeline, parts, self.task(what, number))


def _pictures(measuring: _Measuring, held_out: CaptionedImages) -> tuple[Image, Image]:
    """Held-out pictures above pictures of their captions, and held-out pictures with captions written for them."""
    shown = held_out.spread(SHOWN_PROMPTS)
    prompts, images = [captions[0] for captions in shown.captions], shown.images()
    drawn = measuring.pictures(prompts, "pictures to show")
    names = [*prompts, *(WAYS[name] for name in drawn for _ in prompts)]
    rows = torch.cat([images, *drawn.values()])
    captioned = held_out.spread(SHOWN_CAPTIONS)
    written = measuring.captions(captioned.parts(), len(captioned), "captions to show")
    return (
        image_grid(rows, names, columns=len(prompts), min_side=SHOWN_SIDE),
        image_grid(captioned.images(), written, columns=6, min_side=SHOWN_SIDE),
    )


def _self_judged(measuring: _Measuring, held_out: CaptionedImages) -> dict[str, Any]:
    """Recall of the prompt of a picture by the model's own encoders, for drawn pictures and for the real one."""
    prompts = [captions[0] for captions in held_out.captions]
    pictures = {**measuring.pictures(prompts, "pictures"), "real": held_out.images()}
    found = {name: own_recall(measuring.pipeline, images, prompts) for name, images in pictures.items()}
    return {"n": len(prompts), "judge": "the model's own encoders", **found}


def _of_shapes(
    measuring: _Measuring, config: "DataConfig", size: tuple[int, int], number: int, folder: RunFolder, notes: list[str]
) -> dict[str, Any]:
    """Judge pictures of scenes with an independent classifier, and captions of combinations that were never seen."""
    shapes, reader, path = config.shapes, ShapesClassifier(*size), folder.evaluation / READER_FILE
    if not reader.load(path):
        reader = ShapesClassifier(*size).fit(progress=measuring.task("training the classifier", STEPS))
        with folder.writing(path):
            reader.save(path)
    accuracy = reader.accuracy()
    if accuracy < GOOD_READER:
        notes.append(
            f"the classifier describes only {100 * accuracy:.1f} % of real pictures entirely right, so it counts some "
            "right pictures as wrong"
        )
    found: dict[str, Any] = {"reader_accuracy": accuracy, "reader_renders": TEST_RENDERS}
    asked = draw_asked(shapes, number, size, measuring.seed)
    found["prompts"] = _followed(measuring, asked, reader, "pictures")
    if shapes.unseen:
        unseen = draw_asked(shapes, -(-number // 2), size, measuring.seed, unseen=True)
        followed = _followed(measuring, unseen, reader, "unseen combinations")
        found["unseen_prompts"] = {"combinations": list(shapes.unseen), **followed}
        written = measuring.captions(iter(unseen.real.split(PART)), len(unseen.real), "captions of unseen combinations")
        found["unseen_captions"] = caption_truth(written, unseen.scenes, measuring.seed)
    return found


def _followed(measuring: _Measuring, asked: Asked, reader: ShapesClassifier, what: str) -> dict[str, Any]:
    pictures = {**measuring.pictures(asked.prompts, what), "real": asked.real}
    found = {name: following(asked, images, reader, measuring.seed) for name, images in pictures.items()}
    return {"n": len(asked.prompts), **found}


def evaluate(run: Path, request: Request) -> Evaluation:
    """Evaluate a run of recipe ``text-image`` or ``alignment`` as asked for on the command line."""
    team().first_alone()
    number = PROMPTS if request.number is None else request.number
    return evaluate_text_image(run, request.seed, number, request.data, **request.options())
