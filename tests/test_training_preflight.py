"""``heterodiff check CONFIG`` and ``heterodiff train CONFIG --dry-run``: the same numbers, and nothing written."""

import json
from pathlib import Path

import pytest

from heterodiff.config.file import load_config
from heterodiff.training.preflight import trial as module
from heterodiff.training.preflight.trial import dry_run
from tests.test_cli import call
from tests.test_data_volumes import MODALITIES, patients

SMALL = "model: {variant: unet, model_channels: 32, channel_mult: [1], layers_per_block: 1}"
TRAINING = "{steps: 50, batch_size: 4, tensorboard: false}"


def write_config(folder: Path, data: str, more: str = "") -> Path:
    file = folder / "config.yaml"
    file.write_text(f"output: {folder / 'run'}\ndata: {data}\n{SMALL}\ntraining: {TRAINING}\n{more}")
    return file


def two_parts(folder: Path) -> Path:
    codec = "codec: {kind: kl-vae, path: VAE, training: {steps: 7, batch_size: 4}}".replace("VAE", str(folder / "vae"))
    return write_config(folder, "{source: digits, image_size: 8}", f"{codec}\nvae: {{block_out_channels: [8, 8]}}\n")


def test_both_commands_report_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = two_parts(tmp_path)
    assert call("check", file) == 0
    checked = [line[6:] for line in capsys.readouterr().out.splitlines() if line.startswith("pass")]
    assert call("train", file, "--dry-run") == 0
    tried = capsys.readouterr().out.splitlines()
    same = ("network", "loss")
    rows = [[line.split(maxsplit=1) for line in lines if line.startswith(same)] for lines in (checked, tried)]
    assert rows[0] == rows[1]
    assert [name for name, _ in rows[0]] == ["network", "loss"] * 2
    needed = [[line.split("training needs ")[1].split(";")[0] for line in lines if line.startswith("memory")]
              for lines in (checked, tried)]  # fmt: skip
    assert needed[0] == needed[1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_total_is_that_of_both_parts_without_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(two_parts(tmp_path))
    steps = {"AutoencoderKL": iter([9.0, 20.0]), "unet": iter([50.0, 4.0, 8.0, 9.0])}
    now = 0.0
    original = module.Trainer.step_once

    def slow(self: module.Trainer, batch: object) -> float:
        nonlocal now
        now += next(steps[self.recipe.summary.split()[0]])
        return original(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Trainer, "step_once", slow)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    result = dry_run(config)
    assert [part.step_seconds for part in result.parts] == [20.0, 8.0]
    assert [part.seconds for part in result.parts] == [7 * 20.0, 50 * 8.0]
    assert dict(result.rows)["total"].startswith("about 9 min 00 s (2 min 20 s + 6 min 40 s)")


def test_slices_of_volumes_are_not_left_beside_the_data(tmp_path: Path) -> None:
    volumes = json.dumps({"modalities": MODALITIES})
    data = f"{{source: volumes, path: {patients(tmp_path / 'data')}, image_size: 16, volumes: {volumes}}}"
    file = write_config(tmp_path, data)
    assert call("check", file) == 0
    assert call("train", file, "--dry-run") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "data"}
