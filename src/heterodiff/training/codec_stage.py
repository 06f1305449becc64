"""The codec that a run on latents trains first if there is none yet."""

from dataclasses import replace
from pathlib import Path

from heterodiff.codecs import cnn, kl_vae
from heterodiff.config import CodecConfig, RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import ConfigError, RunError
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of_codec
from heterodiff.training.checkpoints.resume import as_begun, changed_keys
from heterodiff.training.optimization import check_training
from heterodiff.training.preflight.memory_plan import check_fits
from heterodiff.training.recipes.alignment_networks import codec_arguments
from heterodiff.training.recipes.diffusion import DiffusionRecipe


def codec_run(config: RunConfig) -> RunConfig | None:
    """Return the run of recipe ``vae`` or ``alignment`` that ``config`` needs and describes, if it is not finished.

    Raises:
        RunError: ``codec.path`` holds one that was trained with other settings.
    """
    codec = config.codec
    if codec.kind == "pixels" or codec.training is None or codec.path is None or config.data.source == "latents":
        return None
    if config.output is not None and RunFolder(config.output).weights_step() is not None:
        return None  # it has begun, so it has a copy
    task = task_of_codec(codec.kind)
    keys = {name: getattr(config, name) for name in ("data", *task.sections)}
    keys |= {"recipe": task.recipe, "output": codec.path, "training": codec.training}
    run = RunFolder(codec.path)
    if not run.has_config:
        return None if _holds_codec(codec) else RunConfig().model_copy(update=keys)  # None: one from elsewhere
    before = run.config()
    wanted = as_begun(before.model_copy(update=keys))  # other sections do not matter to it
    if changes := changed_keys(before, wanted, run.weights_step() or 0):
        name = "its VAE" if codec.kind == "kl-vae" else "its image codec with the text networks"
        raise RunError(
            f"codec.path={codec.path}: {name} was trained with other settings; undo these, set codec.path to "
            "a new folder, or leave codec.training out to use it as it is:\n  " + "\n  ".join(changes)
        )
    return None if run.weights_step() == wanted.training.steps else wanted


def ignored_keys(config: RunConfig, data: LoadedData) -> list[str]:
    """Notes on settings of networks that are loaded from ``codec.path``, where they differ from those there."""
    if config.codec.path is None or config.codec.training is not None:
        return []
    run = RunFolder(config.codec.path)
    if not run.has_config:
        return []
    there = run.config()
    return [
        f"{name}.{key}={getattr(section, key)} is ignored: the networks in codec.path={config.codec.path} were trained "
        f"with {getattr(getattr(there, name), key)}"
        for name, section in (("text", config.text), ("alignment", config.alignment))
        for key in sorted(section.model_fields_set)
        if getattr(section, key) != getattr(getattr(there, name), key)
    ]


def _holds_codec(codec: CodecConfig) -> bool:
    path: Path = codec.path  # type: ignore[assignment]
    return (path / cnn.FOLDER).is_dir() if codec.kind == "cnn" else kl_vae.holds_vae(path)


def check_denoiser(config: RunConfig, spec: ImageSpec) -> None:
    """Build the denoiser before its codec is trained, so that a mistake in its settings does not cost that time.

    Args:
        spec: of the images.

    Raises:
        ConfigError: settings that would stop the denoiser's training later.
    """
    channels, height, width = _latent_shape(config, spec)
    check_training(config.training)
    on_latents = replace(spec, channels=channels, height=height, width=width)
    on_pixels = config.model_copy(update={"codec": CodecConfig()})
    check_fits(on_pixels.model_copy(update={"recipe": "diffusion"}), on_latents)
    try:
        DiffusionRecipe(on_pixels, on_latents)
    except ConfigError as error:
        raise ConfigError(f"the denoiser of {channels}x{height}x{width} latents: {error}") from None


def _latent_shape(config: RunConfig, spec: ImageSpec) -> tuple[int, int, int]:
    """Shape of the latents of a codec that is not trained yet."""
    if config.codec.kind == "cnn":
        return cnn.latent_shape(codec_arguments(config, spec), spec.channels, spec.height, spec.width)
    vae = {"in_channels": spec.channels, **config.vae.model_dump(include={"block_out_channels", "latent_channels"})}
    if config.vae.init_from is not None:
        vae = kl_vae.read_vae_config(config.vae.init_from)
    return kl_vae.latent_shape(vae, spec.channels, spec.height, spec.width)
