"""Sampling: from noise along a sampler's steps to clean images or latents."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.guidance import Denoise
from heterodiff.diffusion.noise import Generators
from heterodiff.diffusion.prediction import limit_x0
from heterodiff.diffusion.samplers import PreparedSampler, list_samplers, make_sampler
from heterodiff.diffusion.schedule import NoiseSchedule

__all__ = ["list_samplers", "make_sampler", "sample"]

Callback = Callable[[int, int, Tensor], None]
AfterStep = Callable[[int, int, Any, Tensor], tuple[Tensor, bool]]


def _unit_z(sampler: PreparedSampler, z: Tensor, index: Tensor) -> Tensor:
    """Scale the scheduler's z to alpha^2 + sigma^2 = 1."""
    if sampler.row.space == "flow":
        sigma = float(index) / sampler.scheduler.config.num_train_timesteps
        return z / math.hypot(1 - sigma, sigma)
    return sampler.scheduler.scale_model_input(z, index)


def _step(
    sampler: PreparedSampler, index: Tensor, z: Tensor, x0: Tensor, channels: Tensor, generator: Generators
) -> Tensor:
    """Return the scheduler's next z, given predicted x0 and the variance ``channels`` of the network."""
    if sampler.row.space == "flow":
        sigma = float(index) / sampler.scheduler.config.num_train_timesteps
        x0 = (z - x0) / sigma  # velocity eps - x0
    if sampler.learned_variance:
        x0 = torch.cat([x0, channels], dim=1)
    randomness = {"generator": generator} if sampler.row.stochastic else {}
    return sampler.scheduler.step(x0, index, z, return_dict=False, **randomness)[0]


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    prediction: str,
    *,
    noise: Tensor | None = None,
    z_start: Tensor | None = None,
    sampler: str = "dpmpp",
    num_inference_steps: int = 20,
    timesteps: Sequence[int] | None = None,
    generator: Generators = None,
    learned_variance: bool = False,
    clip_sample: bool = False,
    dynamic_threshold: float | None = None,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Draw clean images or latents; any sampler works with any schedule and prediction.

    The network's prediction becomes x0 on the path it was trained on; the sampler gets x0 and moves on its own path
    with the same SNR, which differs by a scale of z.

    Args:
        denoise, schedule, prediction: a :class:`heterodiff.diffusion.denoiser.Denoiser` with a bound condition:
            ``sample(*denoiser, noise=noise)``.
        noise: (B, C, H, W) of unit variance, see :mod:`heterodiff.diffusion.noise`; or give ``z_start`` instead.
        z_start: (B, C, H, W), z at the first timestep, for example of an inverted image.
        sampler: one of :func:`list_samplers`.
        num_inference_steps, timesteps: see :func:`make_sampler`.
        generator: noise of stochastic samplers; one, or a list with one per sample.
        learned_variance: the network has variance channels, for ``ddpm`` to use.
        clip_sample: clip predicted x0 to [-1, 1].
        dynamic_threshold: quantile of Saharia et al. 2022 instead of plain clipping.
        callback: called after each step as (step from 1, number of steps, predicted x0).
        after_step: called after each step as (step from 1, number of steps, timestep, z in the sampler's scale);
            returns the z to go on with, and whether to go on.

    Returns:
        (B, C, H, W) float32.

    Raises:
        ConfigError: unknown sampler or prediction; steps outside the training schedule.
    """
    assert (noise is None) != (z_start is None), "give either noise or z_start"
    prepared = make_sampler(sampler, schedule, num_inference_steps, timesteps, learned_variance)
    norms = torch.hypot(schedule.alpha, schedule.sigma)
    if z_start is not None:
        noise = z_start.float() / norms[prepared.steps[0][1]].item()
    assert noise is not None
    z = noise.float() * prepared.start_scale
    denoiser = Denoiser(denoise, schedule, prediction)
    for number, (index, t) in enumerate(prepared.steps, start=1):
        z_network = _unit_z(prepared, z, index) * norms[t].item()
        output = denoiser.output(z_network, t)
        x0 = limit_x0(denoiser.x0_eps(output, z_network, t)[0], clip_sample, dynamic_threshold)
        z = _step(prepared, index, z, x0, output[:, z.shape[1] :], generator)
        if callback is not None:
            callback(number, len(prepared.steps), x0)
        if after_step is not None:
            z, go_on = after_step(number, len(prepared.steps), t, z)
            if not go_on:
                break
    return z
