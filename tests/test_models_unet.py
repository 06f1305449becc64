"""Every variant on every kind of label, size and configuration."""

from functools import cache

import pytest
import torch

from heterodiff.errors import ConfigError
from heterodiff.models.blocks import AttentionBlock
from heterodiff.models.hybrid import SparseSelfAttention
from heterodiff.models.normalization import GroupNorm32
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import VARIANTS, create_model

# 64 and 128 channels: several channels a norm group, or a norm would cancel the biases before it.
TINY = {
    "in_channels": 3,
    "model_channels": 32,
    "channel_mult": (2, 2, 4),
    "layers_per_block": 1,
    "attention_resolutions": (2, 4),
    "num_classes": 4,
}
CONFIGS = {
    "plain": {},
    "scale-shift": {"use_scale_shift_norm": True, "out_channels": 6},
    "updown": {"resblock_updown": True, "num_heads_upsample": 2},
    "head-channels": {"num_head_channels": 16, "conv_resample": False, "condition_tokens": False},
    "unconditional": {"num_classes": None},
    "direct": {"class_embedding": "direct", "layers_per_block": 2, "activation": "identity"},
}
LABELS = {"labelled": [0, 3, 2], "none": [-1, -1, -1], "mixed": [-1, 3, 0], "absent": None}
SIZES = [(16, 16), (12, 12), (20, 12), (4, 4), (8, 24)]


@cache
def model_of(variant: str, config: str) -> HAEUNet:
    """A float64 network whose zero-initialised parameters are replaced, so that every branch counts."""
    torch.manual_seed(0)
    model = create_model(variant, **TINY | CONFIGS[config]).double()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def labels_of(kind: str, config: str) -> torch.Tensor | None:
    return None if kind == "absent" or config == "unconditional" else torch.tensor(LABELS[kind])


def inputs(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 500, 999])


ROW_BY_ROW = [name for name, variant in VARIANTS.items() if variant.tokens_of_none]
"""Networks whose prediction for an image does not depend on the others of its batch."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("config", "labels"), [("unconditional", "absent"), *(("plain", kind) for kind in LABELS)])
@pytest.mark.parametrize("variant", ROW_BY_ROW)
def test_batch_equals_single(variant, config, labels, size):
    model, (x, t), y = model_of(variant, config), inputs(size), labels_of(labels, config)
    with torch.no_grad():
        together = model(x, t, y).sample
        assert together.shape == (3, 3, *size)
        assert together.isfinite().all()
        for i in (0, 1):
            alone = model(x[i : i + 1], t[i : i + 1], None if y is None else y[i : i + 1]).sample
            assert (alone - together[i : i + 1]).abs().max() <= 1e-10 * together.abs().max()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("variant", ROW_BY_ROW)
def test_batch_equals_single_in_float32(variant, config):
    model = model_of(variant, config)
    x, t = inputs((12, 20))
    y = labels_of("mixed", config)
    model.float()
    with torch.no_grad():
        together = model(x, t, y).sample
        alone = torch.cat([model(x[i : i + 1], t[i], None if y is None else y[i : i + 1]).sample for i in range(3)])
    model.double()
    assert together.dtype == torch.float32
    assert together.shape[1] == model.config.out_channels or model.config.out_channels is None
    assert (alone - together).abs().max() <= 1e-5 * max(1, together.abs().max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_parameter_learns(variant, config):
    """No parameter's gradient is zero; biases of keys are, where they shift all scores of a query alike."""
    model = model_of(variant, config)
    for size in ((16, 16), (20, 12)) if config == "plain" else ((20, 12),):
        x, t = inputs(size)
        model.zero_grad()
        out = model(x, t, labels_of("labelled", config)).sample
        (out * torch.randn_like(out)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all()]
        scale = max(g.abs().max() for g in gradients.values())
        assert not [name for name, g in gradients.items() if g.abs().max() < 1e-9 * scale]
        for module in model.modules():
            if isinstance(module, AttentionBlock):
                q, k, v = module.qkv.bias.grad.view(module.num_heads, 3, -1).unbind(1)
                assert min(q.abs().max(), v.abs().max()) > 1e-9 * scale
                if module.encoder_kv is not None:  # both biases together shift all scores alike, either alone does not
                    assert k.abs().max() > 1e-9 * scale
                    k = k + module.encoder_kv.bias.grad.view(module.num_heads, 2, -1)[:, 0]
                assert k.abs().max() < 1e-12 * scale
            elif isinstance(module, SparseSelfAttention):
                q, k, v = module.in_proj_bias.grad.chunk(3)
                assert min(q.abs().max(), v.abs().max()) > 1e-9 * scale
                assert k.abs().max() < 1e-12 * scale


