"""The VAE that a run on latents trains first, where there is none yet."""

import os
from dataclasses import replace

from heterodiff.codecs.kl_vae import holds_vae, latent_shape, read_vae_config
from heterodiff.config import CodecConfig, RunConfig
from heterodiff.config_file import load_config
from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import ConfigError, RunError
from heterodiff.pipelines.load import CONFIG_FILE
from heterodiff.training.loop import check_batch, precision_of
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from heterodiff.training.run_folder import changed_keys, weights_step


def vae_run(config: RunConfig) -> RunConfig | None:
    """The run of recipe ``vae`` that ``config`` needs and describes, if it is not finished yet.

    Raises:
        RunError: ``codec.path`` holds a VAE that was trained with other settings.
    """
    codec = config.codec
    if config.recipe != "diffusion" or codec.training is None or codec.path is None or config.data.source == "latents":
        return None
    if config.output is not None and weights_step(config.output) is not None:
        return None  # it has begun, so it has a copy
    keys = {"recipe": "vae", "output": codec.path, "data": config.data, "vae": config.vae, "training": codec.training}
    if not (codec.path / CONFIG_FILE).is_file():
        return None if holds_vae(codec.path) else RunConfig().model_copy(update=keys)  # None: a VAE from elsewhere
    before = load_config(codec.path / CONFIG_FILE)
    wanted = before.model_copy(update=keys)  # other sections do not matter to a VAE
    if changes := changed_keys(before, wanted):
        raise RunError(
            f"codec.path={codec.path}: its VAE was trained with other settings; undo these, set codec.path to a new "
            "folder, or leave codec.training out to use that VAE as it is:\n  " + "\n  ".join(changes)
        )
    return None if weights_step(codec.path) == codec.training.steps else wanted


def check_denoiser(config: RunConfig, spec: ImageSpec) -> str:
    """Build the denoiser before its VAE is trained, so that a mistake in it does not cost that time; its summary.

    Args:
        spec: of the images.

    Raises:
        ConfigError: what would stop the denoiser's training later.
    """
    vae = {"in_channels": spec.channels, **config.vae.model_dump(include={"block_out_channels", "latent_channels"})}
    if config.vae.init_from is not None:
        vae = read_vae_config(config.vae.init_from)
    channels, height, width = latent_shape(vae, spec.channels, spec.height, spec.width)
    precision_of(config.training)
    check_batch(config.training, int(os.environ.get("WORLD_SIZE", "1")))
    on_latents = replace(spec, channels=channels, height=height, width=width)
    try:
        recipe = DiffusionRecipe(config.model_copy(update={"codec": CodecConfig()}), on_latents)
    except ConfigError as error:
        raise ConfigError(f"the denoiser of {channels}x{height}x{width} latents: {error}") from None
    parameters = sum(p.numel() for p in recipe.model.parameters())
    return f"{recipe.summary} on {channels}x{height}x{width} latents, {parameters:,} parameters"
