"""A checkpoint whose optimiser or state is lost: an error, and an explicit way on with its weights."""

from pathlib import Path

import pytest
import torch

from heterodiff.config.file import dump_config
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from tests.test_cli import call
from tests.training_runs import last_checkpoint, tiny_config

LOST = ("state.json", "optimizer.safetensors", "recipe.safetensors")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that was stopped after 4 of 8 steps, with one checkpoint."""
    small = {"model__variant": "unet-conv", "model__channel_mult": [1], "training__steps": 8}
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(tmp_path / "run", **small)))
    assert call("train", tmp_path / "config.yaml", "--stop-after", "4", "--quiet") == 0
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("name", LOST)
def test_going_on_with_weights_alone(
    name: str, damage: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    before = read_checkpoint(checkpoint)
    file = checkpoint / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    capsys.readouterr()
    assert call("train", config) == 1
    error = capsys.readouterr().err
    assert str(file) in error
    assert "go on from weights alone with --resume weights-only" in error
    assert call("train", config, "--resume", "weights-only", "--stop-after", "5") == 0
    assert "goes on with the weights of step 4 and a new optimiser" in capsys.readouterr().out
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 5
    assert {float(value) for key, value in tensors.items() if key.endswith("/step")} == {1.0}  # of the new optimiser
    moved = [
        (tensors[f"model/{key}"] - value).abs().max() for key, value in before.tensors["model"].items() if value.numel()
    ]
    assert 0 < max(moved) < 0.01  # one step from where it was
    assert call("train", config) == 0  # and from there on as ever
    assert last_checkpoint(tmp_path / "run")[0] == 8


def test_damaged_weights_are_not_gone_on_with(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    file = checkpoint / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert call("train", config, "--resume", "weights-only") == 1
    error = capsys.readouterr().err
    assert str(file) in error
    assert "weights-only" not in error
    assert "start from the beginning" in error


def test_there_must_be_a_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", config, "--resume", "weights-only", f"output={tmp_path / 'other'}") == 1
    assert "holds no run to go on with" in capsys.readouterr().err
    assert call("train", config, "--resume", "weight-only") == 1
    assert "expected auto, never, weights-only or one of: " in capsys.readouterr().err


def test_a_sound_checkpoint_gives_the_same_weights(config: Path, tmp_path: Path) -> None:
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    before = read_checkpoint(checkpoint)
    assert call("train", config, "--resume", "weights-only", "--stop-after", "4", "--quiet") == 0
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 4
    for group in ("model", "ema"):
        assert all(torch.equal(tensors[f"{group}/{key}"], value) for key, value in before.tensors[group].items())
