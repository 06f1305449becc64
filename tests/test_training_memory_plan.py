"""Predicted memory against what a process really takes, and suggestions that fit."""

import subprocess
import sys
from pathlib import Path

import pytest

from heterodiff.config.file import parse_config
from heterodiff.data.dataset import ImageSpec
from heterodiff.models.variants import create_model
from heterodiff.training.preflight.memory_plan import (
    advice,
    images_at_once,
    largest_batch,
    suggest_plan,
    training_memory_bytes,
)

SPEC = ImageSpec(32, 32, 1, ("a", "b"), (0.0, 255.0), "uint8")
MODEL = {"variant": "hae-v2", "model_channels": 64, "channel_mult": [1, 2], "attention_resolutions": [2]}


def config_of(batch_size: int, *changes: str):
    content = {
        "data": {"source": "digits", "image_size": 32},
        "model": dict(MODEL),
        "training": {"batch_size": batch_size, "steps": 10},
    }
    for change in changes:
        key, _, value = change.partition("=")
        section, name = key.split(".")
        content[section][name] = value == "true" if value in ("true", "false") else int(value)
    return parse_config(content)


def test_every_suggestion_fits_and_is_the_same_batch():
    config = config_of(64)
    needed = training_memory_bytes(config, SPEC)
    assert suggest_plan(config, SPEC, needed).changes == ()
    seen = set()
    for share in (0.9, 0.6, 0.4, 0.2, 0.16):
        plan = suggest_plan(config, SPEC, share * needed)
        changed = config_of(64, *plan.changes)
        assert changed.training.batch_size == 64
        assert training_memory_bytes(changed, SPEC) == pytest.approx(plan.peak_bytes)
        assert plan.peak_bytes <= share * needed
        seen.add(plan.changes)
    assert len(seen) >= 3
    assert suggest_plan(config, SPEC, 1e6) is None


def test_smaller_parts_come_before_recomputation_and_that_before_tiny_parts():
    config = config_of(64)
    needed = training_memory_bytes(config, SPEC)
    assert suggest_plan(config, SPEC, 0.7 * needed).changes == ("training.accumulation_steps=2",)
    least = training_memory_bytes(config_of(64, "training.accumulation_steps=8"), SPEC)
    changes = suggest_plan(config, SPEC, 0.99 * least).changes
    assert any(change.startswith("model.") for change in changes)


def test_processes_share_weights_and_what_belongs_to_them(monkeypatch):
    """Weights, gradients, EMA and two moments of four bytes, a quarter of each in each of four processes."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    alone, shared = (config_of(64, f"training.fsdp={value}") for value in ("false", "true"))
    parameters = sum(p.numel() for p in create_model(**MODEL, num_classes=2, sample_size=32).parameters())
    saved = training_memory_bytes(alone, SPEC) - training_memory_bytes(shared, SPEC)
    assert saved == pytest.approx(20 * 0.75 * parameters, rel=0.02)


def test_the_largest_batch_is_the_largest():
    config = config_of(64)
    budget = 0.5 * training_memory_bytes(config, SPEC)
    batch = largest_batch(config, SPEC, budget)
    assert training_memory_bytes(config_of(batch), SPEC) <= budget < training_memory_bytes(config_of(batch + 1), SPEC)


def test_advice_names_what_would_fit():
    config = config_of(64)
    needed = training_memory_bytes(config, SPEC)
    fits, text = advice(config, SPEC, 10 * needed)
    assert fits
    assert f"{images_at_once(config)} images at once; up to " in text
    fits, text = advice(config, SPEC, 0.5 * needed)
    assert not fits
    assert "training.accumulation_steps=" in text
    fits, text = advice(config, SPEC, 1e6)
    assert not fits
    assert "model_channels" in text


STEP = """
import sys
from pathlib import Path
def peak():  # of this process; getrusage would count the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
from heterodiff.config.file import load_config
from heterodiff.training.build import load_run_data
from heterodiff.training.preflight.trial import dry_run
from heterodiff.training.preflight.memory_plan import training_memory_bytes
config = load_config(sys.argv[1])
spec = load_run_data(config).spec
predicted = training_memory_bytes(config, spec)
from heterodiff.training.loop import Trainer  # all libraries are there before the first reading
before = peak()
dry_run(config)
print(predicted, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to read a process's peak memory")
@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "float32"),
        pytest.param({}, "bfloat16", marks=pytest.mark.slow),
        *(
            pytest.param({key: True}, "float32", marks=pytest.mark.slow)
            for key in ("memory_optimization", "gradient_checkpointing")
        ),
    ],
)
def test_prediction_is_near_to_what_a_process_takes(changes, precision, tmp_path):
    model = "\n".join(f"  {key}: {value}" for key, value in (MODEL | changes).items())
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{source: digits, image_size: 32}}\nmodel:\n{model}\n"
        f"training: {{batch_size: 32, steps: 10, precision: {precision}}}\n",
        "utf-8",
    )
    done = subprocess.run([sys.executable, "-c", STEP, str(path)], check=True, capture_output=True, text=True)
    predicted, taken = map(float, done.stdout.split())
    assert 0.6 * taken < predicted < 1.6 * taken
