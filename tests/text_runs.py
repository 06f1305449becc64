"""Tiny runs of recipe ``text-image`` for tests: shapes of 16x16 with captions, all networks trained in seconds."""

import json
from pathlib import Path
from typing import Any

from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config

SHAPES = {"source": "shapes", "image_size": 16, "shapes": {"images": 80}}
TRAINING = {"steps": 3, "batch_size": 8, "warmup_steps": 1, "learning_rate": 2e-3, "ema_decay": 0.5, "log_every": 1}
QUIET = {"preview_every": 100, "checkpoint_every": 100, "tensorboard": False}
TEXT = {
    "vocabulary_size": 120,
    "max_tokens": 20,
    "width": 32,
    "layers": 1,
    "num_heads": 2,
    "embedding_dim": 12,
    "captioner_width": 32,
    "captioner_layers": 1,
}
OF_A_NEW_ENCODER = ("vocabulary_size", "width", "layers")
ALIGNMENT = {"latent_channels": 6, "block_out_channels": [8, 16]}
FILM = {"model_channels": 32, "channel_mult": [1, 2], "layers_per_block": 1, "num_heads": 2}


def text_config(output: Path, recipe: str = "text-image", **overrides: Any) -> RunConfig:
    """Maps of 6x4x4 and embeddings of 12 numbers; ``overrides`` as section__key=value.

    The alignment trains as long as the denoiser; with ``alignment__joint=True`` there is one stage.
    """
    content: dict[str, Any] = {
        "recipe": recipe,
        "output": str(output),
        "data": dict(SHAPES),
        "text": dict(TEXT),
        "alignment": dict(ALIGNMENT),
        "training": TRAINING | QUIET,
    }
    variant = overrides.get("model__variant", "film-unet")
    if recipe == "text-image":
        content["sampling"] = {"num_inference_steps": 2}
        content["model"] = dict(FILM) if variant == "film-unet" else {**FILM, "variant": variant}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        content[section] = content.get(section, {}) | {name: value}
    if content["data"]["source"] not in ("shapes", "latents"):
        content["data"].pop("shapes", None)
    if content["text"].get("encoder"):  # which brings its own
        content["text"] = {key: value for key, value in content["text"].items() if key not in OF_A_NEW_ENCODER}
    return parse_config(content)


def forget_files(run: Path) -> Path:
    """Let a run's pipeline be changed: list its step alone, as earlier versions did."""
    file = run / "weights.json"
    file.write_text(json.dumps({"step": json.loads(file.read_text())["step"]}))
    return run
