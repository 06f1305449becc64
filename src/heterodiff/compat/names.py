"""Earlier names of a network's arguments, and reading their values."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from heterodiff.errors import ConfigError, unknown_name
from heterodiff.models.variants import network_class

EARLIER_NAMES = {"image_size": "sample_size", "num_res_blocks": "layers_per_block"}
"""Arguments of the earlier networks that are spelt differently now; all others kept their names."""

ABSENT = -1
"""Earlier head count for "not given"."""

_HEAD_COUNTS = ("num_head_channels", "num_heads_upsample")


@cache
def model_arguments(variant: str = "unet") -> dict[str, Any]:
    """Name -> type of each argument of a network: one of :func:`heterodiff.models.variants.list_models`.

    Raises:
        ConfigError: no such network.
    """
    network = network_class(variant)
    return {name: hint for name, hint in get_type_hints(network.__init__).items() if name != "return"}


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` items of a command line; values as in YAML, ``8,16`` as a sequence.

    Raises:
        ConfigError: an item without ``=``, or a key that appears twice.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key or key in overrides:
            problem = "appears twice" if key in overrides else "expected key=value, for example image_size=128"
            raise ConfigError(f"override '{item}': {problem}")
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides


def current_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` under today's names, -1 for an absent head count as None.

    Raises:
        ConfigError: an argument under both of its names.
    """
    current: dict[str, Any] = {}
    for name, value in arguments.items():
        new = EARLIER_NAMES.get(name, name)
        if new in current:
            raise ConfigError(f"'{name}' and '{new}' are the same argument; give one of them")
        current[new] = None if new in _HEAD_COUNTS and value == ABSENT else value
    return current


def read_arguments(arguments: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` under today's names with checked types.

    Args:
        arguments: under earlier or today's names, values as given.
        extra: name -> type of arguments accepted besides the network's own.

    Raises:
        ConfigError: an unknown argument (the nearest known one is named) or a value of a wrong type.
    """
    hints = dict(model_arguments(arguments.get("variant", "unet") if "variant" in extra else "unet"))
    hints.pop("variant", None)
    hints |= extra
    read = {}
    for name, value in current_names(arguments).items():
        if name not in hints:
            raise ConfigError(unknown_name("argument", name, [*hints, *EARLIER_NAMES]))
        read[name] = _read_value(name, value, hints[name])
    return read


def _read_value(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type ``hint``; ``"1,2,4"`` and a single number count as a sequence."""
    kinds = str(hint)
    try:
        if isinstance(value, bool) and "bool" not in kinds:
            raise TypeError
        if isinstance(value, str) and "," in value and ("Sequence" in kinds or "tuple" in kinds):
            value = [part for part in value.split(",") if part]
        if isinstance(value, int | float | str) and "Sequence" in kinds:
            value = [value]
        read = TypeAdapter(hint).validate_python(value)
    except (TypeError, ValidationError):
        kind = hint.__name__ if isinstance(hint, type) else kinds.replace("collections.abc.", "")
        kind = " or ".join(get_args(hint)) if get_origin(hint) is Literal else kind
        raise ConfigError(f"{name}: expected {kind}, found {value!r}") from None
    return tuple(read) if isinstance(read, list) else read
