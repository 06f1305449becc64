"""Measuring text to image and back: finding each by the other, pictures that show what the prompt says, true captions.

How a picture is judged depends on the data: those of ``shapes`` are read by an independent classifier; for others there
is none, and the model's own encoders say which prompt a picture is nearest to.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.config import ShapesConfig
from heterodiff.evaluation.captioned import PART, CaptionedImages, seed_words
from heterodiff.evaluation.progress import pictures_at_once
from heterodiff.metrics.bootstrap import crossed_bootstrap, percentile_interval
from heterodiff.metrics.distances import wilson_interval
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.metrics.retrieval import recall
from heterodiff.metrics.shapes_classifier import ShapesReader, draw_renders
from heterodiff.pipelines.drawing import explaining_memory
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.text_to_image import TextImagePipeline
from heterodiff.simulators.shapes.scenes import Scene, matches, unseen_things
from heterodiff.simulators.shapes.words import complete_caption, read_caption

TEXT_PART = 256
PROMPT_SCENES, UNSEEN_SCENES = (2, 20_240_229), (3, 20_240_229)
"""What the random numbers of scenes to ask for have beside the seed, so that no data set of any seed has them."""
KS = (1, 5)

Progress = Callable[[int], None]


def _quiet(done: int) -> None:
    """Report nothing."""


# ---- finding texts by images and images by texts ---------------------------------------------------------------------


def embed_texts(pipeline: TextImagePipeline, texts: Sequence[str]) -> Tensor:
    """Embeddings (B, D) of texts, on the CPU."""
    starts = range(0, len(texts), TEXT_PART)
    return torch.cat([pipeline.encode_text(texts[start : start + TEXT_PART]).cpu() for start in starts])


def embed_images(pipeline: TextImagePipeline, parts: Iterator[Tensor], progress: Progress = _quiet) -> Tensor:
    """Embeddings (B, D) of images in parts (b, C, H, W), on the CPU."""
    found: list[Tensor] = []
    done = 0
    for part in parts:
        found.append(pipeline.encode_image(part).cpu())
        progress(done := done + len(part))
    return torch.cat(found)


def retrieval(pipeline: TextImagePipeline, chosen: CaptionedImages, progress: Progress = _quiet) -> dict[str, Any]:
    """Recall at 1 and 5 among ``chosen``, both ways, every caption a text; with ``images`` and ``texts``, how many."""
    texts = [text for captions in chosen.captions for text in captions]
    image_of_text = torch.tensor([k for k, captions in enumerate(chosen.captions) for _ in captions])
    images = embed_images(pipeline, chosen.parts(), progress)
    found = recall(images, embed_texts(pipeline, texts), image_of_text, texts, KS)
    return {"images": len(chosen), "texts": len(texts), **found}


def reconstruction(
    pipeline: TextImagePipeline, chosen: CaptionedImages, progress: Progress = _quiet
) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of each image (N,) from its map."""
    quality: list[tuple[Tensor, Tensor]] = []
    done = 0
    for part in chosen.parts():
        decoded = pipeline.codec.decode(pipeline.codec.encode(part.to(pipeline.device))).cpu()
        quality.append((psnr(part, decoded), ssim(part, decoded)))
        progress(done := done + len(part))
    return torch.cat([found for found, _ in quality]), torch.cat([found for _, found in quality])


