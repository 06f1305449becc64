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

from heterodiff.codecs.weight_files import ANCHOR, PREFIXES, read_weights, some, strip_prefix, tidy_tensors
from heterodiff.compat.formats import FORMATS, CheckpointFormat
from heterodiff.compat.inference import UnknownLayout, infer
from heterodiff.compat.layouts import describe_unknown
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


@dataclass(frozen=True)
class Source:
    """An earlier checkpoint as read from its file.

    Attributes:
        row: its format.
        tensors: weights (float32) under the names of the networks here.
        stored: arguments that the file's metadata give, under today's names.
        variant: the one that the metadata name, if any.
        notes: a line for each change made in reading.
    """

    path: Path
    row: CheckpointFormat
    tensors: dict[str, Tensor]
    stored: dict[str, Any]
    variant: str | None
    notes: list[str]


@dataclass(frozen=True)
class ImportedNetwork:
    """A network with the weights of a checkpoint.

    Attributes:
        config: arguments that :func:`heterodiff.create_model` builds it with, ``variant`` included.
        arguments: all arguments known of the checkpoint, given or from its metadata.
        notes: a line for each setting and its reason.
    """

    model: HAEUNet
    config: dict[str, Any]
    arguments: dict[str, Any]
    notes: list[str]


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
    out = Path(out)
    given = read_arguments(overrides or {}, IMPORT_ARGUMENTS)
    check_target(out)
    network = build_network(read_source(Path(path), format), given, variant)
    scheduler, note = scheduler_arguments(network.config, network.arguments)
    _write_folder(out, network.model, scheduler)
    return ImportReport(out, network.config, [*network.notes, note])


def read_source(path: Path, format: str) -> Source:
    """Read the weights of a checkpoint; errors as of :func:`import_checkpoint`."""
    if format not in FORMATS:
        raise ConfigError(unknown_name("checkpoint format", format, FORMATS))
    file = read_weights(path)
    anchors = [name.removesuffix(ANCHOR) for name in file.tensors if name.endswith(ANCHOR)]
    if not any(map(PREFIXES.fullmatch, anchors)):
        raise CheckpointError(
            f"{path}: expected one guided-diffusion U-Net (with '{ANCHOR}'), found a layout that is not known here; "
            f"{describe_unknown(file.tensors)}"
        )
    tensors, prefixes = strip_prefix(path, file.tensors)
    tensors, converted = tidy_tensors(path, tensors)
    stored, unused = _stored_arguments(path, file.metadata)
    notes = [*file.notes, *prefixes, *converted, *unused]
    return Source(path, FORMATS[format], tensors, stored, file.metadata.get("variant"), notes)


def check_layout(source: Source) -> None:
    """Raise CheckpointError unless the weights of ``source`` have the names of a network that is known here."""
    try:
        infer({name: tuple(tensor.shape) for name, tensor in source.tensors.items()})
    except UnknownLayout as error:
        raise CheckpointError(f"{source.path}: {error}; {describe_unknown(source.tensors)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None


def build_network(source: Source, given: Mapping[str, Any], variant: str | None = None) -> ImportedNetwork:
    """Build the network that the weights of ``source`` belong to; errors as of :func:`import_checkpoint`.

    Args:
        given: arguments of the network and :data:`IMPORT_ARGUMENTS`, under today's names and of the right type.
    """
    stored = dict(source.stored)
    if "num_heads" in given:  # the given number, not the width of heads in the file
        stored.pop("num_head_channels", None)
    arguments = {**stored, **given}
    check_layout(source)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
        config, reasons = complete_config(shapes, source.row, arguments, variant or source.variant)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model: HAEUNet = create_model(**config)
        tensors, changed = _fitting(source.tensors, model, bool(arguments.get("use_new_attention_order")))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{source.path}: {error}") from None
    model.load_state_dict(tensors, assign=True)
    sources = {**reasons, **dict.fromkeys(stored, "from the file's metadata"), **dict.fromkeys(given, "given")}
    settings = [f"{name}: {short(value)} ({sources.get(name, 'from the weights')})" for name, value in config.items()]
    return ImportedNetwork(model, config, arguments, [*source.notes, *changed, *settings])


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


def check_target(out: Path) -> None:
    """Raise CheckpointError unless ``out`` does not exist or is an empty folder."""
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
        check_target(out)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
