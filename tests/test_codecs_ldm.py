"""Autoencoders in the layout of latent diffusion: by its published layer names, against diffusers' own network."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae, read_vae_config
from heterodiff.compat.vae import VAEInterface
from heterodiff.errors import CheckpointError
from heterodiff.training.start import train
from tests.training_runs import tiny_config

NAMES = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"upsamplers\.0", "upsample"),
    (r"\.resnets\.", ".block."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
"""Names of diffusers, and those of latent diffusion, apart from the order of its upper blocks."""


def made(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    arguments = {"block_out_channels": (32, 64), "layers_per_block": 2, "latent_channels": 3, **changes}
    levels = len(arguments["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **arguments
    )
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vae.eval()


def in_ldm_layout(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    tensors = {}
    for name, value in vae.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[name] = value[:, :, None, None].clone() if attention else value.clone()  # there, 1x1 convolutions
    return tensors


def assert_same(found: AutoencoderKL, expected: AutoencoderKL) -> None:
    images = torch.randn(2, expected.config.in_channels, 16, 24)
    with torch.no_grad():
        moments = [vae.encode(images).latent_dist.parameters for vae in (found, expected)]
        assert torch.equal(*moments)
        latents = moments[0][:, : expected.config.latent_channels]
        assert torch.equal(found.decode(latents).sample, expected.decode(latents).sample)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32, 64), "layers_per_block": 1},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ],
    ids=str,
)
def test_the_network_is_that_of_diffusers(changes: dict[str, Any], tmp_path: Path) -> None:
    vae = made(**changes)
    save_file(in_ldm_layout(vae), tmp_path / "vae.safetensors")
    found = load_vae(tmp_path / "vae.safetensors")
    assert_same(found, vae)
    assert found.config.scaling_factor == pytest.approx(0.18215)
    assert read_vae_config(tmp_path / "vae.safetensors")["latent_channels"] == 3
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_a_part_of_a_latent_diffusion_model(suffix: str, tmp_path: Path) -> None:
    """Nested as its training scripts do, beside a denoiser and losses, with the scale of its latents."""
    vae = made()
    tensors = {f"first_stage_model.{name}": value for name, value in in_ldm_layout(vae).items()}
    tensors |= {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2), "scale_factor": torch.tensor(0.25)}
    tensors |= {"first_stage_model.loss.logvar": torch.ones(())}
    path = tmp_path / f"model.{suffix}"
    torch.save({"state_dict": tensors, "global_step": 7}, path)
    interface = VAEInterface(path, "cpu")
    assert_same(interface.vae, vae)
    assert interface.scale_factor == pytest.approx(0.25)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = 0.25 * vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(interface.encode_batch(images), expected)


def test_a_run_on_its_latents(tmp_path: Path) -> None:
    """The file is the codec of a run, which keeps the autoencoder in diffusers' layout."""
    vae = made(in_channels=1, out_channels=1)
    save_file(in_ldm_layout(vae), tmp_path / "vae.safetensors")
    codec = {"codec__kind": "kl-vae", "codec__path": str(tmp_path / "vae.safetensors"), "model__channel_mult": [1, 1]}
    sizes = {"data__image_size": 16, "model__variant": "unet-conv", "codec__statistics": "measured"}
    train(tiny_config(tmp_path / "run", **codec, **sizes, training__steps=2), quiet=True)
    assert KLVAECodec(load_vae(tmp_path / "run")).fingerprint() == KLVAECodec(vae).fingerprint()


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in tensors.items()}


DAMAGE = {
    "a U-Net": (lambda t: {"time_embed.0.weight": torch.ones(2, 2)}, "expected one KL autoencoder"),
    "two": (lambda t: {**t, **{f"ema.{name}": value for name, value in t.items()}}, "found 2 autoencoders"),
    "no block": (lambda t: renamed(t, "encoder.down.0.", "encoder.down.4."), r"blocks numbered \[1, 4\]"),
    "attention": (
        lambda t: {**t, "encoder.down.1.attn.0.norm.weight": torch.ones(64)},
        "attention outside of the middle",
    ),
    "moments": (lambda t: {**t, "quant_conv.weight": torch.ones(8, 8, 1, 1)}, "latents of 3 channels, but 8 moments"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "decoder.norm_out.bias"}, "decoder.conv_norm_out.bias"),
    "another shape": (lambda t: {**t, "encoder.norm_out.bias": torch.ones(7)}, "encoder.conv_norm_out.bias"),
    "more": (lambda t: {**t, "decoder.extra.weight": torch.ones(7)}, "1 more tensors than the network has"),
    "NaN": (lambda t: {**t, "encoder.conv_in.bias": torch.full((32,), torch.nan)}, "NaN or infinite weights"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_other_weights_are_refused(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    tensors = {name: value.clone().contiguous() for name, value in change(in_ldm_layout(made())).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as refused:
        load_vae(tmp_path / "x.safetensors")
    assert str(refused.value).startswith(str(tmp_path / "x.safetensors"))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "vae.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"expected .safetensors, .pt, .pth, .bin, .ckpt, found '.png'"):
        VAEInterface(tmp_path / "vae.png")
