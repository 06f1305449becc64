"""Codec ``cnn``: a convolutional autoencoder whose map also gives an embedding, for text to image."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from heterodiff.codecs.scaling import LatentCodec, halved
from heterodiff.errors import ConfigError, reason
from heterodiff.models.loading import load_network, read_network_config

FOLDER = "image_codec"
STAGES = (32, 64, 128, 256, 256)
"""Default channels of the encoder's stages (224x224 to 7x7); small images use fewer, large ones repeat the last."""
LATENT_SIDE = 8
HEAD_CHANNELS = 256
MAX_PROJECTION_WIDTH = 512
MAX_GROUPS = 8
FEATURE_CHANNELS = 16
"""Channels of the features that recipe `text-image` predicts beside the map."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and std of natural images, by which pretrained networks scale their inputs."""


def default_stages(height: int, width: int) -> tuple[int, ...]:
    """Channels of the halving stages that bring the longer side nearest to 8."""
    count = max(1, round(math.log2(max(height, width) / LATENT_SIDE)))
    return (STAGES + STAGES[-1:] * max(0, count - len(STAGES)))[:count]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1), _norm(out_channels), nn.SiLU())


def _up(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1), _norm(out_channels), nn.SiLU())


class Residual(nn.Sequential):
    """x + two layers of convolution(SiLU(norm(x)))."""

    def __init__(self, channels: int):
        layers = [(_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
        super().__init__(*(layer for part in layers for layer in part))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PretrainedStages(nn.Module):
    """A convolutional network of transformers as the encoder's stages, for RGB images.

    Args:
        config: configuration of the network; the caller loads its weights.
        channels: channels of the projected map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any], channels: int):
        super().__init__()
        from transformers import AutoConfig, AutoModel

        settings = AutoConfig.for_model(**config)
        settings._attn_implementation = None  # transformers would fetch and run a kernel of that name
        network = AutoModel.from_config(settings, trust_remote_code=False)
        self.network = network.float()  # whatever its configuration says
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
        in_channels: channels of the images.
        sample_size: height and width of the images.
        block_out_channels: channels of the encoder's stages, each of which halves height and width; the decoder mirrors
            them.
        latent_channels: channels of the map.
        embedding_dim: width of the embedding.
        latents_mean, latents_std: statistics of each channel of the map over the training images.
        scaling_factor, shift_factor: as in diffusers' autoencoders; ignored if the two above are set.
        backbone: configuration of a network of transformers in place of the encoder's stages.
        feature_channels: channels of the features predicted beside the map, see :meth:`add_features`.

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
        last = widths[-1]
        stages: nn.Module
        if backbone is None:
            stages = nn.Sequential(*(_down(a, b) for a, b in pairwise((in_channels, *widths))))
        else:
            stages = PretrainedStages(backbone, last)
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
        width = min(MAX_PROJECTION_WIDTH, 2 * embedding_dim)
        self.projection = nn.Sequential(  # a linear layer could not locate two objects
            nn.Linear(embedding_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, (latent_channels + feature_channels) * math.prod(self.latent_size)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, last, 3, padding=1),
            Residual(last),
            *(_up(a, b) for a, b in pairwise(reversed(widths))),
            nn.ConvTranspose2d(widths[0], in_channels, 4, 2, 1),
        )

    def _check_backbone(self) -> None:
        """Run the encoder once, which also sets the shape of its lazy projection."""
        try:
            with torch.no_grad():
                found = tuple(self.encoder(torch.zeros(1, self.config.in_channels, *self.config.sample_size)).shape[2:])
        except (RuntimeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"alignment.backbone: cannot take these images ({reason(error):.200}); take a network for RGB images, "
                "such as a ResNet"
            ) from None
        if found != self.latent_size:
            raise ConfigError(
                f"alignment.backbone: expected a network for RGB images with a map of "
                f"{self.latent_size[0]}x{self.latent_size[1]} as its last hidden state, found {found}; set "
                "alignment.block_out_channels to one level for each halving of the image, or take a ResNet"
            )

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> map (B, c, h, w) of rms 1."""
        return unit_rms(self.encoder(images))

    def embed(self, latents: Tensor) -> Tensor:
        """Map (B, c, h, w) -> embedding (B, D), not normalised."""
        return self.embedder(latents)

    def get_latent_from_embedding(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) of images or texts, of any nonzero length -> expected map (B, c, h, w)."""
        return self.prior(embeddings)[:, : self.config.latent_channels]

    def prior(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> expected map and features (B, c + features, h, w)."""
        flat = self.projection(scaled(embeddings))
        return flat.unflatten(1, (self.config.latent_channels + self.config.feature_channels, *self.latent_size))

    def add_features(self, channels: int) -> None:
        """Let :meth:`prior` predict ``channels`` of features, too; its last layer becomes a new one, to be trained."""
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
    """Scale embeddings (B, D) to an rms of 1; rows of zeros stay."""
    return nn.functional.normalize(embeddings, dim=-1) * math.sqrt(embeddings.shape[-1])


def given_rows(embeddings: Tensor, maps: Tensor) -> Tensor:
    """``maps`` (B, c, h, w) with zeros in rows without a condition, whose embedding (B, D) is zero."""
    return torch.where(embeddings.ne(0).any(dim=1)[:, None, None, None], maps, 0)


def latent_shape(config: Mapping[str, Any], channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape of the maps that an :class:`ImageCodec` of ``config`` makes of images (channels, height, width).

    Raises:
        ConfigError: images of another shape than its own, or sides that its stages cannot halve.
    """
    expected = (config["in_channels"], *config["sample_size"])
    if (channels, height, width) != expected:
        shape = "x".join(map(str, expected))
        raise ConfigError(
            f"images of {channels}x{height}x{width}: the image codec takes {shape}; set data.channels={expected[0]} "
            f"data.image_size={list(expected[1:])}, or train another codec"
        )
    stages = len(config["block_out_channels"])
    size = halved("image codec", height, width, stages, ", or fewer alignment.block_out_channels")
    return config["latent_channels"], *size


class CNNCodec(LatentCodec):
    """Latents that are the maps of an :class:`ImageCodec`."""

    shape_for = staticmethod(latent_shape)

    def __init__(self, codec: ImageCodec):
        super().__init__(codec, 2 ** len(codec.config.block_out_channels))

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.network.encode(images)
        return latents, torch.zeros_like(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents)

    def prior(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> expected z and features (B, c + features, h, w); zeros where the embedding is zero."""
        found = self.network.prior(embeddings).float()
        maps, features = found.split([self.latent_channels, found.shape[1] - self.latent_channels], dim=1)
        return given_rows(embeddings, torch.cat([self.scale(maps), features], dim=1))


def _folder(path: Path) -> Path:
    inside = path / FOLDER
    return inside if inside.is_dir() else path


def read_codec_config(path: Path) -> dict[str, Any]:
    """Read the configuration of the :class:`ImageCodec` of a run, or in its own folder, without its weights.

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
