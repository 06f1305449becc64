"""Processes that are killed or asked to stop at any moment: the same command goes on to the same result."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from heterodiff.config.file import dump_config
from heterodiff.training.start import train
from tests.conftest import ROOT
from tests.test_data_webdataset import write_shards
from tests.training_runs import assert_same_run, last_checkpoint, losses_of, tiny_config

SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1], "training__log_every": 1}
PATIENCE = 120.0


def configured(folder: Path, **overrides: Any) -> Path:
    (folder / "config.yaml").write_text(dump_config(tiny_config(folder / "run", **SMALL | overrides)))
    return folder / "config.yaml"


def started(*arguments: object, log: Path, fault: str = "none", record: Path = Path(os.devnull)) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.reliability.faulty", fault, str(record), *map(str, arguments)]
    with log.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment, start_new_session=True)


def wait_until(condition: Any, process: subprocess.Popen) -> bool:
    """Return whether ``condition`` came true before the process ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise AssertionError(f"nothing happened for {PATIENCE:.0f} seconds")


def rows_in(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tmp_path: Path) -> None:
    """Every other kill waits for a checkpoint that is being written."""
    rng, run = random.Random(kills), tmp_path / "run"
    config = configured(tmp_path, training__steps=100_000, training__checkpoint_every=2)
    in_saves, unfinished = 0, run / "checkpoints"
    for number in range(kills):
        process = started("train", config, log=tmp_path / "log.txt")
        before = rows_in(run)
        assert wait_until(lambda before=before: rows_in(run) > before, process), (tmp_path / "log.txt").read_text()
        if number % 2:
            assert wait_until(lambda: any(unfinished.glob("step_*.tmp")), process)
        else:
            time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        in_saves += any(unfinished.glob("step_*.tmp"))
    assert in_saves >= 15 * kills // 50
    stop = last_checkpoint(run)[0] + 3
    process = started("train", config, "--stop-after", stop, log=tmp_path / "log.txt")
    assert process.wait(PATIENCE) == 0
    straight = tiny_config(tmp_path / "straight", **SMALL, training__steps=100_000, training__checkpoint_every=10**6)
    train(straight, quiet=True, stop_after=stop)
    assert_same_run(tmp_path / "straight", run)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("source", ["digits", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_killed_twice_in_an_epoch(source: str, workers: int, tmp_path: Path) -> None:
    """Every image is seen once an epoch, in the order of a run that was not killed."""
    settings = {"training__batch_size": 64, "training__checkpoint_every": 4, "training__num_workers": workers}
    if source == "webdataset":  # 600 images that are read from their shards at every step
        write_shards(tmp_path / "shards", "cls", samples=200)
        data = {"source": source, "path": str(tmp_path / "shards"), "memory_limit_gb": 1e-9}
        settings |= {f"data__{key}": value for key, value in data.items()}
    config = configured(tmp_path, training__steps=52, **settings)  # two epochs of 1,618 images and a little more
    record, run = tmp_path / "record.jsonl", tmp_path / "run"
    for least in (7, 15):
        process = started("train", config, log=tmp_path / "log.txt", record=record)
        assert wait_until(lambda least=least: rows_in(run) >= least, process), (tmp_path / "log.txt").read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert started("train", config, log=tmp_path / "log.txt", record=record).wait(PATIENCE) == 0
    whole = tmp_path / "whole.jsonl"
    process = started("train", config, f"output={tmp_path / 'other'}", log=tmp_path / "log.txt", record=whole)
    assert process.wait(PATIENCE) == 0
    seen: dict[int, list[int]] = {}
    repeated = 0
    for row in map(json.loads, record.read_text().splitlines()):
        repeated += row["step"] in seen
        assert seen.setdefault(row["step"], row["images"]) == row["images"]
    assert repeated > 0  # steps after a checkpoint were taken again
    expected = [row["images"] for row in map(json.loads, whole.read_text().splitlines())]
    assert [seen[step] for step in sorted(seen)] == expected
    order = [image for images in expected for image in images]
    images = max(order) + 1
    for start, stop in pairwise(range(0, len(order), images)):
        assert sorted(order[start:stop]) == list(range(images))
    assert losses_of(run) == losses_of(tmp_path / "other")


SIGNALS = [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)]
WHERE = {"step": ("step:{}:6", 0), "save": ("save:{}:6", 0), "preview": ("preview:{}:1", 0)}
WHERE |= {"validation": ("validation:{}:1", 0), "loader": ("loader:{}:4", 2)}
LATER = ("step", "preview", "validation")


@pytest.mark.parametrize(("name", "code"), SIGNALS)
@pytest.mark.parametrize("place", ["save", "loader", *(pytest.param(p, marks=pytest.mark.slow) for p in LATER)])
def test_asked_to_stop(place: str, name: str, code: int, tmp_path: Path) -> None:
    fault, workers = WHERE[place]
    every = {"training__checkpoint_every": 4, "training__preview_every": 5, "training__num_workers": workers}
    config = configured(tmp_path, training__steps=2000, **every)
    record, log = tmp_path / "record.jsonl", tmp_path / "log.txt"
    process = started("train", config, log=log, fault=fault.format(name), record=record)
    assert process.wait(PATIENCE) == code, log.read_text()
    taken = len(record.read_text().splitlines())
    step, _, _ = last_checkpoint(tmp_path / "run")
    assert step == taken < 2000  # no step is lost
    assert log.read_text().endswith(f"stopped by {name} at step {step}; the same command goes on from there\n")
    assert started("train", config, "--stop-after", step + 2, log=log).wait(PATIENCE) == 0
    train(tiny_config(tmp_path / "straight", **SMALL, training__steps=2000), quiet=True, stop_after=step + 2)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
