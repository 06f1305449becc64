"""The reference of keys: complete, true and up to date."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from heterodiff.cli import main
from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config
from heterodiff.config.reference import TOP, find_keys, list_sections, to_markdown
from heterodiff.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
SECTIONS = list_sections()
KEYS = {key.name: key for section in SECTIONS for key in section.keys}


def leaves(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a nested dictionary by the path of its keys."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == to_markdown(SECTIONS), "run `make docs`"


def test_every_key_of_a_saved_configuration_is_listed_with_its_default() -> None:
    saved = leaves(RunConfig().model_dump(mode="json"))
    assert KEYS.keys() == saved.keys()
    assert {name: yaml.safe_load(key.default) for name, key in KEYS.items()} == saved


def test_every_key_and_section_has_a_meaning() -> None:
    assert [key.name for key in KEYS.values() if len(key.meaning) < 5] == []
    assert [section.name for section in SECTIONS if section.meaning == (BaseModel.__doc__ or "")] == []
    assert [section.name for section in SECTIONS if not section.meaning.endswith(".")] == []


def refusal(name: str, value: str) -> str:
    """The error of a configuration with this one key; empty where it is accepted."""
    content: Any = value
    for part in reversed(name.split(".")):
        content = {part: content}
    try:
        parse_config(content)
    except ConfigError as error:
        return str(error)
    return ""


def test_listed_choices_and_bounds_are_those_that_are_enforced() -> None:
    choices = {
        key.name: key.type.removeprefix("one of ").removesuffix(", or null").split(", ")
        for key in KEYS.values()
        if "one of" in key.type
    }
    assert choices["data.resize"] == ["crop", "stretch"]
    for name, known in choices.items():
        assert f"{name}: Input should be" in refusal(name, "no such choice")
        for choice in known:  # some ask for another key, which is another message
            assert f"{name}: Input should be" not in refusal(name, choice)
    assert KEYS["training.steps"].type == "integer > 0, <= 1,000,000,000,000"
    assert KEYS["data.val_fraction"].type == "number >= 0, < 1"
    assert KEYS["data.image_size"].type == "[integer, integer], each > 0, <= 16,384, or null"
    assert KEYS["training.seed"].type == "integer >= 0"
    assert KEYS["codec.path"].type == "path, or null"


def test_markdown_shows_what_it_says() -> None:
    """Neither bars that would end a cell, nor angle brackets that would be taken for HTML."""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") == 5, line
            outside = "".join(line.split("`")[::2])
            assert re.search(r"<[A-Za-z/]", outside) is None, line


def test_sections_and_keys_are_found_by_name() -> None:
    assert [section.name for section in find_keys("data")] == [
        section.name for section in SECTIONS if section.name.split(".")[0] == "data"
    ]
    assert [[key.name for key in section.keys] for section in find_keys("ema_decay")] == [["training.ema_decay"]]
    assert [section.name for section in find_keys("guidance_scale")] == ["sampling", "segmentation"]
    assert [section.name for section in find_keys("recipe")] == [TOP]
    for wrong, near in (("trainning", "'training'"), ("training.step", "'training.steps'")):
        with pytest.raises(ConfigError, match=f"did you mean {near}"):
            find_keys(wrong)
    with pytest.raises(ConfigError, match="'guidance_scale' or 'guidance_interval'") as error:
        find_keys("guidance")
    assert max(map(len, str(error.value).splitlines())) <= 120
    assert "segmentation" in str(error.value)


def test_command_prints_a_section(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["keys", "diffusion"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "  diffusion.p_uncond: 0.1  (number >= 0, <= 1)\n      probability of dropping the condition" in printed
    assert "training.steps" not in printed
