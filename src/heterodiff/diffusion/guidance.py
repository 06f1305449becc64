"""Classifier-free guidance (Ho & Salimans 2022), in an interval of noise levels if wished; guidance by a classifier."""

import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heterodiff.diffusion.prediction import target_of, to_x0_eps
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z (B, C, H, W), network time (B,) on the CPU, the same in all rows) -> prediction (B, C or 2C, H, W)."""
ModelCall = Callable[[Tensor, Tensor, Any], Tensor]


LEAST_ALPHA = 1e-6
"""Share of the image from which on a change of the noise is one of the predicted image; a flow begins at 0."""
LogProbability = Callable[[Tensor, Tensor], Tensor]
"""(z (B, C, H, W), network time (B,) on its device) -> log p(y | z) (B,), with gradient."""


def null_labels(labels: Tensor) -> Tensor:
    """Return the condition "none" for class labels (B,): -1 everywhere."""
    return torch.full_like(labels, -1)


def join_conditions(first: Any, second: Any) -> Any:
    """Concatenate two conditions along the batch: tensors, or mappings, sequences and dataclasses of them."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: join_conditions(first[key], second[key]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(join_conditions(one, other) for one, other in zip(first, second, strict=True))
    if first is None and second is None:
        return None
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{k: join_conditions(value, getattr(second, k)) for k, value in vars(first).items()})
    raise TypeError(f"cannot batch conditions of type {type(first).__name__}")


def guided(model_call: ModelCall, z: Tensor, time: Tensor, condition: Any, null_condition: Any, scale: float) -> Tensor:
    """Return out = uncond + scale (cond - uncond), from one call with a batch of 2B.

    Ho & Salimans 2022, eq. 6 write (1 + w) cond - w uncond: their w is our scale minus 1. Scale 1 evaluates only the
    conditional branch, scale 0 only the unconditional one. All kinds of prediction are linear in the predicted noise,
    so guiding any of them is the same. Variance channels are those of the conditional branch.

    Args:
        model_call: (z, time (B,), condition) -> (B, C or 2C, H, W).
        z: (B, C, H, W).
        condition, null_condition: tensors with B rows, or mappings or sequences of such tensors.
    """
    if scale == 1:
        return model_call(z, time, condition)
    if scale == 0:
        return model_call(z, time, null_condition)
    both = model_call(torch.cat([z, z]), torch.cat([time, time]), join_conditions(condition, null_condition))
    conditional, unconditional = both.chunk(2)
    channels = z.shape[1]
    mean, null_mean = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([null_mean + scale * (mean - null_mean), conditional[:, channels:]], dim=1)


def guided_denoiser(
    model_call: ModelCall,
    condition: Any,
    null_condition: Any,
    scale: float,
    num_train_timesteps: int,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Bind a condition and its guidance to a network: return the ``denoise(z, time)`` that sampling takes.

    Args:
        scale: guidance scale; 1 is unguided.
        num_train_timesteps: T; a network time counts as the noise level time / T.
        interval: noise levels (low, high) that are guided, both included; outside, only the conditional branch
            is evaluated (Kynkäänniemi et al. 2024), at half the cost.

    Raises:
        ConfigError: a negative scale or one that is not finite, or not 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= scale < math.inf:  # NaN as well
        raise ConfigError(f"guidance_scale {scale}: expected 0 or more and finite; 1 is unguided")
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance_interval ({low}, {high}): expected 0 <= low <= high <= 1")

    def denoise(z: Tensor, time: Tensor) -> Tensor:
        level = float(time[0])  # the rows of a sampling batch share one time, known without asking the device
        on_device = torch.full((len(z),), level, device=z.device)
        inside = low <= level / num_train_timesteps <= high
        return guided(model_call, z, on_device, condition, null_condition, scale if inside else 1.0)

    return denoise


def classifier_guided(
    denoise: Denoise, schedule: NoiseSchedule, prediction: str, log_probability: LogProbability, scale: float
) -> Denoise:
    """Steer a denoiser along the gradient of a classifier's log probability: eps - scale sigma grad log p(y | z).

    Dhariwal & Nichol 2021, algorithm 2, for all kinds of prediction and schedules; variance channels stay as they are.
    The gradient of a step is not kept, so memory does not grow with the number of steps.

    Args:
        denoise, schedule, prediction: see :class:`heterodiff.diffusion.denoiser.Denoiser`.
        log_probability: of z as the network gets it, noised as in training.
        scale: 1 draws from p(z) p(y | z); more follows the classifier more closely.

    Raises:
        ConfigError: a negative scale or one that is not finite.
    """
    if not 0 <= scale < math.inf:  # NaN as well
        raise ConfigError(f"classifier_scale {scale}: expected 0 or more and finite; 0 is unguided")

    def steered(z: Tensor, time: Tensor) -> Tensor:
        output = denoise(z, time).float()
        levels = schedule.at(time[0].double())
        alpha, sigma = (level.item() for level in levels)
        alpha = max(alpha, LEAST_ALPHA)
        with torch.enable_grad():
            leaf = z.detach().float().requires_grad_(True)
            on_device = torch.full((len(z),), float(time[0]), device=z.device)
            (gradient,) = torch.autograd.grad(log_probability(leaf, on_device).sum(), leaf)
        channels = z.shape[1]
        _, eps = to_x0_eps(prediction, output[:, :channels], z, alpha, sigma)
        eps = eps - scale * sigma * gradient
        clean = (z - sigma * eps) / alpha
        return torch.cat([target_of(prediction, clean, eps, alpha, sigma), output[:, channels:]], dim=1)

    return steered
