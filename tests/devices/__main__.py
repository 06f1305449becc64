"""Runs a command line of heterodiff on the test device and prints what it cost there, by source line."""

import sys

from tests.devices import register, watched


def main() -> None:
    register()
    from heterodiff.cli import main as heterodiff

    with watched() as counts:
        try:
            heterodiff()
        finally:
            print(counts.report(), file=sys.stderr)


if __name__ == "__main__":
    main()
