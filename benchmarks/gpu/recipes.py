"""Short runs of every recipe: the shipped configurations, with few images and few steps."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.session import ROOT, Bench, Unavailable

if TYPE_CHECKING:
    from heterodiff.config import RunConfig

SHIPPED = {
    "digits": [],
    "digits_latent": ["vae.adversarial_weight=0.5", "vae.adversarial_start=1"],
    "shapes_small": ["data.shapes.images=400"],
    "phantom_small": ["data.brain_phantom.patients=20", "segmentation.num_inference_steps=5"],
}
"""Configurations and what is changed in them: pixels; a VAE with a discriminator, then its latents; image codec and
text networks (recipe alignment), then text-image; simulated heads."""

_SMALL = ["sampling.num_inference_steps=2", "model.channel_mult=[1]", "model.layers_per_block=1"]
TINY = {
    "digits": [*_SMALL, "data.val_fraction=0.02"],
    "digits_latent": [*_SMALL, "data.val_fraction=0.02", "vae.block_out_channels=[8,8,8]"],
    "shapes_small": [
        *_SMALL,
        "data.image_size=16",
        "data.shapes.images=40",
        "text={width: 32, layers: 1, num_heads: 2, max_tokens: 20, embedding_dim: 16, vocabulary_size: 120, "
        "captioner_width: 32, captioner_layers: 1}",
        "alignment.block_out_channels=[8,16]",
        "model.model_channels=32",
        "sampling.candidates=1",
    ],
    "phantom_small": [
        *_SMALL,
        "data.image_size=32",
        "data.brain_phantom={patients: 10, slices_per_patient: 4}",
        "segmentation.num_inference_steps=2",
    ],
}
ONLY_THE_STEPS = {"warmup_steps": 0, "log_every": 1, "tensorboard": "false"}
SELDOM = 10**6
PRECISIONS = ("bfloat16", "float32", "float16")


def config_of(
    bench: Bench, name: str, folder: Path, steps: int, codec: Path | None = None, **training: object
) -> "RunConfig":
    """The shipped configuration ``name`` for ``steps`` steps in ``folder``.

    Args:
        codec: where the codec that it needs is, or is to be trained; default: in ``folder``.
        **training: keys of section ``training``, also for the codec.

    Raises:
        Unavailable: a precision that the device lacks.
    """
    from heterodiff.config.file import load_config

    if training.get("precision") == "float16" and bench.device.type == "cpu":
        raise Unavailable("float16 needs a GPU")
    keys = {"steps": steps, **ONLY_THE_STEPS, "preview_every": SELDOM, "checkpoint_every": SELDOM, **training}
    if bench.tiny:
        keys["batch_size"] = 4
    overrides = [*SHIPPED[name], *(TINY[name] if bench.tiny else []), f"output={folder}"]
    has_codec = name in ("digits_latent", "shapes_small")
    if has_codec:
        overrides.append(f"codec.path={codec or folder / 'codec'}")
    if training.get("precision") == "float16":  # which the discriminator's weight does not stand
        overrides += ["vae.adversarial_weight=0", "vae.adversarial_start=2000"]
    for section in ("training", "codec.training") if has_codec else ("training",):
        overrides += [f"{section}.{key}={value}" for key, value in keys.items()]
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)
