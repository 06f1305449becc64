"""Training losses of a denoiser."""

from collections.abc import Callable

from torch import Tensor

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.noise import find_noise
from heterodiff.diffusion.prediction import target_of, to_x0_eps, x0_sensitivity
from heterodiff.diffusion.schedule import Lookup, NoiseSchedule
from heterodiff.diffusion.variance import VarianceBound
from heterodiff.errors import ConfigError


def min_snr_weights(schedule: NoiseSchedule, prediction: str, gamma: float) -> Tensor:
    """Return the min-SNR-gamma weights of the squared prediction error (Hang et al. 2023), (T,) float64.

    They weight the error of x0 by min(SNR, gamma), whatever the network predicts: hence
    min(SNR, gamma) |d x0 / d prediction|^2, which is min(SNR, gamma) / SNR for epsilon and
    min(SNR, gamma) / (SNR + 1) for v, as in the paper.
    """
    snr = schedule.log_snr.exp()
    return snr.clamp(max=gamma) * x0_sensitivity(prediction, schedule.alpha, schedule.sigma) ** 2


class DiffusionObjective:
    """Squared error of a denoiser's prediction, and the variational bound of a learned variance.

    With ``learn_variance`` this is L_simple + 0.001 L_vlb of Nichol & Dhariwal 2021, eq. 16; the sum over T
    terms is estimated by T L_t. The likelihood at t = 0 assumes 8-bit images in [-1, 1], and uses the same grid for
    latents.
    """

    VLB_WEIGHT = 0.001

    def __init__(self, config: DiffusionConfig, schedule: NoiseSchedule) -> None:
        """Raise ConfigError if prediction, schedule and noise do not go together."""
        if (config.prediction == "flow") != (schedule.kind == "flow"):
            raise ConfigError(f"prediction '{config.prediction}' cannot be trained on a {schedule.kind} schedule")
        if config.learn_variance and not find_noise(config.noise).is_gaussian:
            raise ConfigError(
                "diffusion.learn_variance=true: its bound is that of Gaussian noise, not of "
                f"diffusion.noise={config.noise}; leave one of them out"
            )
        self.config = config
        self.schedule = schedule
        self._bound = VarianceBound(schedule) if config.learn_variance else None
        self._weights: Lookup | None = None
        if config.weighting == "min-snr":
            self._weights = Lookup(min_snr_weights(schedule, config.prediction, config.snr_gamma))

    def losses(
        self, model_call: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each sample and its parts.

        Args:
            model_call: (z_t (B, C, H, W), network time (B,) float32) -> (B, C, H, W), or (B, 2C, H, W)
                with ``learn_variance``: prediction, then variance channels.
            x0: (B, C, H, W) float32 clean images in [-1, 1] or latents of unit scale.
            t: (B,) int64 training timesteps.
            noise: (B, C, H, W) of unit variance.

        Returns:
            losses (B,) float32, and detached parts of shape (B,): ``mse`` (unweighted, mean over C, H, W)
            and with ``learn_variance`` ``vlb`` (L_t in bits per dimension).

        Raises:
            ConfigError: the network returns another shape.
        """
        alpha, sigma = self.schedule.alpha_at(t), self.schedule.sigma_at(t)
        z = alpha * x0 + sigma * noise
        time = self.schedule.time_at(t).flatten()
        output = model_call(z, time).float()
        self._check_shape(output, x0)
        mean, channels = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
        kind = self.config.prediction
        mse = (mean - target_of(kind, x0, noise, alpha, sigma)).square().flatten(1).mean(dim=1)
        loss = mse if self._weights is None else self._weights(t).flatten() * mse
        parts = {"mse": mse.detach()}
        if self._bound is not None:
            # The bound trains the variance alone: it would only add noise to the gradient of the mean.
            predicted_x0, _ = to_x0_eps(kind, mean.detach(), z, alpha, sigma)
            vlb = self._bound.term(x0, z, t, predicted_x0, channels)
            loss = loss + self.VLB_WEIGHT * self.schedule.num_train_timesteps * vlb
            parts["vlb"] = vlb.detach()
        return loss, parts

    def _check_shape(self, output: Tensor, x0: Tensor) -> None:
        channels = x0.shape[1] * (2 if self.config.learn_variance else 1)
        expected = (x0.shape[0], channels, *x0.shape[2:])
        if tuple(output.shape) != expected:
            raise ConfigError(
                f"the network returned shape {tuple(output.shape)}; learn_variance: "
                f"{str(self.config.learn_variance).lower()} on {x0.shape[1]} channels expects {expected}"
            )
