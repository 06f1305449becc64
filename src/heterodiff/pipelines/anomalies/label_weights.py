"""One anomaly map from several planes of an image, weighted as image labels alone teach.

Planes are what may tell a lesion: of each channel the difference that a label makes to the model, and the intensity
itself. A pixel's value is a weighted sum of its planes, an image's score the mean of its largest values, as in
multiple-instance learning: an unhealthy image has some pixels that no healthy image has.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FOREGROUND = 0.025
"""Mean of all channels, in [0, 1], above which a pixel is not background (Che et al. 2025)."""
TRIES, STEPS, RATE, DECAY = 40, 300, 0.05, 0.003
OUTSIDE = -30.0
"""Value of the background, which no decision should rest on."""


@dataclass(frozen=True)
class LabelWeights:
    """Weights of P planes.

    Attributes:
        weights: (P,).
        bias: added to the weighted sum; values above 0 are those of a lesion.
        area: number of the largest values whose mean is an image's score.
    """

    weights: tuple[float, ...]
    bias: float
    area: int

    @classmethod
    def from_dict(cls, content: Any, planes: int) -> "LabelWeights":
        """Read what :func:`dataclasses.asdict` gave; raises ValueError if that are no weights of ``planes`` planes."""
        found = cls(tuple(map(float, content["weights"])), float(content["bias"]), int(content["area"]))
        if len(found.weights) != planes or found.area < 1 or not np.isfinite([*found.weights, found.bias]).all():
            raise ValueError(f"weights: expected {planes} finite ones, found {content['weights']}")
        return found

    def values(self, planes: np.ndarray) -> np.ndarray:
        """Return the weighted sums (N, H, W) of ``planes`` (N, P, H, W); :data:`OUTSIDE` where all planes are 0."""
        summed = np.einsum("p,nphw->nhw", np.asarray(self.weights, np.float32), planes) + np.float32(self.bias)
        return np.where((planes != 0).any(axis=1), summed, np.float32(OUTSIDE))

    def probabilities(self, planes: np.ndarray) -> np.ndarray:
        """Return the sigmoid (N, H, W) of :meth:`values`, 0 in the background."""
        from scipy.special import expit

        values = self.values(planes)
        return np.where(values > OUTSIDE, expit(values), np.float32(0))

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return the score (N,) of each image of :meth:`values`."""
        flat = values.reshape(len(values), -1)
        area = min(self.area, flat.shape[1])
        return np.partition(flat, -area, axis=1)[:, -area:].mean(axis=1)


def planes_of(differences: np.ndarray, images: np.ndarray, channels: list[int], smoothing: int) -> np.ndarray:
    """Return the planes (N, 2C, H, W) of N images: smoothed differences, then smoothed intensities; background 0.

    Args:
        differences: (N, C, H, W), see :func:`heterodiff.diffusion.anomaly.label_difference`.
        images: (N, all channels, H, W) in [0, 1].
        channels: the C channels that ``differences`` are of.
        smoothing: side of the moving average in pixels.
    """
    return _smoothed(np.concatenate([differences, images[:, channels]], axis=1), images, smoothing)


def intensity_planes(images: np.ndarray, channels: list[int], smoothing: int) -> np.ndarray:
    """Return the planes (N, C, H, W) of intensities alone, see :func:`planes_of`."""
    return _smoothed(images[:, channels], images, smoothing)


def _smoothed(planes: np.ndarray, images: np.ndarray, smoothing: int) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    foreground = images.mean(axis=1, keepdims=True) > FOREGROUND
    side = (1, 1, smoothing, smoothing)
    return np.where(foreground, uniform_filter(planes.astype(np.float32), side), np.float32(0))


def fit_label_weights(
    planes: np.ndarray, unhealthy: np.ndarray, area: int, importance: np.ndarray | None = None
) -> LabelWeights:
    """Learn weights of planes from the labels of images.

    Minimises the binary cross-entropy of the images' scores, both classes weighing the same. The loss has several
    minima, so each plane alone, with either sign, is tried as a start, and the best is followed.

    Args:
        planes: (N, P, H, W), 0 in the background.
        unhealthy: (N,) bool, some of each.
        area: see :class:`LabelWeights`.
        importance: (N,) how much each image counts within its class, more than 0; default: all the same.
    """
    inside = torch.from_numpy((planes != 0).any(axis=1)).flatten(1)
    area = min(area, inside.shape[1])
    found = torch.from_numpy(planes).flatten(2)
    counts = inside.sum().clamp(min=1)
    mean = (found.sum(dim=(0, 2)) / counts)[:, None]
    std = ((found - mean).square() * inside[:, None]).sum(dim=(0, 2)).div(counts).sqrt().clamp(min=1e-12)[:, None]
    standard = (found - mean) / std
    label = torch.from_numpy(unhealthy).float()
    counting = torch.ones_like(label) if importance is None else torch.from_numpy(importance).float()
    of_class = torch.where(label > 0, (counting * label).sum(), (counting * (1 - label)).sum())
    balance = counting / of_class * len(label) / 2

    def loss(weights: Tensor, bias: Tensor) -> Tensor:
        values = torch.einsum("p,npk->nk", weights, standard) + bias
        score = values.masked_fill(~inside, OUTSIDE).topk(area, dim=1).values.mean(dim=1)
        return functional.binary_cross_entropy_with_logits(score, label, balance) + DECAY * weights.square().sum() / 2

    def descend(weights: Tensor, bias: Tensor, steps: int) -> tuple[float, Tensor, Tensor]:
        weights, bias = weights.clone().requires_grad_(), bias.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights, bias], RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(weights, bias).backward()
            optimizer.step()
        with torch.no_grad():
            return float(loss(weights, bias)), weights.detach(), bias.detach()

    starts = [sign * one for one in torch.eye(len(mean)) for sign in (1, -1)]
    _, weights, bias = min((descend(one, torch.tensor(-2.0), TRIES) for one in starts), key=lambda tried: tried[0])
    _, weights, bias = descend(weights, bias, STEPS)
    plain = weights / std[:, 0]
    return LabelWeights(tuple(plain.tolist()), float(bias - (plain * mean[:, 0]).sum()), area)
