"""Between the live objects of a run and a checkpoint's named tensors and plain values."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heterodiff.training.checkpoints.checkpoint import Checkpoint
from heterodiff.training.ema import EMA
from heterodiff.training.recipes.base import Recipe


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


def capture(step: int, recipe: Recipe, parts: list[Part], ema: EMA, scaler: torch.amp.GradScaler) -> Checkpoint:
    """All that a run needs to go on bit by bit as if it had not stopped.

    There are no generator states: every random number is drawn from a seed derived from the run's and the step.
    """
    names = [name for name, _ in recipe.model.named_parameters()]
    tensors: dict[str, dict[str, Tensor]] = {
        "ema": dict(zip(names, ema.shadow_params, strict=True)),
        "recipe": recipe.state_dict(),
    }
    for part in parts:
        tensors[part.name] = dict(part.module.state_dict())
        tensors[part.optimizer_group] = _optimizer_tensors(part)
    return Checkpoint(
        step=step,
        tensors=tensors,
        state={
            "ema_step": ema.optimization_step,
            "scaler": scaler.state_dict() or None,
            "torch": torch.__version__,
        },
    )


def _optimizer_tensors(part: Part) -> dict[str, Tensor]:
    names = [name for name, _ in part.module.named_parameters()]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, state in part.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore(checkpoint: Checkpoint, recipe: Recipe, parts: list[Part], ema: EMA, scaler: torch.amp.GradScaler) -> None:
    """Put what :func:`capture` took back into the live objects.

    Raises:
        KeyError, RuntimeError: the checkpoint lacks parts, or belongs to another network.
    """
    tensors, state = checkpoint.tensors, checkpoint.state
    for part in parts:
        part.module.load_state_dict(tensors[part.name])
        _restore_optimizer(part, tensors[part.optimizer_group])
    names = [name for name, _ in recipe.model.named_parameters()]
    for name, shadow in zip(names, ema.shadow_params, strict=True):
        shadow.copy_(tensors["ema"][name])
    ema.optimization_step = state["ema_step"]
    recipe.load_state_dict(tensors["recipe"])
    if scaler.is_enabled() and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])


def _restore_optimizer(part: Part, tensors: dict[str, Tensor]) -> None:
    parameters = dict(part.module.named_parameters())
    index = {name: i for i, name in enumerate(parameters)}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if value.shape == parameters[name].shape:  # in the parameter's memory layout, which fused AdamW relies on
            value = torch.empty_like(parameters[name], dtype=value.dtype, device=value.device).copy_(value)
        moments.setdefault(index[name], {})[slot] = value
    groups = part.optimizer.state_dict()["param_groups"]
    part.optimizer.load_state_dict({"state": moments, "param_groups": groups})