@pytest.mark.parametrize("config", ["plain", "scale-shift"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_bfloat16(variant, config):
    model = model_of(variant, config)
    x, t = inputs((16, 16))
    y = labels_of("mixed", config)
    with torch.no_grad():
        expected = model(x, t, y).sample
        model.to(torch.bfloat16)
        try:
            out = model(x.to(torch.bfloat16), t, y).sample
        finally:
            model.double()
            model_of.cache_clear()  # its weights are rounded now
    assert out.dtype == torch.bfloat16
    error = (out.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_computed_in_float32(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 64, 9, 9) * 30 + 300).to(dtype)  # a mean that eats up the digits of bfloat16
    for norm, value in ((GroupNorm32(64), x), (torch.nn.LayerNorm(64), x.permute(0, 2, 3, 1))):
        norm.to(dtype)
        out = norm(value)
        expected = norm.float()(value.float()).to(dtype)
        assert out.dtype == dtype
        assert (out.float() - expected.float()).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_fresh_networks_predict_zero_and_start_as_identity_branches():
    model = create_model("hae-v2", **TINY)
    x, t = inputs((8, 8))
    assert model(x.float(), t).sample.eq(0).all()


def test_use_hae_off_is_the_plain_unet():
    plain = create_model("unet", **TINY).state_dict()
    assert {k: v.shape for k, v in create_model("hae", use_hae=False, **TINY).state_dict().items()} == {
        k: v.shape for k, v in plain.items()
    }


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_forward_is_deterministic(variant):
    model = create_model(variant, **TINY | {"channel_mult": (2, 2)})
    torch.nn.init.normal_(model.out[2].weight)
    x, y = torch.randn(1, 3, 48, 48), torch.tensor([1])  # hybrid blocks at 24x24: the blocked attention
    gradients = []
    for _ in range(2):
        model.zero_grad()
        out = model(x, 7, y).sample
        out.sum().backward()
        gradients.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_patches_are_channels_of_a_smaller_image(variant):
    model = create_model(variant, **TINY | {"patch_size": 2, "out_channels": 6}).double()
    torch.nn.init.normal_(model.out[2].weight)
    inner = create_model(variant, **TINY | {"in_channels": 12, "out_channels": 24}).double()
    inner.load_state_dict(model.state_dict())
    x, t = inputs((16, 24))
    y = torch.tensor(LABELS["mixed"])
    patches = x.view(3, 3, 8, 2, 12, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 12, 8, 12)
    with torch.no_grad():
        out = inner(patches, t, y).sample.view(3, 6, 2, 2, 8, 12).permute(0, 1, 4, 2, 5, 3).reshape(3, 6, 16, 24)
        assert torch.equal(model(x, t, y).sample, out)
    with pytest.raises(ConfigError, match="divisible by 8"):
        model(x[..., :12, :], t, y)
    with pytest.raises(ConfigError, match="patch_size: expected at least 1, found 0"):
        create_model(variant, **TINY | {"patch_size": 0})


@pytest.mark.parametrize("variant", ["unet", "unet-lean", "unet-conv", "hae-v3"])
def test_initial_weights_are_drawn_in_the_order_of_the_layers(variant):
    """So that a seed gives the weights that it gave, whatever the constructor is rewritten to."""
    torch.manual_seed(3)
    model = create_model(variant, in_channels=2, model_channels=32, channel_mult=(1, 2), num_classes=3, sample_size=16)
    drawn = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    again = dict(model.named_parameters())
    compared = [
        name for name, value in drawn.items() if value.any()
    ]  # biases of norms and what is set to zero do not tell
    assert len(compared) > len(drawn) / 2
    assert [name for name in compared if not torch.equal(again[name], drawn[name])] == []
