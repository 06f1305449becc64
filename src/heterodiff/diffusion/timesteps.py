"""Which training timesteps a batch gets."""

from typing import Protocol

import torch
from torch import Tensor

from heterodiff.errors import ConfigError, unknown_name


class TimestepSampler(Protocol):
    """Draws training timesteps and the weights that keep the expected loss that of uniform timesteps."""

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return t (batch,) int64 in 0..T-1 and loss weights (batch,) float32, both on the CPU."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Tell the unweighted losses (B,) observed at timesteps t (B,)."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""


class UniformTimesteps:
    """Every timestep is equally likely; all weights are 1."""

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`TimestepSampler`."""
        return torch.randint(self.num_train_timesteps, (batch,), generator=generator), torch.ones(batch)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class LossSecondMomentTimesteps:
    """Importance sampling with p_t proportional to sqrt(E[L_t^2]); Nichol & Dhariwal 2021, eq. 18.

    E[L_t^2] is the mean over the last 10 losses of t. Timesteps are uniform until each has 10 losses, and a
    share of 0.1 % stays uniform so that none starves. Losses are kept on the CPU; with several processes
    the caller passes the gathered losses to :meth:`update` so that all processes agree.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps
        self._losses = torch.zeros(num_train_timesteps, self.HISTORY, dtype=torch.float64)
        self._counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Return p_t, (T,) float64, sums to 1."""
        uniform = torch.full((self.num_train_timesteps,), 1 / self.num_train_timesteps, dtype=torch.float64)
        moments = self._losses.square().mean(dim=1).sqrt()
        if (self._counts < self.HISTORY).any() or moments.sum() == 0:
            return uniform
        return (1 - self.UNIFORM_SHARE) * moments / moments.sum() + self.UNIFORM_SHARE * uniform

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`TimestepSampler`; the weights are 1 / (T p_t)."""
        probabilities = self.probabilities()
        t = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
        return t, (1 / (self.num_train_timesteps * probabilities[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """See :class:`TimestepSampler`; losses that are not finite are left out."""
        for step, loss in zip(t.tolist(), losses.detach().double().cpu(), strict=True):
            if torch.isfinite(loss):
                # A ring: the newest loss replaces the oldest one, and their order does not matter.
                self._losses[step, self._counts[step] % self.HISTORY] = loss
                self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses (T, 10) float64 and how many each timestep has seen (T,) int64."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ConfigError: the state belongs to another number of timesteps.
        """
        if state["losses"].shape != self._losses.shape:
            found = state["losses"].shape[0]
            raise ConfigError(f"timestep sampler state of {found} timesteps; this run has {self.num_train_timesteps}")
        self._losses = state["losses"].double().cpu().clone()
        self._counts = state["counts"].long().cpu().clone()


_SAMPLERS: dict[str, type[UniformTimesteps] | type[LossSecondMomentTimesteps]] = {
    "uniform": UniformTimesteps,
    "loss-second-moment": LossSecondMomentTimesteps,
}


def make_timestep_sampler(name: str, num_train_timesteps: int) -> TimestepSampler:
    """Return the sampler called ``name``: ``uniform`` or ``loss-second-moment``.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _SAMPLERS:
        raise ConfigError(unknown_name("timestep sampler", name, _SAMPLERS))
    return _SAMPLERS[name](num_train_timesteps)
