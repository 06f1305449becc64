"""Tiny VAEs for tests: a run of recipe ``vae`` that trains in seconds, and runs on its latents."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from heterodiff.config import RunConfig
from tests.training_runs import tiny_config

DIGITS = {"source": "digits", "image_size": 16}
VAE = {"block_out_channels": [8, 8, 8]}


def vae_config(output: Path, **overrides: Any) -> RunConfig:
    """A VAE of 16x16 digits to 4x4x4 latents; ``overrides`` as section__key=value."""
    if "vae__init_from" not in overrides:  # which brings its own levels
        overrides = {f"vae__{key}": value for key, value in VAE.items()} | overrides
    overrides = {"data__image_size": 16, "training__learning_rate": 3e-3, "training__ema_decay": 0.9} | overrides
    return tiny_config(output, "vae", **overrides)


def latent_config(output: Path, vae: Path, **overrides: Any) -> RunConfig:
    """A small denoiser of the latents of ``vae``."""
    overrides = {"codec__kind": "kl-vae", "codec__path": str(vae), "data__image_size": 16} | overrides
    return tiny_config(output, **{"model__channel_mult": [1, 2]} | overrides)


def plain_vae(**changes: Any) -> AutoencoderKL:
    """An untrained AutoencoderKL as diffusers makes it."""
    torch.manual_seed(0)
    arguments = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return AutoencoderKL(**(arguments | changes))
