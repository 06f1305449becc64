"""Cost of a network: parameters, FLOPs and activation memory, found without computing anything."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heterodiff.models.hybrid import HybridBlock
from heterodiff.models.variants import create_model


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
