"""Samplers of the training timesteps of a batch."""

import torch
from torch import Tensor

from heterodiff.devices import double_dtype
from heterodiff.errors import ConfigError, unknown_name


class UniformTimesteps:
    """Draws all training timesteps equally often; base class of samplers that learn from the losses.

    Attributes:
        learns: whether :meth:`update` changes the draws.
    """

    learns = False

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``, where losses are observed."""

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return t (batch,) int64 in 0..T-1 and loss weights (batch,) float32, both on the generator's device.

        The weights keep the expected loss that of uniform timesteps.
        """
        device = generator.device
        t = torch.randint(self.num_train_timesteps, (batch,), generator=generator, device=device)
        return t, torch.ones(batch, device=device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Observe the unweighted losses (B,) at timesteps t (B,), without waiting for the device."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""


class LossSecondMomentTimesteps(UniformTimesteps):
    """Importance sampling with p_t proportional to sqrt(E[L_t^2]); Nichol & Dhariwal 2021, eq. 18.

    E[L_t^2] is the mean over the last 10 losses of t. Timesteps are uniform until each has 10 losses, and a
    share of 0.1 % stays uniform. Several processes must pass the gathered losses to :meth:`update` to agree.
    """

    learns = True
    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__(num_train_timesteps)
        # The last row takes losses that do not count, so that no step has to ask the device which ones those are.
        self._losses = torch.zeros(num_train_timesteps + 1, self.HISTORY, dtype=torch.float64)
        self._counts = torch.zeros(num_train_timesteps + 1, dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        self._losses = self._losses.to(device, double_dtype(device))
        self._counts = self._counts.to(device)

    def probabilities(self) -> Tensor:
        """Return p_t, (T,) float64 (float32 on devices without it), sums to 1."""
        losses, counts = self._losses[:-1], self._counts[:-1]
        uniform = torch.full_like(losses[:, 0], 1 / self.num_train_timesteps)
        moments = losses.square().mean(dim=1).sqrt()
        total = moments.sum()
        learned = (1 - self.UNIFORM_SHARE) * moments / total + self.UNIFORM_SHARE * uniform
        return torch.where((counts >= self.HISTORY).all() & (total > 0), learned, uniform)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :meth:`UniformTimesteps.sample`; the weights are 1 / (T p_t)."""
        probabilities = self.probabilities()
        if torch.are_deterministic_algorithms_enabled() and probabilities.device.type != "cpu":
            t = draw_by_race(probabilities, batch, generator)
        else:
            t = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
        return t, (1 / (self.num_train_timesteps * probabilities[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """See :meth:`UniformTimesteps.update`; losses that are not finite are left out."""
        losses = losses.detach().to(self._losses.dtype)
        scrap = self.num_train_timesteps
        row = torch.where(torch.isfinite(losses), t, scrap)
        alike = row[:, None] == row[None]
        slot = (self._counts[row] + alike.tril(-1).sum(dim=1)) % self.HISTORY  # the newest replaces the oldest
        # If there are more losses than a row holds, only the last are written: writes to one place have no order.
        written = torch.where(alike.triu(1).sum(dim=1) < self.HISTORY, row, scrap)
        self._losses.index_put_((written, slot), losses)
        self._counts.index_add_(0, row, torch.ones_like(row))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses (T, 10) float64 and their number at each timestep (T,) int64."""
        return {"losses": self._losses[:-1].double(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ConfigError: the state belongs to another number of timesteps.
        """
        if state["losses"].shape != self._losses[:-1].shape:
            found = state["losses"].shape[0]
            raise ConfigError(f"timestep sampler state of {found} timesteps; this run has {self.num_train_timesteps}")
        self._losses[:-1].copy_(state["losses"])
        self._counts[:-1].copy_(state["counts"])


def draw_by_race(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` indices by their probabilities: the first of exponential clocks with these rates.

    torch.multinomial draws by a cumulative sum, which has no deterministic kernel on CUDA.
    """
    clocks = torch.empty(count, len(probabilities), device=probabilities.device).exponential_(generator=generator)
    return (clocks / probabilities).argmin(dim=1)


_SAMPLERS = {"uniform": UniformTimesteps, "loss-second-moment": LossSecondMomentTimesteps}


def make_timestep_sampler(name: str, num_train_timesteps: int) -> UniformTimesteps:
    """Return the sampler called ``name``: ``uniform`` or ``loss-second-moment``.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _SAMPLERS:
        raise ConfigError(unknown_name("timestep sampler", name, _SAMPLERS))
    return _SAMPLERS[name](num_train_timesteps)
