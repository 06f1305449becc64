"""Commands for data: check, encode."""

from pathlib import Path
from typing import Annotated

import typer

from heterodiff.cli.options import MOST_IMAGES, ConfigArgument, Overrides


def check(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|DATA|RUN", show_default=False)],
    overrides: Overrides = None,
    gpus: Annotated[
        int, typer.Option(min=1, max=100_000, help="Also estimate the run on so many devices like the one here.")
    ] = 1,
    link: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=10_000.0,
            help="GB per second that each device can send: PCIe 4 about 12, NVLink 200 and more, 100 Gbit Ethernet 12.",
        ),
    ] = 12.0,
) -> None:
    """Verify data, shapes, value ranges, the network, its loss and memory before training."""
    from heterodiff.config.shipped import shipped_configs
    from heterodiff.training.preflight.check import check_target

    shipped = shipped_configs() / f"{target}.yaml"
    found = shipped if not target.exists() and shipped.is_file() else target
    raise typer.Exit(0 if check_target(found, overrides or [], gpus, link) else 1)


def encode(
    config: ConfigArgument,
    vae: Annotated[
        Path, typer.Option(metavar="RUN", help="A run of recipe vae, or a diffusers AutoencoderKL.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the latents.", show_default=False)],
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images encoded at once.")] = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in each file.")] = 1024,
) -> None:
    """Encode the images of a configuration to train on their latents; repeat the command after an interruption."""
    from heterodiff.config.file import load_config
    from heterodiff.config.shipped import find_config

    run_config = load_config(find_config(config), overrides or [])  # before anything slow is imported
    from heterodiff.latents.encode_run import encode_run

    result = encode_run(run_config.data, vae, out, batch_size, shard_size)
    if result is None:  # another process of torchrun reports
        return
    for note in result.notes:
        typer.echo(f"note     {note}")
    stored = result.data.latents
    assert stored is not None
    shape = "x".join(map(str, stored.shape))
    std = " ".join(f"{value:.3f}" for value in result.std)
    typer.echo(f"latents  {len(result.data.train)} training and {len(result.data.val)} held-out, {shape}, in {out}")
    typer.echo(f"std      {std} {'per channel ' if len(result.std) > 1 else ''}after scaling, expected 1")
    typer.echo(
        f"next     heterodiff train {config} data.source=latents data.path={out} codec.kind=kl-vae codec.path={vae} "
        "output=runs/NEW"
    )
