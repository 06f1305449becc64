"""Quality of reconstructed images: PSNR and SSIM of each."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

GAUSSIAN_FROM = 12
"""Shortest side for the usual 11x11 Gaussian window; below it, a uniform 3x3 window."""


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair (B,); images (B, C, H, W) in [0, 1]."""
    return peak_signal_noise_ratio(others, images, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (B,), 1 for equal ones (Wang et al. 2004); images (B, C, H, W) in [0, 1]."""
    gaussian = min(images.shape[-2:]) >= GAUSSIAN_FROM
    found = structural_similarity_index_measure(
        others, images, gaussian_kernel=gaussian, kernel_size=3, data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return torch.atleast_1d(found)
