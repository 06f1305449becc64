"""Noise schedules: the shares of image and noise in ``z_t = alpha_t x0 + sigma_t eps``."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from heterodiff.config import DiffusionConfig
from heterodiff.errors import ConfigError

# Our names of schedules and predictions, and those of diffusers.
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}

MAX_BETA = 0.999


def _linear_beta_range(num_train_timesteps: int) -> tuple[float, float]:
    """First and last beta: 1e-4 and 0.02 at T = 1000 (Ho et al. 2020), scaled by 1000/T to keep the end SNR."""
    scale = 1000 / num_train_timesteps
    return min(1e-4 * scale, MAX_BETA), min(0.02 * scale, MAX_BETA)


def _cosine_betas(num_train_timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008; shape (T,)."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


def _betas_of(scheduler: Any) -> Tensor:
    """Return betas (T,) in float64; our own two schedules are computed anew, not read back from float32."""
    config = scheduler.config
    plain = config.get("trained_betas") is None and not config.get("rescale_betas_zero_snr", False)
    if plain and config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64)
    if plain and config.beta_schedule == "squaredcos_cap_v2":
        return _cosine_betas(config.num_train_timesteps)
    return scheduler.betas.double()


class Lookup:
    """A table over the training timesteps, in float32 on the device where it was last looked up.

    Args:
        table: (T,) float64 on the CPU.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table.float()

    def __call__(self, t: Tensor) -> Tensor:
        """Return the values at timesteps ``t`` (B,) as (B, 1, 1, 1) on their device."""
        if self._table.device != t.device:
            self._table = self._table.to(t.device)  # kept: a copy at every step would cost a transfer each time
        return self._table[t].view(-1, 1, 1, 1)


@dataclass(frozen=True)
class NoiseSchedule:
    """Table of alpha_t and sigma_t over the training timesteps t = 0..T-1; 0 is nearly clean.

    Attributes:
        kind: ``vp`` (alpha^2 + sigma^2 = 1; Ho et al. 2020) or ``flow`` (alpha = 1 - sigma; Lipman et al. 2023).
        alpha: (T,) float64 on the CPU, in [0, 1].
        sigma: (T,) float64 on the CPU, in (0, 1].
        time: (T,) float64, the network's time input at t: t itself, or t + 1 = sigma T for ``flow``.
    """

    kind: Literal["vp", "flow"]
    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @classmethod
    def _from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        steps = torch.arange(len(betas), dtype=torch.float64)
        return cls("vp", alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), steps)

    @classmethod
    def _flow(cls, num_train_timesteps: int) -> "NoiseSchedule":
        time = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64)
        sigma = time / num_train_timesteps
        return cls("flow", 1 - sigma, sigma, time)

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> "NoiseSchedule":
        """Build the schedule that ``config`` trains with."""
        return cls.from_scheduler(training_scheduler(config))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Build the schedule that a model saved with this diffusers ``scheduler`` was trained with.

        Raises:
            ConfigError: neither a scheduler with betas nor an unshifted FlowMatchEulerDiscreteScheduler.
        """
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            config = scheduler.config
            if config.shift != 1.0 or config.use_dynamic_shifting or config.invert_sigmas:
                raise ConfigError("flow scheduler: expected shift 1 without dynamic shifting or inversion")
            return cls._flow(config.num_train_timesteps)
        if not hasattr(scheduler, "betas"):
            name = type(scheduler).__name__
            raise ConfigError(f"cannot read a noise schedule from {name}: expected a scheduler with betas")
        return cls._from_betas(_betas_of(scheduler))

    @property
    def num_train_timesteps(self) -> int:
        """Number T of training timesteps."""
        return len(self.time)

    @property
    def log_snr(self) -> Tensor:
        """(T,) float64, decreasing: log(alpha^2 / sigma^2); the last one of ``flow`` is -inf."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def at(self, time: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at network times, fractional ones included.

        ``flow`` is exact; ``vp`` interpolates the log-SNR linearly in t. Times outside the table are clamped.

        Returns:
            two tensors like ``time``: float64 if ``time`` is (a Python number or float64), else float32.
        """
        times = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float64)
        where = times.detach().double().cpu().clamp(self.time[0].item(), self.time[-1].item())
        if self.kind == "flow":
            sigma = where / self.num_train_timesteps
            alpha = 1 - sigma
        else:
            low = where.floor().long().clamp(max=self.num_train_timesteps - 2)
            log_snr = torch.lerp(self.log_snr[low], self.log_snr[low + 1], where - low)
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        dtype = torch.float64 if times.dtype == torch.float64 else torch.float32
        return alpha.to(dtype).to(times.device), sigma.to(dtype).to(times.device)

    def time_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Return the network times with these log-SNRs, float64 on the CPU: the inverse of :meth:`at`.

        Values beyond the table are clamped to its ends.
        """
        values = torch.as_tensor(log_snr, dtype=torch.float64).detach().cpu()
        if self.kind == "flow":
            sigma = torch.sigmoid(-values / 2)
            return (sigma * self.num_train_timesteps).clamp(1, self.num_train_timesteps)
        rising = self.log_snr.flip(0)
        values = values.clamp(rising[0].item(), rising[-1].item())
        high = torch.searchsorted(rising, values).clamp(1, len(rising) - 1)
        share = (values - rising[high - 1]) / (rising[high] - rising[high - 1])
        return (len(rising) - 1) - (high - 1 + share)

    # The tables for timesteps on any device.
    alpha_at = cached_property(lambda self: Lookup(self.alpha))
    sigma_at = cached_property(lambda self: Lookup(self.sigma))
    time_at = cached_property(lambda self: Lookup(self.time))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t = alpha_t x0 + sigma_t eps for x0 and noise (B, C, H, W) at timesteps (B,) int64."""
        return self.alpha_at(t) * x0 + self.sigma_at(t) * eps


def training_scheduler(config: DiffusionConfig, clip_sample: bool = False) -> Any:
    """Return the diffusers scheduler that describes the training; saved in a run folder's ``scheduler/``.

    Plain diffusers pipelines sample with it: a DDPMScheduler, or a FlowMatchEulerDiscreteScheduler for
    ``prediction: flow``.

    Args:
        clip_sample: whether the data lie in [-1, 1], so that predicted x0 may be clipped to it.
    """
    steps = config.num_train_timesteps
    if config.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=1.0)
    beta_start, beta_end = _linear_beta_range(steps)
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=BETA_SCHEDULES[config.schedule],
        prediction_type=PREDICTION_TYPES[config.prediction],
        variance_type="learned_range" if config.learn_variance else "fixed_small",
        clip_sample=clip_sample,
        timestep_spacing="trailing",  # sampling must start at pure noise: Lin et al. 2024, section 3.3
    )


def prediction_of(scheduler: Any) -> str:
    """Return our name of the prediction that a diffusers ``scheduler`` is for; raises ConfigError if we have none."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    found = scheduler.config.get("prediction_type")
    names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if found not in names:
        raise ConfigError(f"scheduler: prediction_type '{found}'; expected one of {', '.join(names)}")
    return names[found]
