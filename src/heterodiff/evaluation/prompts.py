"""Measuring a text-image run: retrieval, reconstruction, pictures of prompts, and captions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.evaluation.captioned import PART, CaptionedImages
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.metrics.retrieval import recall
from heterodiff.pipelines.drawing import explaining_memory
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.image_files import pictures_at_once
from heterodiff.pipelines.text_to_image import TextImagePipeline

TEXT_PART = 256
KS = (1, 5)

Progress = Callable[[int], None]


def _quiet(done: int) -> None:
    """Ignore progress."""


def _reporting(parts: Iterable[Tensor], progress: Progress) -> Iterator[Tensor]:
    """Yield parts (b, C, H, W) and, when each is done with, report the number of images so far."""
    done = 0
    for part in parts:
        yield part
        progress(done := done + len(part))


def embed_texts(pipeline: TextImagePipeline, texts: Sequence[str]) -> Tensor:
    """Embeddings (B, D) of texts, on the CPU."""
    starts = range(0, len(texts), TEXT_PART)
    return torch.cat([pipeline.encode_text(texts[start : start + TEXT_PART]).cpu() for start in starts])


def embed_images(pipeline: TextImagePipeline, parts: Iterable[Tensor], progress: Progress = _quiet) -> Tensor:
    """Embeddings (B, D) of images in parts (b, C, H, W), on the CPU."""
    return torch.cat([pipeline.encode_image(part).cpu() for part in _reporting(parts, progress)])


def retrieval(pipeline: TextImagePipeline, chosen: CaptionedImages, progress: Progress = _quiet) -> dict[str, Any]:
    """Recall at 1 and 5 among ``chosen``, both ways, every caption a text; and the numbers of ``images``, ``texts``."""
    texts = [text for captions in chosen.captions for text in captions]
    image_of_text = torch.tensor([k for k, captions in enumerate(chosen.captions) for _ in captions])
    images = embed_images(pipeline, chosen.parts(), progress)
    found = recall(images, embed_texts(pipeline, texts), image_of_text, texts, KS)
    return {"images": len(chosen), "texts": len(texts), **found}


def reconstruction(
    pipeline: TextImagePipeline, chosen: CaptionedImages, progress: Progress = _quiet
) -> tuple[Tensor, Tensor]:
    """PSNR in dB (N,) and SSIM (N,) of each image, decoded from its latents."""
    quality = []
    for part in _reporting(chosen.parts(), progress):
        decoded = pipeline.codec.decode(pipeline.codec.encode(part.to(pipeline.device))).cpu()
        quality.append(torch.stack([psnr(part, decoded), ssim(part, decoded)]))
    found_psnr, found_ssim = torch.cat(quality, dim=1)
    return found_psnr, found_ssim


def own_recall(pipeline: TextImagePipeline, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """``generated_recall@k``: share of pictures (N, C, H, W) whose prompt is among the k nearest of all N prompts.

    The judges are the encoders of the model that drew the pictures, which flatters it.
    """
    images = embed_images(pipeline, pictures.split(PART))
    found = recall(images, embed_texts(pipeline, prompts), torch.arange(len(prompts)), prompts, KS)
    return {f"generated_recall@{k}": found[f"recall@{k}_image_to_text"] for k in KS}


def ways_of(pipeline: TextImagePipeline, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the ways from a text to a picture: options of ``generate_image_from_text`` by name.

    Where the best of several candidates is kept, ``first`` is the way without this choice.

    Args:
        **options: of the diffusion.
    """
    direct = {"direct": {"use_diffusion": False}}
    if pipeline.unet is None:
        return direct
    several = pipeline.defaults.candidates > 1
    first = {"first": {**options, "candidates": 1}} if several else {}
    return {"diffusion": options, **first, **direct}


def draw_pictures(
    pipeline: TextImagePipeline,
    prompts: Sequence[str],
    seed: int,
    progress: Progress = _quiet,
    batch_size: int | None = None,
    **options: Any,
) -> Tensor:
    """Draw a picture of each prompt (N, C, H, W) in [0, 1]; the noise of picture k depends on ``seed`` and k alone.

    Args:
        batch_size: pictures drawn at once; default: by device.
        **options: of :meth:`TextImagePipeline.generate_image_from_text`, such as guidance_scale.
    """
    embeddings, generators = embed_texts(pipeline, prompts), seeded_generators(seed, len(prompts))
    at_once = batch_size or pictures_at_once(pipeline.device)
    parts = []
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        with explaining_memory(len(prompts[rows]), pipeline.device):
            parts.append(
                pipeline.generate_image_from_text(
                    embeddings[rows], generators=generators[rows], texts=prompts[rows], batch_size=at_once, **options
                )
            )
        progress(min(start + at_once, len(prompts)))
    return torch.cat(parts)


def write_captions(pipeline: TextImagePipeline, parts: Iterable[Tensor], progress: Progress = _quiet) -> list[str]:
    """Greedily decode a caption of each image in parts (b, C, H, W)."""
    every = (pipeline.generate_text_from_image(part, 1, temperature=0) for part in _reporting(parts, progress))
    return [captions[0] for found in every for captions in found]
