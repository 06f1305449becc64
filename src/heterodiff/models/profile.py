"""What a network costs: parameters, FLOPs and activation memory, found without computing anything."""

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
        parameters: their number.
        hybrid_parameters: those of them in hybrid decoder blocks.
        gflop: 1e9 floating point operations of the forward pass of one image; a multiply-add counts as two.
            Matrix products, convolutions and attention count, the rest does not. Attention counts for the keys that
            are scored: for the blocks of the sparse pattern those of its lists, for dense attention all of them.
        saved_mb: 1e6 bytes a sample that the forward pass keeps for the backward pass in training: distinct storages
            of the saved tensors, parameters left out. They are those of the CPU kernels; with gradient checkpointing
            (hae-v2-conservative) what is recomputed is not kept.
    """

    variant: str
    parameters: int
    hybrid_parameters: int
    gflop: float
    saved_mb: float


def profile(variant: str, height: int, width: int, batch: int = 1, **config: Any) -> ModelProfile:
    """Profile a network in float32 on images or latents of (height, width), with the condition that it was built for.

    The network is built from fake tensors (shapes without values), so the time and memory this takes hardly depend
    on its size.

    Args:
        variant: one of ``heterodiff.list_models()``.
        batch: images at once; what a batch shares (index lists) is divided by it in ``saved_mb``.
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
    """FLOPs of ``model(*inputs)`` without gradients, a multiply-add as two; inputs may be fake tensors."""
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch has none for it
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(*inputs)
    return counter.get_total_flops()


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of the shapes (..., T, d), (..., S, d), (..., S, e): T S d products for the scores, T S e for the answers."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def count_saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that ``model(*inputs)`` keeps for its backward pass; inputs may be fake tensors.

    Counted are the distinct storages of the saved tensors, except those of the model's parameters.
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
