"""The documentation names keys, commands, files and headings that exist."""

import re
import tomllib
from pathlib import Path

import pytest

from heterodiff.cli import app
from heterodiff.config.reference import list_sections
from tests.reliability.rows import ROWS, table

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTIONS = list_sections()
KEYS = {key.name for section in SECTIONS for key in section.keys} | {section.name for section in SECTIONS}
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
CODE = re.compile(r"`([^`\n]+)`")
ROOMS = "|".join(sorted({name.split(".")[0] for name in KEYS if "." in name}))
KEY = re.compile(rf"(?<![\w.])(?:{ROOMS})\.[a-z_][a-z_.]*\b")
FILES = ("json", "jsonl", "csv", "npz", "yaml", "png", "md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_code_exist(page: Path) -> None:
    named = {key.rstrip(".") for code in CODE.findall(page.read_text("utf-8")) for key in KEY.findall(code)}
    keys = {re.sub(r"^codec\.training\.", "training.", key) for key in named if key.split(".")[-1] not in FILES}
    assert keys <= KEYS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    blocks = re.findall(r"^    heterodiff ([a-z0-9]+)", text, flags=re.MULTILINE)
    inline = [match.group(1) for code in CODE.findall(text) if (match := re.match(r"heterodiff ([a-z0-9]+)", code))]
    assert {*blocks, *inline} <= COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_glossary_is_in_order_and_one_line_a_term() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE)[
        1:
    ]
    terms = [term.casefold() for term, _ in rows]
    assert len(terms) > 30
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)


def test_faults_are_listed_as_they_are_tested() -> None:
    assert table() in (ROOT / "docs" / "reliability.md").read_text("utf-8")
    for row in ROWS.values():
        for test in row.tests:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / "tests" / file).read_text("utf-8"), test


def test_every_dependency_is_listed_with_its_licence() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {
        re.split(r"[<>=]", line)[0] for line in declared["dependencies"] + declared["optional-dependencies"]["mri"]
    }
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| ([\w-]+) \| [^|]+ \| ([^|]+) \|", page, re.MULTILINE))
    assert names <= set(listed)
    assert "not declared" not in listed.values()
