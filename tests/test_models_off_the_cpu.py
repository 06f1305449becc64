"""What networks do on other devices, as far as a CPU can tell."""

import pytest
import torch

from heterodiff.devices import use_tf32
from heterodiff.models.conditioning import attend_with_condition
from heterodiff.models.variants import create_model

META = torch.device("meta")


@pytest.mark.parametrize("timestep", [7, 0.5, torch.tensor(7), torch.tensor([3, 4])], ids=repr)
def test_timesteps_come_from_anywhere(timestep):
    with META:
        model = create_model("hae-v2", in_channels=1, model_channels=32, channel_mult=(1, 2), num_classes=3)
        sample, labels = torch.empty(2, 1, 8, 8), torch.empty(2, dtype=torch.long)
    assert model(sample, timestep, labels).sample.device == META


def test_condition_tokens_stay_separate_off_the_cpu(monkeypatch):
    """Merged, they would give heads a width of d + 2, which fused kernels do not take."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **given: seen.append((q.shape[-1], k.shape[2])) or kernel(q, k, v, **given),
    )
    for device in ("cpu", "meta"):
        q, kv = torch.empty(2, 5, 4, 8, device=device), torch.empty(2, 5, 4, 2, 8, device=device)
        c, weight, bias = (torch.empty(shape, device=device) for shape in ((2, 20), (64, 20), (64,)))
        assert attend_with_condition(q, kv, c, weight, bias).shape == q.shape
    assert seen == [(10, 6), (8, 25)]


def test_tf32_is_for_gpus():
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before
        use_tf32(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
