"""Building a run: its data, and the recipe with networks of initial weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import LoadedData, image_captions, load_data, with_captions
from heterodiff.data.sources.volumes import known_fingerprint
from heterodiff.errors import ConfigError, RunError, compile_error, is_out_of_memory
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of
from heterodiff.training.latents import stored_latents
from heterodiff.training.preflight.memory_plan import advice, check_fits, training_memory_bytes
from heterodiff.training.recipes.base import Recipe


@contextmanager
def explaining(config: RunConfig, spec: ImageSpec) -> Iterator[None]:
    """Name settings that help if memory runs out or compilation fails; other errors stay as they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (failed := compile_error(error, "training.compile=true")) is not None:
            raise failed from error
        if not is_out_of_memory(error):
            raise
        needed = training_memory_bytes(config, spec)
        _, text = advice(config, spec, 0.9 * needed)  # it was too much, whatever was free
        raise RunError(f"out of memory: a training step needs {text}; checkpoints are untouched") from error


def build_recipe(config: RunConfig, data: LoadedData) -> Recipe:
    """Return the recipe of a run, its networks with initial weights.

    Raises:
        ConfigError, CheckpointError: no network for these images, or a VAE that cannot be used.
    """
    spec = data.spec
    if config.data.random_crop >= min(spec.height, spec.width):
        raise ConfigError(
            f"data.random_crop={config.data.random_crop}: expected less than the image size, {spec.height}x{spec.width}"
        )
    check_fits(config, spec)
    torch.manual_seed(config.training.seed)  # initial weights
    recipe: Recipe = loaded(task_of(config).build)(config, data)
    return recipe


def load_run_data(config: RunConfig) -> LoadedData:
    """Load the data of a run; with the split and value range saved in its folder, if it has them already."""
    if config.output is not None:
        if (latents := stored_latents(config)) is not None:
            captions = image_captions(config.data) if config.codec.kind == "cnn" else None
            return latents if captions is None else with_captions(latents, captions)
        run = RunFolder(config.output)
        if run.facts_problem() is None:
            check_preprocessing(run.path, known_fingerprint(config.data))
            return load_data(config.data, split=run.split(), spec=run.spec())
    return load_data(config.data)
