"""Every way of computing a norm against the formula, with gradients; layout and precision of what it returns."""

import pytest
import torch
from torch import Tensor

from heterodiff.models import normalization
from heterodiff.models.normalization import GroupNorm32, norm_film, norm_silu, set_norm_groups
from heterodiff.models.profile import count_saved_bytes

WAYS = {"kernel": ("kernel", ()), "kernel of NCHW maps": ("kernel", ("cpu",)), "tokens": ("tokens", ())}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    name, nchw = WAYS[request.param]
    monkeypatch.setitem(normalization.NORM_WAYS, "cpu", name)
    monkeypatch.setattr(normalization, "NCHW_KERNELS", nchw)
    return name


def make(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, groups: int = 32
) -> tuple[GroupNorm32, Tensor]:
    torch.manual_seed(0)
    norm = GroupNorm32(shape[1])
    set_norm_groups(norm, groups)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    return norm.double() if dtype == torch.float64 else norm, x


def formula(x: Tensor, norm: GroupNorm32, silu: bool) -> Tensor:
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).view(x.shape)
    y = normal * norm.weight[:, None, None].double() + norm.bias[:, None, None].double()
    return y * torch.sigmoid(y) if silu else y


@pytest.mark.parametrize("groups", [32, 8])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 64, 6, 5), (1, 32, 1, 1), (3, 96, 1, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)]
)
def test_values_gradients_layout_and_precision(way, shape, memory_format, dtype, tolerance, silu, groups):
    norm, x = make(shape, dtype, memory_format, groups)
    inputs = [x, norm.weight, norm.bias]
    found, expected = norm_silu(x, norm) if silu else norm(x), formula(x, norm, silu)
    direction = torch.randn(shape).to(dtype)
    gradients = torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction.double())
    for f, e in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert f.shape == e.shape
        assert (f - e).abs().max() <= tolerance * max(1, e.abs().max())
    for tensor in (found, gradients[0][0]):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=memory_format)


def test_statistics_of_half_precision_are_those_of_its_values(way):
    norm, x = make((2, 64, 9, 9), torch.float32, torch.channels_last)
    x = (30 * x.detach() + 300).bfloat16()  # a mean that eats up the digits of bfloat16
    found, expected = norm(x), formula(x, norm, silu=False)
    assert (found - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_backward_keeps_the_input_and_little_else(way):
    norm, x = make((2, 64, 16, 16), torch.float32, torch.channels_last)
    assert count_saved_bytes(norm, x) <= 4 * x.numel() + 2 * 4 * 2 * 32


def test_frozen_parts_get_no_gradient(way):
    norm, x = make((2, 32, 4, 4), torch.float32, torch.channels_last)
    norm.requires_grad_(False)
    norm_silu(x, norm).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("needed", range(1, 8))
def test_gradients_of_a_part(way, needed, film, memory_format):
    """As where other weights are frozen: those that are needed are what they are beside all others."""
    norm, x = make((2, 32, 3, 4), torch.float32, memory_format)
    scale, shift = (torch.randn(2, 32, 1, 1, requires_grad=True) for _ in range(2))
    inputs = [x, norm.weight, norm.bias]

    def result() -> Tensor:
        return norm_film(x, norm, scale, shift, silu=True) if film else norm_silu(x, norm)

    direction = torch.randn(x.shape)
    expected = torch.autograd.grad(result(), inputs, direction)
    some = [k for k in range(3) if needed >> k & 1]
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(k in some)
    found = torch.autograd.grad(result(), [inputs[k] for k in some], direction)
    assert all(torch.equal(f, expected[k]) for f, k in zip(found, some, strict=True))
    if film:  # as in a network whose norms and earlier layers are all frozen
        for tensor in inputs:
            tensor.requires_grad_(False)
        assert torch.autograd.grad(result(), [scale], direction)[0].isfinite().all()
