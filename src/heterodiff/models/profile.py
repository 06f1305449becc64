"""Cost of networks, found without computing anything: parameters, FLOPs, activation memory; and a table of them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heterodiff.models.hybrid import HybridBlock
from heterodiff.models.variants import NETWORKS, VARIANTS, create_model, list_models

SIZE = ("sample_size", "in_channels", "model_channels", "channel_mult", "attention_resolutions", "num_classes")
OTHER_SIZE = {"film-unet": ("latent_channels", "latent_size", "condition_dim", "model_channels", "channel_mult")}
"""Arguments that the table shows beside those that are given."""


@dataclass(frozen=True)
class ModelProfile:
    """Size and cost of a network; ``dataclasses.asdict`` makes it JSON.

    Attributes:
        variant: name of the network.
        parameters: number of parameters.
        hybrid_parameters: number of parameters in hybrid decoder blocks.
        gflop: 1e9 floating point operations of the forward pass of one image, a multiply-add counted as two. Matrix
            products, convolutions and attention count, the rest does not. Attention counts the keys that are scored:
            those of the sparse pattern's lists, or all of them where it is dense.
        saved_mb: 1e6 bytes a sample that the forward pass keeps for the backward pass in training: distinct storages
            of the tensors that the CPU kernels save, without parameters and without activations that are recomputed.
    """

    variant: str
    parameters: int
    hybrid_parameters: int
    gflop: float
    saved_mb: float


def profile(variant: str, height: int, width: int, batch: int = 1, **config: Any) -> ModelProfile:
    """Profile a network in float32 on images or latents of (height, width), with the condition it was built for.

    The network is built from fake tensors (shapes without values), so this takes little time and memory at any size.

    Args:
        variant: one of ``heterodiff.list_models()``.
        batch: batch size; index lists, which a batch shares, are divided by it in ``saved_mb``.
        **config: arguments of :func:`heterodiff.create_model`.

    Raises:
        ConfigError: arguments that no network can be built from, or a size it cannot take.
    """
    with FakeTensorMode():
        model = create_model(variant, **config).train()
        sample = torch.empty(batch, model.config.in_channels, height, width)
        timestep = torch.zeros(batch)
        labels = None if model.config.num_classes is None else torch.zeros(batch, dtype=torch.long)
        width = model.config.condition_dim
        inputs = (sample, timestep, labels, True, None if width is None else torch.ones(batch, width))
        flops = count_flops(model, *inputs)
        saved = count_saved_bytes(model, *inputs)
    hybrid = (p.numel() for m in model.modules() if isinstance(m, HybridBlock) for p in m.parameters())
    return ModelProfile(
        variant=variant,
        parameters=sum(p.numel() for p in model.parameters()),
        hybrid_parameters=sum(hybrid),
        gflop=flops / batch / 1e9,
        saved_mb=saved / batch / 1e6,
    )


def count_flops(model: nn.Module, *inputs: Any) -> int:
    """Count the FLOPs of ``model(*inputs)`` without gradients, a multiply-add as two; inputs may be fake tensors."""
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch has none for it
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(*inputs)
    return counter.get_total_flops()


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Shapes (..., T, d), (..., S, d), (..., S, e): T S d products for the scores, T S e for the outputs."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def count_saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Count the bytes that ``model(*inputs)`` keeps for its backward pass, without parameters, each storage once.

    Inputs may be fake tensors.
    """
    # Keeping the storages themselves keeps their addresses from being used again.
    parameters = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    del output
    return sum(storage.nbytes() for storage in saved.values())


def model_table(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each network: name, parameters, cost (see :class:`ModelProfile`), summary and configuration.

    Args:
        arguments: arguments of :func:`heterodiff.create_model`. With ``variant`` the table has that network alone;
            without it the whole family, and without any arguments every network.

    Raises:
        ConfigError: arguments that no network can be built from.
    """
    given = dict(arguments)
    names = [given.pop("variant")] if "variant" in given else list(VARIANTS if given else list_models())
    return [_row(name, given) for name in names]


def _row(name: str, given: dict[str, Any]) -> dict[str, Any]:
    with FakeTensorMode():
        filled = create_model(name, **given).config
    height, width = (filled.sample_size,) * 2 if isinstance(filled.sample_size, int) else filled.sample_size
    found = asdict(profile(name, height, width, **given))
    shown = dict.fromkeys([*OTHER_SIZE.get(name, SIZE), *given])
    config = {key: filled[key] for key in shown if filled[key] is not None}
    return {**found, "summary": (VARIANTS | NETWORKS)[name].summary, "config": config}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of :func:`model_table`."""
    table = Table(box=box.SIMPLE)
    table.add_column("variant", no_wrap=True)
    for column in ("parameters", "of it hybrid", "GFLOP", "MB saved"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row['parameters']:,}", f"{row['hybrid_parameters']:,}", f"{row['gflop']:.2f}")
        table.add_row(row["variant"], *numbers, f"{row['saved_mb']:.1f}")
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        console.print(f"{row['variant']}: {row['summary']}")
    console.print("\nGFLOP: forward pass of one image; MB saved: per image, for the backward pass", style="dim")
    configs = _by_config(rows)
    for config, names in configs.items():
        console.print(f"{', '.join(names) + ': ' if len(configs) > 1 else ''}for {config}", style="dim")
    console.print("key=value changes the configuration; --json for programs", style="dim")


def _by_config(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the networks by configuration, as text."""
    found: dict[str, list[str]] = {}
    for row in rows:
        config = ", ".join(f"{key}={value}" for key, value in row["config"].items())
        found.setdefault(config, []).append(row["variant"])
    return found
