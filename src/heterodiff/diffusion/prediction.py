"""The kinds of prediction of networks, the conversions between them, and keeping clean images in their range.

Every kind is linear in the clean image and the noise, p = c x0 + d eps, and so is z = alpha x0 + sigma eps;
solving the two equations serves all kinds and all schedules:

    ========  ======  =====  =================================================
    kind      c       d      source
    ========  ======  =====  =================================================
    epsilon   0       1      Ho et al. 2020
    v         -sigma  alpha  Salimans & Ho 2022, section 4
    sample    1       0      x0 itself
    flow      -1      1      Lipman et al. 2023; Liu et al. 2023 (velocity)
    ========  ======  =====  =================================================
"""

from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import ConfigError, unknown_name

PREDICTIONS = ("epsilon", "v", "sample", "flow")

Level = Any  # alpha or sigma: a float, or a tensor that broadcasts against images


def _coefficients(kind: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
    """Return (c, d) of p = c x0 + d eps."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v":
        return -sigma, alpha
    if kind == "sample":
        return 1.0, 0.0
    if kind == "flow":
        return -1.0, 1.0
    raise ConfigError(unknown_name("prediction", kind, PREDICTIONS))


def target_of(kind: str, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """Return the training target of this kind, shaped like ``x0``; raises ConfigError for an unknown kind."""
    c, d = _coefficients(kind, alpha, sigma)
    return c * x0 + d * eps


def to_x0_eps(kind: str, output: Tensor, z: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
    """Convert a prediction at z = alpha x0 + sigma eps to (x0, eps).

    ``epsilon`` needs alpha > 0 and ``sample`` needs sigma > 0; ``v`` and ``flow`` are fine at both ends.

    Args:
        kind: one of :data:`PREDICTIONS`; others raise ConfigError.
        output, z: (B, C, H, W), the network's output without variance channels.
    """
    c, d = _coefficients(kind, alpha, sigma)
    determinant = alpha * d - sigma * c
    return (d * z - sigma * output) / determinant, (alpha * output - c * z) / determinant


def x0_sensitivity(kind: str, alpha: Level, sigma: Level) -> Level:
    """Return |d x0 / d prediction| at fixed z: the error of x0 for a unit error of the prediction."""
    c, d = _coefficients(kind, alpha, sigma)
    return abs(sigma / (alpha * d - sigma * c))


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Clip x0 to [-s, s] and divide by s, where s >= 1 is the quantile of |x0| per image.

    Saharia et al. 2022 (Imagen), section 2.3: keeps contrast under strong guidance, where static clipping
    saturates.

    Args:
        x0: (B, C, H, W), data range [-1, 1].
        quantile: in (0, 1]; 0.995 is usual.
    """
    # kthvalue-based interpolation instead of torch.quantile, which refuses more than 2^24 elements.
    values = x0.detach().abs().flatten(1).float()
    position = quantile * (values.shape[1] - 1)
    low = int(position)
    high = min(low + 1, values.shape[1] - 1)
    ordered = values.sort(dim=1).values
    scale = torch.lerp(ordered[:, low], ordered[:, high], position - low)
    scale = scale.clamp(min=1).to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-scale, scale) / scale


def limit_x0(x0: Tensor, clip_sample: bool, quantile: float | None) -> Tensor:
    """Apply dynamic thresholding if ``quantile`` is given, else clip to [-1, 1] if ``clip_sample``."""
    if quantile is not None:
        return dynamic_threshold(x0, quantile)
    return x0.clamp(-1, 1) if clip_sample else x0
