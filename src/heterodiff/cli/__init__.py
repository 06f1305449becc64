"""The command line: parse, call, print. Heavy libraries are imported by the command that needs them."""

import logging
import os
import sys
from typing import Annotated

import typer

from heterodiff import __version__
from heterodiff.cli import data, draw, start, train, use
from heterodiff.errors import HeterodiffError, is_out_of_memory, visible
from heterodiff.memory import keep_freed_memory

GROUPS = {
    "Start": (start.demo, start.models, start.init, start.keys),
    "Data": (data.check, data.encode),
    "Train": (train.train, train.import_),
    "Use a run": (draw.sample, draw.translate, draw.edit, draw.text2image, use.caption, use.segment, use.evaluate),
}
"""Commands by their group in ``heterodiff --help``."""

app = typer.Typer(
    name="heterodiff",
    help="Train and use conditional diffusion models with HAE U-Nets on your own images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group, commands in GROUPS.items():
    for command in commands:
        app.command(command.__name__.rstrip("_"), rich_help_panel=group)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heterodiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["HETERODIFF_DEBUG"] = "1"


def _fail(message: str) -> int:
    print(f"error: {visible(message)}", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit code 0 on success, 1 on a user's error, 128 + n after signal n."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damaged files are reported by name already
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    keep_freed_memory()
    try:
        code = app(arguments or sys.argv[1:] or ["--help"], prog_name="heterodiff", standalone_mode=False)
    except HeterodiffError as error:
        if os.environ.get("HETERODIFF_DEBUG"):
            raise
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; nothing after the last checkpoint is kept", file=sys.stderr)
        code = 130
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("HETERODIFF_DEBUG") or not is_out_of_memory(error):
            raise
        code = _fail("out of memory; free some, or compute on another --device")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: no complaint at exit
        code = 1
    except Exception as error:
        message = getattr(error, "format_message", None)  # wrong usage, found by typer
        if message is None:
            raise
        context = getattr(error, "ctx", None)
        command = f" {context.info_name}" if context is not None and context.parent is not None else ""
        code = _fail(f"{message()} (see heterodiff{command} --help)")
    sys.exit(code if isinstance(code, int) else 0)
