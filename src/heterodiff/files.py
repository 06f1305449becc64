"""Files that appear whole or not at all, in folders that others can write to as well; what is read has a bound."""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from heterodiff.errors import CheckpointError, HeterodiffError, reason

MAX_JSON_BYTES = 2**26
MAX_LIST_BYTES = 2**30
"""Largest JSON files that are read: facts, and lists with an entry per image or step."""

MAX_HEADER_BYTES = 4 * 2**20
"""A network of this family has at most a few thousand tensors: a header of a few hundred kilobytes."""

FAST_SUM = "xxh3_128"
SUMS: dict[str, Any] = {FAST_SUM: xxhash.xxh3_128, "sha256": hashlib.sha256}
"""Checksums in lists of files: the one that is written, and that of earlier versions."""

LIST_FILE = "weights.json"
"""Lists the files of a run's pipeline."""
COPY_AGAIN = "train the run again, or copy the folder again"
CHECKSUM = "checksum"
"""Key of a JSON file's own checksum."""
LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.tmp")
LEFTOVER_SECONDS = 3600.0
"""Age in seconds at which an unfinished file counts as left behind by a process that was killed."""


def fresh(path: Path) -> Path:
    """Remove ``path`` and return it, to be written anew: through a link, another file would be overwritten."""
    path.unlink(missing_ok=True)
    return path


