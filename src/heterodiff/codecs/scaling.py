"""Base class of latent codecs, and measuring the scale that brings latents to unit variance."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from heterodiff.errors import CheckpointError, ConfigError, DataError

PIXELS_AT_ONCE = 2**20
"""Pixels encoded or decoded at once: an encoder's activations are far larger than those of a network on its latents."""
LEAST_STD, MOST_STD = 0.8, 1.25
"""Bounds of the std of latents that count as having unit variance."""


def halved(network: str, height: int, width: int, times: int, way_out: str = "") -> tuple[int, int]:
    """Return height and width after ``times`` halvings.

    Raises:
        ConfigError: sides that cannot be halved as often; ``way_out`` ends the message.
    """
    factor = 2**times
    if height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise ConfigError(
            f"images of {height}x{width}: the {network} needs sides divisible by {factor}; set "
            f"data.image_size={near}{way_out}"
        )
    return height // factor, width // factor


class LatentCodec:
    """Latents of a trained network, scaled as diffusers' pipelines do.

    z = (latent - latents_mean) / latents_std * scaling_factor, with zero mean and unit std where the network's
    configuration lacks the first two (then ``shift_factor`` is the mean).

    Args:
        network: network, which is not trained here.
        factor: height and width of an image relative to those of its latent.

    Attributes:
        encoder_parts: prefixes of the weights on which the latents of an image depend.
        shape_for: function that gives the shape of latents from a network's configuration.
    """

    clip_sample = False
    random = False
    encoder_parts: tuple[str, ...] = ("encoder.",)
    shape_for: Callable[[Any, int, int, int], tuple[int, int, int]]

    def __init__(self, network: Any, factor: int):
        self.network = network
        self.factor = factor
        self.latent_channels: int = network.config.latent_channels
        self._mean, self._scale = _statistics(network.config)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std (B, c, h, w) of the posterior of images in [-1, 1]."""
        raise NotImplementedError

    def _decoded(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> images (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def latent_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """Shape of z for images (channels, height, width).

        Raises:
            ConfigError: another number of channels than the network was made for, or sides that it cannot take.
        """
        return self.shape_for(self.network.config, channels, height, width)

    @property
    def per_channel(self) -> bool:
        """True if the network has a mean and std for each channel, rather than one factor for all."""
        return self.network.config.get("latents_std") is not None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> "LatentCodec":
        self.network.to(device)
        return self

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> mean and std of the posterior (B, 2 c, h, w), float32, unscaled."""
        at_once = max(1, PIXELS_AT_ONCE // (images.shape[-1] * images.shape[-2]))
        parts = (images * 2 - 1).to(self.network.dtype).split(at_once)
        return torch.cat([torch.cat(self._moments(part), dim=1).float() for part in parts])

    def draw(self, posterior: Tensor, noise: Tensor | None) -> Tensor:
        """Mean and std (B, 2 c, h, w) -> z (B, c, h, w); with ``noise`` (standard normal) a draw, else the mean."""
        mean, std = posterior.float().chunk(2, dim=1)
        latents = mean if noise is None else mean + std * noise
        return self.scale(latents)

    def scale(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as the network gives them -> z of unit variance."""
        mean, scale = self._statistics_for(latents)
        return (latents - mean) * scale

    def unscale(self, z: Tensor) -> Tensor:
        """z -> latents (B, c, h, w) as the network gives and takes them."""
        mean, scale = self._statistics_for(z)
        return z / scale + mean

    def _statistics_for(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale with the type of ``z`` and on its device, where they stay."""
        if self._mean.device != z.device:
            self._mean, self._scale = self._mean.to(z.device), self._scale.to(z.device)
        return self._mean.to(z.dtype), self._scale.to(z.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the most likely z (B, c, h, w)."""
        return self.draw(self.posterior(images), None)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> images (B, C, H, W) in [0, 1]."""
        latents = self.unscale(z).to(self.network.dtype)
        at_once = max(1, PIXELS_AT_ONCE // (z.shape[-1] * z.shape[-2] * self.factor**2))
        decoded = torch.cat([self._decoded(part) for part in latents.split(at_once)])
        return ((decoded.float() + 1) / 2).clamp(0, 1)

    def fingerprint(self) -> str:
        """Hash of the encoder's weights; networks with equal fingerprints give equal latents."""
        parts = {k: v for k, v in self.network.state_dict().items() if k.startswith(self.encoder_parts)}
        digest = hashlib.sha256()
        for name in sorted(parts):
            value = parts[name].detach().cpu().contiguous().float()
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Scale by ``mean`` and ``std`` (c,) from now on, and store them in the network's configuration."""
        self.network.register_to_config(
            latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0, shift_factor=None
        )
        self._mean, self._scale = _statistics(self.network.config)


def _statistics(config: Any) -> tuple[Tensor, Tensor]:
    """Mean to subtract and factor to multiply with, each (c, 1, 1)."""
    channels = config["latent_channels"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    mean = [config.get("shift_factor") or 0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise CheckpointError(
            f"the codec's configuration: expected latents_mean and latents_std of {channels} numbers, the second "
            "above 0"
        )
    return torch.tensor(mean).view(-1, 1, 1), (config.get("scaling_factor", 1.0) / torch.tensor(std)).view(-1, 1, 1)


class LatentMoments:
    """Running mean and variance of each channel of latents, posterior variance included (law of total variance)."""

    def __init__(self, channels: int):
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Add posteriors of mean and std (B, c, h, w)."""
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
        moments.add(*posterior.chunk(2, dim=1))
    std = moments.std
    if not bool(torch.isfinite(std).all()):
        raise DataError("the encoder gives NaN or infinite latents; train it again with a lower training.learning_rate")
    if float(std.min()) < 1e-6:
        raise DataError(
            f"channel {int(std.argmin())} of the latents never varies (std {float(std.min()):.2g}): the images are "
            "constant, or the encoder is not trained"
        )
    return moments.mean, std


def check_scale(codec: LatentCodec, mean: Tensor, std: Tensor) -> None:
    """Compare measured ``mean`` and ``std`` (c,) of unscaled latents with the codec's scale.

    Raises:
        DataError: scaled latents have a std outside 0.8 to 1.25, see :func:`scaled_std`.
    """
    found = scaled_std(codec, mean, std)
    if not (float(found.min()) >= LEAST_STD and float(found.max()) <= MOST_STD):  # NaN too
        listed = ", ".join(f"{value:.3g}" for value in found.tolist())
        raise DataError(
            f"latents of the training images have a std of {listed} after scaling, expected 1 ({LEAST_STD} to "
            f"{MOST_STD}): the codec's scale is that of other images; set codec.statistics=measured to scale by these "
            "images, or train a codec on them (recipe: vae, or alignment for images with captions)"
        )


def scaled_std(codec: LatentCodec, mean: Tensor, std: Tensor) -> Tensor:
    """Std after scaling: of each channel (c,), or over all (1,) where the network has one factor for all."""
    scale = codec._scale.flatten().to(std)
    if codec.per_channel:
        return std * scale
    shifted = mean - codec._mean.flatten().to(mean)
    total = (std.square() + shifted.square()).mean() - shifted.mean().square()
    return total.sqrt().view(1) * scale[0]
