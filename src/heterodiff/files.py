"""Files that a run writes again and again, in folders that others can write to as well."""

import shutil
from pathlib import Path


def fresh(path: Path) -> Path:
    """Return ``path`` to write to, without what was there: through a link, another file would be overwritten."""
    path.unlink(missing_ok=True)
    return path


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there; of a link only itself."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)
