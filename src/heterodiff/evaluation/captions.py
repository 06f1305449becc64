"""Evaluating a run of recipe ``text-image`` or ``alignment``: run folder in; numbers, pictures and report out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.config import RunConfig, ShapesConfig
from heterodiff.devices import Device
from heterodiff.errors import ConfigError
from heterodiff.evaluation.captioned import PART, CaptionedImages, held_out_captioned
from heterodiff.evaluation.class_images import Evaluation, Request, image_config, run_data
from heterodiff.evaluation.prompts import (
    KS,
    draw_pictures,
    own_recall,
    reconstruction,
    retrieval,
    ways_of,
    write_captions,
)
from heterodiff.evaluation.vae import spread
from heterodiff.metrics.captions import caption_likeness
from heterodiff.metrics.scenes import Asked, caption_truth, draw_asked, following, scenes_of
from heterodiff.metrics.shapes_classifier import STEPS, TEST_RENDERS, ShapesReader
from heterodiff.pictures import image_grid
from heterodiff.pipelines.load import load_text_image
from heterodiff.pipelines.text_to_image import TextImagePipeline, text_notes
from heterodiff.progress import StartTask, progress_tasks
from heterodiff.report.captions import WAYS
from heterodiff.report.writing import CAPTIONS_PICTURE, PROMPTS_PICTURE, write_report
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of

PROMPTS = 200
READER_FILE = "reader.safetensors"
MAX_RETRIEVAL_IMAGES = 2_500
SHOWN_PROMPTS, SHOWN_CAPTIONS = 8, 12
SHOWN_SIDE = 128
GOOD_READER = 0.99


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

    Writes ``evaluation.json``, the folder ``evaluation`` (pictures; for ``shapes`` the classifier that reads them, for
    the next time) and ``report.html`` into the run. A run of recipe ``alignment`` has no denoiser, and no numbers of
    one.

    Args:
        number: how many prompts to draw and how many pictures to caption; half as many where a combination was never
            seen, and where the model judges itself.
        data: a folder of captioned images to use instead of the validation split.
        num_inference_steps, guidance_scale, sampler: default to the run's ``sampling`` section.
        device: see :func:`heterodiff.load`.
        batch_size: pictures drawn at once; default: as the device likes it.

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
    shapes = image_config(run).shapes if image_config(run).source == "shapes" else None
    held_out, captions, record = held_out_captioned(run, loaded, data)
    everything = CaptionedImages.choose(held_out, captions, MAX_RETRIEVAL_IMAGES, seed)
    folder = RunFolder(run)
    with progress_tasks() as task, text_notes() as notes:
        measuring = _Measuring(pipeline, options, seed, task, batch_size)
        pictures = _pictures(measuring, everything)  # first: a sampler that does not fit is found before the long part
        metrics: dict[str, Any] = {"held_out": record, "seed": seed, "number": number}
        if pipeline.unet is not None:
            metrics["sampling"] = {**pipeline.defaults.model_dump(mode="json"), **options}
        # Among more, the right one is harder to find: to compare, as many training images as held-out ones; then more.
        metrics["retrieval"] = {
            "held_out": retrieval(pipeline, everything, task("held-out retrieval", len(everything)))
        }
        for name, count in (("train", len(everything)), ("train_more", MAX_RETRIEVAL_IMAGES)):
            train = CaptionedImages.choose(loaded.train, loaded.captions, count, seed)
            metrics["retrieval"][name] = retrieval(pipeline, train, task("training retrieval", len(train)))
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
            metrics |= _of_shapes(measuring, shapes, size, number, folder.evaluation / READER_FILE, record["notes"])
    if notes:
        record["notes"].append(notes[0] + (f" (and {len(notes) - 1:,} others)" if len(notes) > 1 else ""))
    for name, picture in pictures.items():
        folder.write_picture(run / name, picture)
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, run / PROMPTS_PICTURE, write_report(run))


@dataclass(frozen=True)
class _Measuring:
    """What all measurements of a run need."""

    pipeline: TextImagePipeline
    options: dict[str, Any]
    seed: int
    task: StartTask
    batch_size: int | None = None

    def pictures(self, prompts: Sequence[str], what: str) -> dict[str, Tensor]:
        """Pictures (N, C, H, W) of ``prompts`` by each way that there is."""
        drawn = {}
        for name, options in ways_of(self.pipeline, **self.options).items():
            progress = self.task(f"{what}, {name}", len(prompts))
            drawn[name] = draw_pictures(self.pipeline, prompts, self.seed, progress, self.batch_size, **options)
        return drawn

    def captions(self, parts: Iterator[Tensor], number: int, what: str) -> list[str]:
        """A caption of each of ``number`` images."""
        return write_captions(self.pipeline, parts, self.task(what, number))


def _pictures(measuring: _Measuring, held_out: CaptionedImages) -> dict[str, Image]:
    """Held-out pictures above pictures of their captions; and with captions written for them. By file name."""
    shown = held_out.spread(SHOWN_PROMPTS)
    prompts, images = [captions[0] for captions in shown.captions], shown.images()
    drawn = measuring.pictures(prompts, "pictures to show")
    names = [*prompts, *(WAYS[name].lower() for name in drawn for _ in prompts)]
    rows = torch.cat([images, *drawn.values()])
    captioned = held_out.spread(SHOWN_CAPTIONS)
    written = measuring.captions(captioned.parts(), len(captioned), "captions to show")
    return {
        PROMPTS_PICTURE: image_grid(rows, names, columns=len(prompts), min_side=SHOWN_SIDE),
        CAPTIONS_PICTURE: image_grid(captioned.images(), written, columns=6, min_side=SHOWN_SIDE),
    }


def _self_judged(measuring: _Measuring, held_out: CaptionedImages) -> dict[str, Any]:
    """Whether the model's own encoders find the prompt of a picture; and of the real picture with this caption."""
    prompts = [captions[0] for captions in held_out.captions]
    pictures = {**measuring.pictures(prompts, "pictures"), "real": held_out.images()}
    found = {name: own_recall(measuring.pipeline, images, prompts) for name, images in pictures.items()}
    return {"n": len(prompts), "judge": "the model's own encoders", **found}


