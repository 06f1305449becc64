"""Training a small part of a network: low-rank updates of frozen weights (LoRA), or the weights of its condition."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heterodiff.config import ModelConfig
from heterodiff.errors import ConfigError

CLASSES = "label_emb.weight"
"""The class table, which is trained whole in every mode: LoRA has no updates for embeddings of new classes."""
OF_CONDITION = re.compile(r"(label_emb|class_emb|attribute_emb)\..*|.*\.(encoder_kv|condition_token)\..*")
"""Weights that a network has for its condition alone."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
IN_PROJECTION = "in_proj_weight"
"""Queries, keys and values of attention layers that hold them as one matrix."""
MOST_SHARE, MOST_RANK = 0.05, 16
"""The default rank is the largest with which at most this share of the weights is trained."""
ADAPTER, PREFIX = "adapter", "base_model.model."
"""Folder of the updates in a run, and the beginning of their names in peft's files."""
_PART = re.compile(r"parametrizations\.(\w+)\.(original|0\.(lora_A|lora_B))")


class LowRank(nn.Module):
    """The parametrization W + B A of a weight (Hu et al. 2021, eq. 3), which starts at W.

    A weight (out, in, ...) has the factors A (rank, in, ...) and B (out, rank, 1, ...), as in peft's layers. Whoever
    reads the weight gets the sum, so networks may compute with it in any way, not only through the layer's own pass.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).view_as(weight)


def _targets(network: nn.Module, rank: int) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, layer and name of the weight of all that low-rank updates of ``rank`` are smaller than."""
    for name, module in network.named_modules():
        key = "weight" if isinstance(module, LAYERS) else IN_PROJECTION
        weight = getattr(module, key, None)
        if isinstance(weight, nn.Parameter) and rank < min(len(weight), weight[0].numel()):
            yield name, module, key


def _default_rank(network: nn.Module) -> int:
    """Return the largest rank that trains at most ``MOST_SHARE`` of the weights; 1 where none does."""
    count = sum(p.numel() for p in network.parameters())
    table = dict(network.named_parameters()).get(CLASSES)
    for rank in range(MOST_RANK, 1, -1):
        weights = (getattr(module, key) for _, module, key in _targets(network, rank))
        trained = sum(rank * (len(weight) + weight[0].numel()) for weight in weights)
        if trained + (0 if table is None else table.numel()) <= MOST_SHARE * count:
            return rank
    return 1


def train_part(network: nn.Module, model: ModelConfig) -> None:
    """Freeze ``network``, in place, but for what ``model.train`` names.

    Raises:
        ConfigError: the network has nothing of that kind.
    """
    if model.train == "all":
        return
    table = dict(network.named_parameters()).get(CLASSES)
    network.requires_grad_(False)
    if model.train == "conditions":
        chosen = [p for name, p in network.named_parameters() if OF_CONDITION.fullmatch(name)]
        if not chosen:
            raise ConfigError(
                f"model.train=conditions: {model.variant} has no weights of a condition, since the images have no "
                "classes; use lora or all, or images with classes"
            )
    else:
        chosen = [] if table is None else [table]
        rank = model.lora_rank or _default_rank(network)
        targets = list(_targets(network, rank))
        if not targets:
            raise ConfigError(
                f"model.train=lora: {model.variant} has no attention, linear or convolution layer that is wider than "
                f"model.lora_rank={rank}; lower it, or use model.train=all"
            )
        for _, module, key in targets:
            parametrize.register_parametrization(module, key, LowRank(getattr(module, key), rank), unsafe=True)
    for parameter in chosen:
        parameter.requires_grad_(True)


def adapted(network: nn.Module) -> bool:
    """Return whether ``network`` has low-rank updates."""
    return any(isinstance(module, LowRank) for module in network.modules())


def base_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``network`` by the names that they have without low-rank updates."""
    every = dict((*network.named_parameters(), *network.named_buffers()))
    of_updates = {name for name in every if name.endswith((".lora_A", ".lora_B"))}
    return {_PART.sub(r"\1", name): value for name, value in every.items() if name not in of_updates}


@torch.no_grad()
def merged(network: Any) -> Any:
    """Return a network of the same class without low-rank updates, which are added to its weights."""
    state = {name: value.detach() for name, value in base_tensors(network).items()}
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            for key in module.parametrizations:
                state[f"{name}.{key}"] = getattr(module, key)
    with torch.device("meta"):  # no random numbers for weights that are replaced at once
        plain = type(network).from_config(dict(network.config))
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def save_updates(network: nn.Module, folder: Path, base: Path) -> None:
    """Write the low-rank updates of ``network`` and its class table to ``folder``, in peft's layout.

    Args:
        base: run that the updates belong to.
    """
    from peft import LoraConfig  # takes seconds to import

    modules = dict(network.named_modules())
    updated = {name: key for name, module in modules.items() for key in getattr(module, "parametrizations", ())}
    of_parameters = [name for name, key in updated.items() if key == IN_PROJECTION]
    tensors, rank = dict[str, Tensor](), 0
    for name, key in updated.items():
        outer = next((outer for outer in of_parameters if name.startswith(f"{outer}.")), None)
        known = name if outer is None else f"{outer}.base_layer{name.removeprefix(outer)}"  # peft wraps the outer one
        update: Any = modules[f"{name}.parametrizations.{key}.0"]
        tensors[f"{PREFIX}{known}.lora_A.weight"] = update.lora_A
        tensors[f"{PREFIX}{known}.lora_B.weight"] = update.lora_B
        rank = len(update.lora_A)
    table = dict(network.named_parameters()).get(CLASSES)
    if table is not None:
        tensors[PREFIX + CLASSES] = table
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # which weighs the updates by 1
        target_modules=sorted(updated.keys() - set(of_parameters)),
        target_parameters=sorted(f"{name}.{IN_PROJECTION}" for name in of_parameters) or None,
        modules_to_save=None if table is None else [CLASSES.partition(".")[0]],
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    values = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})
