"""The command line as a user meets it: what it prints, what it writes, how it fails."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff
from heterodiff.cli import main
from heterodiff.config import RunConfig
from heterodiff.errors import ConfigError
from heterodiff.models.variants import VARIANTS
from heterodiff.training.start import train
from tests.training_runs import tiny_config


def call(*arguments: str | Path) -> int:
    """Exit code of ``heterodiff arguments``."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config(folder, training__steps=6), quiet=True)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes with four 8x8 grey pictures each."""
    rng = np.random.default_rng(0)
    for name in ("drone", "bird"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            picture.save(tmp_path / "images" / name / f"{k}.png")
    return tmp_path / "images"


def write_config(folder: Path, images: Path, extra: str = "") -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        f"output: {folder / 'run'}\n"
        f"data: {{source: images, path: {images}}}\n"
        "model: {model_channels: 32, layers_per_block: 1}\n"
        "sampling: {num_inference_steps: 2}\n"
        "training: {steps: 3, batch_size: 4, tensorboard: false}\n" + extra
    )
    return path


def test_five_line_config_trains_samples_and_evaluates(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, run = write_config(tmp_path, images), tmp_path / "run"
    assert call("check", config) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert call("train", config, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not run.exists()
    assert call("train", config, "--quiet") == 0
    assert {"config.yaml", "model_index.json", "unet", "scheduler", "metrics.jsonl", "samples", "report.html"} <= {
        p.name for p in run.iterdir()
    }
    assert call("check", run) == 0
    assert call("sample", run, "--class", "bird", "-n", "2", "--out", tmp_path / "out") == 0
    names = ["bird_0000.png", "bird_0001.png", "grid.png", "settings.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    with Image.open(tmp_path / "out" / "bird_0000.png") as picture:
        assert (picture.mode, picture.size) == ("L", (8, 8))
    capsys.readouterr()
    assert call("evaluate", run, "-n", "3", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["sizes"] == {"generated": 6, "train": 6, "val": 2, "image": [1, 8, 8]}
    assert (run / "evaluation.json").is_file()


def test_sampling_twice_gives_identical_files(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert call("sample", run, "--class", "3", "-n", "8", "--seed", "0", "--out", tmp_path / name) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 18  # npy in the digits' units and a png of each, the grid, and the settings
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert call("sample", run, "--class", "3", "-n", "8", "--seed", "1", "--out", tmp_path / "c") == 0
    assert (tmp_path / "a" / "grid.png").read_bytes() != (tmp_path / "c" / "grid.png").read_bytes()


def test_models_as_json_has_all_variants(capsys: pytest.CaptureFixture) -> None:
    assert call("models", "--json", "sample_size=16", "model_channels=32", "channel_mult=1,2") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in rows] == list(VARIANTS)
    for row in rows:
        model = heterodiff.create_model(row["variant"], sample_size=16, model_channels=32, channel_mult=(1, 2))
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["gflop"] > 0
        assert row["saved_mb"] > 0
    assert rows[0]["hybrid_parameters"] == 0 < rows[1]["hybrid_parameters"]


def bad_images(folder: Path, how: str) -> None:
    bird = folder / "bird"
    if how == "zero bytes":
        (bird / "0.png").write_bytes(b"")
    elif how == "truncated":
        (bird / "0.png").write_bytes((bird / "0.png").read_bytes()[:40])
    elif how == "not an image":
        (bird / "0.png").write_text("hello")
    elif how == "wrong channels":
        (bird / "0.png").unlink()
        np.save(bird / "0.npy", np.zeros((5, 8, 8), np.uint8))
    elif how == "one class":
        for p in bird.iterdir():
            p.unlink()
        bird.rmdir()
    elif how == "empty":
        for p in folder.rglob("*.png"):
            p.unlink()


DATA_CASES = {
    "zero bytes": "0.png",
    "truncated": "0.png",
    "not an image": "0.png",
    "wrong channels": "0.npy",
    "one class": "data.labels=none",
    "empty": "images",
}


@pytest.mark.parametrize("how", DATA_CASES)
def test_bad_images_stop_training_before_anything_is_written(
    how: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(tmp_path, images)
    bad_images(images, how)
    assert call("train", config, "--quiet") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert DATA_CASES[how] in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()
    assert call("check", config) == 1
    captured = capsys.readouterr()
    assert "FAIL" in captured.out or captured.err.startswith("error: ")


def test_bad_images_can_be_skipped(images: Path, tmp_path: Path) -> None:
    bad_images(images, "truncated")
    assert call("train", write_config(tmp_path, images), "data.on_bad=skip", "--quiet") == 0


CONFIG_CASES = {
    "data.path=nowhere": "nowhere",
    "data.source=digit": "did you mean 'digits'",
    "data.image_size=[10, 7]": "nearest widths [6, 8]",
    "data.image_size=9": "nearest heights [8, 12]",
    "model.variant=hae-v9": "did you mean 'hae-v3'",
    "model.modelchannels=32": "did you mean 'model_channels'",
    "model.model_channels=40": "multiple of 32",
    "data.channels=5": "data.channels is 5",
    "data.labels=maybe": "data.labels",
    "training.batch_size=0": "training.batch_size",
    "training.accumulation_steps=3": "accumulation_steps",
    "sampling.guidance_interval=[0.8, 0.2]": "low <= high",
    "training.learning_rate=.inf": "training.learning_rate",
    "training.seed=-1": "training.seed",
    "training.precision=float16": "needs a GPU",
    "data.random_crop=8": "random_crop",
    "sampling.sampler=dmp": "did you mean 'dpmpp'",
}


@pytest.mark.parametrize("override", CONFIG_CASES)
def test_bad_settings_are_one_clear_message(
    override: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    extra = ["model.channel_mult=[1, 1, 1]"] if override == "data.image_size=9" else []
    assert call("train", write_config(tmp_path, images), override, *extra, "--quiet") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert CONFIG_CASES[override] in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "RUN", "--class", "12"], "0..9"),
        (["sample", "RUN", "--class", "four"], "expected a class name"),
        (["sample", "RUN", "--sampler", "dpm"], "did you mean"),
        (["sample", "RUN", "--steps", "2000"], "1000"),
        (["sample", "RUN", "-n", "0"], "-n"),
        (["sample", "missing"], "no such run folder"),
        (["evaluate", "missing"], "missing"),
        (["train", "missing.yaml"], "no such configuration file"),
        (["train"], "CONFIG"),
        (["check", "missing"], "no such"),
        (["models", "variant=hae-v9"], "did you mean"),
        (["models", "colour=red"], "colour"),
        (["import", "missing.pt", "--out", "new"], "missing.pt"),
        (["smaple"], "smaple"),
        (["train", "digits", "--resume", "sometimes"], "sometimes"),
    ],
)
def test_wrong_use_is_one_clear_message(
    arguments: list[str], expected: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(*[str(run) if a == "RUN" else a for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "heterodiff.cli"]
    for options, shown in (([], False), (["--debug"], True)):
        result = subprocess.run([*command, *options, "train", "missing.yaml"], capture_output=True, text=True)
        assert result.returncode == 1
        assert ("Traceback" in result.stderr) == shown


def seconds_of(code: str, enough: float = 0) -> float:
    """Best of three times that a fresh interpreter and those it starts compute for ``code``, whatever else runs.

    Args:
        enough: a time after which no better one is looked for.
    """
    timed = f"import os; start = sum(os.times()[:4]); {code}; print(sum(os.times()[:4]) - start)"
    best = math.inf
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
        best = min(best, float(done.stdout.split()[-1]))
        if best < enough:
            break
    return best


def test_import_is_quick_and_light() -> None:
    """Within two seconds beyond torch, or on a slow machine within one and a half times torch's own time."""
    code = "import torch, os; start = sum(os.times()[:4]); import heterodiff; heterodiff.list_models"
    assert (found := seconds_of(code, enough=2)) < 2 or found < 1.5 * seconds_of("import torch")
    code = "import sys, heterodiff; print([m for m in ('torch', 'diffusers', 'sklearn') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_help_answers_quickly() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'heterodiff.cli', '--help'])"
    assert seconds_of(code, enough=2) < 2


def test_folder_that_cannot_be_written_is_an_error_before_training(images: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = Path("/proc/heterodiff")  # root may write everywhere else
    else:
        blocked = tmp_path / "locked"
        blocked.mkdir(mode=0o500)
    assert call("train", write_config(tmp_path, images), f"output={blocked / 'run'}", "--quiet") == 1


def test_overrides_of_a_demo_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stop(config: RunConfig) -> None:
        seeds = (config.training.seed, config.codec.training and config.codec.training.seed)
        raise ConfigError(f"{config.training.steps} {seeds} {config.output} {config.codec.path}")

    monkeypatch.setattr("heterodiff.demo.train", stop)
    assert call("demo", "latents", "training.steps=7", "codec.training.seed=1", "--seed", "5", "--out", "a/b") == 1
    assert call("demo", "latents", "training.steps=7", "output=c", "codec.path=d") == 1
    assert capsys.readouterr().err.splitlines() == ["error: 7 (5, 1) a/b a/b_vae", "error: 7 (0, 0) c d"]
    assert call("demo", "digits", "training.step=7") == 1
    assert "did you mean 'steps'" in capsys.readouterr().err
