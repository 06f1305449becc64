"""The update of a training step: learning rate, clipping, optimisers and EMA, without waiting for the device."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from heterodiff.config import TrainingConfig
from heterodiff.devices import can_fuse_optimizer
from heterodiff.errors import ConfigError
from heterodiff.training.ema import EMA
from heterodiff.training.precision import compute_in, loss_scaler, precision_of
from heterodiff.training.processes import world_size
from heterodiff.training.recipes.base import Recipe


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then constant or a half cosine to zero."""
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
        ConfigError: a precision that the device does not have, or a batch that does not split evenly.
    """
    precision_of(training)
    check_batch(training, world_size())


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
    """

    def __init__(self, recipe: Recipe, training: TrainingConfig, accelerator: Accelerator):
        self.training, self.accelerator = training, accelerator
        self.dtype = precision_of(training)
        self.scaler = loss_scaler(accelerator.device, self.dtype)
        self.main = self._part("model", recipe.model)
        self.adversary = None if recipe.adversary is None else self._part("adversary", recipe.adversary)
        self.ema = EMA(recipe.model.parameters(), decay=training.ema_decay)

    def _part(self, name: str, module: nn.Module) -> Part:
        device = self.accelerator.device
        compute_in(module, device, self.dtype)
        network = self.accelerator.prepare_model(module)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
            fused=can_fuse_optimizer(device),
        )
        return Part(name, module, network, optimizer)

    @property
    def parts(self) -> list[Part]:
        """The networks that are trained, each with its optimiser."""
        return [self.main] if self.adversary is None else [self.main, self.adversary]

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
        norms = [nn.utils.clip_grad_norm_(p.module.parameters(), self.training.max_grad_norm) for p in trained]
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
