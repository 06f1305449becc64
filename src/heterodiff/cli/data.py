"""Commands for data: check, encode."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterodiff.cli.options import MOST_IMAGES, Overrides
from heterodiff.errors import ConfigError

if TYPE_CHECKING:
    from heterodiff.latents.encode_run import Encoded


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
    vae: Annotated[
        Path,
        typer.Option(
            metavar="VAE",
            help="A run of recipe vae, a diffusers AutoencoderKL, or a file of weights as of latent diffusion.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the latents.", show_default=False)],
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="Of the images to encode; not with --from.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Latents that another program stored as .npy or .npz files, in place of images.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|vae",
            help="With --from: they are multiplied by this number, such as 0.18215, or scaled as the VAE says.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images encoded at once.")] = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in each file.")] = 1024,
) -> None:
    """Encode the images of a configuration to train on their latents; repeat the command after an interruption."""
    result: Encoded | None
    items = [*([] if config is None else [config]), *(overrides or [])]
    if from_ is not None:
        result = _stored(from_, items, vae, out, scale, batch_size, shard_size)
    else:
        if config is None or scale is not None:
            missing = "name the configuration of the images to encode, or latents with --from FOLDER"
            raise ConfigError(missing if config is None else "--scale: only with --from; images are encoded unscaled")
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
        f"next     heterodiff train {config if from_ is None else 'CONFIG'} data.source=latents data.path={out} "
        f"codec.kind=kl-vae codec.path={vae} output=runs/NEW"
    )


def _stored(
    folder: Path, items: list[str], vae: Path, out: Path, scale: str | None, batch_size: int, shard_size: int
) -> "Encoded":
    """Store the latents of another program, see :func:`heterodiff.latents.foreign.store_foreign`."""
    from heterodiff.config.file import apply_override, parse_config
    from heterodiff.latents.foreign import READ_KEYS, store_foreign

    content: dict[str, Any] = {"data": {"source": "latents", "path": str(folder)}}
    known = [f"data.{key}" for key in READ_KEYS]
    for item in items:
        if item.partition("=")[0] not in known:
            raise ConfigError(f"{item}: with --from, expected nothing but {', '.join(known)}; leave it out")
        apply_override(content, item)
    return store_foreign(folder, parse_config(content).data, vae, out, scale, batch_size, shard_size)
