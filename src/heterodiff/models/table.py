"""The variants side by side for one configuration."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from heterodiff.models.profile import profile
from heterodiff.models.variants import VARIANTS

DEFAULTS: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "model_channels": 64,
    "channel_mult": (1, 2, 2, 4),
    "attention_resolutions": (4, 8),
    "num_classes": 10,
}
"""The network that ``heterodiff models`` describes where nothing else is asked for."""


def model_table(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a variant: name, parameters, hybrid part, GFLOP of a forward pass, MB saved for backward, and what
    the row describes.

    Args:
        arguments: of :class:`heterodiff.models.unet.HAEUNet`, over ``DEFAULTS``.

    Raises:
        ConfigError: arguments that no network can be built from.
    """
    config = DEFAULTS | arguments
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    rows = []
    for name in [config.pop("variant")] if "variant" in config else VARIANTS:
        row = asdict(profile(name, height, width, **config))
        rows.append({**row, "summary": VARIANTS[name].summary, "config": config})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print :func:`model_table` for people."""
    config = ", ".join(f"{key}={value}" for key, value in rows[0]["config"].items())
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
    console.print(f"for {config}\nkey=value changes the configuration; --json for programs", style="dim")