def _of_shapes(
    measuring: _Measuring, shapes: ShapesConfig, size: tuple[int, int], number: int, path: Path, notes: list[str]
) -> dict[str, Any]:
    """What pictures of scenes show, to an independent classifier; and captions of combinations that were never seen."""
    reader = trained_reader(path, size, measuring.task)
    accuracy = reader.accuracy()
    if accuracy < GOOD_READER:
        notes.append(
            f"the classifier reads only {100 * accuracy:.1f} % of real pictures entirely right, so it counts some "
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


def _followed(measuring: _Measuring, asked: Asked, reader: ShapesReader, what: str) -> dict[str, Any]:
    pictures = {**measuring.pictures(asked.prompts, what), "real": asked.real}
    found = {name: following(asked, images, reader, measuring.seed) for name, images in pictures.items()}
    return {"n": len(asked.prompts), **found}


def trained_reader(path: Path, size: tuple[int, int], task: StartTask) -> ShapesReader:
    """The reader of pictures of ``size`` (height, width): its weights from ``path``, or trained and stored there."""
    reader = ShapesReader(*size)
    if not reader.load(path):
        reader = ShapesReader(*size).fit(progress=task("training the classifier", STEPS))
        reader.save(path)
    return reader


def text_image_summary(metrics: dict[str, Any]) -> list[str]:
    """The main numbers of an evaluated run, a line each."""
    lines = []
    for name, title in (("held_out", "held-out"), ("train", "training"), ("train_more", "training")):
        found = metrics["retrieval"][name]
        shares = {key: f"{100 * value:.1f} %" for key, value in found.items() if key.startswith("recall")}
        lines.append(
            f"recall   at 1 and 5: text of a picture {shares['recall@1_image_to_text']}, "
            f"{shares['recall@5_image_to_text']}; picture of a text {shares['recall@1_text_to_image']}, "
            f"{shares['recall@5_text_to_image']} ({found['images']} {title} pictures)"
        )
    quality = metrics["reconstruction"]
    lines.append(
        f"codec    PSNR {quality['psnr']['mean']:.2f} dB, SSIM {quality['ssim']['mean']:.4f} (held-out pictures)"
    )
    for name, title in (("prompts", "prompts"), ("unseen_prompts", "unseen")):
        for way, found in metrics.get(name, {}).items():
            if way in _WAY_TITLES:
                lines.append(
                    f"{title:8} {_WAY_TITLES[way]}: things right {_share(found['things'])}, place too "
                    f"{_share(found['scene'])}, sharpness {found['sharpness']:.2f} of real"
                )
    if "reader_accuracy" in metrics:
        lines.append(
            f"reader   reads {100 * metrics['reader_accuracy']:.1f} % of {metrics['reader_renders']} fresh real "
            "pictures entirely right"
        )
    for way, found in metrics.get("generated_recall", {}).items():
        if way in _WAY_TITLES:
            both = " and ".join(f"{100 * found[f'generated_recall@{k}']:.1f} %" for k in KS)
            lines.append(f"prompts  {_WAY_TITLES[way]}: recognised by the model's own encoders at 1 and 5: {both}")
    for name, title in (("captions", "captions"), ("unseen_captions", "unseen   captions:")):
        found = metrics.get(name)
        if found and "true" in found:
            lines.append(
                f"{title} things right {_share(found['things'])}, entirely true {_share(found['true'])}, and "
                f"complete {_share(found['scene'])}"
            )
        elif found:
            lines.append(f"{title} word for word {_share(found['exact'])}, unigram F1 {found['unigram_f1']:.3f}")
    return [*lines, *(f"note     {note}" for note in metrics["held_out"]["notes"])]


_WAY_TITLES = {
    "diffusion": "by diffusion",
    "first": "  without choosing among candidates",
    "direct": "directly",
    "real": "real pictures",
}


def _share(proportion: dict[str, Any]) -> str:
    return f"{100 * proportion['share']:.1f} % of {proportion['n']}"


def evaluate(run: Path, request: Request) -> tuple[Evaluation, list[str]]:
    """Evaluate a run of recipe ``text-image`` or ``alignment`` as asked for on the command line; its main numbers."""
    number = PROMPTS if request.number is None else request.number
    found = evaluate_text_image(run, request.seed, number, request.data, **request.options())
    return found, text_image_summary(found.metrics)


def demo(config: RunConfig, out: Path, seed: int) -> list[str]:
    """Evaluate a run of recipe ``text-image``; the commands to go on with."""
    print(f"trained  {config.training.steps} steps; drawing and reading {PROMPTS} pictures of prompts", flush=True)
    evaluation, lines = evaluate(out, Request(seed=seed))
    print(*lines, sep="\n")
    print(f"pictures {evaluation.picture}\nreport   {evaluation.report}")
    return task_of(config).next_lines(out)
