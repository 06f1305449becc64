"""A classifier of noisy images, for guidance: the encoder half of the U-Net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterodiff.models.unet import HAEUNet


class MeanAndMaximum(nn.Module):
    """Mean and maximum of each channel over the positions: (B, C, H, W) -> (B, 2C).

    The map is taken before it is normalised: a norm of few channels would take their means away.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


class NoisyClassifier(HAEUNet):
    """Log odds of classes from noisy images and their time: the encoder of a variant, pooled over positions.

    Dhariwal & Nichol 2021, section 4.2 and appendix H; there the positions are pooled by attention. Arguments are those
    of :class:`heterodiff.models.unet.HAEUNet` without a condition; ``out_channels`` is the number of classes.
    """

    has_decoder = False

    def _make_out(self, channels: int) -> nn.Module:
        hidden, classes = nn.Linear(2 * channels, channels), nn.Linear(channels, self.config.out_channels)
        return nn.Sequential(MeanAndMaximum(), nn.LayerNorm(2 * channels), hidden, nn.SiLU(), classes)

    def forward(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:  # type: ignore[override]
        """Return log odds (B, classes), float32.

        Args:
            sample: (B, in_channels, H, W), noised as in training; H and W divisible by the network's factor.
            timestep: network times (B,), (1,) or a number; fractions are allowed.

        Raises:
            ConfigError: another shape.
        """
        self._check_sample(sample)
        embedding = F.silu(self._time_embedding(timestep, sample))
        h, _ = self._encoded(sample, embedding, None, self._recompute())
        logits: Tensor = self.out(h)
        return logits.float()

    def log_probability(self, sample: Tensor, timestep: Any, label: int) -> Tensor:
        """Return log p(label | sample) (B,); arguments as :meth:`forward`."""
        return torch.log_softmax(self(sample, timestep), dim=1)[:, label]
