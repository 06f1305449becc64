"""Commands to start with: demo, models, init, keys."""

import json
from pathlib import Path
from typing import Annotated

import typer

from heterodiff.cli.options import AsJson, Overrides, Seed
from heterodiff.errors import ConfigError, unknown_name

DEMOS = {
    "digits": "digits",
    "latents": "digits_latent",
    "radar": "microdoppler_small",
    "text": "shapes_small",
    "brain": "phantom_small",
}
"""Names of the shipped configurations."""


def demo(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[digits|latents|radar|text|brain]",
            help="Real digits, the same in the latents of a VAE, simulated radar, pictures with captions, or simulated "
            "heads with lesions.",
        ),
    ] = "digits",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/ and the name, as runs/digits.")] = None,
    seed: Seed = 0,
) -> None:
    """Train on built-in images, draw samples, evaluate and write a report, in minutes."""
    if what not in DEMOS:
        raise ConfigError(unknown_name("demo", what, DEMOS))
    from heterodiff.config.shipped import find_config
    from heterodiff.demo import run_demo

    run_demo(find_config(DEMOS[what]), out or Path("runs") / what, seed, overrides or [])


def models(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the networks with parameters, FLOPs and activation memory for a configuration.

    key=value sets an argument of the network, for example sample_size=128 model_channels=128 channel_mult=1,1,2,3,4
    """
    from heterodiff.compat.names import parse_overrides, read_arguments
    from heterodiff.models.profile import model_table, print_table

    rows = model_table(read_arguments(parse_overrides(overrides or []), {"variant": str}))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_table(rows)


def init(
    task: Annotated[
        str,
        typer.Argument(
            metavar="[digits|images|captions|mri|radar]",
            help="Built-in digits, your images of classes, pictures with captions, MRI volumes, or simulated radar.",
        ),
    ] = "images",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file; default: my_TASK.yaml.", show_default=False)
    ] = None,
) -> None:
    """Write a commented configuration to start from."""
    from heterodiff.config.starter import next_command, write_starter

    path = out or Path(f"my_{task}.yaml")
    write_starter(task, path)
    typer.echo(f"wrote    {path}\nnext     {next_command(task, path)}")


def keys(
    name: Annotated[
        str | None, typer.Argument(metavar="[SECTION|KEY]", help="Such as training, data.volumes or ema_decay.")
    ] = None,
) -> None:
    """List the keys of a configuration file with their defaults, types and meanings."""
    from heterodiff.config.reference import find_keys, to_text

    for line in to_text(find_keys(name)):
        typer.echo(line)
