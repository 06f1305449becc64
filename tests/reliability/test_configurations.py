"""Configurations that were made to hurt: one line of error, at once, through the command line."""

import time
from pathlib import Path

import pytest

from heterodiff.config.file import load_config
from tests.test_cli import call

VALUES = {
    "a date": ("training.steps=2024-01-01", "valid integer"),
    "a tag": ("training.steps=!!python/object/apply:os.system [ls]", "valid integer"),
    "a number of 5,000 digits": ("training.steps=" + "9" * 5000, "integer"),
    "a number of 5,000 digits in hexadecimal": ("training.steps=0x" + "f" * 5000, "less than or equal"),
    "3,000 brackets": ("training.steps=" + "[" * 3000, "valid integer"),
    "timesteps beyond memory": ("diffusion.num_train_timesteps=9999999999", "less than or equal to"),
    "a batch beyond memory": ("training.batch_size=9999999999999", "less than or equal to"),
    "a width beyond memory": ("model.model_channels=320000000", "less than or equal to"),
    "an image beyond memory": ("data.image_size=999999999", "less than or equal to"),
    "no number": ("training.learning_rate=.nan", "finite number"),
}


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("place", ["override", "file"])
def test_values_are_refused_in_a_line(
    what: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override, message = VALUES[what]
    config = tmp_path / "config.yaml"
    config.write_text("data: {source: digits}\n")
    key, _, value = override.partition("=")
    overrides = [override]
    if place == "file":
        section, name = key.split(".")
        config.write_text(
            f"{section}:\n  {name}: {value}\n" + ("" if section == "data" else "data: {source: digits}\n")
        )
        overrides = []
    assert call("train", config, f"output={tmp_path / 'run'}", *overrides) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error or (place == "file" and "not readable as YAML" in error)
    assert len(error) < 600
    assert not (tmp_path / "run").exists()


FILES = {
    "distinct keys": ("data: {" + ", ".join(f"k{number}: 1" for number in range(80_000)) + "}", "more"),
    "a key twice": ("training: {steps: 1, steps: 2}", "appears twice"),
    "a list as a key": ("? [a]\n: 1", "unhashable"),
    "an alias bomb": ("a: &a [1, 1]\nb: &b [*a, *a]\n", "aliases"),
    "megabytes": ("data: " + "x" * 2_000_000, "bytes"),
    "brackets": ("data: " + "[" * 5000, "not readable as YAML"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_are_refused_in_a_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[what]
    (tmp_path / "config.yaml").write_text(content)
    assert call("check", tmp_path / "config.yaml") == 1
    error = capsys.readouterr().err + capsys.readouterr().out
    assert message in error
    assert len(error) < 20_000


def test_many_keys_take_time_in_proportion(tmp_path: Path) -> None:
    """Four times the keys take far less than sixteen times as long; the shorter of two measurements counts."""
    seconds = {}
    for count in (10_000, 40_000):
        (tmp_path / "config.yaml").write_text("data: {" + ", ".join(f"k{number}: 1" for number in range(count)) + "}")
        tries = []
        for _ in range(2):
            start = time.process_time()
            with pytest.raises(Exception, match="unknown key"):
                load_config(tmp_path / "config.yaml")
            tries.append(time.process_time() - start)
        seconds[count] = min(tries)
    assert seconds[40_000] < 10 * seconds[10_000]


def test_the_home_folder_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("recipe: text-image\noutput: ~/runs/x\ndata: {source: shapes}\n")
    config = load_config(tmp_path / "config.yaml")
    assert config.output == tmp_path / "runs" / "x"
    assert config.codec.path == tmp_path / "runs" / "x" / "alignment"
