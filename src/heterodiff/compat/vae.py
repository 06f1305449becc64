"""A VAE, and data and networks in its latents, under the call signatures of earlier latent diffusion scripts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.compat.gaussian_diffusion import GaussianDiffusion
from heterodiff.compat.guided_diffusion import EarlierNetwork, UNetModel
from heterodiff.config import DataConfig
from heterodiff.data.augment import augment
from heterodiff.data.sources import load_data
from heterodiff.devices import find_device
from heterodiff.errors import ConfigError, DataError
from heterodiff.models.defaults import default_levels
from heterodiff.training.batches import BatchOrder, Stream, derive_seed

ROUND_TRIP_MSE = 0.01
RANGE_TOLERANCE = 1e-3


class VAEInterface:
    """Encode and decode batches with the VAE at ``vae_path``; its own scale is used, never a constant.

    Args:
        vae_path: a run of recipe ``vae``, a folder with a diffusers AutoencoderKL, or a file of weights in the layout
            of latent diffusion (.pt, .ckpt, .safetensors).
        device: default: a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: no VAE there, or one that cannot be loaded.
        ConfigError: a device that this machine does not have.
    """

    def __init__(self, vae_path: str | Path, device: str | torch.device | None = None):
        self.device = find_device(device)
        self.codec = KLVAECodec(load_vae(vae_path))
        self.codec.to(self.device)

    @property
    def vae(self) -> Any:
        """The AutoencoderKL itself, which works on images in [-1, 1] and on latents that are not scaled."""
        return self.codec.vae

    @property
    def scale_factor(self) -> float:
        """Factor that gives latents unit std, after the mean of each channel is taken off; a mean over the channels."""
        channels = self.codec.latent_channels
        zeros, ones = (self.codec.scale(torch.full((1, channels, 1, 1), value)) for value in (0.0, 1.0))
        return float((ones - zeros).mean())

    def encode_batch(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> latents (B, c, h, w) of unit std, from the mean of the posterior.

        Raises:
            ConfigError: channels or a size that the VAE cannot take.
            DataError: values outside [0, 1], or NaN.
        """
        images = torch.as_tensor(images)
        if images.ndim != 4 or len(images) == 0:
            channels = self.codec.vae.config.in_channels
            raise ConfigError(f"images {tuple(images.shape)}: the VAE encodes (B, {channels}, H, W), B above 0")
        self.codec.latent_shape(*images.shape[1:])
        low, high = float(images.min()), float(images.max())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise DataError(f"images to encode hold values {low:g} to {high:g}; expected [0, 1]: scale them first")
        return self.codec.encode(images.to(self.device, torch.float32))

    def decode_batch(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as from :meth:`encode_batch` -> images (B, C, H, W), clamped to [0, 1].

        Raises:
            ConfigError: another number of channels than the VAE's.
        """
        latents = torch.as_tensor(latents)
        if latents.ndim != 4 or latents.shape[1] != self.codec.latent_channels:
            raise ConfigError(
                f"latents {tuple(latents.shape)}: the VAE decodes (B, {self.codec.latent_channels}, h, w)"
            )
        return self.codec.decode(latents.to(self.device, torch.float32))

    def get_latent_size(self, image_size: int) -> int:
        """Side of the latent of an image with sides of ``image_size`` pixels.

        Raises:
            ConfigError: a side that the VAE's factor does not divide.
        """
        return self.codec.latent_shape(self.codec.vae.config.in_channels, image_size, image_size)[1]

    def test_roundtrip(self, images: Tensor, max_mse: float = ROUND_TRIP_MSE) -> bool:
        """Check that images (B, C, H, W) in [0, 1] are reconstructed with a mean squared error below ``max_mse``."""
        decoded = self.decode_batch(self.encode_batch(images)).cpu()
        return float((decoded - torch.as_tensor(images).cpu()).square().mean()) < max_mse


def load_data_with_vae(
    *,
    data_dir: str | Path,
    batch_size: int,
    image_size: int,
    vae: VAEInterface | str | Path,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield batches of latents of a folder's images for ever, as ``load_data`` of guided-diffusion does of images.

    Classes are subfolders, or else what stands before the first ``_`` in a file's name, in the order of their names.

    Args:
        data_dir: see source ``images`` of a configuration.
        image_size: sides of the images after resizing.
        vae: encodes them; or its path, see :class:`VAEInterface`.
        class_cond: also give the classes.
        deterministic: in the order of the files; else each epoch in an order of its own, from ``seed``.
        random_crop: crop up to an eighth of the sides at random.
        random_flip: mirror half of the images.

    Yields:
        latents (batch_size, c, h, w) of unit std on the VAE's device, and ``{"y": classes (batch_size,)}``, or ``{}``.

    Raises:
        DataError: no usable images, or ``class_cond`` with images that have no classes.
        ConfigError: images that the VAE cannot take.
    """
    encoder = vae if isinstance(vae, VAEInterface) else VAEInterface(vae)
    channels = encoder.vae.config.in_channels
    encoder.codec.latent_shape(channels, image_size, image_size)
    config = DataConfig(
        path=Path(data_dir),
        image_size=(image_size, image_size),
        channels=channels,
        val_fraction=0,
        horizontal_flip=random_flip,
        random_crop=image_size // 8 if random_crop else 0,
    )
    data = load_data(config).train
    labels = torch.from_numpy(_classes(data.names, data.labels)) if class_cond else None
    return _batches(data, labels, encoder, config, batch_size, None if deterministic else seed)


def _batches(
    data: Any, labels: Tensor | None, encoder: VAEInterface, config: DataConfig, batch_size: int, seed: int | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    order, step = None if seed is None else BatchOrder(len(data), batch_size, seed), 0
    while True:
        positions = range(step * batch_size, (step + 1) * batch_size)
        indices = [k % len(data) for k in positions] if order is None else order.indices(step)
        seeds = [derive_seed(seed or 0, Stream.AUGMENT, k) for k in positions]
        images = augment(data.batch(indices)[0], seeds, config)
        yield encoder.encode_batch(images), {} if labels is None else {"y": labels[indices]}
        step += 1


def _classes(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Class indices (N,) int64: ``labels``, or from the beginnings of ``names`` where there are none."""
    if (labels >= 0).all():
        return labels
    if (labels >= 0).any():
        row = int((labels < 0).argmax())
        raise DataError(f"{names[row]}: no class, as {int((labels < 0).sum())} of {len(names)} images; leave them out")
    starts = [Path(name).name.split("_")[0] for name in names]
    if any(start == Path(name).name for start, name in zip(starts, names, strict=True)):
        raise DataError("class_cond=True: images have no classes; use subfolders, or names such as cat_12.png")
    return np.unique(starts, return_inverse=True)[1].astype(np.int64)


def create_model_and_diffusion_vae(
    image_size: int,
    vae: VAEInterface | str | Path,
    class_cond: bool = False,
    num_classes: int = 1000,
    learn_sigma: bool = False,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    channel_mult: str | Sequence[int | float] = "",
    num_heads: int = 4,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    attention_resolutions: str | Sequence[int] = "16,8",
    dropout: float = 0.0,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = True,
    use_checkpoint: bool = False,
    use_scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    clf_free: bool = True,
    network: type[EarlierNetwork] = UNetModel,
) -> tuple[EarlierNetwork, GaussianDiffusion]:
    """Make a network of a VAE's latents, and its diffusion process, with the arguments of guided-diffusion.

    Args:
        image_size: sides of the images; the network's own are those of their latents.
        vae: see :class:`VAEInterface`.
        channel_mult: ``""`` chooses by the size of the latents.
        attention_resolutions: as text sides of maps in positions of the latents, else downsampling factors.
        rescale_learned_sigmas: accepted; a learned variance always has the loss that it stands for.
        network: a class of :mod:`heterodiff.compat.guided_diffusion`.

    Raises:
        ConfigError: an argument that no network can be built from; ``use_kl`` or ``rescale_timesteps`` of other than
            1000 steps, which the networks here are not trained with.
    """
    if use_kl:
        raise ConfigError("use_kl=True: the loss is the squared error, with a variational bound of a learned variance")
    if rescale_timesteps and diffusion_steps != 1000:
        raise ConfigError("rescale_timesteps=True: networks get the timestep itself; use 1000 diffusion_steps")
    encoder = vae if isinstance(vae, VAEInterface) else VAEInterface(vae)
    channels, size = encoder.codec.latent_channels, encoder.get_latent_size(image_size)
    model = network(
        image_size=size,
        in_channels=channels,
        model_channels=num_channels,
        out_channels=2 * channels if learn_sigma else channels,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_resolutions,
        dropout=dropout,
        channel_mult=default_levels(size)[0] if channel_mult == "" else channel_mult,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        clf_free=clf_free,
    )
    return model, GaussianDiffusion(diffusion_steps, noise_schedule, learn_sigma, predict_xstart, timestep_respacing)
