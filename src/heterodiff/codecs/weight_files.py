"""Reading weights from untrusted files: never more than tensors, whatever the file holds."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from heterodiff.errors import CheckpointError, reason
from heterodiff.files import refuse_header
from heterodiff.models.loading import refuse_nonfinite

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FETCH_AGAIN = "fetch the file again"
WRAPPERS = ("ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
"""Keys under which training scripts nest a state dict, the best weights first."""
ANCHOR = "time_embed.0.weight"
"""A parameter that every network of the family has; what stands before its name is a prefix."""
PREFIXES = re.compile(r"((module|_orig_mod|weight|model)\.)*")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TENSORS_ALONE = "if you trust the file, save its tensors alone: torch.save(model.state_dict(), 'weights.pt')"


@dataclass
class WeightFile:
    """Contents of a file: tensors by name, metadata (safetensors only), and notes for the user."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path) -> WeightFile:
    """Read a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file; no code in it is ever run.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise CheckpointError(f"{path}: expected .safetensors, {', '.join(TORCH_SUFFIXES)}, found '{path.suffix}'")


def strip_prefix(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the network's tensors without what wrappers put before their names, and notes.

    Raises:
        CheckpointError: no such network, or several.
    """
    prefixes = [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    prefixes = [prefix for prefix in prefixes if PREFIXES.fullmatch(prefix)]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} networks: {some(prefixes)}" if prefixes else f"tensors {some(sorted(tensors))}"
        raise CheckpointError(f"{path}: expected one guided-diffusion U-Net (with '{ANCHOR}'), found {found}")
    prefix = prefixes[0]
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    notes = [f"names: prefix '{prefix}' removed"] if prefix else []
    if outside:
        notes.append(f"names: {len(outside)} tensors outside '{prefix}' ignored: {some(outside)}")
    return inside, notes


def tidy_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return ``tensors`` as contiguous float32 with memory of their own, and notes.

    Raises:
        CheckpointError: a tensor that is sparse, not of floats, or not finite.
    """
    tidy: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
            raise CheckpointError(f"{path}: '{name}': expected dense floats, found {tensor.layout}, {tensor.dtype}")
        tensor = tensor.detach().to(torch.float32).contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tidy[name] = tensor
    refuse_nonfinite(tidy, path, "use an earlier checkpoint of that run")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"}
    return tidy, [f"weights: converted from {', '.join(sorted(kinds))} to float32"] if kinds else []


def some(names: list[str], count: int = 4) -> str:
    """Return the first few of ``names`` in one line."""
    return ", ".join(names[:count]) + (f", … {len(names) - count} more" if len(names) > count else "")


def _read_safetensors(path: Path) -> WeightFile:
    refuse_header(path, FETCH_AGAIN)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return WeightFile(tensors, dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {error}; {FETCH_AGAIN}") from None


def _read_torch(path: Path) -> WeightFile:
    zipped = _is_archive(path)
    if zipped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which are refused in the next moment
            # Anything but tensors and plain containers is refused inside; there is no second way to read the file.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        what = f"a Python object ({found[1]})" if found else "something other than tensors, or it is damaged"
        raise CheckpointError(f"{path}: refused: it holds {what}; {TENSORS_ALONE}") from None
    except Exception as error:  # a damaged file fails in many ways
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not readable as a torch file: {why}; {FETCH_AGAIN}") from None
    tensors, notes = _find_state_dict(path, content)
    claimed, stored = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > stored:
        raise CheckpointError(f"{path}: its tensors claim {claimed:,} bytes, but the file has {stored:,}")
    return WeightFile(tensors, notes=notes)


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True  # a damaged one


def _check_archive(path: Path) -> None:
    """Refuse compressed archives, which could unpack to far more than the file; torch stores tensors uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises nearly anything on damaged files
        raise CheckpointError(f"{path}: not readable as a torch file: {reason(error)}; {FETCH_AGAIN}") from None
    stored = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or stored > path.stat().st_size:
        raise CheckpointError(f"{path}: a compressed archive, which torch never writes; {TENSORS_ALONE}")


def _find_state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return the flat dict of tensors in ``content``, at its top or one level under a known key."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}; {TENSORS_ALONE}")
    notes = []
    if wrapper := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        others = [str(key) for key in content if key != wrapper]
        notes.append(f"weights: taken from '{wrapper}'" + (f", not from: {some(others)}" if others else ""))
        content = content[wrapper]
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected a flat dict of tensors (or one under {', '.join(WRAPPERS)}), "
                f"found {type(value).__name__} under {name!r}; {TENSORS_ALONE}"
            )
    if not content:
        raise CheckpointError(f"{path}: holds no tensors")
    return dict(content), notes
