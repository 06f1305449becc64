"""A network as a denoiser: with the noise schedule and the kind of prediction that it was trained with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heterodiff.diffusion.guidance import guided_denoiser
from heterodiff.diffusion.prediction import to_x0_eps
from heterodiff.diffusion.schedule import NoiseSchedule


class Denoiser(NamedTuple):
    """Network, schedule and prediction, which sampling, inversion and anomaly maps take first: ``sample(*denoiser)``.

    Attributes:
        network: (z (B, C, H, W), network time (B,), condition) -> (B, C or 2C, H, W), channels after the first C are
            variance. Once :meth:`guided` has bound the condition, (z, network time (B,) on the CPU) -> the same.
        schedule: noise schedule of the training.
        prediction: one of :data:`heterodiff.diffusion.prediction.PREDICTIONS`.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    prediction: str

    def guided(
        self,
        condition: Any,
        null_condition: Any = None,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> "Denoiser":
        """Bind a condition and its guidance, see :func:`heterodiff.diffusion.guidance.guided_denoiser`."""
        steps = self.schedule.num_train_timesteps
        return self._replace(network=guided_denoiser(self.network, condition, null_condition, scale, steps, interval))

    def output(self, z: Tensor, t: int) -> Tensor:
        """Return the network's output (B, C or 2C, H, W) at training timestep ``t``, float32; needs a bound condition.

        The time lies on the CPU, so that reading it waits for no device.
        """
        return self.network(z, torch.full((len(z),), self.schedule.time[t].item())).float()

    def x0_eps(self, output: Tensor, z: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Convert an output at z (B, C, H, W) to clean images and noise, each (B, C, H, W)."""
        alpha, sigma = self.schedule.alpha[t].item(), self.schedule.sigma[t].item()
        return to_x0_eps(self.prediction, output[:, : z.shape[1]], z, alpha, sigma)
