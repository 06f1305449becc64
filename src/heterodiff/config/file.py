"""Reading and writing configurations: one YAML file, ``key.path=value`` overrides, unknown keys refused."""

from collections.abc import Container, Hashable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from heterodiff.config import RunConfig
from heterodiff.config.names import UNKNOWN_NAME
from heterodiff.config.readers import unread_keys
from heterodiff.errors import ConfigError, nearest_name
from heterodiff.models.defaults import NORM_GROUPS

MAX_CONFIG_BYTES = 1_000_000
LENGTHS = ("steps", "minutes")
"""Keys of section ``training`` that set its length; a run saves both, the steps being those that it measured."""
MOST_PROBLEMS = 20
BESIDE_SAVED = ("run.json", "model_index.json")
"""Files that mark a run folder; the configuration beside them is that of the run."""
ADDED_KEYS = {
    ("model", "norm_groups"): NORM_GROUPS,
    ("data", "volumes", "normalization"): "slice",
    ("segmentation", "network_steps"): 0,
    ("segmentation", "classifier"): None,
    ("segmentation", "classifier_scale"): 100.0,
}
"""Keys that earlier runs did not save, and what these runs did."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases (an alias bomb grows exponentially) or duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not accepted in a configuration; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set()
        for key in keys:
            name = key if isinstance(key, Hashable) else repr(key)
            if name in seen:
                raise ConfigError(f"key '{key}' appears twice (line {node.start_mark.line + 1})")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping from ``path``.

    Raises:
        ConfigError: the file is missing, larger than 1 MB, not UTF-8, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'a folder, not' if path.is_dir() else 'no such'} configuration file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; a configuration has at most 1,000,000")
    try:
        # The loader is SafeLoader with two more refusals: it can build plain values only.
        content = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a number of 5,000 digits
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set ``key.path=value``, the value read as YAML, in nested ``content``.

    A length of a training (``steps`` or ``minutes``) takes the place of the other one.

    Raises:
        ConfigError: not of that form, or a path through a value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}': expected key.path=value, for example training.steps=1000")
    *parents, last = key.strip().split(".")
    section = content
    for parent in parents:
        child = section.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a section")
        section = child
    try:
        section[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        section[last] = text
    if parents[-1:] == ["training"] and last in LENGTHS and section[last] is not None:
        section.pop(LENGTHS[1 - LENGTHS.index(last)], None)


def _refuse_two_lengths(content: dict[str, Any], where: Path) -> None:
    """Raise a ConfigError if ``content`` gives both steps and minutes to a training."""
    codec = content.get("codec")
    sections = {"training": content, "codec.training": codec if isinstance(codec, dict) else {}}
    for name, parent in sections.items():
        training = parent.get("training")
        if isinstance(training, dict) and all(training.get(length) is not None for length in LENGTHS):
            raise ConfigError(
                f"{where}: {name}.steps={training['steps']} and {name}.minutes={training['minutes']} are both given; "
                "leave one of them out"
            )


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at ``location``."""
    section: type[BaseModel] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))  # also of an optional section
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            break
        section = inner
    return list(section.model_fields)


def _shown(value: Any) -> str:
    """The beginning of a value as Python writes it."""
    try:
        return f"{value!r:.100}"
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"


def _explain(error: ValidationError) -> str:
    lines, problems = list[str](), error.errors()
    for item in problems[:MOST_PROBLEMS]:
        location = item["loc"]
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            hint = nearest_name(str(location[-1]), known)
            lines.append(f"unknown key '{key}'{hint}; known here: {', '.join(known)}")
        elif item["type"] == UNKNOWN_NAME:
            lines.append(f"{key}: {item['msg']}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}, found {_shown(item['input'])}" if key else message)
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"and {len(problems) - MOST_PROBLEMS:,} more")
    return "\n".join(lines)


def parse_config(
    content: dict[str, Any], where: str = "configuration", tolerated: Container[str] | None = ()
) -> RunConfig:
    """Check ``content`` against :class:`RunConfig`.

    Args:
        where: origin of the content, for messages.
        tolerated: keys that may differ from their default though the run does not read them; None: all.

    Raises:
        ConfigError: unknown keys and names (the nearest known one is named), values of a wrong type or range, or keys
            that the run does not read (what would read them is named).
    """
    try:
        return RunConfig.model_validate(content, context={"tolerated": tolerated})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read the YAML file at ``path``, apply ``key.path=value`` overrides and check the result.

    The run folder (``output``) defaults to ``runs/<file stem>``. Keys that the run does not read are refused, except
    those that the configuration in a run folder holds: earlier versions accepted and saved them.

    Raises:
        ConfigError: see :func:`read_yaml` and :func:`parse_config`.
    """
    path = Path(path)
    content = read_yaml(path)
    tolerated: Container[str] | None = ()
    if any((path.parent / name).is_file() for name in BESIDE_SAVED):
        for (*sections, key), value in ADDED_KEYS.items():
            inner: Any = content
            for section in sections:
                inner = inner.get(section) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner.setdefault(key, value)
        saved = parse_config(content, str(path), tolerated=None)
        given = {override.partition("=")[0].strip() for override in overrides}
        tolerated = {unread.key for unread in unread_keys(saved)} - given
    else:
        _refuse_two_lengths(content, path)
    for override in overrides:
        apply_override(content, override)
    content.setdefault("output", str(Path("runs") / path.stem))
    return parse_config(content, str(path), tolerated)


def dump_config(config: RunConfig) -> str:
    """Return ``config`` as YAML text that :func:`load_config` reads back to an equal object.

    Keys that the run does not read are left out, unless they differ from their default.
    """
    content = config.model_dump(mode="json")
    for unread in unread_keys(config):
        if unread.is_default:
            _remove(content, unread.key.split("."))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _remove(content: dict[str, Any], key: list[str]) -> None:
    """Delete the key from nested ``content``, and sections that become empty."""
    if len(key) > 1:
        _remove(content[key[0]], key[1:])
    if len(key) == 1 or not content[key[0]]:
        del content[key[0]]
