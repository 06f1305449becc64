"""Between the live objects of a run and a checkpoint's named tensors and plain values."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from heterodiff.training.checkpoints.checkpoint import Checkpoint
from heterodiff.training.optimization import Optimization, Part
from heterodiff.training.processes import put
from heterodiff.training.recipes.base import Recipe


def capture(step: int, recipe: Recipe, optimization: Optimization) -> Checkpoint:
    """Return all that a run needs to go on bit by bit as if it had not stopped; tensors may be split over processes.

    There are no generator states: every random number is drawn from a seed derived from the run's and the step.
    """
    names = [name for name, _ in recipe.model.named_parameters()]
    ema = optimization.ema
    tensors: dict[str, Mapping[str, Tensor]] = {
        "ema": dict(zip(names, ema.shadow_params, strict=True)),
        "recipe": recipe.state_dict(),
    }
    for part in optimization.parts:
        tensors[part.name] = dict(part.module.state_dict())
        tensors[part.optimizer_group] = _optimizer_tensors(part)
    scaler = optimization.scaler.state_dict() or None
    return Checkpoint(step, tensors, {"ema_step": ema.optimization_step, "scaler": scaler, "torch": torch.__version__})


def _optimizer_tensors(part: Part) -> dict[str, Tensor]:
    names = [name for name, _ in part.module.named_parameters()]
    return {
        f"{names[index]}/{key}": value if isinstance(value, Tensor) else torch.as_tensor(value)
        for index, state in part.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore(checkpoint: Checkpoint, recipe: Recipe, optimization: Optimization) -> None:
    """Put what :func:`capture` took back into the live objects.

    Raises:
        KeyError, RuntimeError: the checkpoint lacks parts, or belongs to another network.
    """
    tensors, state, ema = checkpoint.tensors, checkpoint.state, optimization.ema
    for part in optimization.parts:
        _restore_weights(part, tensors[part.name])
        if checkpoint.weights_only:
            continue
        _restore_optimizer(part, tensors[part.optimizer_group])
    names = [name for name, _ in recipe.model.named_parameters()]
    for name, shadow in zip(names, ema.shadow_params, strict=True):
        put(tensors["ema"][name], shadow)
    if "recipe" in tensors or not checkpoint.weights_only:
        recipe.load_state_dict(dict(tensors["recipe"]))
    if checkpoint.weights_only:
        ema.optimization_step = checkpoint.step
        return
    ema.optimization_step = state["ema_step"]
    if optimization.scaler.is_enabled() and state["scaler"] is not None:
        optimization.scaler.load_state_dict(state["scaler"])


def _restore_weights(part: Part, tensors: Mapping[str, Tensor]) -> None:
    own = part.module.state_dict()
    if not any(isinstance(value, DTensor) for value in own.values()):
        part.module.load_state_dict(tensors)
        return
    if different := sorted(own.keys() ^ set(tensors)):
        raise RuntimeError(f"{part.name}: {different[0]} is missing here or there")
    for name, target in own.items():
        values = tensors[name]
        if values.shape != target.shape:
            raise RuntimeError(f"{name}: expected {tuple(target.shape)}, found {tuple(values.shape)}")
        put(values, target)


def _restore_optimizer(part: Part, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(part.module.named_parameters())
    index = {name: i for i, name in enumerate(parameters)}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if value.shape == parameters[name].shape:  # in the parameter's memory layout, which fused AdamW relies on
            whole, value = value, torch.empty_like(parameters[name], dtype=value.dtype)
            put(whole, value)
        moments.setdefault(index[name], {})[slot] = value
    groups = part.optimizer.state_dict()["param_groups"]
    part.optimizer.load_state_dict({"state": moments, "param_groups": groups})
