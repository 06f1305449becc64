"""The codec ``kl-vae``: latents of diffusers' AutoencoderKL, brought to zero mean and unit variance."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from heterodiff.errors import CheckpointError, ConfigError, DataError

PIXELS_AT_ONCE = 2**20
"""Pixels encoded or decoded at once: a VAE's activations are far larger than those of a network on its latents."""
LEAST_STD, MOST_STD = 0.8, 1.25
"""Bounds of the std of latents that are said to have unit variance."""
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
"""As diffusers clamps the log variance of the posterior."""
AGAIN = "train or copy the VAE again, or correct its path"
_DEFAULTS = {name: p.default for name, p in inspect.signature(AutoencoderKL).parameters.items()}


class KLVAECodec:
    """Latents of an AutoencoderKL.

    The VAE itself works on images in [-1, 1]. Its latents are scaled as diffusers' pipelines do:
    z = (latent - latents_mean) / latents_std * scaling_factor, with zero mean and unit std where its configuration
    lacks the first two (then ``shift_factor`` is the mean).

    Args:
        vae: used as it is; nothing here trains it.
    """

    clip_sample = False
    random = True

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        self._mean, self._scale = _statistics(vae)

    @property
    def per_channel(self) -> bool:
        """Whether the VAE brings a mean and std of each channel, rather than one factor for all."""
        return self.vae.config.latents_std is not None

    def to(self, device: torch.device) -> "KLVAECodec":
        self.vae.to(device)
        return self

    def latent_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """Shape of z for images (channels, height, width).

        Raises:
            ConfigError: another number of channels than the VAE was made for, or sides that its factor does not divide.
        """
        return latent_shape(self.vae.config, channels, height, width)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> mean and std of the posterior (B, 2 c, h, w), float32, as the VAE gives them."""
        at_once = max(1, PIXELS_AT_ONCE // (images.shape[-1] * images.shape[-2]))
        parts = (images * 2 - 1).to(self.vae.dtype).split(at_once)
        moments = torch.cat([self.vae.encode(part).latent_dist.parameters.float() for part in parts])
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))], dim=1)

    def draw(self, posterior: Tensor, noise: Tensor | None) -> Tensor:
        """Mean and std (B, 2 c, h, w) -> z (B, c, h, w); with ``noise`` (standard normal) a draw, else the mean."""
        mean, std = posterior.float().chunk(2, dim=1)
        latents = mean if noise is None else mean + std * noise
        return (latents - self._mean.to(mean)) * self._scale.to(mean)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the most likely z (B, c, h, w)."""
        return self.draw(self.posterior(images), None)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> images (B, C, H, W) in [0, 1]."""
        latents = (z / self._scale.to(z) + self._mean.to(z)).to(self.vae.dtype)
        at_once = max(1, PIXELS_AT_ONCE // (z.shape[-1] * z.shape[-2] * self.factor**2))
        decoded = torch.cat([self.vae.decode(part).sample for part in latents.split(at_once)])
        return ((decoded.float() + 1) / 2).clamp(0, 1)

    def fingerprint(self) -> str:
        """Hash of the encoder's weights; latents of two VAEs of one fingerprint are the same."""
        parts = {k: v for k, v in self.vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
        digest = hashlib.sha256()
        for name in sorted(parts):
            value = parts[name].detach().cpu().contiguous().float()
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Scale by ``mean`` and ``std`` (c,) of the latents from now on, and store them in the VAE's configuration."""
        self.vae.register_to_config(
            latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0, shift_factor=None
        )
        self._mean, self._scale = _statistics(self.vae)


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
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise ConfigError(
            f"images of {height}x{width}: the VAE needs sides divisible by {factor}; set data.image_size={near}"
        )
    return vae_config["latent_channels"], height // factor, width // factor


def _statistics(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Mean to take off and factor to multiply with, each (c, 1, 1)."""
    config = vae.config
    channels = config.latent_channels
    mean = config.latents_mean if config.latents_mean is not None else [config.shift_factor or 0.0] * channels
    std = config.latents_std if config.latents_std is not None else [1.0] * channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise CheckpointError(
            f"the VAE's configuration: expected latents_mean and latents_std of {channels} numbers, the second above 0"
        )
    return torch.tensor(mean).view(-1, 1, 1), (config.scaling_factor / torch.tensor(std)).view(-1, 1, 1)


class LatentMoments:
    """Running mean and variance of latents, a channel each; posterior variance included (law of total variance)."""

    def __init__(self, channels: int):
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Take in mean and std (B, c, h, w) of posteriors."""
        mean, std = mean.cpu().double(), std.cpu().double()
        self.count += mean.numel() // mean.shape[1]
        self._sum += mean.sum(dim=(0, 2, 3))
        self._square += (mean.square() + std.square()).sum(dim=(0, 2, 3))

    @property
    def mean(self) -> Tensor:
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        return (self._square / self.count - self.mean.square()).clamp_min(0).sqrt()


def measure(posteriors: Iterable[Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std (c,) of the latents of ``posteriors``, each (B, 2 c, h, w).

    Raises:
        DataError: NaN or infinite latents, or a channel that never varies.
    """
    moments = LatentMoments(channels)
    for posterior in posteriors:
        mean, std = posterior.chunk(2, dim=1)
        moments.add(mean, std)
    if not bool(torch.isfinite(moments.std).all()):
        raise DataError("the VAE gives NaN or infinite latents; train it again with a lower training.learning_rate")
    if float(moments.std.min()) < 1e-6:
        channel = int(moments.std.argmin())
        raise DataError(
            f"channel {channel} of the latents never varies (std {float(moments.std.min()):.2g}): the images are "
            "constant, or the VAE is not trained"
        )
    return moments.mean, moments.std


def check_scale(codec: KLVAECodec, mean: Tensor, std: Tensor) -> None:
    """Compare measured ``mean`` and ``std`` (c,) of unscaled latents with the codec's scale.

    Raises:
        DataError: scaled latents have a std outside 0.8 to 1.25, of a channel where the VAE brings a std of each, else
            over all.
    """
    found = scaled_std(codec, mean, std)
    if not (float(found.min()) >= LEAST_STD and float(found.max()) <= MOST_STD):  # NaN too
        listed = ", ".join(f"{value:.3g}" for value in found.tolist())
        raise DataError(
            f"latents of the training images have a std of {listed} after scaling, expected 1 ({LEAST_STD} to "
            f"{MOST_STD}): the VAE's scale is that of other images; set codec.statistics=measured to scale by these "
            "images, or train a VAE on them (recipe: vae)"
        )


def scaled_std(codec: KLVAECodec, mean: Tensor, std: Tensor) -> Tensor:
    """Std after scaling: of each channel (c,), or over all (1,) where the VAE brings one factor for all."""
    scale = codec._scale.flatten().to(std)
    if codec.per_channel:
        return std * scale
    shifted = mean - codec._mean.flatten().to(mean)
    total = (std.square() + shifted.square()).mean() - shifted.mean().square()
    return total.sqrt().view(1) * scale[0]


def vae_folder(path: Path) -> Path:
    """The folder of the AutoencoderKL that ``path`` means: a run folder's ``vae``, or itself.

    Raises:
        CheckpointError: there is none.
    """
    if (folder := _find_vae(path)) is not None:
        return folder
    what = "holds no VAE (vae/config.json or config.json)" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {what}; train one with recipe `vae`, or correct the path of the VAE")


def holds_vae(path: Path) -> bool:
    """Whether there is something at ``path`` that :func:`load_vae` would try to load."""
    return _find_vae(path.expanduser()) is not None


def _find_vae(path: Path) -> Path | None:
    return next((folder for folder in (path / "vae", path) if (folder / "config.json").is_file()), None)


def read_vae_config(path: str | Path) -> dict[str, Any]:
    """Configuration of the AutoencoderKL that ``path`` means, without its weights; defaults filled in.

    Raises:
        CheckpointError: no VAE there, or another kind of network.
    """
    file = vae_folder(Path(path).expanduser()) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        kind = config.get("_class_name")
        if kind == AutoencoderKL.__name__:
            return _DEFAULTS | config
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as a JSON object ({error}); {AGAIN}") from None
    raise CheckpointError(f"{file.parent}: expected a network of class AutoencoderKL, found {kind}; {AGAIN}")


def load_vae(path: str | Path) -> AutoencoderKL:
    """Load an AutoencoderKL from a run of recipe ``vae``, a pipeline folder, or a folder as diffusers writes it.

    Raises:
        CheckpointError: no VAE there, another kind of network, or damaged, incomplete or NaN weights.
    """
    folder = vae_folder(Path(path).expanduser())
    read_vae_config(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; weights are loaded from safetensors only; {AGAIN}")
    try:
        vae, info = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: damaged VAE ({reason:.300}); {AGAIN}") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{weights}: weights of another network ({', '.join(map(str, wrong[:4]))}, ...) than its config.json says; "
            f"{AGAIN}"
        )
    if bad := [name for name, value in vae.state_dict().items() if not bool(torch.isfinite(value).all())]:
        raise CheckpointError(f"{weights}: NaN or infinite weights ({', '.join(bad[:4])}); {AGAIN}")
    return vae.eval().requires_grad_(False)
