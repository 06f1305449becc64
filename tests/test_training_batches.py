"""Which images a step sees, and that splitting the work differently does not change the result."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from heterodiff.config import DataConfig
from heterodiff.config.file import dump_config, parse_config
from heterodiff.data.dataset import ImageDataset, ImageSpec, MemoryStore
from heterodiff.data.sources import load_data
from heterodiff.errors import ConfigError
from heterodiff.training.batches import BatchOrder, StepBatches, Stream, derive_seed
from heterodiff.training.optimization import learning_rate_at
from heterodiff.training.start import train
from tests.training_runs import losses_of, tiny_config


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (7, 7), (5, 12), (100, 1), (64, 16)])
def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own(length: int, batch_size: int) -> None:
    order = BatchOrder(length, batch_size, seed=3)
    steps = -(-3 * length // batch_size)
    seen = [i for step in range(steps) for i in order.indices(step)]
    epochs = [seen[e * length : (e + 1) * length] for e in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 6:
        assert epochs[0] != epochs[1] != epochs[2]
    assert seen != [i for step in range(steps) for i in BatchOrder(length, batch_size, seed=4).indices(step)]


def test_order_does_not_depend_on_where_one_starts() -> None:
    straight = [BatchOrder(10, 4, 0).indices(step) for step in range(12)]
    backwards = BatchOrder(10, 4, 0)
    assert [backwards.indices(step) for step in reversed(range(12))] == straight[::-1]


def test_seeds_of_streams_and_positions_differ() -> None:
    seeds = [derive_seed(s, stream, k) for s in (0, 1, -1) for stream in Stream for k in range(20)]
    assert max(Counter(seeds).values()) == 1
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_shares_of_processes_make_up_the_batch() -> None:
    config = DataConfig(source="digits", horizontal_flip=True, random_crop=2)
    data = load_data(config).train
    whole = StepBatches(data, config, 12, seed=0)[5]
    parts = [StepBatches(data, config, 12, 0, rank, 3)[5] for rank in range(3)]
    assert [i for part in parts for i in part.indices] == whole.indices
    assert torch.equal(torch.cat([part.stored for part in parts]), whole.stored)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = parse_config({"training": {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0}}).training
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    constant = config.model_copy(update={"lr_schedule": "constant"})
    assert {learning_rate_at(step, constant) for step in range(10, 100)} == {1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"training__accumulation_steps": 4},
        {"training__num_workers": 1},
        {"model__gradient_checkpointing": True},
        {"model__variant": "hae-v2-conservative"},
        {"data__memory_limit_gb": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_ways_to_save_memory_do_not_change_what_is_learned(change: dict, tmp_path: Path) -> None:
    common = {"training__steps": 6, "training__log_every": 1, "model__dropout": 0.0, "data__random_crop": 1}
    train(tiny_config(tmp_path / "plain", **common), quiet=True)
    train(tiny_config(tmp_path / "changed", **common, **change), quiet=True)
    for plain, changed in zip(losses_of(tmp_path / "plain"), losses_of(tmp_path / "changed"), strict=True):
        assert changed == pytest.approx(plain, rel=1e-4)


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    common = {"training__steps": 6, "training__log_every": 1, "model__dropout": 0.0}
    train(tiny_config(tmp_path / "one", **common), quiet=True)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(dump_config(tiny_config(tmp_path / "two", **common)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, "-m", "heterodiff.cli", "train", str(config_file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == 6
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_batch_that_does_not_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        train(tiny_config(tmp_path / "run", training__accumulation_steps=3), quiet=True)
    assert not (tmp_path / "run").exists()


def test_metrics_have_what_the_report_shows(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", training__steps=10, training__tensorboard=True), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [5, 10]
    assert all(
        {"lr", "grad_norm", "images_per_second", "waiting_share", "seconds"} <= set(r) for r in rows if "loss" in r
    )
    assert rows[-1]["val_loss"] > 0


@pytest.mark.parametrize(("kind", "bytes_each"), [(np.uint8, 1), (np.uint16, 4), (np.float32, 4)])
def test_kept_images_take_the_room_that_is_counted(kind: type, bytes_each: int) -> None:
    """Integers of more than a byte travel, and stay on the device, as floats."""
    spec = ImageSpec(4, 5, 2, (), (0.0, 1.0), np.dtype(kind).name)
    images = MemoryStore(np.ones((3, 2, 4, 5), kind))
    data = ImageDataset(spec, images, np.arange(3), ["a", "b", "c"], np.full(3, -1))
    assert data.bytes_in_memory() == data.stored(range(3)).nbytes == 3 * 2 * 4 * 5 * bytes_each
