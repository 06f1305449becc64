"""More than memory holds: refused before work starts, and where it runs out nonetheless, nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heterodiff.config.file import dump_config
from heterodiff.training.recipes.alignment import AlignmentRecipe
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from heterodiff.training.recipes.vae import VAERecipe
from heterodiff.training.start import train
from tests.test_cli import call
from tests.text_runs import text_config
from tests.training_runs import assert_same_run, last_checkpoint, losses_of, tiny_config
from tests.vae_runs import vae_config

HUGE = {
    "training.batch_size=9999999999999": "training.batch_size: Input should be less than or equal to 1048576",
    "training.accumulation_steps=9999999999999": "training.accumulation_steps: Input should be less than or equal to",
    "training.num_workers=99999": "training.num_workers: Input should be less than or equal to 1024",
    "model.model_channels=999999999": "model.model_channels: Input should be less than or equal to 16384",
    "model.layers_per_block=99999": "model.layers_per_block: Input should be less than or equal to 64",
    "data.image_size=999999999": "data.image_size.0: Input should be less than or equal to 16384",
    "sampling.num_inference_steps=99999999999": "sampling.num_inference_steps: Input should be less than or equal to",
    "training.batch_size=1000000": "images at once; the same training in",
    "model.model_channels=16384": "even one image at a time is too much: choose a smaller model.model_channels",
}
ESTIMATED = tuple(HUGE)[-2:]
COMMANDS = (("train", "--quiet"), ("train", "--dry-run"), ("check",))
CHILD = """
import resource, sys
from heterodiff.cli import main
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
config, *settings = sys.argv[1:]
for setting in settings:
    for name, *options in {commands} if setting in {estimated} else {commands}[:1]:
        print("CALL", setting, name, *options, flush=True)
        try:
            main([name, config, setting, *options])
        except SystemExit as stop:
            print("CODE", stop.code, flush=True)
"""


def test_huge_numbers_are_refused_before_work_starts(tmp_path: Path) -> None:
    """In a process that may not take more than 8 GB, so that the machine is safe."""
    (tmp_path / "mine.yaml").write_text(dump_config(tiny_config(tmp_path / "run")))
    command = [
        sys.executable,
        "-c",
        CHILD.format(commands=COMMANDS, estimated=ESTIMATED),
        str(tmp_path / "mine.yaml"),
        *HUGE,
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    calls = [part.splitlines() for part in done.stdout.split("CALL ")[1:]]
    assert len(calls) == len(HUGE) + 2 * len(ESTIMATED)
    for title, *lines, code in calls:
        setting = title.split()[0]
        (line,) = [line for line in lines if HUGE[setting] in line]
        assert line.startswith(("error: ", "FAIL  memory")), title
        assert code == "CODE 1", title
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sample", "text2image", "evaluate"])
@pytest.mark.parametrize("option", ["-n", "--steps"])
def test_huge_numbers_of_pictures_or_steps(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["a red circle"] if command == "text2image" else []
    assert call(command, tmp_path, *prompt, option, "9999999999999") == 1
    assert f"error: Invalid value for '{option}'" in (error := capsys.readouterr().err)
    assert "1000000" in error


@pytest.mark.parametrize("recipe", ["diffusion", "vae", "alignment", "text-image"])
def test_float16_without_a_device_for_it_is_refused_before_data_are_read(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr("heterodiff.training.build.load_data", read)
    config = {
        "diffusion": tiny_config,
        "vae": vae_config,
        "alignment": lambda run: text_config(run, recipe="alignment"),
        "text-image": text_config,
    }[recipe](tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    for options in ((), ("--dry-run",)):
        assert call("train", tmp_path / "mine.yaml", "training.precision=float16", *options) == 1
        assert capsys.readouterr().err == (
            "error: training.precision=float16 needs a GPU, found none; use float32 or bfloat16\n"
        )
    assert not (tmp_path / "run").exists()


ERRORS = {
    "of the device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "of the machine": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "of Python": MemoryError(),
}


def fail_at(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, error: Exception, number: int) -> None:
    """Raise ``error`` in the call ``number`` of a method and all later ones."""
    original, calls = getattr(cls, method), []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) >= number:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(cls, method, failing)


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_in_a_step_keeps_the_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"training__steps": 4, "training__checkpoint_every": 2, "training__log_every": 1}
    config, straight = (tiny_config(tmp_path / name, **options) for name in ("run", "straight"))
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    with monkeypatch.context() as patch:
        fail_at(patch, DiffusionRecipe, "losses", ERRORS[kind], 3)
        assert call("train", tmp_path / "mine.yaml", "--quiet") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: a training step needs about 0.2")
    assert "training.accumulation_steps=" in error or "model.model_channels" in error
    assert error.count("\n") == 1
    assert last_checkpoint(tmp_path / "run")[0] == 2
    if kind != "of the device":
        return
    assert call("train", tmp_path / "mine.yaml", "--quiet") == 0
    train(straight, quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("method", ["validate", "preview"])
@pytest.mark.parametrize(
    ("cls", "make"),
    [
        (DiffusionRecipe, tiny_config),
        (VAERecipe, vae_config),
        (AlignmentRecipe, lambda *args, **options: text_config(*args, recipe="alignment", **options)),
    ],
)
def test_out_of_memory_in_a_preview_loses_no_step(
    cls: type, make: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = {"checkpoint_every": 100, "preview_every": 3, "steps": 5, "log_every": 1}
    config = make(tmp_path / "run", **{f"training__{key}": value for key, value in options.items()})
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    with monkeypatch.context() as patch:
        fail_at(patch, cls, method, ERRORS["of the device"], 1)
        assert call("train", tmp_path / "mine.yaml", "--quiet") == 1
    assert capsys.readouterr().err == (
        "error: out of memory in the preview after step 3, whose checkpoint is written; go on with "
        "training.preview_every=5, which leaves all but the last one out\n"
    )
    step, weights, _ = last_checkpoint(tmp_path / "run")
    assert step == 3
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert call("train", tmp_path / "mine.yaml", "--quiet", "training.preview_every=5") == 0
    assert [row[0] for row in losses_of(tmp_path / "run") if row[0] <= 5][-1] == 5
    assert last_checkpoint(tmp_path / "run")[0] == 5
