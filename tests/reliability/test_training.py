"""Trainings that learn nothing, or go on from an older checkpoint, say so whatever they were told to print."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from heterodiff.config.file import dump_config
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from tests.reliability.test_pipeline_files import flipped
from tests.test_cli import call
from tests.test_training_resume import start_training, wait_for_row, workers_of
from tests.training_runs import last_checkpoint, tiny_config


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


def images_in(folder: Path) -> Path:
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder / "images"


def lazy_run(folder: Path, workers: int) -> Path:
    """Images that are decoded at every access."""
    images = {"data__source": "images", "data__path": str(images_in(folder)), "data__labels": "none"}
    options = {"training__steps": 3000, "training__checkpoint_every": 1000, "training__num_workers": workers}
    config = tiny_config(folder / "run", data__memory_limit_gb=1e-6, **images, **options)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


def kill_a_worker(process: subprocess.Popen[bytes], folder: Path) -> None:
    workers_of(process)[0].kill()


def remove_an_image(process: subprocess.Popen[bytes], folder: Path) -> None:
    (folder / "images" / "3.png").unlink()


@pytest.mark.parametrize(
    ("workers", "fault", "message"),
    [
        (2, kill_a_worker, "a process that loads images has ended"),
        (2, remove_an_image, "3.png can no longer be read"),
        (0, remove_an_image, "3.png can no longer be read"),
    ],
)
def test_images_that_cannot_be_loaded_any_more_lose_no_step(
    workers: int, fault: Callable[..., None], message: str, tmp_path: Path
) -> None:
    config_file = lazy_run(tmp_path, workers)
    process = start_training(config_file, tmp_path / "log.txt")
    wait_for_row(tmp_path / "run", process)
    started = workers_of(process)
    fault(process, tmp_path)
    assert process.wait(60) == 1
    error = (tmp_path / "log.txt").read_text().splitlines()[-1]
    step, _, _ = last_checkpoint(tmp_path / "run")
    assert error.startswith("error: ")
    assert message in error
    assert error.endswith(f"; the checkpoint of step {step} is written")
    assert step >= 5
    assert psutil.wait_procs(started, timeout=30)[1] == []


def test_a_run_folder_that_is_renamed_while_it_trains(tmp_path: Path) -> None:
    config_file = written(tmp_path, 3000)
    process = start_training(config_file, tmp_path / "log.txt")
    wait_for_row(tmp_path / "run", process)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert process.wait(60) == 1
    error = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert error == (
        f"error: {tmp_path / 'run'}: the run folder is no longer there; rename it back if it was renamed, and start "
        "the same command again"
    )
    if (tmp_path / "run").exists():  # renamed while diffusers was making the folder of a network
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".pipeline"}
        shutil.rmtree(tmp_path / "run")
    step, _, _ = last_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert call("train", config_file, "--stop-after", str(step + 1), "--quiet") == 0
    assert last_checkpoint(tmp_path / "run")[0] == step + 1


def test_a_preview_that_was_killed_is_made_up_for(tmp_path: Path) -> None:
    every = {"training__steps": 4, "training__preview_every": 2, "training__checkpoint_every": 2}
    slow = {"sampling__num_inference_steps": 1000, "sampling__sampler": "ddim"}
    config = tiny_config(tmp_path / "run", **every, **slow)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    process = start_training(tmp_path / "config.yaml", tmp_path / "log.txt")
    while not (tmp_path / "run" / "weights.json").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # in the preview of step 2, or just before it
    process.wait(60)
    quick = (tmp_path / "config.yaml", "sampling.num_inference_steps=2")
    assert call("train", *quick, "--quiet") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step_000002.png",
        "step_000004.png",
    ]
    assert call("train", *quick, "--quiet") == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(rows)
