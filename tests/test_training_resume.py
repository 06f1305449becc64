"""A run that was stopped and resumed is bit by bit the run that was not."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from heterodiff.cli import main
from heterodiff.config.file import dump_config
from heterodiff.errors import CheckpointError, HeterodiffError, RunError
from heterodiff.training.checkpoints.checkpoint import list_checkpoints
from heterodiff.training.loop import CHECKPOINTS
from heterodiff.training.start import train
from tests.training_runs import assert_same_run, last_checkpoint, losses_of, tiny_config

CASES = {
    "defaults": {},
    "augmented, accumulated": {
        "data__horizontal_flip": True,
        "data__random_crop": 1,
        "training__accumulation_steps": 2,
    },
    "learned variance, importance sampling": {
        "diffusion__learn_variance": True,
        "diffusion__timestep_sampler": "loss-second-moment",
        "diffusion__num_train_timesteps": 10,
    },
    "flow, two loader workers": {"diffusion__prediction": "flow", "training__num_workers": 2},
    "recomputing network": {"model__variant": "hae-v2-conservative", "model__gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_equal_fifteen_and_fifteen(case: str, tmp_path: Path) -> None:
    straight, resumed = (tiny_config(tmp_path / name, **CASES[case]) for name in ("straight", "resumed"))
    losses: dict[str, list[float]] = {"straight": [], "resumed": []}
    train(straight, quiet=True, on_step=lambda _, loss: losses["straight"].append(loss))
    first = train(resumed, quiet=True, stop_after=15, on_step=lambda _, loss: losses["resumed"].append(loss))
    assert first.step == 15
    torch.manual_seed(12345)  # whatever the process did in between must not matter
    second = train(resumed, quiet=True, on_step=lambda _, loss: losses["resumed"].append(loss))
    assert second.step == 30
    assert len(losses["straight"]) == 30
    assert losses["straight"] == losses["resumed"]
    assert len(set(losses["straight"])) == 30
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("variants", [("hae-v2", "hae-v2-conservative"), ("hae-v2-conservative", "hae-v2")], ids=str)
def test_a_run_goes_on_with_the_network_of_equal_weights(variants: tuple[str, str], tmp_path: Path) -> None:
    """Bit by bit as before, with more or less memory."""
    straight, first, second = (
        tiny_config(tmp_path / name, model__variant=variant, training__steps=8)
        for name, variant in (("straight", variants[0]), ("changed", variants[0]), ("changed", variants[1]))
    )
    train(straight, quiet=True)
    train(first, quiet=True, stop_after=4)
    train(second, quiet=True)
    expected, found = (last_checkpoint(tmp_path / name) for name in ("straight", "changed"))
    assert found[0] == expected[0] == 8
    assert [key for key, value in expected[1].items() if not torch.equal(found[1][key], value)] == []
    assert losses_of(tmp_path / "straight") == losses_of(tmp_path / "changed")
    with pytest.raises(RunError, match=r"model.variant: .* -> unet"):
        train(tiny_config(tmp_path / "changed", model__variant="unet", training__steps=8), quiet=True)


def start_training(config_file: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "heterodiff.cli", "train", str(config_file)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def wait_for_row(output: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if (output / "metrics.jsonl").is_file() and losses_of(output):
            return
        assert process.poll() is None, "training ended before its first row"
        time.sleep(0.05)
    raise AssertionError("training wrote no row within a minute")


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
)
@pytest.mark.slow  # tests/reliability kills in other ways
def test_killed_process_resumes_exactly(number: signal.Signals, code: int, tmp_path: Path) -> None:
    workers = 2 if number == signal.SIGKILL else 0
    config = tiny_config(
        tmp_path / "killed", training__steps=300, training__checkpoint_every=3, training__num_workers=workers
    )
    config_file = tmp_path / "config.yaml"
    config_file.write_text(dump_config(config))
    process = start_training(config_file, tmp_path / "log.txt")
    wait_for_row(tmp_path / "killed", process)
    started = workers_of(process)
    assert len(started) == workers
    process.send_signal(number)
    assert process.wait(60) == code, (tmp_path / "log.txt").read_text()
    assert psutil.wait_procs(started, timeout=30)[1] == []  # nobody is left behind
    step, _, _ = last_checkpoint(tmp_path / "killed")
    assert 3 <= step < 290
    stop = step + 5
    train(config, quiet=True, stop_after=stop)
    train(
        tiny_config(tmp_path / "straight", training__steps=300, training__checkpoint_every=3),
        quiet=True,
        stop_after=stop,
    )
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signal_to_all_processes_loses_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """As Slurm, Docker and Ctrl-C send it: to the loader workers, too. There was no checkpoint before."""
    options = {"training__steps": 300, "training__checkpoint_every": 1000, "training__num_workers": 2}
    config = tiny_config(tmp_path / "killed", **options)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(dump_config(config))
    process = start_training(config_file, tmp_path / "log.txt")
    wait_for_row(tmp_path / "killed", process)
    workers = workers_of(process)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    assert process.wait(60) == code, (tmp_path / "log.txt").read_text()
    assert [worker for worker in workers if worker.is_running()] == []
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    step, _, _ = last_checkpoint(tmp_path / "killed")
    assert 5 <= step < 290
    train(config, quiet=True, stop_after=step + 3)
    train(tiny_config(tmp_path / "straight", **options), quiet=True, stop_after=step + 3)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_steps_of_a_finished_run_are_not_repeated(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=5)
    train(config, quiet=True)
    called: list[int] = []
    assert train(config, quiet=True, on_step=lambda step, _: called.append(step)).step == 5
    assert called == []


@pytest.mark.parametrize("damage", ["truncated", "flipped byte", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint_is_found_and_the_previous_one_used(name: str, damage: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=6, training__checkpoint_every=2)
    train(config, quiet=True, stop_after=4)
    file = list_checkpoints(tmp_path / "run" / CHECKPOINTS)[-1] / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
    steps: list[int] = []
    train(config, quiet=True, on_step=lambda step, _: steps.append(step))
    assert steps == [3, 4, 5, 6]


def test_all_checkpoints_damaged_is_an_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=6, training__checkpoint_every=2)
    train(config, quiet=True, stop_after=4)
    for path in list_checkpoints(tmp_path / "run" / CHECKPOINTS):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        train(config, quiet=True)


def test_resume_with_a_changed_config_names_the_keys(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run"), quiet=True, stop_after=2)
    changed = tiny_config(tmp_path / "run", training__learning_rate=0.5, data__split_seed=3, training__log_every=1)
    with pytest.raises(RunError) as error:
        train(changed, quiet=True)
    assert "training.learning_rate: 0.0015 -> 0.5" in str(error.value)
    assert "data.split_seed: 0 -> 3" in str(error.value)
    assert "log_every" not in str(error.value)


def test_never_refuses_a_folder_with_a_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=2)
    train(config, quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="already holds a run"):
        train(config, resume="never", quiet=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="holds files but no run"):
        train(tiny_config(tmp_path), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_from_a_named_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=6, training__checkpoint_every=2)
    train(config, quiet=True, stop_after=4)
    steps: list[int] = []
    path = tmp_path / "run" / CHECKPOINTS / "step_00000002"
    train(config, resume=str(path), quiet=True, stop_after=4, on_step=lambda step, _: steps.append(step))
    assert steps == [3, 4]
    with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
        train(config, resume=str(tmp_path / "nowhere"), quiet=True)


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    for name, width in (("a", 32), ("b", 64)):
        train(tiny_config(tmp_path / name, model__model_channels=width, training__steps=4), quiet=True, stop_after=2)
    shutil.rmtree(tmp_path / "a" / CHECKPOINTS)
    shutil.copytree(tmp_path / "b" / CHECKPOINTS, tmp_path / "a" / CHECKPOINTS)
    with pytest.raises(CheckpointError, match="belongs to a run of another configuration"):
        train(tiny_config(tmp_path / "a", training__steps=4), quiet=True)


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from heterodiff.run_folder import RunFolder

    with RunFolder(tmp_path / "run").locked(), pytest.raises(RunError, match="another run"):
        train(tiny_config(tmp_path / "run"), quiet=True)


def test_nonfinite_losses_change_nothing_and_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heterodiff.training.recipes.diffusion import DiffusionRecipe

    original = DiffusionRecipe.losses

    def broken(self, network, images, labels, draws):  # type: ignore[no-untyped-def]
        losses = original(self, network, images, labels, draws)
        losses.each = losses.each * float("nan")
        return losses

    config = tiny_config(
        tmp_path / "run", training__steps=30, training__checkpoint_every=2, training__max_nonfinite_steps=3
    )
    train(config, quiet=True, stop_after=2)
    _, before, _ = last_checkpoint(tmp_path / "run")
    monkeypatch.setattr(DiffusionRecipe, "losses", broken)
    with pytest.raises(HeterodiffError, match="3 steps in a row"):
        train(config, quiet=True)
    step, after, _ = last_checkpoint(tmp_path / "run")
    assert step == 4
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_that_were_lost_are_made_again_from_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", training__steps=4)
    train(config, quiet=True)
    weights = tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "run" / "unet")
    assert train(config, quiet=True).step == 4
    assert weights.read_bytes() == before


def test_checkpoint_copied_from_another_run_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        train(tiny_config(tmp_path / name, training__seed=seed, training__steps=4), quiet=True, stop_after=2)
    other = list_checkpoints(tmp_path / "b" / CHECKPOINTS)[-1]
    with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
        train(tiny_config(tmp_path / "a", training__steps=4), resume=str(other), quiet=True)


def test_stop_during_a_preview_loses_nothing(tmp_path: Path) -> None:
    """A signal in a preview ends it at once; the checkpoint of that step is on disk already."""
    config = tiny_config(
        tmp_path / "run", training__steps=8, training__preview_every=4, training__checkpoint_every=4,
        sampling__num_inference_steps=1000, sampling__sampler="ddim",
    )  # fmt: skip
    config_file = tmp_path / "config.yaml"
    config_file.write_text(dump_config(config))
    process = start_training(config_file, tmp_path / "log.txt")
    for _ in range(1200):
        if (tmp_path / "run" / "weights.json").is_file():
            break
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (tmp_path / "log.txt").read_text()
    assert last_checkpoint(tmp_path / "run")[0] == 4
    assert not list((tmp_path / "run" / "samples").glob("*.png"))  # a preview that went on would have left one


def call(*arguments: str | Path) -> int:
    """Exit code of ``heterodiff arguments``."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def config_file(folder: Path, **overrides: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(tiny_config(folder / "run", **overrides)))
    return path


