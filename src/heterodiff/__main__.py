"""``python -m heterodiff``: the command line."""

from heterodiff.cli import main

if __name__ == "__main__":
    main()
