"""Whole networks against the same computed naively: outer products, dense masks, all attention weights."""

import copy

import pytest
import torch

from heterodiff.models.profile import count_saved_bytes
from heterodiff.models.variants import VARIANTS, create_model
from tests.oracles.naive_backbone import make_naive


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])  # hybrid blocks under a mask, and in blocks of queries
def test_networks_equal_the_naive_ones(variant, size):
    torch.manual_seed(0)
    model = create_model(
        variant,
        in_channels=2,
        model_channels=32,
        channel_mult=(1, 1),
        layers_per_block=1,
        attention_resolutions=(2,),
        num_classes=3,
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    naive = make_naive(copy.deepcopy(model))
    x, t = torch.randn(3, 2, *size, dtype=torch.float64), torch.tensor([0, 500, 999])
    for labels in (torch.tensor([0, -1, 2]), None):
        found, expected = model(x, t, labels).sample, naive(x, t, labels).sample
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    if not model.memory_optimization:  # which keeps nothing of either
        assert count_saved_bytes(model, x, t, labels) < count_saved_bytes(naive, x, t, labels)
