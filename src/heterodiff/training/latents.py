"""Latents of a run's images, encoded once into its folder or with every batch, and the check of their scale."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heterodiff.codecs.make import load_saved_codec
from heterodiff.codecs.scaling import LatentCodec, check_scale, measure
from heterodiff.config import RunConfig
from heterodiff.data.assemble import with_attributes, with_captions, without_captions
from heterodiff.data.sources import LoadedData
from heterodiff.errors import DataError
from heterodiff.latents.encode import encode_data
from heterodiff.latents.reading import INDEX_FILE, load_latents
from heterodiff.run_folder import RunFolder
from heterodiff.training.processes import HostGroup

if TYPE_CHECKING:
    from heterodiff.training.recipes.diffusion import DiffusionRecipe

MEASURED_IMAGES = 1024
MEASURED_BATCH = 32


def stored_latents(config: RunConfig) -> LoadedData | None:
    """Return the latents that a run encoded into its folder when it began; None if it has none.

    Only those of a run that has begun are known to be of its images; others are compared when it begins. They lack the
    columns of ``data.conditions``, for which the images are read once more.
    """
    if config.output is None or not config.caches_latents or config.data.conditions:
        return None
    run = RunFolder(config.output)
    if not run.has_config or not (run.latents / INDEX_FILE).is_file():
        return None
    return load_latents(run.latents, config.data.memory_limit_gb)


def prepare_latents(
    config: RunConfig, recipe: "DiffusionRecipe", data: LoadedData, hosts: HostGroup, quiet: bool
) -> LoadedData:
    """Return the data that ``recipe`` trains on: ``data``, or the latents of its images if the run caches them.

    Also sets the scale of the codec, see :class:`heterodiff.config.CodecConfig`.

    Args:
        hosts: the processes of the run, all of which call this.

    Raises:
        DataError: latents of another VAE, NaN latents, or a std after scaling outside 0.8 to 1.25.
    """
    codec = recipe.codec
    if not isinstance(codec, LatentCodec):
        return data
    if data.latents is None and config.caches_latents:
        assert config.output is not None
        plain, captions = without_captions(data) if data.captions else (data, None)
        folder = encode_data(
            plain,
            config.data,
            codec,
            RunFolder(config.output).latents,
            vae_path=Path(config.codec.path or ""),
            rank=hosts.rank,
            world_size=hosts.count,
            barrier=hosts.wait,
            quiet=quiet,
        )
        data = load_latents(folder, config.data.memory_limit_gb)
        if captions is not None:
            data = with_captions(data, captions)
        data = with_attributes(data, plain)
    mean, std = _statistics(codec, data, recipe)
    if config.codec.statistics == "measured":
        codec.set_statistics(mean, std)
    check_scale(codec, mean, std)
    return data


def _statistics(codec: LatentCodec, data: LoadedData, recipe: "DiffusionRecipe") -> tuple[Tensor, Tensor]:
    """Mean and std (c,) of the unscaled latents of the training images: stored with them, or of up to 1,024."""
    if (stored := data.latents) is not None:
        if (found := codec.fingerprint()) != stored.vae_fingerprint or stored.shape != recipe.latent_shape:
            raise DataError(
                f"{stored.folder}: latents {stored.shape} of the VAE {stored.vae_path} (fingerprint "
                f"{stored.vae_fingerprint}), but codec.path={recipe.config.codec.path} makes {recipe.latent_shape} "
                f"and has {found}; use that VAE, or encode the images again with this one"
            )
        return torch.tensor(stored.mean, dtype=torch.float64), torch.tensor(stored.std, dtype=torch.float64)
    _refuse_another_vae(codec, recipe)
    rows = torch.linspace(0, len(data.train) - 1, min(MEASURED_IMAGES, len(data.train))).long().tolist()
    parts = (rows[k : k + MEASURED_BATCH] for k in range(0, len(rows), MEASURED_BATCH))
    return measure(
        (codec.posterior(data.train.batch(part)[0].to(codec.device)) for part in parts), codec.latent_channels
    )


def _refuse_another_vae(codec: LatentCodec, recipe: "DiffusionRecipe") -> None:
    """Compare the codec with the one that a resumed run saved beside its weights."""
    run = recipe.config.output
    if run is None or RunFolder(run).weights_step() is None or (saved := load_saved_codec(run)) is None:
        return
    found, before = codec.fingerprint(), saved.fingerprint()
    if found != before:
        what = "VAE" if recipe.config.codec.kind == "kl-vae" else "image codec"
        raise DataError(
            f"{run}: began with a {what} of fingerprint {before}, but codec.path={recipe.config.codec.path} now has "
            f"{found}; set codec.path to the first one ({run} holds a copy), or start a new run"
        )
