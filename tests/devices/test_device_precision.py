"""Mixed precision on the test device: CUDA's table of types, and float16 with a scaler."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.devices import NAME, watched

DEVICE = torch.device(NAME)
LOW, FULL = "low", "float32"


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


# From torch's documentation of autocast on CUDA. Each takes tensors of the type that is given.
TABLE = {
    "conv2d": (LOW, lambda d: F.conv2d(tensor(1, 2, 4, 4, dtype=d), tensor(2, 2, 3, 3, dtype=d))),
    "linear": (LOW, lambda d: F.linear(tensor(2, 3, dtype=d), tensor(4, 3, dtype=d))),
    "matmul": (LOW, lambda d: tensor(2, 3, dtype=d) @ tensor(3, 2, dtype=d)),
    "bmm": (LOW, lambda d: torch.bmm(tensor(1, 2, 3, dtype=d), tensor(1, 3, 2, dtype=d))),
    "addmm": (LOW, lambda d: torch.addmm(tensor(2, dtype=d), tensor(2, 3, dtype=d), tensor(3, 2, dtype=d))),
    "einsum": (LOW, lambda d: torch.einsum("ij,jk", tensor(2, 3, dtype=d), tensor(3, 2, dtype=d))),
    "attention": (LOW, lambda d: F.scaled_dot_product_attention(*[tensor(1, 2, 3, 8, dtype=d)] * 3)),
    "softmax": (FULL, lambda d: tensor(2, 3, dtype=d).softmax(-1)),
    "log_softmax": (FULL, lambda d: tensor(2, 3, dtype=d).log_softmax(-1)),
    "layer_norm": (FULL, lambda d: F.layer_norm(tensor(2, 3, dtype=d), (3,))),
    "group_norm": (FULL, lambda d: F.group_norm(tensor(1, 4, 2, 2, dtype=d), 2)),
    "exp": (FULL, lambda d: tensor(3, dtype=d).exp()),
    "log": (FULL, lambda d: tensor(3, dtype=d).log()),
    "pow": (FULL, lambda d: tensor(3, dtype=d) ** 2),
    "norm": (FULL, lambda d: tensor(3, dtype=d).norm()),
    "vector_norm": (FULL, lambda d: torch.linalg.vector_norm(tensor(3, dtype=d))),
    "sum": (FULL, lambda d: tensor(3, dtype=d).sum()),
    "sum of rows": (FULL, lambda d: tensor(2, 3, dtype=d).sum(0)),
    "cumsum": (FULL, lambda d: tensor(3, dtype=d).cumsum(0)),
    "prod": (FULL, lambda d: tensor(3, dtype=d).prod()),
    "mse_loss": (FULL, lambda d: F.mse_loss(tensor(3, dtype=d), tensor(3, dtype=d))),
    "cross_entropy": (
        FULL,
        lambda d: F.cross_entropy(tensor(2, 3, dtype=d), torch.zeros(2, dtype=torch.long).to(DEVICE)),
    ),
    "cosine_similarity": (FULL, lambda d: F.cosine_similarity(tensor(2, 3, dtype=d), tensor(2, 3, dtype=d))),
    "nearest": (FULL, lambda d: F.interpolate(tensor(1, 2, 4, 4, dtype=d), scale_factor=2)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLE)
def test_autocast_casts_as_cuda_does(name: str, dtype: torch.dtype) -> None:
    kind, call = TABLE[name]
    with torch.autocast(NAME, dtype):
        for given in (torch.float32, dtype):
            assert call(given).dtype == (dtype if kind == LOW else torch.float32)
    assert call(torch.float32).dtype == torch.float32


def test_autocast_leaves_the_rest_and_takes_the_widest() -> None:
    with torch.autocast(NAME, torch.float16):
        half, full = tensor(3, dtype=torch.float16), tensor(3)
        assert F.silu(half).dtype == torch.float16
        assert F.silu(full).dtype == torch.float32
        assert torch.cat([half, full]).dtype == torch.float32
        assert (tensor(2, 2).double() @ tensor(2, 2).double()).dtype == torch.float64


def test_a_weight_is_cast_once_in_a_block() -> None:
    layer = nn.Linear(3, 3, bias=False).to(DEVICE)
    x = tensor(2, 3, dtype=torch.bfloat16)
    for _ in range(2):
        with torch.autocast(NAME, torch.bfloat16), watched() as counts:
            out = layer(x) + layer(x)
            out.backward(torch.ones_like(out))
        assert counts.operations("launch")["aten._to_copy.default"] == 2  # the weight there, its gradient back
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32


def test_halves_give_the_numbers_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3)
    images = torch.rand(1, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
    layer.to(DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        torch.testing.assert_close(layer(images.to(DEVICE)).cpu(), expected)


def test_a_scaler_skips_the_step_that_overflows_and_nobody_waits() -> None:
    layer = nn.Linear(3, 3).to(DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(NAME, init_scale=4.0, growth_interval=1)
    changed = []
    with watched() as counts:
        for factor in (1.0, float("inf"), 1.0):
            before = layer.weight.detach().clone()
            with torch.autocast(NAME, torch.float16):
                loss = (layer(tensor(2, 3)) * factor).mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            changed.append((layer.weight != before).any())
        assert counts.waits == 0
    assert [bool(c) for c in changed] == [True, False, True]
    assert scaler.get_scale() == 4.0 * 2.0 * 0.5 * 2.0


def test_a_kernel_that_the_cpu_lacks_in_16_bits_is_computed_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.devices.tensor import compute

    func = torch.ops.aten.linalg_inv_ex.default
    half = torch.eye(2, dtype=torch.float16)
    with pytest.raises(RuntimeError):
        func(half)
    with pytest.raises(RuntimeError, match="Low precision"):  # refused on CUDA too
        compute(func, (half,), {})
    assert compute(torch.ops.aten._cdist_forward.default, (half, half, 2.0, None), {}).dtype == torch.float16
