"""Configurations: read strictly, explained clearly, written back faithfully."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from heterodiff.config import RunConfig
from heterodiff.config.file import dump_config, load_config, parse_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.errors import ConfigError

SHIPPED = sorted(shipped_configs().glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.output == Path("runs") / path.stem


def test_there_are_shipped_configs() -> None:
    assert "digits" in [path.stem for path in SHIPPED]


def test_overrides_reach_their_section_and_keep_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {source: digits}\ntraining: {steps: 7}\n")
    config = load_config(
        path, ["training.batch_size=4", "model.channel_mult=[1, 2]", "data.path=a b", "data.source=images"]
    )
    assert (config.training.steps, config.training.batch_size) == (7, 4)
    assert config.model.channel_mult == (1, 2)
    assert config.data.path == Path("a b")
    assert config.output == Path("runs/mine")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainning: {steps: 1}", "did you mean 'training'"),
        ("training: {stepz: 1}", "unknown key 'training.stepz' (did you mean 'steps'?)"),
        ("training: {steps: many}", "training.steps"),
        ("training: {steps: -1}", "training.steps"),
        ("model: {sparsity: 1.5}", "model.sparsity"),
        ("diffusion: {prediction: velocity}", "diffusion.prediction"),
        ("diffusion: {prediction: flow, learn_variance: true}", "learn_variance"),
        ("data: {image_size: [8, 8, 8]}", "data.image_size"),
        ("segmentation: {smoothing: 4}", "segmentation.smoothing: expected an odd number"),
        ("training: 3", "training"),
        ("- a\n- b", "expected `key: value` lines, found list"),
        ("training: {steps: 1", "not readable as YAML"),
        ("a: &x 1\nb: *x", "aliases"),
        ("data: {path: x}\ndata: {path: y}", "'data' appears twice"),
        ("data: !!python/object/apply:os.system ['touch MARKER']", "not readable as YAML"),
    ],
)
def test_bad_files_are_explained(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert expected in str(error.value)
    assert "bad.yaml" in str(error.value)
    assert not (tmp_path / "MARKER").exists()


def test_missing_huge_and_bomb_files_are_refused_before_they_grow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    huge, bomb = tmp_path / "huge.yaml", tmp_path / "bomb.yaml"
    with huge.open("wb") as file:
        file.truncate(100_000_000)
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'x'}]" for i in range(12)]
    bomb.write_text("\n".join(levels))
    tracemalloc.start()
    try:
        for path, expected in ((huge, "100,000,000 bytes"), (bomb, "aliases")):
            with pytest.raises(ConfigError, match=expected):
                load_config(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000  # bytes: the one would take ten times as much, the other 10^12 values


@pytest.mark.parametrize("override", ["training.steps", "=3", "training.steps.more=3"])
def test_bad_overrides_are_explained(override: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {steps: 7}\n")
    with pytest.raises(ConfigError, match="override"):
        load_config(path, [override])


def test_every_field_has_a_default_that_is_valid() -> None:
    assert parse_config({}) == RunConfig()
    assert parse_config(yaml.safe_load(dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"codec": {"kind": "kl-vae"}}, r"codec: kind kl-vae needs codec\.path"),
        ({"codec": {"path": "runs/vae"}}, r"codec\.path=runs/vae is read only with codec\.kind=kl-vae"),
        ({"codec": {"training": {"steps": 5}}}, r"codec\.training={\.\.\.} is read only with codec\.kind=kl-vae"),
        (
            {"recipe": "vae", "codec": {"kind": "kl-vae", "path": "x"}},
            r"codec\.kind=kl-vae, codec\.path=x are read only by recipes diffusion and text-image",
        ),
        (
            {"codec": {"kind": "kl-vae", "path": "x"}, "sampling": {"dynamic_threshold": 0.9}},
            r"dynamic_threshold=0\.9 is read only on pixels",
        ),
        (
            {"codec": {"kind": "kl-vae", "path": "x"}, "data": {"random_crop": 2}},
            r"data\.random_crop=2 is read only where training sees images, not stored latents: .* codec\.cache=false",
        ),
        (
            {"codec": {"kind": "kl-vae", "path": "x", "training": {"stepz": 5}}},
            r"unknown key 'codec\.training\.stepz' \(did you mean 'steps'\?\)",
        ),
    ],
)
def test_sections_that_do_not_go_together(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(content)


def test_the_path_of_a_vae_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    codec = {"kind": "kl-vae", "path": "~/vae", "training": {}}
    config = parse_config({"codec": codec, "vae": {"init_from": "~/first"}})
    assert (config.codec.path, config.vae.init_from) == (tmp_path / "vae", tmp_path / "first")
