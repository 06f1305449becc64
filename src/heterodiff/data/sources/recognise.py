"""Recognition of folders made for another source than ``images``."""

import csv
import json
from pathlib import Path
from typing import Any

from heterodiff.config import DataConfig
from heterodiff.data.captions import COCO_FOLDER, COCO_PATTERN, SINGLE_FILES
from heterodiff.data.captions.files import SUFFIXES
from heterodiff.data.decoding.nifti import files_below, is_nifti
from heterodiff.data.findings import show
from heterodiff.data.sources.scan import METADATA_NAMES
from heterodiff.data.sources.slice_files import holds_slices

LONGEST_HEADER = 65_536


def source_hint(config: DataConfig) -> str | None:
    """Return a line on captions, volumes or shards in ``config.path`` and the settings that read them, if any.

    Only for source ``images``, which reads any folder of images and ignores everything else.
    """
    if config.source != "images" or config.path is None or not config.path.expanduser().is_dir():
        return None
    root = config.path.expanduser()
    if captions := _captions(root, config):
        found, settings = f"captions ({show(captions.relative_to(root).as_posix())})", "data.source=captions"
        if captions.parent == root and captions.name not in (*SINGLE_FILES, *METADATA_NAMES):
            settings += f" data.captions_file={show(captions.name)}"
    elif holds_slices(root):
        found, settings = "preprocessed slices (patient_*/slice_*.npz)", "data.source=volumes"
    elif volume := next((path for path in files_below(root) if is_nifti(path)), None):
        found, settings = f"NIfTI volumes ({show(volume.name)})", "data.source=volumes"
    elif shard := next((path for path in sorted(root.glob("*.tar")) if path.is_file()), None):
        found, settings = f"tar files ({show(shard.name)})", "data.source=webdataset"
    else:
        return None
    return f"{show(str(root))} holds {found}, which source images does not read; for them set {settings}"


def _captions(root: Path, config: DataConfig) -> Path | None:
    """Return the file that source ``captions`` would read here, or one that it reads when it is named."""
    if coco := sorted(root.joinpath(COCO_FOLDER).glob(COCO_PATTERN)):
        return coco[0]
    results, plain = (root / name for name in SINGLE_FILES)
    if "|" in _first_line(results):  # any other results.csv has nothing to do with Flickr30k
        return results
    if plain.is_file():
        return plain
    for path in (root / name for name in METADATA_NAMES):
        columns = _columns(path)
        if config.text_column in columns and "label" not in columns:
            return path
    named = (path for path in sorted(root.glob("captions*")) if path.suffix in SUFFIXES and path.is_file())
    return next(named, None)


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(LONGEST_HEADER)
    except OSError:
        return ""


def _columns(path: Path) -> list[Any]:
    """Names in the header of a CSV file, or keys of the first of JSON lines; none where it cannot be read."""
    line = _first_line(path)
    try:
        return list(json.loads(line)) if path.suffix == ".jsonl" else next(csv.reader([line]), [])
    except (ValueError, TypeError, RecursionError, csv.Error):
        return []
