"""Import of earlier checkpoints: weights of guided-diffusion and AnoFPDM become a folder for ``heterodiff.load``."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from torch import Tensor

from heterodiff.codecs.weight_files import read_weights, some, strip_prefix, tidy_tensors
from heterodiff.compat.formats import FORMATS
from heterodiff.compat.names import EARLIER_NAMES, model_arguments, read_arguments
from heterodiff.compat.network_config import IMPORT_ARGUMENTS, complete_config, scheduler_arguments, short
from heterodiff.errors import CheckpointError, ConfigError, unknown_name
from heterodiff.files import write_json
from heterodiff.models.blocks import AttentionBlock
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import create_model
from heterodiff.run_folder import RunFolder


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        folder: the diffusers folder.
        config: arguments that :func:`heterodiff.create_model` builds the network with, ``variant`` included.
        notes: a line for each setting and its reason.
    """

    folder: Path
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    path: str | Path,
    format: str,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> ImportReport:
    """Convert an earlier checkpoint to a diffusers folder: ``unet/``, ``scheduler/``, ``model_index.json``.

    The configuration is inferred from the names and shapes of the weights. They do not determine the number of
    attention heads and the image size; these come from ``overrides`` or from ``config`` metadata of a safetensors file.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` with a dict of tensors (perhaps under ``ema``,
            ``state_dict`` or ``model``).
        format: a name of :data:`heterodiff.compat.formats.FORMATS`.
        out: a folder that does not exist yet or is empty.
        overrides: arguments under their earlier or today's names, such as ``{"image_size": 128, "num_heads": 4}``,
            and those of :data:`heterodiff.compat.network_config.IMPORT_ARGUMENTS`.
        variant: default: the one that the weights belong to.

    Raises:
        ConfigError: unknown arguments or values of a wrong type.
        CheckpointError: the file or its weights cannot be used: what was expected, found, and the way out.
    """
    path, out = Path(path), Path(out)
    if format not in FORMATS:
        raise ConfigError(unknown_name("checkpoint format", format, FORMATS))
    given = read_arguments(overrides or {}, IMPORT_ARGUMENTS)
    _check_target(out)
    file = read_weights(path)
    tensors, prefixes = strip_prefix(path, file.tensors)
    tensors, converted = tidy_tensors(path, tensors)
    stored, unused = _stored_arguments(path, file.metadata)
    if "num_heads" in given:  # the given number, not the width of heads in the file
        stored.pop("num_head_channels", None)
    arguments = {**stored, **given}
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        variant = variant or file.metadata.get("variant")
        config, reasons = complete_config(shapes, FORMATS[format], arguments, variant)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = create_model(**config)
        tensors, changed = _fitting(tensors, model, bool(arguments.get("use_new_attention_order")))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None
    model.load_state_dict(tensors, assign=True)
    scheduler, scheduler_note = scheduler_arguments(config, arguments)
    _write_folder(out, model, scheduler)
    sources = {**reasons, **dict.fromkeys(stored, "from the file's metadata"), **dict.fromkeys(given, "given")}
    settings = [f"{name}: {short(value)} ({sources.get(name, 'from the weights')})" for name, value in config.items()]
    notes = [*file.notes, *prefixes, *converted, *unused, *changed, *settings, scheduler_note]
    return ImportReport(out, config, notes)


def _stored_arguments(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Read the arguments under ``config`` in the metadata; also return a note that names those that are ignored."""
    try:
        content = json.loads(metadata.get("config", "{}"))
    except (json.JSONDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        found = metadata["config"][:80]
        raise CheckpointError(f"{path}: metadata 'config': expected a JSON object, found {found!r}")
    known = {*model_arguments(), *IMPORT_ARGUMENTS, *EARLIER_NAMES} - {"variant"}
    try:
        stored = read_arguments({name: content[name] for name in content if name in known}, IMPORT_ARGUMENTS)
    except ConfigError as error:
        raise CheckpointError(f"{path}: metadata 'config': {error}") from None
    ignored = [name for name in content if name not in known]
    return stored, [f"metadata: not used: {some(ignored)}"] if ignored else []


def _fitting(tensors: dict[str, Tensor], model: HAEUNet, new_order: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return exactly the tensors that ``model`` has, and notes of what was changed.

    Args:
        new_order: the rows of each ``qkv`` are [q; k; v] over all heads at once, not of one head after the other.
    """
    notes = []
    if model.config.num_classes is None and (tokens := [name for name in tensors if ".encoder_kv." in name]):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tokens}
        notes.append(f"encoder_kv: {len(tokens)} tensors dropped; without classes they were never applied")
    _check_fit(model, tensors)
    if new_order:
        for block, module in model.named_modules():
            if isinstance(module, AttentionBlock):
                for name in (f"{block}.qkv.weight", f"{block}.qkv.bias"):
                    rows = tensors[name].unflatten(0, (3, module.num_heads, -1))
                    tensors[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()
        notes.append("qkv: rows moved from the new order to [q; k; v] per head (use_new_attention_order=true)")
    return tensors, notes


def _check_fit(model: HAEUNet, tensors: Mapping[str, Tensor]) -> None:
    """Check that ``tensors`` are exactly those that ``model`` has, by name and shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} (expected {shape}, found {tuple(tensors[name].shape)})"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if problems := [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]:
        raise CheckpointError(f"the weights do not fit the network they describe; tensors {'; '.join(problems)}")


def _check_target(out: Path) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    if not empty and (out.exists() or out.is_symlink()):
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder, or delete this one")


def _write_folder(out: Path, model: HAEUNet, scheduler: Mapping[str, Any]) -> None:
    """Write ``model`` and a DDPM scheduler as a diffusers pipeline to ``out``; no part of it stays after a failure."""
    temporary = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary / "unet", safe_serialization=True)
        DDPMScheduler(**scheduler).save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": "GenerationPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["heterodiff", "HAEUNet"],
        }
        write_json(RunFolder(temporary).index_file, index, indent=2)
        _check_target(out)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
