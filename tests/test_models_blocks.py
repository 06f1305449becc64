"""The blocks' own ways of computing, each against the plain one it stands for."""

import functools

import pytest
import torch
import torch.nn.functional as F

from heterodiff.models.blocks import Dropout, FusedSequential, ResBlock, Upsample, conv3x3, upsample_conv
from heterodiff.models.normalization import GroupNorm32, norm_film, norm_silu
from heterodiff.models.profile import count_saved_bytes


def same_with_gradients(
    found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance: float
) -> None:
    direction = torch.randn_like(expected)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, direction)),
        (expected, *torch.autograd.grad(expected, inputs, direction)),
        strict=True,
    )
    for f, e in pairs:
        assert f.shape == e.shape
        assert (f - e).abs().max() <= tolerance * max(1, e.abs().max())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 64, 6, 5), (1, 32, 1, 1), (3, 96, 1, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_norm_silu(shape, memory_format, dtype, tolerance):
    torch.manual_seed(0)
    norm = GroupNorm32(shape[1]).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    groups = x.reshape(shape[0], 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).view(shape)
    y = normal * norm.weight[:, None, None] + norm.bias[:, None, None]
    same_with_gradients(norm_silu(x, norm), y * torch.sigmoid(y), [x, norm.weight, norm.bias], tolerance)


def test_norm_silu_keeps_its_input_alone():
    norm, x = GroupNorm32(64), torch.randn(2, 64, 16, 16, requires_grad=True)
    assert count_saved_bytes(FusedSequential(norm, torch.nn.SiLU()), x) == 4 * x.numel()
    assert count_saved_bytes(torch.nn.Sequential(norm, torch.nn.SiLU()), x) > 7 * x.numel()


@pytest.mark.parametrize("frozen", ["weights", "input"])
def test_norm_silu_with_parts_that_need_no_gradient(frozen):
    norm, x = GroupNorm32(32), torch.randn(2, 32, 4, 4, requires_grad=frozen == "weights")
    norm.requires_grad_(frozen == "input")
    inputs = [x] if frozen == "weights" else list(norm.parameters())
    same_with_gradients(norm_silu(x, norm), F.silu(norm(x)), inputs, 1e-6)


@pytest.mark.parametrize("silu", [False, True])
def test_norm_film_has_every_bit_of_plain_autograd_and_keeps_less(silu):
    torch.manual_seed(0)
    norm, shape = GroupNorm32(64), (3, 64, 8, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.randn(2, 3, 64, 1, 1).requires_grad_().unbind()
    inputs = [x, scale, shift, norm.weight, norm.bias]
    plain = norm(x) * (1 + scale) + shift
    plain, found = F.silu(plain) if silu else plain, norm_film(x, norm, scale, shift, silu)
    direction = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(plain, inputs, direction, retain_graph=True)
    assert torch.equal(found, plain)
    for one, other in zip(torch.autograd.grad(found, inputs, direction, retain_graph=True), gradients, strict=True):
        assert torch.equal(one, other)

    class Block(torch.nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.norm, self.fused = norm, fused

        def forward(self, x):
            if self.fused:
                return norm_film(x, self.norm, scale, shift, silu)
            y = self.norm(x) * (1 + scale) + shift
            return F.silu(y) if silu else y

    maps = [count_saved_bytes(Block(fused), x) // (4 * x.numel()) for fused in (True, False)]
    assert maps == [2, 3 if silu else 2]


def test_norm_silu_in_half_precision_computes_in_float32():
    norm = GroupNorm32(32)
    x = (100 + torch.randn(2, 32, 8, 8)).bfloat16().requires_grad_()
    found = norm_silu(x, norm)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.silu(norm(x.float())).bfloat16())
    found.sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (9, 2)])
def test_upsample_conv(size, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, b, padding=1)
    inputs = [t for t in (x, weight, b) if t is not None]
    same_with_gradients(upsample_conv(x, weight, b), expected, inputs, 1e-12)


@pytest.mark.parametrize("side", [4, 32])  # 16 positions for 32 channels: plain; 1024: transposed
def test_upsample_layer_is_the_same_either_way(side):
    layer, x = Upsample(32, use_conv=True), torch.randn(1, 32, side, side)
    expected = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_dropout_keeps_a_byte_a_value_and_its_mean():
    dropout, x = Dropout(0.25), torch.ones(4, 5000, requires_grad=True)
    assert count_saved_bytes(dropout, x) == x.numel()
    out = dropout(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(out.mean() - 1) < 0.02
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_a_res_block_changes_memory_alone(film, resample, dropout):
    torch.manual_seed(0)
    block = ResBlock(32, 64, 16, dropout, use_scale_shift_norm=film, resample=resample).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    e = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (True, False):
        torch.manual_seed(1)  # of dropout
        out = block(x, e, recompute=recompute)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, e, *block.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    saved = []
    for recompute in (True, False):
        block.forward = functools.partial(ResBlock.forward, block, recompute=recompute)
        saved.append(count_saved_bytes(block, x, e))
    assert saved[0] < 0.8 * saved[1]


def test_conv3x3_keeps_the_size():
    assert conv3x3(2, 3)(torch.randn(1, 2, 5, 7)).shape == (1, 3, 5, 7)
