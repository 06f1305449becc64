"""Between the live objects of a run and a checkpoint's named tensors and plain values."""

from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from heterodiff.training.checkpoint import Checkpoint
from heterodiff.training.recipes.diffusion import DiffusionRecipe


def capture(
    step: int, recipe: DiffusionRecipe, optimizer: torch.optim.Optimizer, ema: EMAModel, scaler: Any | None
) -> Checkpoint:
    """All that a run needs to go on bit by bit as if it had not stopped.

    There are no generator states: every random number is drawn from a seed derived from the run's and the step.
    """
    names = [name for name, _ in recipe.model.named_parameters()]
    return Checkpoint(
        step=step,
        tensors={
            "model": dict(recipe.model.state_dict()),
            "ema": dict(zip(names, ema.shadow_params, strict=True)),
            "optimizer": {
                f"{names[index]}/{key}": torch.as_tensor(value)
                for index, state in optimizer.state_dict()["state"].items()
                for key, value in state.items()
            },
            "recipe": recipe.state_dict(),
        },
        state={
            "ema_step": ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
            "torch": torch.__version__,
        },
    )


def restore(
    checkpoint: Checkpoint,
    recipe: DiffusionRecipe,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    scaler: Any | None,
) -> None:
    """Put what :func:`capture` took back into the live objects.

    Raises:
        KeyError, RuntimeError: the checkpoint lacks parts, or belongs to another network.
    """
    tensors, state = checkpoint.tensors, checkpoint.state
    recipe.model.load_state_dict(tensors["model"])
    names = [name for name, _ in recipe.model.named_parameters()]
    for name, shadow in zip(names, ema.shadow_params, strict=True):
        shadow.copy_(tensors["ema"][name])
    ema.optimization_step = state["ema_step"]
    parameters = dict(recipe.model.named_parameters())
    index = {name: i for i, name in enumerate(names)}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors["optimizer"].items():
        name, _, slot = key.rpartition("/")
        if value.shape == parameters[name].shape:  # in the parameter's memory layout, which fused AdamW relies on
            value = torch.empty_like(parameters[name], dtype=value.dtype, device=value.device).copy_(value)
        moments.setdefault(index[name], {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    recipe.load_state_dict(tensors["recipe"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
