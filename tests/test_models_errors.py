"""What a user gets wrong is said, with the way out."""

import pytest
import torch

from heterodiff.errors import ConfigError
from heterodiff.models.variants import create_model

TINY = {"in_channels": 3, "model_channels": 32, "channel_mult": (1, 1, 1), "attention_resolutions": (4,)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_chanels": 32}, "unknown model argument 'model_chanels'.*did you mean 'model_channels'"),
        ({"image_size": 32}, "unknown model argument 'image_size'"),
        ({"attention_pattern": "multi-scale"}, "attention_pattern 'multi-scale'.*did you mean 'multiscale'"),
        ({"activation": "sliu"}, "activation 'sliu'.*did you mean 'silu'"),
        ({"class_embedding": "lin"}, "class_embedding 'lin'.*known: mlp, direct"),
        ({"model_channels": 50}, r"multiple of 32.*found \[50\].*model_channels=64"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_heads": 5}, "32 channels do not split into 5 heads"),
        ({"num_heads": 0}, "0 heads"),
        ({"num_heads_upsample": 3}, "3 heads"),
        ({"num_head_channels": 24}, "24 channels"),
        ({"attention_resolutions": (3, 8)}, r"powers of 2, found \[3\]"),
        ({"dims": 3}, "dims: expected 2"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"max_keys": 2}, "max_keys >= 16"),
    ],
    ids=str,
)
def test_arguments(config, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        create_model("hae-v2", **TINY | config)


def test_variant():
    with pytest.raises(ConfigError, match=r"unknown model variant 'hae_v2' \(did you mean 'hae-v2'\?\); known: unet, "):
        create_model("hae_v2", **TINY)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 10, 12), r"10x12.*divisible by 4; nearest heights \[8, 12\], nearest widths \[12\]"),
        ((1, 3, 12, 3), r"nearest widths \[4\]"),
        ((1, 1, 8, 8), r"expected 3 channels, found \(1, 1, 8, 8\)"),
        ((3, 8, 8), r"expected 3 channels, found \(3, 8, 8\)"),
    ],
)
def test_sample(shape, message):
    with pytest.raises(ConfigError, match=message):
        create_model("unet", **TINY)(torch.zeros(shape), 0)


@pytest.mark.parametrize("variant", ["hae-v2", "hae-v2-conservative"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], r"expected -1 \(none\) or 0..2, found \[0, 3\]"),
        ([-2, 1], r"found \[-2, 1\]"),
        ([1], r"expected shape \(2,\), found \(1,\)"),
        ([[1], [1]], r"expected shape \(2,\), found \(2, 1\)"),
    ],
)
def test_labels(variant, labels, message):
    model = create_model(variant, num_classes=3, **TINY)
    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        model(torch.zeros(2, 3, 8, 8), 0, torch.tensor(labels))


def test_labels_without_classes():
    with pytest.raises(ConfigError, match="without classes"):
        create_model("unet", **TINY)(torch.zeros(1, 3, 8, 8), 0, torch.tensor([0]))


@pytest.mark.parametrize(
    "mask", [torch.zeros(5, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool), torch.zeros(5, 5)]
)
def test_masks(mask):
    model = create_model("hae", **TINY)
    with pytest.raises(ConfigError, match=r"mask for S=5: expected bool \(5, 5\)"):
        model.set_attention_masks({5: mask})
