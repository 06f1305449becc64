"""The codec ``cnn``: a convolutional autoencoder whose map also gives an embedding, for text to image."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from heterodiff.codecs.scaling import LatentCodec
from heterodiff.errors import ConfigError
from heterodiff.models.loading import load_network, read_network_config

FOLDER = "image_codec"
STAGES = (32, 64, 128, 256, 256)
"""Default channels of the encoder's stages (224x224 to 7x7); fewer for smaller images, more of the last for larger."""
LATENT_SIDE = 8
HEAD_CHANNELS = 256
MOST_PROJECTION_WIDTH = 512
MAX_GROUPS = 8
FEATURE_CHANNELS = 16
"""Number of features in the prior of recipe `text-image`, beside the map."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and std of natural images, by which pretrained networks scale theirs."""


def default_stages(height: int, width: int) -> tuple[int, ...]:
    """Channels of as many halving stages as bring the longer side nearest to 8."""
    count = max(1, round(math.log2(max(height, width) / LATENT_SIDE)))
    return (STAGES + STAGES[-1:] * max(0, count - len(STAGES)))[:count]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1), _norm(out_channels), nn.SiLU())


def _up(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1), _norm(out_channels), nn.SiLU())


class Residual(nn.Sequential):
    """x + convolution(SiLU(norm(x))), twice as deep."""

    def __init__(self, channels: int):
        layers = [(_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
        super().__init__(*(layer for part in layers for layer in part))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Backbone(nn.Module):
    """A convolutional network of transformers as the encoder's stages, for pictures of three channels.

    Args:
        config: of the network; its weights are loaded by whoever builds this.
        channels: what its map is brought to.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any], channels: int):
        super().__init__()
        from transformers import AutoConfig, AutoModel

        settings = AutoConfig.for_model(**config)
        settings._attn_implementation = None  # transformers would fetch and run a kernel of that name
        network = AutoModel.from_config(settings, trust_remote_code=False)
        self.network = network.float()  # whatever it is stored in
        self.projection = nn.LazyConv2d(channels, 1)
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> map (B, channels, h, w)."""
        return self.projection(self.network(((images + 1) / 2 - self.mean) / self.std).last_hidden_state)


class ImageCodec(ModelMixin, ConfigMixin):
    """Image to map, map to embedding, and both back to the image.

    The map has an rms of 1 over each image, so that noise on it means the same for all.

    Args:
        in_channels: of the images.
        sample_size: their height and width.
        block_out_channels: of the encoder's stages, each of which halves height and width; the decoder mirrors them.
        latent_channels: of the map.
        embedding_dim: of the embedding.
        latents_mean, latents_std: of each channel of the map, over the training images.
        scaling_factor, shift_factor: as in diffusers' autoencoders; not used where the two above are set.
        backbone: configuration of a network of transformers in place of the encoder's stages.
        feature_channels: of the features that :meth:`prior` gives beside the map, see :meth:`add_features`.

    Raises:
        ConfigError: images whose sides the stages cannot halve, or a backbone that gives no map of the same size.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: tuple[int, int] = (224, 224),
        block_out_channels: tuple[int, ...] = STAGES,
        latent_channels: int = 256,
        embedding_dim: int = 512,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        backbone: dict[str, Any] | None = None,
        feature_channels: int = 0,
    ):
        super().__init__()
        self.latent_size = latent_shape(self.config, in_channels, *sample_size)[1:]
        widths = tuple(block_out_channels)
        stages: nn.Module
        if backbone is None:
            stages = nn.Sequential(*(_down(a, b) for a, b in pairwise((in_channels, *widths))))
        else:
            stages = Backbone(backbone, widths[-1])
        last = widths[-1]
        self.encoder = nn.Sequential(stages, Residual(last), nn.Conv2d(last, latent_channels, 3, padding=1))
        if backbone is not None:
            self._check_backbone()
        self.embedder = nn.Sequential(
            nn.Conv2d(latent_channels, last, 3, padding=1),
            *(_down(a, HEAD_CHANNELS) for a in (last, HEAD_CHANNELS)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(HEAD_CHANNELS, embedding_dim),
        )
        width = min(MOST_PROJECTION_WIDTH, 2 * embedding_dim)
        self.projection = nn.Sequential(  # one linear layer could not tell where each of two things lies
            nn.Linear(embedding_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, (latent_channels + feature_channels) * math.prod(self.latent_size)),
        )
        outwards = widths[::-1]
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, last, 3, padding=1),
            Residual(last),
            *(_up(a, b) for a, b in pairwise(outwards)),
            nn.ConvTranspose2d(outwards[-1], in_channels, 4, 2, 1),
        )

    def _check_backbone(self) -> None:
        """Run it once, which also fixes the shape of its projection."""
        try:
            with torch.no_grad():
                found = tuple(self.encoder(torch.zeros(1, self.config.in_channels, *self.config.sample_size)).shape[2:])
        except (RuntimeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"alignment.backbone: cannot take these images ({reason}); take a network of RGB pictures, such as a "
                "ResNet"
            ) from None
        if found != self.latent_size:
            raise ConfigError(
                f"alignment.backbone: expected a network of RGB pictures with a map of "
                f"{self.latent_size[0]}x{self.latent_size[1]} as its last hidden state, found {found}; set "
                "alignment.block_out_channels to as many levels as it halves the picture, or take a ResNet"
            )

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> map (B, c, h, w) of rms 1."""
        return unit_rms(self.encoder(images))

    def embed(self, latents: Tensor) -> Tensor:
        """Map (B, c, h, w) -> embedding (B, D), not normalised."""
        return self.embedder(latents)

    def get_latent_from_embedding(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D), of images or texts and of any length but zero -> the map (B, c, h, w) to be expected."""
        return self.prior(embeddings)[:, : self.config.latent_channels]

    def prior(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> (B, c + features, h, w): expected map, then expected features."""
        flat = self.projection(scaled(embeddings))
        return flat.unflatten(1, (self.config.latent_channels + self.config.feature_channels, *self.latent_size))

    def add_features(self, channels: int) -> None:
        """Let :meth:`prior` give ``channels`` of features, too; its last layer is replaced and has to be trained."""
        last = self.projection[-1]
        assert isinstance(last, nn.Linear)
        if channels == self.config.feature_channels:
            return
        outputs = (self.config.latent_channels + channels) * math.prod(self.latent_size)
        self.projection[-1] = nn.Linear(last.in_features, outputs).to(last.weight).requires_grad_(False)
        self.register_to_config(feature_channels=channels)

    def decode_from_latent(self, latents: Tensor) -> Tensor:
        """Map (B, c, h, w) -> images (B, C, H, W) in [0, 1]."""
        return ((self.decode(latents) + 1) / 2).clamp(0, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Map (B, c, h, w) -> images (B, C, H, W) around [-1, 1], for losses."""
        return self.decoder(latents)


def unit_rms(latents: Tensor) -> Tensor:
    """Scale each map (B, c, h, w) to a root mean square of 1."""
    return latents * torch.rsqrt(latents.float().square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6).to(latents.dtype)


def scaled(embeddings: Tensor) -> Tensor:
    """Embeddings (B, D) to a length of sqrt(D), so that a number is about 1; rows of zeros stay."""
    return nn.functional.normalize(embeddings, dim=-1) * math.sqrt(embeddings.shape[-1])


def given_rows(embeddings: Tensor, maps: Tensor) -> Tensor:
    """``maps`` (B, c, h, w), zeros where the embedding (B, D) is, which is "no condition"."""
    return torch.where(embeddings.ne(0).any(dim=1)[:, None, None, None], maps, 0)


def latent_shape(config: Mapping[str, Any], channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape of the maps that an :class:`ImageCodec` of ``config`` makes of images (channels, height, width).

    Raises:
        ConfigError: other images than it is made for, or sides that its stages cannot halve.
    """
    expected = (config["in_channels"], *config["sample_size"])
    if (channels, height, width) != expected:
        shape = "x".join(map(str, expected))
        raise ConfigError(
            f"images of {channels}x{height}x{width}: the image codec takes {shape}; set data.channels={expected[0]} "
            f"data.image_size={list(expected[1:])}, or train another codec"
        )
    factor = 2 ** len(config["block_out_channels"])
    if height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise ConfigError(
            f"images of {height}x{width}: the image codec needs sides divisible by {factor}; set "
            f"data.image_size={near}, or fewer alignment.block_out_channels"
        )
    return config["latent_channels"], height // factor, width // factor


class CNNCodec(LatentCodec):
    """The maps of an :class:`ImageCodec` as latents.

    Args:
        codec: used as it is; nothing here trains it.
    """

    def __init__(self, codec: ImageCodec):
        super().__init__(codec, 2 ** len(codec.config.block_out_channels))

    def latent_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        return latent_shape(self.network.config, channels, height, width)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.network.encode(images)
        return latents, torch.zeros_like(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents)

    def prior(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> expected z and features (B, c + features, h, w); zeros for embeddings of zeros."""
        found = self.network.prior(embeddings).float()
        maps, features = found.split([self.latent_channels, found.shape[1] - self.latent_channels], dim=1)
        return given_rows(embeddings, torch.cat([self.scale(maps), features], dim=1))


def _folder(path: Path) -> Path:
    inside = path / FOLDER
    return inside if inside.is_dir() else path


def read_codec_config(path: Path) -> dict[str, Any]:
    """Configuration of the :class:`ImageCodec` of a run, or in its own folder, without its weights.

    Raises:
        CheckpointError: none there.
    """
    return read_network_config(ImageCodec, _folder(path))


def load_image_codec(path: Path) -> ImageCodec:
    """Load an :class:`ImageCodec` from a run of recipe ``alignment`` or ``text-image``, or from its own folder.

    Raises:
        CheckpointError: none there, or damaged, incomplete or NaN weights.
    """
    return load_network(ImageCodec, _folder(path)).requires_grad_(False)
