"""The exponential moving average of a network's weights, updated without waiting for the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages ``shadow += w (parameter - shadow)``, all parameters in a few kernels.

    w of step n is 1 at first, then 9 / (9 + n), so that early averages follow the weights, and finally 1 - decay (the
    warm-up of diffusers' ``EMAModel``).

    Args:
        parameters: of the network; those that are not trained stay as they are.
        decay: in [0, 1).

    Attributes:
        shadow_params: the averages, in the order of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay = decay
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]
        self._steps = torch.zeros((), device=self.shadow_params[0].device)

    @property
    def optimization_step(self) -> int:
        """Number of steps that were not left out; reading it waits for the device."""
        return int(self._steps)

    @optimization_step.setter
    def optimization_step(self, steps: int) -> None:
        self._steps.fill_(steps)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter], left_out: Tensor) -> None:
        """Take in ``parameters``, unless ``left_out`` (a scalar on their device, 0 or 1) is 1."""
        counts = 1 - left_out
        self._steps += counts
        weight = torch.where(self._steps > 1, (9 / (9 + self._steps)).clamp(min=1 - self.decay), 1.0) * counts
        trained = [(s, p) for s, p in zip(self.shadow_params, parameters, strict=True) if p.requires_grad]
        shadows, values = [s for s, _ in trained], [p.detach() for _, p in trained]
        change = torch._foreach_sub(values, shadows)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(shadows, change)

    @contextmanager
    def applied_to(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Replace ``parameters`` by the averages inside the context."""
        values = [parameter.detach() for parameter in parameters]
        stored = [value.clone() for value in values]
        torch._foreach_copy_(values, self.shadow_params)
        try:
            yield
        finally:
            torch._foreach_copy_(values, stored)
