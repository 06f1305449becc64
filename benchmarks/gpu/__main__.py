"""All that only an accelerator can tell: is it right there, how fast is it, which of several ways is the fastest.

    python -m benchmarks.gpu --minutes 12             what fits into the time, most valuable first
    python -m benchmarks.gpu --rows resume norms      only these rows, or those that have a word in their names
    python -m benchmarks.gpu --list                   names of the rows, and how long each takes about
    python -m benchmarks.gpu --tiny --out FOLDER      every row at its smallest, on any device, to see that all work

Measures on the default device and writes benchmarks/results/gpu_<device>.json after every row. Rows that it holds for
this version of the code are left out, so a run that was cut goes on with the same command; ``--again`` measures them
once more. A row that fails is kept with its error, and the next one begins. Exits with 1 if one failed, or if
the device misses what the project promises by more than a tenth.

Needs Python 3.11, torch 2.10, numpy, diffusers and psutil, and PYTHONPATH=src where heterodiff is not installed. Rows
that train need all of heterodiff's dependencies (tensorboard and scikit-learn only for the digits), those beside other
networks also einops and monai. What is missing is named in the row and hinders no other.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.gpu.goals import promises
from benchmarks.gpu.session import Bench, DeviceLost, Results, Row, code_version, run_rows
from benchmarks.gpu.steps import measured_file
from benchmarks.gpu.table import lines_of
from benchmarks.gpu.ways import attention_table
from benchmarks.measure import RESULTS
from benchmarks.promises import report as print_promises

FIRST = (
    "agrees with the CPU",
    "steps * bfloat16",
    "overflow float16",
    "resume digits*",
    "B * batch 32 eager",
    "first step of train digits",
    "counts of training digits",
    "norms",
    "attention 64x64",
    "attention 128x128",
    "B train batch 32 compiled",
)
"""Patterns of the rows that a quarter of an hour is best spent on."""


def all_rows() -> list[Row]:
    """Every row, the most valuable first."""
    from benchmarks.gpu import correct, speed, steps, ways

    def rank(row: Row) -> int:
        return next((k for k, pattern in enumerate(FIRST) if fnmatch(row.name, pattern)), len(FIRST))

    return sorted([*correct.rows(), *ways.rows(), *steps.rows(), *speed.rows()], key=rank)


def chosen(words: list[str] | None) -> list[Row]:
    """The rows that ``words`` name, or whose names contain one of them; all rows without ``words``."""
    rows = all_rows()
    names = [row.name for row in rows]
    return [
        row
        for row in rows
        if not words or row.name in words or any(word in row.name for word in words if word not in names)
    ]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="begin no row that would end later; default: no limit")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only these, or those with it in their names")
    parser.add_argument("--again", action="store_true", help="measure also what the results hold already")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; needs --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="print the rows, measure nothing")
    options = parser.parse_args(arguments)
    if options.tiny and options.out == RESULTS:
        parser.error("--tiny measures nothing that is worth keeping: name a folder with --out")
    if not chosen(options.rows):
        parser.error(f"--rows {' '.join(options.rows)}: no such row; --list prints them")
    return options


def _start_again(options: argparse.Namespace, minutes: float | None) -> None:
    """Go on in a new process in place of this one, whose device is lost; what is known is not measured again."""
    again = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out)]
    again += ["--tiny"] * options.tiny
    again += ["--minutes", f"{max(minutes, 0):.2f}"] if minutes is not None else []
    again += ["--rows", *options.rows] if options.rows else []
    os.execv(sys.executable, again)


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 if a row failed or a promise was missed, else 0."""
    options = _options(arguments)
    rows = chosen(options.rows)
    if options.list:
        print("\n".join(f"{row.seconds:6.0f} s  {row.name}" for row in rows))
        return 0
    from heterodiff.devices import default_device, device_name

    start, device = time.perf_counter(), default_device()
    results = Results(device_name(device), options.out, code_version())
    if options.again:
        results.forget([row.name for row in rows])
    print(f"{len(rows)} rows on {results.device}, version {results.version[:12]}", flush=True)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        bench = Bench(device, options.tiny, Path(folder))
        try:
            late = run_rows(rows, bench, results, options.minutes)
            lost = None
        except DeviceLost as error:
            lost = error
    if lost is not None:
        print(f"the device is lost ({lost}); going on in a new process", flush=True)
        left = None if options.minutes is None else options.minutes - (time.perf_counter() - start) / 60
        _start_again(options, left)
    return report(rows, late, results, options.tiny)


def report(rows: list[Row], late: list[str], results: Results, tiny: bool) -> int:
    """Print what is known of ``rows``; 1 if one failed or a promise was missed, else 0."""
    known = [row.name for row in rows if row.name in results.rows]
    print(f"\n{results.device}: {len(known)} of {len(rows)} rows, in {results.folder / results.name}.json")
    for name in known:
        row = results.rows[name]
        print("\n".join(lines_of(name, row, older=row["version"] != results.version)))
    rows_known = {name: results.rows[name] for name in known}
    missed = 0 if tiny else print_promises(promises(rows_known))
    if not tiny and (table := attention_table(rows_known)) is not None:
        print(f"to commit as src/heterodiff/models/attention/ways.json:\n{table}")
    if not tiny and (table := measured_file(results.device, rows_known)) is not None:
        print(f"to commit as src/heterodiff/measured.json:\n{table}")
    if late:
        print(f"no time for {len(late)} rows: {', '.join(late)}")
    return max(missed, int(any(row["state"] == "failed" for row in rows_known.values())))


if __name__ == "__main__":
    sys.exit(main())
