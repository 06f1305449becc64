"""Initial weights of a denoiser: those of another run, to go on from with other images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import CheckpointError, ConfigError, RunError
from heterodiff.models.blocks import AttentionBlock
from heterodiff.models.variants import alike
from heterodiff.pipelines.load import load_generation
from heterodiff.training.processes import put, whole
from heterodiff.training.recipes.adapting import CLASSES, OF_CONDITION, adapted, base_tensors

FREE = (
    "sample_size",
    "num_classes",
    "attributes",
    "dropout",
    "use_checkpoint",
    "memory_optimization",
    "zero_threshold",
    "variant",
)
"""Arguments of networks that may differ though the weights fit."""

UNSEEN = ("activation", "attention_pattern")
"""Arguments that change what a network computes, but not the shapes of its weights."""


def start_from(path: Path, network: Any, prediction: str, class_names: Sequence[str]) -> list[str]:
    """Give ``network`` the weights of the run or model folder at ``path``; those of unknown classes stay fresh.

    Args:
        network: the denoiser, whose weights may be split over processes.
        prediction: what it is trained to predict.
        class_names: its classes, of which those that the run knows by name begin with the run's embeddings.

    Returns:
        A note on what was taken over.

    Raises:
        ConfigError: another architecture or prediction than the run's; what differs is named.
        RunError, CheckpointError: no such run, one that draws no images of classes, or damaged weights.
    """
    try:
        source = load_generation(path, "cpu", dtype="float32")
    except (RunError, CheckpointError) as error:
        raise type(error)(f"model.init_from: {error}") from None
    _refuse_unlike(path, source.unet, network)
    if (known := source.denoiser.prediction) != prediction:
        raise ConfigError(
            f"model.init_from={path}: its network predicts {known}, diffusion.prediction is {prediction}; set "
            f"diffusion.prediction={known}"
        )
    found, fresh = source.unet.state_dict(), []
    for name, target in base_tensors(network).items():  # a state dict may hold copies
        if name == CLASSES and name in found:
            values, taken = _class_rows(whole(target), found[name], class_names, source.class_names)
            put(values, target)
            fresh += [f"{len(values) - taken} of {len(values)} classes"] if taken < len(values) else []
        elif name in found:
            put(found[name], target)
        else:
            fresh.append(name)
    if adapted(network) and (random := [name for name in fresh if OF_CONDITION.fullmatch(name)]):
        raise ConfigError(
            f"model.init_from={path}: it was trained without classes, and model.train=lora would leave the weights "
            f"that it lacks for them ({random[0]}, ...) random; use model.train=conditions or all"
        )
    more = f" and {len(fresh) - 3} more" if len(fresh) > 3 else ""
    return [f"begins with the weights of {path}" + (f"; new: {', '.join(fresh[:3])}{more}" if fresh else "")]


def _refuse_unlike(path: Path, source: Any, network: Any) -> None:
    if source.config.variant not in alike(network.config.variant):
        raise ConfigError(
            f"model.init_from={path}: a network {source.config.variant}, model.variant is {network.config.variant}; "
            f"set model.variant={source.config.variant}"
        )
    keys = [key for key in network.config if not key.startswith("_") and key not in FREE]
    differing = [key for key in keys if _plain(source.config.get(key)) != _plain(network.config[key])]
    there, here = ({name: tuple(value.shape) for name, value in base_tensors(of).items()} for of in (source, network))
    wrong = [
        name
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not OF_CONDITION.fullmatch(name)
    ]
    if wrong:
        values = ((key, source.config.get(key), network.config[key]) for key in differing)
        what = [f"{key} {_plain(known)} there, {_plain(own)} here" for key, known, own in values]
        raise ConfigError(
            f"model.init_from={path}: its network has another architecture: {'; '.join(what) or wrong[0]}; make the "
            "two alike"
        )
    odd_key = next((key for key in UNSEEN if key in differing), None)
    if odd_key is None and _heads(source) != _heads(network):
        odd_key = "num_heads" if source.config.num_head_channels is None else "num_head_channels"
    if odd_key is not None:
        known, own = (_plain(of.config[odd_key]) for of in (source, network))
        raise ConfigError(
            f"model.init_from={path}: its network has {odd_key} {known}, this one {own}: equal weights would compute "
            f"something else; set model.{odd_key}={known}"
        )
    embedded = [name for name in there if OF_CONDITION.fullmatch(name) and name != CLASSES and name in here]
    if odd := [name for name in embedded if there[name] != here[name]]:
        raise CheckpointError(f"{path}: {odd[0]}: expected {here[odd[0]]}, found {there[odd[0]]}")


def _heads(network: Any) -> dict[str, int]:
    return {name: part.num_heads for name, part in network.named_modules() if isinstance(part, AttentionBlock)}


def refuse_other_arguments(known: Mapping[str, Any], network: Any) -> None:
    """Raise ConfigError unless ``network`` computes what one with the arguments ``known`` does, given its weights."""
    own = network.config
    keys = [key for key in own if not key.startswith("_") and key not in FREE and key in known]
    if differing := [key for key in keys if _plain(known[key]) != _plain(own[key])]:
        found = "; ".join(f"{key} {_plain(known[key])}, here {_plain(own[key])}" for key in differing)
        raise ConfigError(f"a run cannot have a network with these arguments: {found}; import it without --config")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def _class_rows(own: Tensor, known: Tensor, names: Sequence[str], known_names: Sequence[str]) -> tuple[Tensor, int]:
    """Return the class table ``own`` (K, D) with the rows of ``known`` classes, by name, and how many these are."""
    rows = own.detach().clone()
    if own.shape[1] != known.shape[1]:
        return rows, 0
    if not names or not known_names:  # by number, where classes have no names
        pairs = [(k, k) for k in range(min(len(own), len(known)))] if len(own) == len(known) else []
    else:
        pairs = [(k, known_names.index(name)) for k, name in enumerate(names) if name in known_names]
    for here, there in pairs:
        rows[here] = known[there].to(rows)
    return rows, len(pairs)
