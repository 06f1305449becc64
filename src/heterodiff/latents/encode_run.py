"""The command `heterodiff encode`: load the VAE and the images, and encode them with all processes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.codecs.scaling import LEAST_STD, MOST_STD, scaled_std
from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.sources import load_data
from heterodiff.devices import process_state
from heterodiff.errors import DataError
from heterodiff.latents.encode import check_out, encode_data
from heterodiff.latents.reading import load_latents


@dataclass(frozen=True)
class Encoded:
    """Result of `encode_run`.

    Attributes:
        data: the latents.
        std: std of the latents scaled by the VAE's statistics, of each channel, or of all for a VAE with one factor.
        notes: warnings for the user.
    """

    data: LoadedData
    std: tuple[float, ...]
    notes: tuple[str, ...]


def encode_run(config: DataConfig, vae_path: Path, out: Path, batch_size: int, shard_size: int) -> Encoded | None:
    """Encode the images of ``config`` with the VAE at ``vae_path`` into the folder ``out``.

    Started by torchrun, processes share the work; all but the first return None.

    Raises:
        CheckpointError: no VAE there, or a damaged one.
        ConfigError: images that the VAE cannot take.
        DataError: images that cannot be loaded, or latents that cannot be written; see `encode.encode_data`.
    """
    if config.source == "latents":
        raise DataError("data.source=latents: encoded already; give the configuration of the images to encode")
    check_out(out)
    codec = KLVAECodec(load_vae(vae_path))
    if config.channels is not None and config.image_size is not None:  # refused now, not after reading all images
        codec.latent_shape(config.channels, *config.image_size)
    state = process_state()
    rank, world_size = state.process_index, state.num_processes
    lazy = config
    if config.path is None or config.path.suffix.lower() != ".npz":  # npz files are read as a whole
        lazy = config.model_copy(update={"memory_limit_gb": 0.0})  # memory must not grow with the number of images
    data = load_data(lazy)
    encode_data(
        data,
        config,
        codec.to(state.device),
        out,
        vae_path=vae_path,
        shard_size=shard_size,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        barrier=state.wait_for_everyone,
    )
    state.destroy_process_group()
    return _report(config, codec, data, out) if rank == 0 else None


def _report(config: DataConfig, codec: KLVAECodec, images: LoadedData, out: Path) -> Encoded:
    notes = [note for note in images.warnings if "memory_limit_gb" not in note]  # which is set above
    if images.skipped:
        notes.append(f"{len(images.skipped):,} images cannot be used and were left out; `heterodiff check` lists them")
    augmentation = [key for key in ("horizontal_flip", "random_crop") if getattr(config, key)]
    if augmentation:
        keys = " and ".join(f"data.{key}" for key in augmentation)
        notes.append(f"stored latents are not augmented: leave out {keys} when you train on these")
    return describe(codec, out, notes)


def describe(codec: KLVAECodec, out: Path, notes: list[str]) -> Encoded:
    """Return what the folder ``out`` holds, with ``notes`` and one on the scale of its latents, if it is another."""
    data = load_latents(out, memory_limit_gb=0)
    assert data.latents is not None
    std = scaled_std(codec, torch.tensor(data.latents.mean).double(), torch.tensor(data.latents.std).double())
    if float(std.min()) < LEAST_STD or float(std.max()) > MOST_STD:
        notes = [
            *notes,
            "the VAE's statistics are those of other images: train on these with codec.statistics=measured",
        ]
    return Encoded(data, tuple(std.tolist()), tuple(notes))
