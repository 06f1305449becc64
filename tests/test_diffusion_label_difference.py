"""The difference that a label makes, against its closed form for Gaussian classes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.anomaly import difference_timesteps, label_difference
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError

COUNT, CHANNELS, SIDE, STD = 3, 2, 8, 0.3
CLASSES = 3


def means() -> Tensor:
    """Mean image of each class, (K, C, H, W)."""
    return torch.rand(CLASSES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) - 0.5


class GaussianClasses:
    """The best prediction of images of class y that are N(mean of y, STD^2); counts the rows that it sees."""

    def __init__(self, schedule: NoiseSchedule, prediction: str) -> None:
        self.schedule, self.prediction, self.rows = schedule, prediction, 0

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        self.rows += len(z)
        t = int((self.schedule.time - time[0]).abs().argmin())
        alpha, sigma = self.schedule.alpha[t].item(), self.schedule.sigma[t].item()
        mean = means()[labels]
        x0 = mean + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (z - alpha * mean)
        eps = (z - alpha * x0) / sigma
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[self.prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
@pytest.mark.parametrize("channels", [None, [1]])
def test_gaussian_classes_differ_as_their_means_do(prediction: str, channels: list[int] | None) -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    timesteps = difference_timesteps(500, 5)
    network, generator = GaussianClasses(schedule, prediction), torch.Generator().manual_seed(0)
    x = torch.rand(COUNT, CHANNELS, SIDE, SIDE, generator=generator)
    labels = [torch.full((COUNT,), k) for k in range(CLASSES)]
    steps: list[tuple[int, int]] = []
    found = label_difference(
        network,
        schedule,
        prediction,
        x,
        labels[0],
        labels[1:],
        timesteps,
        noise=lambda: torch.randn(x.shape, generator=generator),
        channels=channels,
        progress=lambda step, total: steps.append((step, total)),
    )
    remains = [
        schedule.sigma[t].item() ** 2 / (schedule.alpha[t].item() ** 2 * STD**2 + schedule.sigma[t].item() ** 2)
        for t in timesteps
    ]
    shift = means()[1:].mean(dim=0) - means()[0]
    expected = np.mean(remains) * shift[slice(None) if channels is None else channels]
    for one in found.maps:
        np.testing.assert_allclose(one, expected, atol=2e-4)
    assert found.maps.shape == (COUNT, len(expected), SIDE, SIDE)
    assert found.calls.tolist() == [CLASSES * 5] * COUNT
    assert network.rows == CLASSES * 5 * COUNT
    assert steps == [(k, 5) for k in range(1, 6)]


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [(500, 5, [499, 399, 299, 199, 99]), (10, 20, list(range(9, -1, -1))), (7, 3, [6, 3, 1]), (1, 1, [0])],
)
def test_timesteps_reach_the_depth_and_leave_out_clean_images(depth: int, count: int, expected: list[int]) -> None:
    assert difference_timesteps(depth, count) == expected
    assert len(set(expected)) == len(expected) == min(depth, count)


@pytest.mark.parametrize(("depth", "count"), [(0, 5), (5, 0)])
def test_no_timesteps_is_an_error(depth: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        difference_timesteps(depth, count)


def test_timesteps_must_fit() -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig())
    x, label = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ConfigError):
        label_difference(lambda z, *_: z, schedule, "epsilon", x, label, [label], [1200, 0], noise=lambda: x)


def test_noise_is_drawn_anew_at_each_timestep() -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig())
    seen: list[Tensor] = []

    def look(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        seen.append(z)
        return z

    label, generator = torch.zeros(1, dtype=torch.long), torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 16, 16)
    draws = (torch.randn(x.shape, generator=generator) for _ in range(3))
    label_difference(look, schedule, "epsilon", x, label, [label], [300, 200, 100], noise=lambda: next(draws))
    noises = [z[0] / schedule.sigma[t].item() for z, t in zip(seen, (300, 200, 100), strict=True)]
    for z in seen:
        assert torch.equal(z[0], z[1])  # both labels are asked about the same noisy image
    for one in range(3):
        for other in range(one):
            correlation = (noises[one] * noises[other]).mean()
            assert abs(float(correlation)) < 5 / math.sqrt(16 * 16)
