"""Random flips and crops that depend on a seed for each image, not on the batch, worker or process."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from heterodiff.config import DataConfig
from heterodiff.devices import send


def _draws(seeds: Sequence[int]) -> np.ndarray:
    """Return (B, 3) uniform random 32-bit integers, row b from ``seeds[b]`` alone.

    A hash instead of a generator: the same on every platform and release, and as random for neighbouring seeds.
    """
    digests = [hashlib.blake2b(str(int(seed)).encode(), digest_size=12).digest() for seed in seeds]
    return np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, 3).astype(np.int64)


def augment(images: torch.Tensor, seeds: Sequence[int], config: DataConfig) -> torch.Tensor:
    """Flip half of ``images`` left to right and crop at random, as ``config`` says.

    The crop pads by ``config.random_crop`` pixels on all sides, replicating the edge, and cuts the original size.
    Each option draws its own numbers: switching one on leaves the other as it was.

    Args:
        images: (B, C, H, W), any number type and device.
        seeds: one integer for each image; the same seed and image give the same result in any batch.

    Returns:
        (B, C, H, W); ``images`` itself when both options are off.
    """
    assert len(seeds) == len(images)
    if not (config.horizontal_flip or config.random_crop) or len(images) == 0:
        return images
    draws = _draws(seeds)
    height, width = images.shape[2:]
    rows = np.tile(np.arange(height), (len(draws), 1))
    columns = np.tile(np.arange(width), (len(draws), 1))
    if config.random_crop:
        offsets = draws[:, 1:] % (2 * config.random_crop + 1) - config.random_crop
        rows = np.clip(rows + offsets[:, :1], 0, height - 1)
        columns = np.clip(columns + offsets[:, 1:], 0, width - 1)
    if config.horizontal_flip:
        columns = np.where(draws[:, :1] % 2 == 1, columns[:, ::-1], columns)
    batch_b11 = torch.arange(len(draws), device=images.device)[:, None, None]
    rows_bh1 = send(torch.from_numpy(rows), images.device)[:, :, None]
    columns_b1w = send(torch.from_numpy(np.ascontiguousarray(columns)), images.device)[:, None, :]
    return images.permute(0, 2, 3, 1)[batch_b11, rows_bh1, columns_b1w].permute(0, 3, 1, 2).contiguous()
