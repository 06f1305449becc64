"""Reference of all keys of a configuration, with type, default and meaning, read from the typed sections.

``python -m heterodiff.config.reference`` prints the page ``docs/reference.md``.
"""

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from heterodiff.config import RunConfig, Section
from heterodiff.errors import ConfigError, nearest_name

TOP = "top level"
"""Name of the section of keys outside all sections."""
INTRODUCTION = """# Configuration reference

Every key of a configuration file. `heterodiff keys` prints the same in the terminal, `heterodiff keys training` one
section of it, `heterodiff keys ema_decay` one key. A key that a file leaves out has its default. On the command line, a
key is written with its section: `heterodiff train mine.yaml training.steps=1000`. An unknown key or a value of another
type is an error.

`make docs` writes this page anew, from the types that read a configuration.
"""
HUGE = 1e18
"""Larger bounds are those of the number type, and are not shown."""
_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: name with section, such as ``data.image_size``.
        type: type of the values, with bounds.
        default: default value in YAML.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class KeySection:
    """A section of the configuration, such as ``data.volumes``, with its own keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def list_sections(section: type[Section] = RunConfig, prefix: str = "") -> list[KeySection]:
    """Return ``section`` and all sections inside it, in the order of the configuration."""
    schema = section.model_json_schema()["properties"]
    inner = {name: field.default for name, field in section.model_fields.items() if isinstance(field.default, Section)}
    keys = tuple(
        Key(prefix + name, _type(schema[name]), _default(schema[name]), field.description or "")
        for name, field in section.model_fields.items()
        if name not in inner
    )
    meaning = " ".join((section.__doc__ or "").split()).replace("``", "`")
    found = [KeySection(prefix.removesuffix(".") or TOP, meaning, keys)]
    for name, default in inner.items():
        found += list_sections(type(default), f"{prefix}{name}.")
    return found


def find_keys(name: str | None) -> list[KeySection]:
    """Return all sections, the section ``name`` with those inside it, or the keys ``name``, with or without section.

    Raises:
        ConfigError: no section or key has that name; the nearest ones are named.
    """
    sections = list_sections()
    if name is None:
        return sections
    if found := [section for section in sections if f"{section.name}.".startswith(f"{name}.")]:
        return found
    for section in sections:
        if keys := tuple(key for key in section.keys if f".{key.name}".endswith(f".{name}")):
            found.append(replace(section, keys=keys))
    if not found:
        names = [section.name for section in sections[1:]]
        full = [key.name for section in sections for key in section.keys]
        known = full if "." in name else [key.rpartition(".")[2] for key in full]
        near = nearest_name(name, dict.fromkeys([*names, *known]), count=3)
        listed = textwrap.fill(f"sections: {', '.join(names)}", 100, subsequent_indent="  ")
        raise ConfigError(f"unknown section or key '{name}'{near}\n{listed}")
    return found


OPTIONAL = {"training": "keys of section training", "condition": "one key and its value"}
"""Sections that may be left out."""


def _default(schema: dict[str, Any]) -> str:
    text = yaml.safe_dump(schema["default"], default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _type(schema: dict[str, Any]) -> str:
    """Describe the type of a JSON schema in words."""
    if "anyOf" in schema:
        return ", or ".join(_type(choice) for choice in schema["anyOf"])
    if "$ref" in schema:
        section = schema["$ref"].rpartition("/")[2].removesuffix("Config").lower()
        return OPTIONAL[section]
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return schema["const"]
    if "prefixItems" in schema:
        first, second = (_named(item) for item in schema["prefixItems"])
        return f"[{first}, {second}]{_each(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list of {_named(schema['items'])}s{_each(schema['items'])}"
    if schema["type"] == "object":
        return f"mapping of names to {_named(schema['additionalProperties'])}s"
    return f"{_named(schema)} {_bounds(schema)}".strip()


def _named(schema: dict[str, Any]) -> str:
    return "path" if schema.get("format") == "path" else schema["type"]


def _each(schema: dict[str, Any]) -> str:
    bounds = _bounds(schema)
    return f", each {bounds}" if bounds else ""


def _bounds(schema: dict[str, Any]) -> str:
    found = [f"{sign} {schema[bound]:,.15g}" for bound, sign in _BOUNDS if abs(schema.get(bound, math.inf)) < HUGE]
    return ", ".join(found)


def to_text(sections: list[KeySection]) -> Iterator[str]:
    """Yield lines for a terminal: each key with default and type, and below it the meaning."""
    for section in sections:
        yield f"{section.name}: {section.meaning}"
        for key in section.keys:
            yield f"  {key.name}: {key.default}  ({key.type})"
            yield f"      {key.meaning}"


def to_markdown(sections: list[KeySection]) -> str:
    """Return the page ``docs/reference.md``."""
    lines = [INTRODUCTION]
    for section in sections:
        title = "Top level" if section.name == TOP else f"`{section.name}`"
        lines += [f"## {title}\n", f"{section.meaning}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_markdown(list_sections()), end="")
