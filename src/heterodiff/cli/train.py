"""Commands that produce a model: train, import."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from heterodiff.cli.options import ConfigArgument, Overrides


def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|weights-only|PATH", help="Resume the run in the output folder.")
    ] = "auto",
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Total number of steps after which to save a checkpoint and stop.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print shapes, parameters, memory and one step's time; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a model; repeat the command to resume after an interruption."""
    from heterodiff.config.file import load_config
    from heterodiff.config.shipped import find_config

    run_config = load_config(find_config(config), overrides or [])  # before anything slow is imported
    from heterodiff.training import start
    from heterodiff.training.preflight import trial

    if dry_run:
        trial.print_dry_run(trial.dry_run(run_config))
        return
    result = start.train(run_config, resume, stop_after, quiet=quiet)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        typer.echo(f"stopped by {name} at step {result.step}; the same command goes on from there", err=True)
        raise typer.Exit(128 + result.stopped_by)
    if result.step < result.steps and start.is_main_process():
        typer.echo(f"stopped  at step {result.step} of {result.steps}; the same command goes on")
    elif start.is_main_process():
        from heterodiff.report.writing import write_report

        assert run_config.output is not None
        report = write_report(run_config.output)
        typer.echo(f"done     step {result.step} of {result.steps}\nreport   {report}")
        for line in start.next_steps(run_config):
            typer.echo(line)


def import_(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the imported model.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="What the weights do not determine, such as num_heads=4 sample_size=128; with --config also keys of "
            "it, such as data.path=FOLDER.",
        ),
    ] = None,
    format_: Annotated[str, typer.Option("--format", metavar="guided-diffusion|anofpdm")] = "guided-diffusion",
    variant: Annotated[str | None, typer.Option(help="Variant, where the weights fit more than one.")] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Make a run, to segment, evaluate and train on: data and settings by this configuration, the network "
            "by the checkpoint.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert an earlier checkpoint to a model folder of this toolkit, or with --config to a run."""
    from heterodiff.compat.names import parse_overrides

    items = overrides or []
    if config is None:
        from heterodiff.compat.importing import import_checkpoint

        report = import_checkpoint(checkpoint, format_, out, parse_overrides(items), variant)
        following = [f"next     heterodiff sample {report.folder}"]
    else:
        from heterodiff.compat.import_run import import_run
        from heterodiff.config.shipped import find_config
        from heterodiff.run_folder import RunFolder
        from heterodiff.training.start import next_steps

        changes = [item for item in items if "." in item.partition("=")[0]]
        own = parse_overrides([item for item in items if item not in changes])
        report = import_run(checkpoint, format_, out, find_config(config), own, variant, changes)
        following = [*next_steps(RunFolder(out).config()), f"         heterodiff train {out}/config.yaml"]
    for note in report.notes:
        typer.echo(f"note     {note}")
    typer.echo("\n".join([f"model    {report.folder}", *following]))
