"""The decoder block of hae-v3: against a literal computation, at its start, and with less memory."""

import copy

import pytest
import torch
from torch import nn

import heterodiff as hd
from heterodiff.models.pooled import PooledAttention, PooledResBlock
from tests.oracles.whole_network import pooled_attention, res_block

SMALL = {"in_channels": 2, "model_channels": 32, "channel_mult": (1, 2, 2), "layers_per_block": 1, "num_classes": 3}


def filled(module: nn.Module) -> nn.Module:
    """``module`` in float64 with no parameter left at zero."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (8, 8), (9, 8), (4, 17), (16, 16), (15, 31)], ids=str)
def test_attention_equals_a_literal_one(size: tuple[int, int]) -> None:
    attention = filled(PooledAttention(64, 10))
    n, c = torch.randn(2, 64, *size, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    weights = dict(attention.named_parameters())
    assert torch.allclose(attention(n, c), pooled_attention(weights, n, c), rtol=0, atol=1e-12)
    without = pooled_attention(weights, n, torch.zeros_like(c))
    assert torch.allclose(attention(n, None), without, rtol=0, atol=1e-12)
    assert torch.allclose(attention(n, torch.stack([c[0], c[1] * 0]))[1], without[1], rtol=0, atol=1e-12)


def test_block_equals_a_literal_one_and_keeps_less_when_it_recomputes() -> None:
    block = filled(PooledResBlock(32, 64, 16, 0.0, 16))
    x = torch.randn(2, 32, 6, 10, dtype=torch.float64, requires_grad=True)
    e, c = torch.randn(2, 2, 16, dtype=torch.float64)
    expected = res_block(dict(block.named_parameters()), x, e, c)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for recompute in (False, True):
        found = block(x, nn.functional.silu(e), c, recompute)
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)
        (other,) = torch.autograd.grad(found.square().sum(), x)
        assert torch.allclose(other, gradient, rtol=1e-8, atol=1e-8)


def test_at_its_start_it_is_the_convolutional_network() -> None:
    v3 = hd.create_model("hae-v3", **SMALL, mid_attention=False)
    conv = hd.create_model("unet-conv", **SMALL)
    nn.init.normal_(v3.out[-1].weight)
    shared = {name: value for name, value in v3.state_dict().items() if ".attention." not in name}
    conv.load_state_dict(shared)
    x, t, y = torch.randn(2, 2, 16, 8), torch.tensor([3, 700]), torch.tensor([2, -1])
    out = v3(x, t, y).sample
    assert out.abs().max() > 0
    assert torch.equal(out, conv(x, t, y).sample)
    blocks = [module for module in v3.modules() if isinstance(module, PooledResBlock)]
    assert len(blocks) == 2  # before each upsampling


@pytest.mark.parametrize("way", ["gradient_checkpointing", "memory_optimization"])
def test_recomputing_changes_no_gradient(way: str) -> None:
    model = hd.create_model("hae-v3", **SMALL)
    filled(model)
    other = copy.deepcopy(model)
    setattr(other, way, True)
    x, t, y = torch.randn(3, 2, 12, 20, dtype=torch.float64), torch.tensor([0, 5, 999]), torch.tensor([0, -1, 2])
    for network in (model, other):
        network(x, t, y).sample.square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12), name
