"""Numbers that a run leaves open: learning rate, warm-up, EMA, and the steps and width that its minutes allow."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from heterodiff.config import ModelConfig, RunConfig, TrainingConfig
from heterodiff.config.file import apply_override, load_config
from heterodiff.errors import ConfigError, RunError
from heterodiff.run_folder import RunFolder
from heterodiff.training.loop import Trainer
from heterodiff.training.optimization import learning_rate_at, with_rates
from heterodiff.training.preflight import trial
from heterodiff.training.preflight.trial import ENOUGH_STEPS, SHARE_FOR_STEPS, WIDTHS
from heterodiff.training.start import train
from tests.training_runs import assert_same_run, tiny_config

LENGTHS = (1, 20, 300, 5000, 200_000)


@pytest.mark.parametrize("steps", LENGTHS)
def test_every_length_leaves_the_warm_up_and_forgets_the_first_weights(steps: int) -> None:
    training = with_rates(TrainingConfig(steps=steps), 2_000_000)
    assert training.learning_rate == 1e-3
    assert training.warmup_steps is not None
    assert training.ema_decay is not None
    assert training.warmup_steps <= max(1, steps // 10)
    assert training.ema_decay**steps < 1e-3
    assert max(learning_rate_at(step, training) for step in range(min(steps, 1000))) == pytest.approx(1e-3, rel=0.05)


def test_larger_networks_learn_at_smaller_rates() -> None:
    rates = [with_rates(TrainingConfig(), 10**power).learning_rate for power in range(4, 10)]
    assert all(one is not None and other is not None and one >= other for one, other in pairwise(rates))
    assert rates[0] != rates[-1]


def test_given_numbers_stay() -> None:
    given = {"learning_rate": 3e-4, "warmup_steps": 0, "ema_decay": 0.0}
    training = with_rates(TrainingConfig(**given), 10)
    assert {key: getattr(training, key) for key in given} == given


def open_config(output: Path, **overrides: Any) -> RunConfig:
    rates = {"training__warmup_steps": None, "training__ema_decay": None, "training__learning_rate": None}
    return tiny_config(output, **{**rates, "training__steps": 20_000, **overrides})


def taking(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a step of width 32 take ``seconds``, and others as many more as they are wider; return the widths tried."""
    tried: list[int] = []

    def measured(trainer: Trainer) -> tuple[float, float, int]:
        width = trainer.config.model.model_channels or 64
        tried.append(width)
        return seconds * (width / 32) ** 1.5, 0.0, 8

    monkeypatch.setattr(trial, "time_steps", measured)
    return tried


def test_minutes_give_the_steps_which_a_resumed_run_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(0.5, monkeypatch)
    configs = [open_config(tmp_path / name, training__minutes=0.1) for name in ("straight", "resumed")]
    assert train(configs[0], quiet=True).step == int(SHARE_FOR_STEPS * 6 / 0.5)
    assert train(configs[1], quiet=True, stop_after=5).steps == int(SHARE_FOR_STEPS * 6 / 0.5)
    taking(100.0, monkeypatch)  # another machine, or a busy one
    assert train(configs[1], quiet=True).step == int(SHARE_FOR_STEPS * 6 / 0.5)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    saved = RunFolder(tmp_path / "resumed").config().training
    assert saved.learning_rate is not None
    assert (saved.steps, saved.warmup_steps, saved.ema_decay) == (11, 1, 0.090909)


def test_more_minutes_make_a_finished_run_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(1.0, monkeypatch)
    train(open_config(tmp_path / "run", training__minutes=0.1), quiet=True)
    longer = train(open_config(tmp_path / "run", training__minutes=0.2), quiet=True)
    assert longer.step == 10
    by_steps = load_config(tmp_path / "run" / "config.yaml", ["training.minutes=null", "training.steps=12"])
    assert train(by_steps, quiet=True).step == 12


