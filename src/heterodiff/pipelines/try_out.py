"""Trying pipelines out on little: does what a finished run holds work at all? Each is the ``try_out`` of a task."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from heterodiff.data.findings import show
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.reconstruct import ReconstructionPipeline
from heterodiff.pipelines.text_to_image import TextImagePipeline, TextWarning

Add = Callable[[bool, str, str], None]
"""Takes whether it passed, its name, and a line about it."""


def generation(pipeline: GenerationPipeline, add: Add) -> None:
    """Draw one image."""
    images = pipeline(num_images=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert isinstance(images, Tensor)
    add(bool(torch.isfinite(images).all()), "sample", f"one image {tuple(images.shape[1:])}, 2 steps")


def reconstruction(pipeline: ReconstructionPipeline, add: Add) -> None:
    """Reconstruct one picture of noise."""
    vae = pipeline.vae.config
    side = 8 * pipeline.codec.factor
    images = pipeline(torch.rand(1, vae.in_channels, side, side)).images
    scale = ", ".join(f"{value:.3g}" for value in vae.latents_std or [1 / vae.scaling_factor])
    add(bool(torch.isfinite(images).all()), "vae", f"reconstructs an image; std of its latents {scale}")


def text_image(pipeline: TextImagePipeline, add: Add) -> None:
    """Write one caption of a picture of noise, and draw one picture of that caption."""
    config, draws = pipeline.image_codec.config, pipeline.unet is not None
    noise = torch.rand(1, config.in_channels, *config.sample_size, generator=torch.Generator().manual_seed(0))
    ((text,),) = pipeline.generate_text_from_image(noise, temperature=0.0)
    add(True, "caption", f"one caption of a picture of noise: '{show(text)}'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        images = pipeline.generate_from_text(text.strip() or "a picture", 1, draws, 2).images
    how = "2 steps" if draws else "decoded directly"
    add(bool(torch.isfinite(images).all()), "sample", f"one picture of a text {tuple(images.shape[1:])}, {how}")
