"""Keeping predicted clean images in the range of the data while sampling."""

import torch
from torch import Tensor


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