def rates_of(output: Path) -> dict[int, float]:
    """Learning rate by step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["lr"] for row in rows if "lr" in row}


def test_finished_run_of_a_constant_rate_is_lengthened_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    constant = {"training__lr_schedule": "constant", "training__log_every": 2}
    train(tiny_config(tmp_path / "straight", training__steps=10, **constant), quiet=True)
    file = config_file(tmp_path, training__steps=6, **constant)
    assert call("train", file) == 0
    capsys.readouterr()
    assert call("train", file, "training.steps=10") == 0
    out = capsys.readouterr().out
    assert "note     training.steps is 10, before 6\n" in out
    assert "going on from step 6" in out
    assert "done     step 10 of 10" in out
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    capsys.readouterr()
    assert call("train", file, "training.steps=10") == 0  # finished: nothing to note
    assert "note" not in capsys.readouterr().out


def test_lengthened_run_follows_the_half_cosine_of_the_new_length(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rate = 1e-3
    file = config_file(tmp_path, training__steps=4, training__warmup_steps=0, training__learning_rate=rate)
    assert call("train", file, "training.log_every=1", "training.lr_schedule=cosine") == 0
    capsys.readouterr()
    assert call("train", file, "training.log_every=1", "training.steps=8") == 0
    assert "training.steps is 8, before 4; the learning rate follows" in (out := capsys.readouterr().out)
    assert "0.0005 in place of 0" in out  # half of the new way is gone
    lengths = dict.fromkeys(range(4), 4) | dict.fromkeys(range(4, 8), 8)
    expected = {s + 1: rate * (1 + math.cos(math.pi * s / length)) / 2 for s, length in lengths.items()}
    assert rates_of(tmp_path / "run") == pytest.approx(expected)


def test_run_is_not_made_shorter_than_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config_file(tmp_path, training__steps=8, training__checkpoint_every=2)
    assert call("train", file, "--stop-after", "4", "--quiet") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert call("train", file, "training.steps=3", "--quiet") == 1
    assert "training.steps: 8 -> 3; 4 steps are done" in capsys.readouterr().err
    last = tmp_path / "run" / CHECKPOINTS / "step_00000004"
    assert call("train", file, "training.steps=3", "--resume", last, "--quiet") == 1
    assert "4 steps are done, more than training.steps=3; set it to at least 4" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert call("train", file, "training.steps=5", "--quiet") == 0
    assert last_checkpoint(tmp_path / "run")[0] == 5


FOLDERS = {
    "another run": (["model.model_channels=64"], "train would refuse {run}: holds a run with another configuration"),
    "another split": (["data.split_seed=5"], "data.split_seed: 0 -> 5"),
    "finished": ([], None),
    "to be longer": (["training.steps=9"], None),
    "shorter than done": (["training.steps=1"], "training.steps: 2 -> 1; 2 steps are done"),
    "interrupted": ([], None),
    "no run": ([], "train would refuse {run}: holds files but no run"),
    "a file": ([], "train would refuse {run}: expected a folder for the run, found a file"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a configuration and its finished run of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    assert call("train", config_file(folder, training__steps=2), "--quiet") == 0
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_dry_run_and_check_work_whatever_the_folder_holds(
    case: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides, note = FOLDERS[case]
    run = tmp_path / "run"
    if case == "no run":
        run.mkdir()
        (run / "thesis.txt").write_text("precious")
    elif case == "a file":
        run.write_text("precious")
    else:
        shutil.copytree(begun / "run", run)
    file = config_file(tmp_path, training__steps=4 if case == "interrupted" else 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in (("train", file, "--dry-run", *overrides), ("check", file, *overrides)):
        capsys.readouterr()
        assert call(*arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "936,049 parameters" in captured.out or case == "another run"
        assert ("train would refuse" in captured.out) == (note is not None)
        assert note is None or note.format(run=run) in captured.out
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert not Path("runs/dry-run").exists()
