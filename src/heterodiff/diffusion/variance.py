"""The learned variance of p(z_{t-1} | z_t): its parameterisation and its variational bound."""

import math

import torch
from torch import Tensor

from heterodiff.diffusion.schedule import Lookup, NoiseSchedule

# Gaussian decoder of Ho et al. 2020, eq. 13: 8-bit images scaled to [-1, 1].
HALF_BIN = 1 / 255


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def discretised_gaussian_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of the Gaussian mass in the bin of each value, in nats, elementwise (Ho et al. 2020, eq. 13).

    Args:
        x0: values in [-1, 1] on the grid of 256 levels; the outermost bins reach to infinity.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = (x0 - mean + HALF_BIN) * inverse_std
    lower = (x0 - mean - HALF_BIN) * inverse_std
    upper = torch.where(x0 > 1 - HALF_BIN, torch.inf, upper)
    lower = torch.where(x0 < -1 + HALF_BIN, -torch.inf, lower)
    # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): the smaller tail keeps its digits in float32.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    return -torch.log((torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12))


class VarianceBound:
    """Terms L_t of the variational bound for a variance between beta_t and the posterior variance.

    Nichol & Dhariwal 2021, eq. 15: log variance = f log beta_t + (1 - f) log posterior_variance_t; the network's
    channels in [-1, 1] are mapped to f in [0, 1].
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        assert schedule.kind == "vp"
        alpha_bar = schedule.alpha.square()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        # sigma^2, not 1 - alpha_bar, keeps the digits at small t.
        noise = schedule.sigma.square()
        previous_noise = torch.cat([torch.zeros(1, dtype=torch.float64), noise[:-1]])
        beta = 1 - alpha_bar / previous
        # Ho et al. 2020, eq. 7.
        self.posterior_variance = beta * previous_noise / noise
        self.x0_coefficient = previous.sqrt() * beta / noise
        self.z_coefficient = (alpha_bar / previous).sqrt() * previous_noise / noise
        # The posterior of t = 0 has no width; its log is that of t = 1.
        self.log_posterior_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()
        self.log_beta = beta.log()
        self._x0_at, self._z_at = Lookup(self.x0_coefficient), Lookup(self.z_coefficient)
        self._log_posterior_variance_at = Lookup(self.log_posterior_variance)
        self._log_beta_at = Lookup(self.log_beta)

    def log_variance(self, channels: Tensor, t: Tensor) -> Tensor:
        """Return the log of the learned variance, shaped like ``channels`` (B, C, H, W)."""
        low, high = self._log_posterior_variance_at(t), self._log_beta_at(t)
        fraction = (channels + 1) / 2
        return fraction * high + (1 - fraction) * low

    def term(self, x0: Tensor, z: Tensor, t: Tensor, predicted_x0: Tensor, channels: Tensor) -> Tensor:
        """Return L_t in bits per dimension, (B,): the decoder's likelihood at t = 0, else the KL divergence.

        Args:
            x0, z, predicted_x0: (B, C, H, W); pass ``predicted_x0`` detached to train the variance alone.
            t: (B,) int64.
            channels: (B, C, H, W) variance channels of the network.
        """
        of_x0, of_z, posterior = self._x0_at(t), self._z_at(t), self._log_posterior_variance_at(t)
        mean, predicted_mean = of_x0 * x0 + of_z * z, of_x0 * predicted_x0 + of_z * z
        log_variance = self.log_variance(channels, t)
        kl = gaussian_kl(mean, posterior, predicted_mean, log_variance)
        decoder = discretised_gaussian_nll(x0, predicted_mean, log_variance)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), decoder, kl)
        return nats.flatten(1).mean(dim=1) / math.log(2)
