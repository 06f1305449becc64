"""The denoiser: an ideal network of every kind of prediction gives back the image and the noise."""

import pytest
import torch
from torch import Tensor

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.prediction import PREDICTIONS, target_of
from heterodiff.diffusion.schedule import NoiseSchedule

X0, EPS = torch.randn(2, 1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
T = 400


def denoiser(prediction: str) -> Denoiser:
    """A network that knows X0 and EPS; each condition adds itself to the prediction, and variance channels follow."""
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))

    def network(z: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        assert time.tolist() == [schedule.time[T].item()] * len(z)
        target = target_of(prediction, X0, EPS, schedule.alpha[T].item(), schedule.sigma[T].item())
        return torch.cat([target + condition.view(-1, 1, 1, 1), torch.full_like(z, 7.0)], dim=1)

    return Denoiser(network, schedule, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_ideal_prediction_gives_image_and_noise(prediction: str) -> None:
    ideal = denoiser(prediction).guided(torch.zeros(1))
    z = ideal.schedule.alpha[T].item() * X0 + ideal.schedule.sigma[T].item() * EPS
    output = ideal.output(z, T)
    assert torch.equal(output[:, 3:], torch.full_like(z, 7.0))
    for found, expected in zip(ideal.x0_eps(output, z, T), (X0, EPS), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_guidance_goes_from_the_null_condition_through_the_condition() -> None:
    plain, condition, null = denoiser("epsilon"), torch.tensor([2.0]), torch.tensor([-1.0])
    found = plain.guided(condition, null, 3.0).output(X0, T)[:, :3]
    torch.testing.assert_close(found - EPS, torch.full_like(EPS, -1 + 3 * (2 - -1)))
    outside = plain.guided(condition, null, 3.0, (0.0, 0.3)).output(X0, T)[:, :3]
    torch.testing.assert_close(outside - EPS, torch.full_like(EPS, 2.0))
