"""Search for the image files below a folder."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from heterodiff.data.decoding import SUFFIXES
from heterodiff.data.findings import DataFinding, show

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class FolderScan:
    """Image files of a folder, sorted by relative name (``/`` between parts), and what was passed over."""

    files: tuple[str, ...]
    first_level: tuple[str, ...]
    unreadable: tuple[DataFinding, ...]
    warnings: tuple[str, ...]


def scan_folder(root: Path) -> FolderScan:
    """List all image files below ``root``, following links; hidden files and folders are left out.

    A folder met a second time (a link to a folder already seen, a loop) is not entered again, so the scan ends.
    """
    files: list[str] = []
    ignored: Counter[str] = Counter()
    unreadable: list[DataFinding] = []
    warnings: list[str] = []
    seen = {os.path.realpath(root)}

    def relative(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def note_unreadable(error: OSError) -> None:
        name = relative(error.filename) if error.filename else str(root)
        unreadable.append(DataFinding(name, f"folder cannot be read: {error.strerror}"))

    first_level: tuple[str, ...] = ()
    for folder, subfolders, names in os.walk(root, onerror=note_unreadable, followlinks=True):
        entered = []
        for subfolder in sorted(subfolders):
            path = os.path.join(folder, subfolder)
            real = os.path.realpath(path)
            if subfolder.startswith("."):
                continue
            if real in seen:
                warnings.append(f"{show(relative(path))}: links to a folder already read, not entered again")
                continue
            seen.add(real)
            entered.append(subfolder)
        subfolders[:] = entered
        if Path(folder) == root:
            first_level = tuple(entered)
            names = [name for name in names if name not in METADATA_NAMES]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                files.append(relative(os.path.join(folder, name)))
            else:
                ignored[suffix] += 1
    if ignored:
        kinds = ", ".join(f"{count} x {show(suffix) or 'no suffix'}" for suffix, count in ignored.most_common(5))
        warnings.append(f"{ignored.total():,} files are not images by their suffix and were ignored ({kinds})")
    return FolderScan(tuple(sorted(files)), first_level, tuple(unreadable), tuple(warnings))
