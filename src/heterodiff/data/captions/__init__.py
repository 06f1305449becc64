"""The source ``captions``: a folder of images, and texts that describe them."""

import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from heterodiff.config import DataConfig
from heterodiff.data.captions.files import CaptionFile, CaptionRow, read_caption_file
from heterodiff.data.collection import Collection, read_file
from heterodiff.data.findings import DataFinding, listing, show
from heterodiff.data.sources.metadata import file_problem, find_metadata, name_problem
from heterodiff.data.sources.scan import FolderScan, scan_folder
from heterodiff.errors import DataError

COCO_FOLDER, COCO_PATTERN, _COCO_VALIDATION = "annotations", "captions_*.json", re.compile(r"captions_val.*\.json")
SINGLE_FILES = ("results.csv", "captions.txt")


def open_captions(config: DataConfig) -> Collection:
    """List the images of ``config.path`` that have captions; nothing is decoded yet.

    The layout is that of ``config.captions_file``, or of the first of these that is there: COCO, Flickr30k,
    ``captions.txt``, ``metadata.csv`` or ``metadata.jsonl``. COCO's validation images are held out.

    Raises:
        DataError: no folder, no captions, a file of captions that cannot be read, or images that are not found.
            Single rows that cannot be used become problems of the collection.
    """
    assert config.path is not None
    root = config.path.expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise DataError(f"{root}: {found}; expected a folder of images and their captions in data.path")
    files = [read_caption_file(path, root, config) for path in _caption_files(root, config)]
    where = ", ".join(str(file.path) for file in files)
    scans: dict[str, FolderScan] = {}
    captions: dict[str, dict[str, None]] = {}  # keys of a dictionary, for order without repetition
    problems: list[DataFinding] = []
    images_of: dict[Path, set[str]] = {}
    present: set[str] = set()
    unreadable: dict[DataFinding, None] = {}
    for file in files:
        folder = _image_folder(file, root, scans)
        prefix, scan = "" if folder == "." else f"{folder}/", scans[folder]
        described, wrong = _match(file, root / folder, scan)
        problems.extend(wrong)
        for name, texts in described.items():
            captions.setdefault(prefix + name, {}).update(texts)
        images_of[file.path] = {prefix + name for name in described}
        present.update(prefix + name for name in scan.files)
        unreadable |= {DataFinding(prefix + item.name, item.problem): None for item in scan.unreadable}
    if not captions:
        what = f"none of the captions can be used:\n{listing(problems)}" if problems else "no captions"
        raise DataError(f"{where}: {what}")
    warnings = []
    if bare := present - captions.keys():
        warnings.append(f"{len(bare):,} images have no caption and were left out, for example {show(min(bare))}")
    names = tuple(sorted(captions))
    held_out = _held_out(images_of, where)
    return Collection(
        where=str(root),
        names=names,
        class_of=(None,) * len(names),
        read=partial(read_file, root, names, config.channels, config.background),
        unreadable=tuple(unreadable),
        problems=tuple(problems),
        warnings=tuple(warnings),
        captions=tuple(tuple(captions[name]) for name in names),
        held_out=None if held_out is None else tuple(name in held_out for name in names),
    )


def _caption_files(root: Path, config: DataConfig) -> list[Path]:
    if config.captions_file is not None:
        path = root / config.captions_file.expanduser()
        if not path.is_file():
            raise DataError(f"{path}: no such file; correct data.captions_file, which is relative to data.path")
        return [path]
    if coco := sorted(path for path in (root / COCO_FOLDER).glob(COCO_PATTERN) if path.is_file()):
        return coco
    for name in SINGLE_FILES:
        if (root / name).is_file():
            return [root / name]
    if metadata := find_metadata(root):
        return [metadata]
    looked_for = ", ".join((f"{COCO_FOLDER}/{COCO_PATTERN}", *SINGLE_FILES, "metadata.csv and metadata.jsonl"))
    raise DataError(
        f"{root}: no captions here; looked for {looked_for}. Add one of these, or name another file with "
        "data.captions_file"
    )


def _held_out(images_of: dict[Path, set[str]], where: str) -> set[str] | None:
    """Return the images of COCO's validation files, if there are training files as well."""
    val_files = {path for path in images_of if _COCO_VALIDATION.fullmatch(path.name)}
    if not val_files or len(val_files) == len(images_of):
        return None
    val = set().union(*(images_of[path] for path in val_files))
    train = set().union(*(images_of[path] for path in images_of.keys() - val_files))
    if both := train & val:
        raise DataError(
            f"{where}: {len(both):,} images are described in the training and in the validation files, for example "
            f"{show(min(both))}; keep each image in one of them"
        )
    return val


def clean_caption(text: Any) -> str:
    """Return a caption on one line, with single blanks between its words.

    Raises:
        ValueError: empty, or not a text.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError(f"caption {text!r:.60} is not text")
    cleaned = " ".join((text or "").split())
    if not cleaned:
        raise ValueError("the caption is empty")
    try:
        cleaned.encode()
    except UnicodeEncodeError:
        raise ValueError(f"caption {cleaned!a:.60} holds half of a surrogate pair, which is no character") from None
    return cleaned


def _match(file: CaptionFile, folder: Path, scan: FolderScan) -> tuple[dict[str, dict[str, None]], list[DataFinding]]:
    """Return the captions of each image in ``folder``, and the rows that cannot be used."""
    present = set(scan.files)
    resolved: dict[str, tuple[str, str | None]] = {}
    captions: dict[str, dict[str, None]] = {}
    problems = []
    for row in file.rows:
        if isinstance(row, DataFinding):
            problems.append(row)
            continue
        key = row.file if isinstance(row.file, str) else ""
        if key not in resolved:
            resolved[key] = _resolve(folder, key, file.file_column, present)
        name, problem = resolved[key]
        if problem is not None:
            problems.append(DataFinding(row.where, problem))
            continue
        for text in row.texts or [None]:
            try:
                cleaned = clean_caption(text)
                captions.setdefault(name, {})[cleaned] = None
            except ValueError as error:
                problems.append(DataFinding(row.where, str(error)))
    return captions, problems


def _resolve(folder: Path, file: str, column: str, present: set[str]) -> tuple[str, str | None]:
    """Return the name of ``file`` in ``folder``, and why it cannot be used; asks the disk only about unlisted files."""
    if problem := name_problem(folder, file, column):
        return file, problem
    name = PurePosixPath(file).as_posix()
    return name, None if name in present else file_problem(folder, name, column)


def _image_folder(file: CaptionFile, root: Path, scans: dict[str, FolderScan]) -> str:
    """Return the first folder that holds any of the images, relative to ``root``; `DataError` if none does."""
    named = dict.fromkeys(row.file for row in file.rows if isinstance(row, CaptionRow) and isinstance(row.file, str))
    folders = [folder for folder in dict.fromkeys(file.folders) if (root / folder).is_dir()]
    for folder in folders:
        if folder not in scans:
            scans[folder] = scan_folder(root / folder)
        present = set(scans[folder].files)
        if any(_resolve(root / folder, name, file.file_column, present)[1] is None for name in named):
            return folder
    if all(name_problem(root, name) for name in named):  # the rows are the problem, not the place
        return folders[-1]
    looked_in = ", ".join(str(root / folder) for folder in dict.fromkeys(file.folders))
    raise DataError(
        f"{file.path}: none of the {len(named):,} images it names was found, for example {show(next(iter(named)))}; "
        f"looked in {looked_in}. Put them into one of these folders, or correct data.path or data.captions_file"
    )
