"""Editing of images by a model that was not trained for it: image to image, and inpainting."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heterodiff.config import SamplingConfig
from heterodiff.diffusion.anomaly import noising_timesteps
from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.noise import Generators
from heterodiff.diffusion.prediction import limit_x0
from heterodiff.diffusion.samplers import check_noise, check_timesteps
from heterodiff.diffusion.sampling import sample
from heterodiff.errors import ConfigError
from heterodiff.pipelines.drawing import DrawingPipeline

RESAMPLES = 4
"""Times that each step of inpainting is taken: with one, new pixels match those around them in colour only."""
STRENGTH = 0.6
"""Default share of the noise levels in image to image."""


@torch.no_grad()
def edit_images(
    pipeline: DrawingPipeline,
    images: Tensor,
    mask: Tensor | None,
    condition: Any,
    null_condition: Any,
    settings: SamplingConfig,
    *,
    strength: float | None,
    sampler: str | None,
    resamples: int,
    generator: Generators,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Change ``images`` (B, C, H, W) in [0, 1] that fit the ``pipeline``, whatever its conditions are.

    Args:
        condition, null_condition: conditions of B rows each, as the pipeline's denoiser takes them.
        settings: steps and guidance.
        mask, strength, sampler, resamples, generator, progress: see
            :meth:`heterodiff.pipelines.generate.GenerationPipeline.edit`, as the result and the errors.
    """
    _check_mask(images, mask, strength, sampler)
    bound = pipeline.denoiser.guided(condition, null_condition, settings.guidance_scale, settings.guidance_interval)
    codec = pipeline.codec
    x0 = codec.draw(codec.posterior(images.to(pipeline.device)), None)
    draw = partial(pipeline.draw_noise, x0.shape, generator)
    trained = bound.schedule.num_train_timesteps
    if mask is None:
        sampler = sampler or settings.sampler
        check_noise(sampler, pipeline.noise)
        first = first_timestep(STRENGTH if strength is None else strength, trained)
        steps = noising_timesteps(first + 1, max(1, round(settings.num_inference_steps * (first + 1) / trained)))
        z = sample(
            *bound,
            z_start=noised(x0, draw(), bound, steps[0]),
            sampler=sampler,
            timesteps=steps,
            generator=generator,
            learned_variance=pipeline.unet.config.out_channels == 2 * x0.shape[1],
            clip_sample=codec.clip_sample,
            callback=lambda step, total, _: progress(step, total),
        )
        return codec.decode(z).cpu()
    known = 1 - mask.to(pipeline.device, torch.float32).expand(len(images), 1, -1, -1)
    z = inpaint(
        bound,
        x0,
        known_latents(known, (x0.shape[2], x0.shape[3])),
        noising_timesteps(trained, settings.num_inference_steps),
        draw,
        resamples=resamples,
        clip_sample=codec.clip_sample,
        after_step=progress,
    )
    return torch.where(known.cpu() > 0, images, codec.decode(z).cpu())


def _check_mask(images: Tensor, mask: Tensor | None, strength: float | None, sampler: str | None) -> None:
    if mask is None:
        return
    if strength is not None or sampler is not None:
        raise ConfigError("strength and sampler are for image to image; leave them out, or the mask")
    size = images.shape[2:]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != size or len(mask) not in (1, len(images)):
        raise ConfigError(f"mask {tuple(mask.shape)}: expected ({len(images)}, 1, {size[0]}, {size[1]})")
    found = mask.unique().tolist()
    if found != [0, 1]:
        what = f"the single value {found[0]:g}" if len(found) == 1 else f"{len(found)} different values"
        raise ConfigError(f"mask of {what}: expected 1 where to draw anew, 0 where pixels stay")


def first_timestep(strength: float, num_train_timesteps: int) -> int:
    """Return the training timestep that an image is noised to.

    Raises:
        ConfigError: a strength that is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:  # NaN as well
        raise ConfigError(f"strength {strength}: expected a number above 0 (hardly changed) and at most 1 (drawn anew)")
    return max(1, round(strength * num_train_timesteps)) - 1


def noised(x0: Tensor, noise: Tensor, denoiser: Denoiser, timestep: int) -> Tensor:
    """Clean images or latents x0 (B, C, H, W) with ``noise``, as in training at ``timestep``."""
    return denoiser.schedule.alpha[timestep].item() * x0 + denoiser.schedule.sigma[timestep].item() * noise


def known_latents(known: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return which latents (B, 1, h, w) depend on known pixels alone, of a mask (B, 1, H, W) that is 1 where known."""
    factor = known.shape[-1] // shape[1]
    return known if factor == 1 else -F.max_pool2d(-known, factor)


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    x0: Tensor,
    known: Tensor,
    timesteps: Sequence[int],
    draw: Callable[[], Tensor],
    *,
    resamples: int = RESAMPLES,
    clip_sample: bool = False,
    after_step: Callable[[int, int], None] = lambda step, total: None,
) -> Tensor:
    """Draw what is unknown of images so that it fits what is known (RePaint, Lugmayr et al. 2022, algorithm 1).

    After each DDIM step, what is known is put back, noised to the level of that step. Then the whole image is noised
    back to where the step began, and the step is taken again, so that both parts come to fit. Steps are rotations by
    the angle phi with tan phi = sigma / alpha, so any schedule and prediction will do.

    Args:
        denoiser: with a bound condition.
        x0: (B, C, H, W) clean images or latents; what is unknown of them has no effect.
        known: (B, 1, H, W), 1 where it is known and 0 elsewhere.
        timesteps: strictly decreasing training timesteps; the first one should be the last of training.
        draw: returns noise (B, C, H, W) as of the training, anew at each call.
        resamples: times that each step is taken.
        clip_sample: clip predicted clean images to [-1, 1].
        after_step: called after each network call as (calls done, calls in all).

    Returns:
        (B, C, H, W) float32, equal to x0 where it is known.

    Raises:
        ConfigError: timesteps outside the schedule or not decreasing; fewer than one resample.
    """
    if resamples < 1:
        raise ConfigError(f"resamples {resamples}: expected at least 1")
    schedule = denoiser.schedule
    steps = check_timesteps(timesteps, schedule.num_train_timesteps)
    angles = [math.atan2(schedule.sigma[t].item(), schedule.alpha[t].item()) for t in steps]
    norms = [math.hypot(schedule.sigma[t].item(), schedule.alpha[t].item()) for t in steps]
    z, calls = math.cos(angles[0]) * x0 * known + math.sin(angles[0]) * draw(), 0
    total = resamples * (len(steps) - 1) + 1
    for k, t in enumerate(steps):
        angle, last = angles[k], k == len(steps) - 1
        following = 0.0 if last else angles[k + 1]
        for attempt in range(1 if last else resamples):
            clean, _ = denoiser.x0_eps(denoiser.output(norms[k] * z, t), norms[k] * z, t)
            clean = limit_x0(clean, clip_sample, None)
            eps = (z - math.cos(angle) * clean) / math.sin(angle)
            calls += 1
            after_step(calls, total)
            if last:
                return torch.where(known > 0, x0, clean)
            here = math.cos(following) * clean + math.sin(following) * eps
            there = math.cos(following) * x0 + math.sin(following) * draw()
            z = torch.where(known > 0, there, here)
            if attempt < resamples - 1:
                share = math.cos(angle) / math.cos(following)
                z = share * z + math.sqrt(max(0.0, 1 - share**2)) * draw()
    raise AssertionError("the last step returns")
