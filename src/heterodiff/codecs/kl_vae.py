"""Codec ``kl-vae``: latents of diffusers' AutoencoderKL, brought to zero mean and unit variance."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from heterodiff.codecs.ldm import load_ldm_vae
from heterodiff.codecs.scaling import LatentCodec, halved
from heterodiff.errors import CheckpointError, ConfigError
from heterodiff.models.loading import load_network, read_network_config

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
"""Bounds to which diffusers clamps the log variance of the posterior."""
AGAIN = "train or copy the VAE again, or correct its path"
_DEFAULTS = {name: p.default for name, p in inspect.signature(AutoencoderKL).parameters.items()}


def latent_shape(vae_config: Mapping[str, Any], channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape of the latents that a VAE of ``vae_config`` makes of images (channels, height, width).

    Raises:
        ConfigError: another number of channels than the VAE was made for, or sides that its factor does not divide.
    """
    expected = vae_config["in_channels"]
    if channels != expected:
        raise ConfigError(
            f"images of {channels} channels: the VAE takes {expected}; set data.channels={expected}, or train a VAE on "
            "these images (recipe: vae)"
        )
    levels = len(vae_config["block_out_channels"]) - 1
    return vae_config["latent_channels"], *halved("VAE", height, width, levels)


class KLVAECodec(LatentCodec):
    """Latents of an AutoencoderKL, which itself works on images in [-1, 1]."""

    random = True
    encoder_parts = ("encoder.", "quant_conv.")
    shape_for = staticmethod(latent_shape)

    def __init__(self, vae: AutoencoderKL):
        super().__init__(vae, 2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def vae(self) -> AutoencoderKL:
        return self.network

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.vae.encode(images).latent_dist.parameters.float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def holds_vae(path: Path) -> bool:
    """Return True if :func:`load_vae` would find something to load at ``path``."""
    return path.expanduser().is_file() or _find_vae(path.expanduser()) is not None


def _find_vae(path: Path) -> Path | None:
    return next((folder for folder in (path / "vae", path) if (folder / "config.json").is_file()), None)


def _vae_folder(path: str | Path) -> Path:
    """Folder of the AutoencoderKL at ``path``: a run folder's ``vae``, or ``path`` itself."""
    path = Path(path).expanduser()
    if (folder := _find_vae(path)) is not None:
        return folder
    found = "holds no VAE (vae/config.json or config.json)" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {found}; train one with recipe `vae`, or correct the path of the VAE")


def read_vae_config(path: str | Path) -> dict[str, Any]:
    """Read the configuration of an AutoencoderKL, of a folder without its weights; defaults filled in.

    Raises:
        CheckpointError: no VAE there, or another kind of network.
    """
    if Path(path).expanduser().is_file():
        return dict(load_vae(path).config)
    return _DEFAULTS | read_network_config(AutoencoderKL, _vae_folder(path), AGAIN)


def load_vae(path: str | Path) -> AutoencoderKL:
    """Load an AutoencoderKL from a run of recipe ``vae``, a pipeline folder, or a folder as diffusers writes it.

    A file is read as weights in the layout of latent diffusion, see :func:`heterodiff.codecs.ldm.load_ldm_vae`.

    Raises:
        CheckpointError: no VAE there, another kind of network, or damaged, incomplete or NaN weights.
    """
    if (file := Path(path).expanduser()).is_file():
        return load_ldm_vae(file)
    return load_network(AutoencoderKL, _vae_folder(path), AGAIN).requires_grad_(False)