def remove(path: Path) -> None:
    """Remove a folder and its content if it exists; of a link, only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in ``folder``."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)


# ---- writing ------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path``, or of a link there, when all of it is written.

    Several processes may write the same file at once: the last one wins.

    Args:
        flush: wait until it is on disk, so that a power cut does not leave an empty file.

    Raises:
        OSError: refused by the disk; what was there before is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # exclusively: a link of this name is not followed
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:
        flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes, flush: bool = False) -> None:
    """Write a whole file, see :func:`replacing`."""
    with replacing(path, flush) as file:
        file.write(content)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a whole file in UTF-8, see :func:`replacing`; ``errors`` as of ``str.encode``."""
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, content: Any, errors: str = "strict", sealed: bool = False, **layout: Any) -> None:
    """Write a whole file of JSON, see :func:`replacing`.

    Args:
        sealed: add a checksum, which :func:`read_json` compares.
        layout: as of ``json.dumps``.
    """
    if sealed:
        content = {**content, CHECKSUM: _checksum(content)}
    layout = {"indent": 1, **layout}
    try:
        write_text(path, json.dumps(content, **layout) + "\n", errors)
    except UnicodeEncodeError:  # a file's name that is not UTF-8, which JSON can only hold as an escape
        write_text(path, json.dumps(content, **{**layout, "ensure_ascii": True}) + "\n")


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps their names by itself
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_files(folder: Path) -> None:
    """Give the files below ``folder`` the permissions new files have here; safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def fingerprint(path: Path, method: str = FAST_SUM) -> dict[str, Any]:
    """Return size and checksum of a file, as lists of files hold them.

    The checksum is to find damage: XXH3 takes a tenth of the time of SHA-256, which would double that of saving.

    Args:
        method: the name of the checksum, one of ``SUMS``.

    Raises:
        OSError: refused by the disk.
    """
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, method: hashlib.file_digest(file, SUMS[method]).hexdigest()}


def is_as_listed(path: Path, expected: Any) -> bool:
    """Compare a file with its entry in a list of files, by the checksum that the entry has.

    Raises:
        OSError: refused by the disk.
    """
    if not isinstance(expected, dict) or path.stat().st_size != expected.get("bytes"):
        return False
    return any(fingerprint(path, method) == expected for method in SUMS if method in expected)


# ---- reading ------------------------------------------------------------------------------------------------


def read_bytes(
    path: Path, error: type[HeterodiffError] = CheckpointError, way_out: str = COPY_AGAIN, limit: int = MAX_JSON_BYTES
) -> bytes:
    """Read a whole file.

    Args:
        error: raised where it cannot be read.
        way_out: the end of its message.
        limit: bytes that it may have.

    Raises:
        HeterodiffError: the file is missing, too large, or refused by the disk.
    """
    try:
        if not path.is_file():
            found = "expected a file, found something else" if path.exists() else "missing"
            raise error(f"{path}: {found}; {way_out}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise error(f"{path}: {path.stat().st_size:,} bytes, expected at most {limit:,}; {way_out}")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or reason(problem)}; {way_out}") from None
    return content


def read_json(
    path: Path, error: type[HeterodiffError] = CheckpointError, way_out: str = COPY_AGAIN, limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object; arguments as of :func:`read_bytes`.

    A file that was written with a checksum is compared with it; the checksum is not returned.

    Raises:
        HeterodiffError: the file is missing, too large, damaged, or holds something else.
    """
    content = parse_json(read_bytes(path, error, way_out, limit), path, error, way_out)
    expected = content.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(content):
        raise error(
            f"{path}: damaged: not what was written (checksum differs); {way_out}, or remove its {CHECKSUM} if it was "
            "changed on purpose"
        )
    return content


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever its layout."""
    plain = json.loads(json.dumps(content))  # keys and sequences as they are read back
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def parse_json(
    text: str | bytes, where: object, error: type[HeterodiffError] = CheckpointError, way_out: str = COPY_AGAIN
) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``where`` it comes from is the beginning of the message.

    Raises:
        HeterodiffError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not readable as JSON: {reason(problem)}; {way_out}") from None
    if not isinstance(content, dict):
        raise error(f"{where}: expected a JSON object, found {type(content).__name__}; {way_out}")
    return content


def parse_rows(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects in ``content``, one a line, and the number of damaged lines.

    A process that is killed can leave half a line, which costs that row only.
    """
    rows, damaged = [], 0
    for line in filter(bytes.strip, content.splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def refuse_header(path: Path, way_out: str) -> None:
    """Check that the header of a safetensors file fits into the file and has an honest size.

    Args:
        way_out: the end of an error's message.

    Raises:
        CheckpointError: the file is no file, cut off, of another kind, or declares far more tensors than a network has.
    """
    try:
        if not path.is_file():
            found = "expected a file, found something else" if path.exists() else "missing"
            raise CheckpointError(f"{path}: {found}; weights are loaded from safetensors only; {way_out}")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {way_out}") from None
    if size < 8 or header > size - 8:
        raise CheckpointError(
            f"{path}: truncated, or not safetensors: a header of {header:,} bytes in {size:,}; {way_out}"
        )
    if header > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {header:,} bytes; expected at most {MAX_HEADER_BYTES:,}; {way_out}")


def refuse_changed(part: Path, way_out: str = "") -> None:
    """Compare a component of a run's pipeline with the list that was written with it.

    Args:
        part: a file or folder beside the list ``weights.json``; where there is none, or one of an earlier version that
            lists no files, nothing is compared.
        way_out: the end of an error's message.

    Raises:
        CheckpointError: a file is missing or differs from the one that was written.
    """
    way_out = way_out or write_again(part.parent)
    files = _listed(part, way_out)
    while problem := next((line for path, entry in files.items() if (line := _change(path, entry))), None):
        before, files = files, _listed(part, way_out)  # of a run that trains, both may be replaced meanwhile
        if files == before:
            raise CheckpointError(f"{problem}; {way_out}; remove {LIST_FILE} there if it was exchanged on purpose")


def write_again(run: Path, otherwise: str = COPY_AGAIN) -> str:
    """Return how the pipeline of a run is made again; ``otherwise`` for a folder that was not trained here."""
    config = run / "config.yaml"
    return f"`heterodiff train {config}` writes it again from the newest checkpoint" if config.is_file() else otherwise


def _listed(part: Path, way_out: str) -> dict[Path, Any]:
    """The files of a component as they were written; none while a run replaces them."""
    listed = part.parent / LIST_FILE
    if not listed.is_file():
        return {}
    files = read_json(listed, way_out=way_out).get("files")
    if not isinstance(files, dict):
        return {}
    return {part.parent / name: files[name] for name in files if name.partition("/")[0] == part.name}


def _change(path: Path, expected: Any) -> str:
    """In what a file differs from what was written; empty where it does not."""
    try:
        if not path.is_file():
            return f"{path}: missing"
        return "" if is_as_listed(path, expected) else f"{path}: damaged: not the file that was written"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