def test_minutes_do_not_fit_a_run_of_steps(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", training__steps=2), quiet=True)
    with pytest.raises(RunError, match=r"training\.minutes: none -> 5; set training\.steps"):
        train(tiny_config(tmp_path / "run", training__steps=2, training__minutes=5), quiet=True)


@pytest.mark.parametrize("enough_for", [0, *WIDTHS])
def test_minutes_give_the_widest_network_with_enough_steps(
    enough_for: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = 60
    seconds = SHARE_FOR_STEPS * 60 * minutes / (1.01 * ENOUGH_STEPS) / (max(enough_for, 16) / 32) ** 1.5
    tried = taking(seconds, monkeypatch)
    config = open_config(tmp_path / "run", training__minutes=minutes, data__image_size=8)
    config = config.model_copy(update={"model": ModelConfig(channel_mult=(1, 1), layers_per_block=1)})
    found = trial.in_its_minutes(config, trial.load_run_data(config))
    assert found.model.model_channels == max(enough_for, WIDTHS[0])
    assert found.training.steps == int(SHARE_FOR_STEPS * 60 * minutes / (seconds * (max(enough_for, 32) / 32) ** 1.5))
    assert tried == list(WIDTHS[: len(tried)])
    assert len(tried) <= WIDTHS.index(max(enough_for, 32)) + 2  # no network far too wide is built


def test_a_dry_run_names_the_steps_of_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(2.0, monkeypatch)
    rows = dict(trial.dry_run(open_config(tmp_path / "run", training__minutes=10)).rows)
    assert rows["step"].endswith("285 steps take about 9 min 30 s")
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_goes_on_with_the_defaults_of_before(tmp_path: Path) -> None:
    output = tmp_path / "run"
    before = {"diffusion__prediction": "epsilon", "diffusion__schedule": "linear", "model__norm_groups": 32}
    train(tiny_config(output, model__variant="hae-v3", training__steps=4, **before), quiet=True, stop_after=2)
    file = RunFolder(output).config_file
    text = file.read_text()
    assert "norm_groups: 32\n" in text
    file.write_text("".join(line for line in text.splitlines(True) if "norm_groups" not in line))  # a key of later
    left_open = tiny_config(output, model__variant="hae-v3", training__steps=4)
    assert train(left_open, quiet=True).step == 4
    config = RunFolder(output).config()
    assert (config.diffusion.prediction, config.diffusion.schedule) == ("epsilon", "linear")
    assert config.model.norm_groups == 32
    with pytest.raises(RunError, match=r"diffusion\.prediction: epsilon -> v"):
        train(tiny_config(output, model__variant="hae-v3", training__steps=4, diffusion__prediction="v"), quiet=True)


def test_a_new_run_keeps_its_groups(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", model__variant="hae-v3", training__steps=4)
    train(config, quiet=True, stop_after=2)
    assert train(config, quiet=True).step == 4
    assert '"norm_groups": 8' in (tmp_path / "run" / "unet" / "config.json").read_text()


@pytest.mark.parametrize("section", ["training", "codec.training"])
def test_the_later_length_takes_the_place_of_the_earlier_one(section: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for override, left in (
        ("minutes=20", {"minutes": 20}),
        ("steps=300", {"steps": 300}),
        ("minutes=5", {"minutes": 5}),
        ("minutes=null", {"minutes": None}),
        ("steps=7", {"steps": 7}),
        ("minutes=null", {"steps": 7, "minutes": None}),
    ):
        apply_override(content, f"{section}.{override}")
        inner = content["codec"] if section.startswith("codec") else content
        assert inner["training"] == left
    file = tmp_path / "both.yaml"
    kind = "codec: {kind: kl-vae, path: vae, training: {steps: 3, minutes: 2}}\n"
    file.write_text(kind if section.startswith("codec") else "training: {steps: 3, minutes: 2}\n")
    with pytest.raises(ConfigError, match=rf"{section}\.steps=3 and {section}\.minutes=2 are both given"):
        load_config(file)


def test_steps_lengthen_a_run_of_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(1.0, monkeypatch)
    train(open_config(tmp_path / "run", training__minutes=0.1), quiet=True)
    longer = load_config(tmp_path / "run" / "config.yaml", ["training.steps=8"])
    assert train(longer, quiet=True).step == 8