def own_recall(pipeline: TextImagePipeline, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """``generated_recall@k``: share of pictures (N, C, H, W) whose prompt is among the k nearest of all N prompts.

    Judged by the encoders of the model that drew them, which flatters it.
    """
    images = embed_images(pipeline, iter(pictures.split(PART)))
    found = recall(images, embed_texts(pipeline, prompts), torch.arange(len(prompts)), prompts, KS)
    return {f"generated_recall@{k}": found[f"recall@{k}_image_to_text"] for k in KS}


# ---- drawing and writing ---------------------------------------------------------------------------------------------


def ways_of(pipeline: TextImagePipeline, **options: Any) -> dict[str, dict[str, Any]]:
    """From a text to a picture: what each way is called, and its options for ``generate_image_from_text``.

    Where the best of several candidates is kept, ``first`` is what the diffusion draws without choosing.

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
    """A picture of each prompt (N, C, H, W) in [0, 1]; picture k from noise that depends on ``seed`` and k alone.

    Args:
        batch_size: pictures drawn at once; default: as the device likes it.
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


def write_captions(pipeline: TextImagePipeline, parts: Iterator[Tensor], progress: Progress = _quiet) -> list[str]:
    """The likeliest caption of each image in parts (b, C, H, W): greedy, one an image."""
    captions: list[str] = []
    for part in parts:
        captions += [found[0] for found in pipeline.generate_text_from_image(part, 1, temperature=0)]
        progress(len(captions))
    return captions


# ---- scenes of shapes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Scenes to ask for: what each prompt says in full, and a real render (N, 3, H, W) in [0, 1] of each."""

    scenes: list[Scene]
    prompts: list[str]
    real: Tensor


def draw_asked(config: ShapesConfig, number: int, size: tuple[int, int], seed: int, unseen: bool = False) -> Asked:
    """Fresh scenes, of no data set, that a run of ``config`` could have seen; or with ``unseen`` none of it could have.

    Args:
        size: (height, width) of the renders.
    """
    things = unseen_things(config)
    left_out, needed, purpose = (frozenset(), things, UNSEEN_SCENES) if unseen else (things, frozenset(), PROMPT_SCENES)
    scenes, images = draw_renders((*seed_words(seed), *purpose), number, size, config.pairs, left_out, needed)
    return Asked(scenes, [complete_caption(scene) for scene in scenes], images / 255)


def proportion(hits: Sequence[bool], seed: int) -> dict[str, Any]:
    """``{n, share, low, high}`` of ``hits`` with a 95 % bootstrap interval.

    Where all hits are alike, no resample differs from them, so that the interval is Wilson's instead.
    """
    values = np.array(hits, dtype=bool)
    if 0 < values.sum() < len(values):
        low, high = percentile_interval(crossed_bootstrap(values[None, None], seed=seed_words(seed)[0])[:, 0])
    else:
        low, high = wilson_interval(int(values.sum()), len(values))
    return {"n": len(values), "share": float(values.mean()), "low": low, "high": high}


def sharpness(images: Tensor) -> Tensor:
    """Root mean square gradient of each image (N, C, H, W): (N,), in units of values in [0, 1] a pixel.

    Of its square and not of its magnitude: the sum over a blurred edge is that over a sharp one, and noise too faint to
    be seen, which is everywhere, would count more than all edges.
    """
    down, across = (images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1])
    return (down.square().mean(dim=(1, 2, 3)) + across.square().mean(dim=(1, 2, 3))).sqrt()


def _same_things(scene: Scene, seen: Scene) -> bool:
    """Whether ``seen`` has the things of ``scene``, wherever they are."""
    return matches(Scene(scene.things, None), seen)


def following(asked: Asked, pictures: Tensor, reader: ShapesReader, seed: int) -> dict[str, Any]:
    """Whether pictures (N, 3, H, W) show what was asked for.

    Returns:
        Proportions ``things`` (all colours and shapes are right) and ``scene`` (the place or relation, too), and
        ``sharpness`` over that of real renders of the same scenes: 1 is as sharp.
    """
    pairs = list(zip(asked.scenes, reader.read(pictures), strict=True))
    return {
        "things": proportion([_same_things(scene, seen) for scene, seen in pairs], seed),
        "scene": proportion([matches(scene, seen) for scene, seen in pairs], seed),
        "sharpness": float(sharpness(pictures).mean() / sharpness(asked.real).mean()),
    }


def caption_truth(captions: Sequence[str], scenes: Sequence[Scene], seed: int) -> dict[str, Any]:
    """Whether captions say what pictures of ``scenes`` show; one that cannot be read is wrong.

    Returns:
        Proportions ``things`` (all colours and shapes are right), ``true`` (so is what is said of the place, if
        anything), and ``scene`` (the place or relation is said, and right).
    """
    said = [read_caption(caption) for caption in captions]
    pairs = list(zip(said, scenes, strict=True))
    hits = {
        "things": [found is not None and _same_things(found, scene) for found, scene in pairs],
        "true": [found is not None and matches(found, scene) for found, scene in pairs],
        "scene": [found is not None and found.place is not None and matches(found, scene) for found, scene in pairs],
    }
    return {name: proportion(values, seed) for name, values in hits.items()}


# ---- captions in free words ------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation and case."""
    return re.findall(r"\w+", text.casefold())


def unigram_f1(caption: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that caption and reference have in common, with the best reference."""
    found = Counter(words_of(caption))
    scores = [0.0]
    for reference in references:
        right = Counter(words_of(reference))
        if words := found.total() + right.total():
            scores.append(2 * (found & right).total() / words)
    return max(scores)


def caption_likeness(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """How much captions are like those that people wrote.

    Args:
        references: all captions of each image.

    Returns:
        ``exact``: proportion of captions that have the words of one of the image's captions, in its order;
        ``unigram_f1``: mean over the images of the best :func:`unigram_f1`.
    """
    pairs = list(zip(captions, references, strict=True))
    exact = [any(words_of(caption) == words_of(text) for text in texts) for caption, texts in pairs]
    return {
        "exact": proportion(exact, seed),
        "unigram_f1": float(np.mean([unigram_f1(caption, texts) for caption, texts in pairs])),
    }
