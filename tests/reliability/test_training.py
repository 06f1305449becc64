"""Trainings that learn nothing, or go on from an older checkpoint, say so whatever they were told to print."""

from pathlib import Path

import pytest
import torch

from heterodiff.config.file import dump_config
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from tests.reliability.test_pipeline_files import flipped
from tests.test_cli import call
from tests.training_runs import tiny_config


def written(folder: Path, steps: int) -> Path:
    torch.set_num_threads(1)
    every = {"training__checkpoint_every": 1, "training__warmup_steps": 1}
    config = tiny_config(folder / "run", training__steps=steps, **every)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


def test_a_run_whose_every_step_was_left_out_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = DiffusionRecipe.losses

    def broken(self, network, images, labels, draws):  # type: ignore[no-untyped-def]
        losses = original(self, network, images, labels, draws)
        losses.each = losses.each * float("nan")
        return losses

    config = written(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionRecipe, "losses", broken)
        assert call("train", config) == 1
    assert "none of the 2 steps had a finite gradient, so nothing was learned" in capsys.readouterr().err
    assert call("train", config, "output=" + str(tmp_path / "other")) == 0


def test_a_damaged_checkpoint_that_is_passed_over_is_named_though_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, 3)
    assert call("train", config, "--stop-after", "2") == 0
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    flipped(newest / "model.safetensors")
    capsys.readouterr()
    assert call("train", config, "--quiet") == 0
    shown = capsys.readouterr()
    assert f"{newest / 'model.safetensors'}: damaged (checksum differs" in shown.err
    assert "using the checkpoint of step 1 instead" in shown.err
