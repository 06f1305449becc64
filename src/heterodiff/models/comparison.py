"""The networks side by side: the HAE family for one configuration, others for theirs."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from heterodiff.models.profile import profile
from heterodiff.models.variants import NETWORKS, VARIANTS, create_model, list_models

SIZE = ("sample_size", "in_channels", "model_channels", "channel_mult", "attention_resolutions", "num_classes")
OTHER_SIZE = {"film-unet": ("latent_channels", "latent_size", "condition_dim", "model_channels", "channel_mult")}
"""Arguments that the table shows beside those that are given."""


def model_table(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each network: name, parameters, cost (see :class:`ModelProfile`), summary and configuration.

    Args:
        arguments: arguments of :func:`heterodiff.create_model`. With ``variant`` the table has that network alone;
            without it the whole family, and without any arguments every network.

    Raises:
        ConfigError: arguments that no network can be built from.
    """
    given = dict(arguments)
    names = [given.pop("variant")] if "variant" in given else list(VARIANTS if given else list_models())
    return [_row(name, given) for name in names]


def _row(name: str, given: dict[str, Any]) -> dict[str, Any]:
    with FakeTensorMode():
        filled = create_model(name, **given).config
    height, width = (filled.sample_size,) * 2 if isinstance(filled.sample_size, int) else filled.sample_size
    found = asdict(profile(name, height, width, **given))
    shown = dict.fromkeys([*OTHER_SIZE.get(name, SIZE), *given])
    config = {key: filled[key] for key in shown if filled[key] is not None}
    return {**found, "summary": (VARIANTS | NETWORKS)[name].summary, "config": config}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of :func:`model_table`."""
    table = Table(box=box.SIMPLE)
    table.add_column("variant", no_wrap=True)
    for column in ("parameters", "of it hybrid", "GFLOP", "MB saved"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row['parameters']:,}", f"{row['hybrid_parameters']:,}", f"{row['gflop']:.2f}")
        table.add_row(row["variant"], *numbers, f"{row['saved_mb']:.1f}")
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        console.print(f"{row['variant']}: {row['summary']}")
    console.print("\nGFLOP: forward pass of one image; MB saved: per image, for the backward pass", style="dim")
    configs = _by_config(rows)
    for config, names in configs.items():
        console.print(f"{', '.join(names) + ': ' if len(configs) > 1 else ''}for {config}", style="dim")
    console.print("key=value changes the configuration; --json for programs", style="dim")


def _by_config(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the networks by configuration, as text."""
    found: dict[str, list[str]] = {}
    for row in rows:
        config = ", ".join(f"{key}={value}" for key, value in row["config"].items())
        found.setdefault(config, []).append(row["variant"])
    return found
