"""The update of a training step: learning rate, clipping, optimisers and EMA, without waiting for the device."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from heterodiff.config import TrainingConfig
from heterodiff.devices import can_fuse_optimizer, process_count
from heterodiff.errors import ConfigError
from heterodiff.training.precision import compute_in, loss_scaler, precision_of
from heterodiff.training.processes import gather_into, split_weights, whole
from heterodiff.training.recipes.base import Recipe

PARAMETERS, LEARNING_RATE, RATE_BOUNDS = 2e6, 1e-3, (5e-5, 2e-3)
"""Default learning rate: LEARNING_RATE for PARAMETERS, in inverse proportion to their root, within the bounds."""
WARMUP_SHARE, MOST_WARMUP = 0.05, 500
EMA_SHARE, MOST_EMA = 0.1, 0.9999
"""The EMA averages over this share of the steps."""


def with_rates(training: TrainingConfig, parameters: int) -> TrainingConfig:
    """Return ``training`` with learning rate, warm-up and EMA, where they are not given.

    They follow the number of steps and of ``parameters`` of the network.
    """
    low, high = RATE_BOUNDS
    rate = min(high, max(low, LEARNING_RATE * (PARAMETERS / parameters) ** 0.5))
    found = {
        "learning_rate": float(f"{rate:.2g}"),
        "warmup_steps": min(MOST_WARMUP, round(WARMUP_SHARE * training.steps)),
        "ema_decay": float(f"{min(MOST_EMA, max(0.0, 1 - 1 / (EMA_SHARE * training.steps))):.5g}"),
    }
    return training.model_copy(update={key: value for key, value in found.items() if getattr(training, key) is None})


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then constant or a half cosine to zero.

    Args:
        config: from :func:`with_rates`.
    """
    assert config.learning_rate is not None
    assert config.warmup_steps is not None
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_training(training: TrainingConfig) -> None:
    """Refuse settings that cannot work on this machine, before data are read.

    Raises:
        ConfigError: a precision that the device does not have, weights that are both split and compiled, or a batch
            that does not split evenly.
    """
    precision_of(training)
    if training.fsdp and training.compile is True:
        raise ConfigError("training.fsdp=true does not go with training.compile=true; leave one of them out")
    check_batch(training, process_count())


def check_batch(training: TrainingConfig, processes: int) -> None:
    """Check that a batch splits evenly.

    Raises:
        ConfigError: it does not.
    """
    parts = processes * training.accumulation_steps
    if training.batch_size % parts:
        raise ConfigError(
            f"training.batch_size={training.batch_size} does not split into {processes} process(es) x "
            f"{training.accumulation_steps} accumulation_steps; use a multiple of {parts}"
        )


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Step ``optimizer`` unless ``left_out`` (bool scalar on the device); only optimisers that cannot fuse wait."""
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = None, left_out.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(left_out):
        optimizer.step()


class EMA:
    """Averages ``shadow += w (parameter - shadow)``, all parameters in a few kernels.

    w of step n is 1 at first, then 9 / (9 + n), so that early averages follow the weights, and finally 1 - decay (the
    warm-up of diffusers' ``EMAModel``).

    Args:
        parameters: of the network; those that are not trained are their own averages.
        decay: in [0, 1).

    Attributes:
        shadow_params: the averages, in the order of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay = decay
        values = ((parameter.detach(), parameter.requires_grad) for parameter in parameters)
        self.shadow_params = [value.clone() if trained else value for value, trained in values]
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


@dataclass
class Part:
    """A network that is trained: the module, the module as wrapped for training, and its optimiser."""

    name: str
    module: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def optimizer_group(self) -> str:
        """Name of the optimiser's tensors in a checkpoint."""
        return "optimizer" if self.name == "model" else f"{self.name}_optimizer"


class Optimization:
    """The trained networks of a recipe with their optimisers, the EMA of its model, and the loss scaling of float16.

    Attributes:
        main: the recipe's model, as a :class:`Part`; ``adversary`` likewise, or None.
        splits: True where weights and all that belongs to them are split over the processes.
    """

    def __init__(self, recipe: Recipe, training: TrainingConfig, accelerator: Accelerator):
        assert training.learning_rate is not None
        assert training.ema_decay is not None
        self.training, self.accelerator = training, accelerator
        self.dtype = precision_of(training)
        self.scaler = loss_scaler(accelerator.device, self.dtype)
        self.splits = training.fsdp and accelerator.num_processes > 1
        self._whole = copy.deepcopy(recipe.model) if self.splits and accelerator.is_main_process else None
        if self._whole is not None:
            compute_in(self._whole, accelerator.device, self.dtype)
        self.main = self._part("model", recipe.model)
        self.adversary = None if recipe.adversary is None else self._part("adversary", recipe.adversary)
        self.ema = EMA(recipe.model.parameters(), decay=training.ema_decay)

    def _part(self, name: str, module: nn.Module) -> Part:
        device = self.accelerator.device
        compute_in(module, device, self.dtype)
        network = split_weights(module.to(device)) if self.splits else self.accelerator.prepare_model(module)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=learning_rate_at(0, self.training),
            weight_decay=self.training.weight_decay,
            fused=can_fuse_optimizer(device),
        )
        return Part(name, module, network, optimizer)

    @property
    def parts(self) -> list[Part]:
        """The networks that are trained, each with its optimiser."""
        return [self.main] if self.adversary is None else [self.main, self.adversary]

    @contextmanager
    def ema_weights(self, recipe: Recipe) -> Iterator[None]:
        """Let ``recipe`` use the EMA weights in place of the trained ones; where they are split, all processes enter.

        Split weights are put together in a network of the first process, which takes the place of the recipe's.
        """
        model = recipe.model
        if not self.splits:
            with self.ema.applied_to(model.parameters()):
                model.eval()
                yield
            return
        gather_into(self._whole, model, self.ema.shadow_params)
        if self._whole is not None:
            recipe.model = self._whole.to(self.accelerator.device).eval()
        try:
            yield
        finally:
            recipe.model = model
            if self._whole is not None:
                self._whole.cpu()

    def backward(self, losses: Tensor) -> None:
        """Add the gradients of the mean of ``losses`` (B,), of one of the parts that a batch is computed in."""
        self.scaler.scale(losses.mean() / self.training.accumulation_steps).backward()

    def update(self, step: int, trained: list[Part]) -> tuple[Tensor, Tensor]:
        """Clip the gradients and step the optimisers and the EMA, unless a gradient is not finite.

        Whether one is stays on the device, where fused optimisers read it: their weights and moments then stay as
        they are.

        Args:
            step: 0-based.
            trained: those of ``parts`` that have gradients.

        Returns:
            Norm of the model's gradient, and whether the step was left out (bool scalar).
        """
        for part in trained:
            if self.scaler.is_enabled():
                self.scaler.unscale_(part.optimizer)
        norms = [whole(nn.utils.clip_grad_norm_(p.module.parameters(), self.training.max_grad_norm)) for p in trained]
        left_out = ~torch.isfinite(torch.stack(norms)).all()
        for part in trained:
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate_at(step, self.training)
            step_unless(part.optimizer, left_out)
        for part in self.parts:
            part.optimizer.zero_grad()
        self.ema.step(self.main.module.parameters(), left_out.float())
        if self.scaler.is_enabled():
            self.scaler.update()
        return norms[0], left_out
