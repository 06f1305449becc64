"""Parameter counts of the published sizes, and costs found without computing against real runs."""

import dataclasses
import json
from functools import cache

import pytest
import torch

from heterodiff.errors import ConfigError
from heterodiff.models.profile import ModelProfile, count_flops, count_saved_bytes, model_table, print_table, profile
from heterodiff.models.variants import VARIANTS, create_model, list_models

COMMON = {"sample_size": 128, "in_channels": 4, "model_channels": 128, "layers_per_block": 2, "num_classes": 2}
A = COMMON | {"channel_mult": (1, 2, 4, 8), "attention_resolutions": (16, 8)}
B = COMMON | {"channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16), "num_heads": 4}
PARAMETERS = {  # of the earlier implementation: all, and those of the hybrid blocks
    ("unet", "A"): (253_819_652, 0),
    ("hae", "A"): (408_926_212, 155_106_560),
    ("hae-lite", "A"): (298_823_940, 45_004_288),
    ("hae-v2", "A"): (288_495_300, 34_675_648),
    ("hae-v2-conservative", "A"): (288_495_300, 34_675_648),
    ("unet", "B"): (98_945_668, 0),
    ("hae", "B"): (154_685_828, 55_740_160),
    ("hae-lite", "B"): (115_362_948, 16_417_280),
    ("hae-v2", "B"): (111_671_748, 12_726_080),
    ("hae-v2-conservative", "B"): (111_671_748, 12_726_080),
}


@cache
def published(variant: str, size: str) -> ModelProfile:
    return profile(variant, 128, 128, **{"A": A, "B": B}[size])


@pytest.mark.parametrize(("variant", "size"), PARAMETERS)
def test_parameters_of_the_published_sizes(variant, size):
    found = published(variant, size)
    assert (found.parameters, found.hybrid_parameters) == PARAMETERS[variant, size]


def test_sizes_of_the_variants():
    hybrid = {variant: counts[1] for (variant, size), counts in PARAMETERS.items() if size == "B"}
    assert hybrid["hae-lite"] <= 0.7 * hybrid["hae"]
    assert hybrid["hae-v2"] <= 0.4 * hybrid["hae"]


def test_unet_costs_what_the_earlier_one_did_less_what_is_saved():
    found = published("unet", "B")
    blocks = {256: 5, 384: 5, 512: 6}  # attention blocks by width
    embedding = 512
    outer_products = sum(n * 2 * embedding * (embedding - 1) * 2 * width for width, n in blocks.items())
    # Attention to E tokens against one, at 16x16 (384 channels) and 8x8 (512), where they are merged.
    tokens = sum(n * 4 * side**2 * embedding * width for n, side, width in ((5, 16, 384), (6, 8, 512)))
    # Convolutions of doubled maps: 4 products a pixel and channel instead of 9, at 128x128 and 64x64.
    doubled = sum(2 * (9 - 4) * side**2 * width**2 for side, width in ((128, 128), (64, 256)))
    assert found.gflop + (outer_products + tokens + doubled) / 1e9 == pytest.approx(151.6, abs=0.15)
    # Earlier 748 MB, 126 MB of which were attention weights of the 32x32 maps alone: 5 blocks of 4 heads.
    weights = 5 * 4 * 32**2 * (32**2 + embedding) * 4 / 1e6
    assert found.saved_mb < 748 - 0.95 * weights


def test_hybrid_blocks_add_little():
    found = {variant: published(variant, "B") for variant in ("unet", "hae-v2", "hae-v2-conservative")}
    assert found["hae-v2"].gflop < 1.1 * found["unet"].gflop
    assert found["hae-v2"].saved_mb < 1.25 * found["unet"].saved_mb
    assert found["hae-v2-conservative"].saved_mb < 0.5 * found["unet"].saved_mb
    assert found["hae-v2-conservative"].gflop == found["hae-v2"].gflop


@pytest.mark.parametrize(("variant", "batch"), [*((variant, 1) for variant in VARIANTS), ("hae-v2", 3)])
def test_fake_numbers_are_those_of_a_real_run(variant, batch):
    config = {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,), "num_classes": 3}
    found = profile(variant, 64, 48, batch, dropout=0.1, **config)
    model = create_model(variant, dropout=0.1, **config).train()
    inputs = (torch.randn(batch, 3, 64, 48), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
    assert found.gflop == pytest.approx(count_flops(model, *inputs) / batch / 1e9, rel=1e-9)
    assert found.saved_mb == pytest.approx(count_saved_bytes(model, *inputs) / batch / 1e6, rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("hae-v2", {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,), "in_channels": 4}),
        ("film-unet", {"model_channels": 32, "latent_channels": 4, "dropout": 0.1}),
        ("film-unet", {"model_channels": 32, "latent_channels": 4, "condition_dim": None}),
    ],
)
def test_fake_numbers_with_a_condition_vector(variant, config):
    config = {"condition_dim": 12} | config
    found = profile(variant, 6, 8, 2, **config)
    model = create_model(variant, **config).train()
    condition = None if config["condition_dim"] is None else torch.ones(2, 12)
    inputs = (torch.randn(2, 4, 6, 8), torch.zeros(2), None, True, condition)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gflop == pytest.approx(count_flops(model, *inputs) / 2e9, rel=1e-9)
    assert found.saved_mb == pytest.approx(count_saved_bytes(model, *inputs) / 2e6, rel=1e-9)


def test_table_of_all_networks_and_of_one(capsys):
    small = {"model_channels": 32, "sample_size": 8, "channel_mult": (1, 1), "condition_dim": 12}
    rows = model_table({})
    assert [row["variant"] for row in rows] == list_models()
    of_film = {"latent_channels": 256, "latent_size": 7, "condition_dim": 512}
    assert rows[-1]["config"] == of_film | {"model_channels": 64, "channel_mult": (1, 2)}
    assert 3e6 < rows[-1]["parameters"] < 5e6
    assert [row["variant"] for row in model_table(small)] == list(VARIANTS)
    (row,) = model_table({"variant": "film-unet", "latent_size": (3, 5), "model_channels": 32})
    assert row["config"]["latent_channels"] == 256
    assert row["gflop"] == profile("film-unet", 3, 5, **row["config"]).gflop
    with pytest.raises(ConfigError, match="did you mean 'film-unet'"):
        model_table({"variant": "film_unet"})
    print_table(rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "film-unet: for latent_channels=256, latent_size=7, condition_dim=512" in printed
    assert "hae-v2-conservative-public: for sample_size=64" in printed


def test_flops_of_attention_count_the_keys_that_are_scored():
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 50, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    for mask in (None, torch.zeros(1, 50)):
        assert count_flops(lambda q, k, m=mask: attention(q, k, k, attn_mask=m), q, k) == 2 * 2 * 4 * 10 * 50 * (8 + 8)


def test_cost_grows_linearly_beyond_the_largest_budget():
    config = {"model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (), "in_channels": 1}
    extra = {}
    for size in (256, 512):
        extra[size] = profile("hae-v2", size, size, **config).gflop - profile("unet", size, size, **config).gflop
    assert extra[512] == pytest.approx(4 * extra[256], rel=0.02)


def test_profile_is_json_and_unconditional_networks_work():
    found = profile("hae", 16, 8, model_channels=32, channel_mult=(1, 2))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["variant"] == "hae"
    with pytest.raises(ConfigError, match="divisible"):
        profile("hae", 15, 8, model_channels=32, channel_mult=(1, 2))
