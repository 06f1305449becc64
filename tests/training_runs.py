"""Tiny runs for tests: a configuration that trains in seconds, and what a run left behind."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.loop import CHECKPOINTS


def tiny_config(output: Path, recipe: str = "diffusion", **overrides: Any) -> RunConfig:
    """A run on the digits, with a network of 32 channels where it has one; ``overrides`` as section__key=value."""
    content: dict[str, Any] = {
        "recipe": recipe,
        "output": str(output),
        "data": {"source": "digits"},
        "training": {
            "steps": 30,
            "batch_size": 8,
            "warmup_steps": 5,
            "log_every": 5,
            "preview_every": 100,
            "checkpoint_every": 10,
            "tensorboard": False,
        },
    }
    if recipe == "diffusion":
        content["model"] = {"variant": "hae-v2", "model_channels": 32, "layers_per_block": 1, "dropout": 0.1}
        content["sampling"] = {"num_inference_steps": 2}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    return parse_config(content)


def last_checkpoint(output: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, all tensors and all other state of the newest checkpoint."""
    checkpoint = read_checkpoint(list_checkpoints(output / CHECKPOINTS)[-1])
    tensors = {f"{g}/{k}": v for g, group in checkpoint.tensors.items() for k, v in group.items()}
    return checkpoint.step, tensors, checkpoint.state


def assert_same_run(first: Path, second: Path) -> None:
    """Both runs ended bit by bit alike: weights, EMA, optimiser, recipe state, logged losses, saved weights."""
    step, tensors, state = last_checkpoint(first)
    other_step, other_tensors, other_state = last_checkpoint(second)
    assert step == other_step
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    assert any(key.startswith("optimizer/") and key.endswith("exp_avg_sq") for key in tensors)
    assert any(key.startswith("ema/") for key in tensors)
    different = [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])]
    assert different == []
    assert losses_of(first) == losses_of(second)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


def losses_of(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each logged row."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
