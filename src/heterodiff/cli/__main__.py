"""``python -m heterodiff.cli``."""

from heterodiff.cli import main

if __name__ == "__main__":
    main()
