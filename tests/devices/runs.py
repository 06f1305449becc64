"""The smallest runs of every recipe and codec, and their comparison on two devices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heterodiff.config import RunConfig
from tests.devices.conftest import default_is_cpu
from tests.text_runs import text_config
from tests.training_runs import last_checkpoint, tiny_config
from tests.vae_runs import latent_config, vae_config

# Two steps; everything that a longer run does now and then happens in them.
TRAINING = {
    "steps": 2,
    "batch_size": 4,
    "warmup_steps": 0,
    "log_every": 1,
    "preview_every": 2,
    "checkpoint_every": 1,
    "ema_decay": 0.5,
    "precision": "float32",
    "tensorboard": False,
}
COMMON = {f"training__{key}": value for key, value in TRAINING.items()} | {"data__val_fraction": 0.01}
SHAPES = {"data__shapes": {"images": 24}, "data__val_fraction": 0.2}

Make = Callable[..., RunConfig]


def pixels(output: Path, codecs: Path, **more: Any) -> RunConfig:
    """8x8 digits; with learned variance, importance-sampled timesteps and weights, which wait most easily."""
    options = {"learn_variance": True, "timestep_sampler": "loss-second-moment", "weighting": "min-snr"}
    diffusion = {f"diffusion__{key}": value for key, value in options.items()}
    return tiny_config(output, **{**COMMON, **diffusion, "model__channel_mult": [1], **more})


def conditions(output: Path, codecs: Path, **more: Any) -> RunConfig:
    """An image and two numbers as conditions, beside the class."""
    data = {
        "data__source": "microdoppler",
        "data__image_size": 16,
        "data__microdoppler": {"images_per_class": 4},
        "data__conditions": {"speed_m_s": "number", "aspect_deg": "number"},
        "data__condition": {"edges": True},
        "data__val_fraction": 0.2,
    }
    small = {"model__variant": "unet-conv", "model__channel_mult": [1]}
    return tiny_config(output, **{**COMMON, **data, **small, **more})


def vae(output: Path, codecs: Path, **more: Any) -> RunConfig:
    """With a discriminator, but in float16, which refuses it."""
    adversary = {"vae__adversarial_weight": 0.5, "vae__adversarial_start": 1}
    if more.get("training__precision") == "float16":
        adversary = {}
    return vae_config(output, **{**COMMON, "vae__structural_weight": 0.5, **adversary, **more})


def _latents(output: Path, codecs: Path, **more: Any) -> RunConfig:
    small = {"model__variant": "unet", "model__channel_mult": [1]}
    codec = {"codec__training": TRAINING, "vae__block_out_channels": [8, 8, 8]}
    return latent_config(output, codecs / "vae", **{**COMMON, **small, **codec, **more})


def cached_latents(output: Path, codecs: Path, **more: Any) -> RunConfig:
    return _latents(output, codecs, codec__statistics="measured", **more)


def latents_on_the_fly(output: Path, codecs: Path, **more: Any) -> RunConfig:
    return _latents(output, codecs, codec__cache=False, data__horizontal_flip=True, **more)


def alignment(output: Path, codecs: Path, **more: Any) -> RunConfig:
    return text_config(output, "alignment", **{**COMMON, **SHAPES, **more})


def text_image(output: Path, codecs: Path, **more: Any) -> RunConfig:
    codec = {"codec__path": str(codecs / "alignment"), "codec__training": TRAINING}
    return text_config(output, **{**COMMON, **SHAPES, **codec, **more})


def joint(output: Path, codecs: Path, **more: Any) -> RunConfig:
    return text_config(output, **{**COMMON, **SHAPES, "alignment__joint": True, **more})


# Each takes the run's folder, and one in which the first run of a recipe trains the codec for all of them.
RECIPES: dict[str, Make] = {
    "pixels": pixels,
    "conditions": conditions,
    "vae": vae,
    "cached latents": cached_latents,
    "latents on the fly": latents_on_the_fly,
    "alignment": alignment,
    "text-image": text_image,
    "joint": joint,
}


def train(config: RunConfig, stop_after: int | None = None) -> None:
    from heterodiff.training import start

    start.train(config, stop_after=stop_after, quiet=True)


def train_on_cpu(config: RunConfig) -> None:
    with default_is_cpu():
        train(config)


def rows(output: Path) -> list[dict[str, float]]:
    """The logged numbers of a run, without those of clocks."""
    clocks = ("images_per_second", "waiting_share", "seconds", "time")
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in clocks} for row in found]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    return last_checkpoint(output)[1]
