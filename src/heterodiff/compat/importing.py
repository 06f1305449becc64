"""Import of earlier checkpoints: weights of guided-diffusion and AnoFPDM become a folder for ``heterodiff.load``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from heterodiff.compat.folder import check_target, write_folder
from heterodiff.compat.formats import FORMATS, CheckpointFormat, to_legacy_order
from heterodiff.compat.names import EARLIER_NAMES, model_arguments, read_arguments
from heterodiff.compat.network_config import IMPORT_ARGUMENTS, scheduler_arguments, settle, short
from heterodiff.compat.weight_files import read_json_metadata, read_weights, some, tidy_tensors
from heterodiff.errors import CheckpointError, ConfigError, unknown_name
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import create_model

ANCHOR = "time_embed.0.weight"
"""A parameter that every network of the family has; what stands before its name is a prefix."""
PREFIXES = re.compile(r"((module|_orig_mod|weight|model)\.)*")


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote.

    Attributes:
        folder: the diffusers folder.
        config: arguments that :func:`heterodiff.create_model` builds the network with, ``variant`` included.
        notes: a line for each thing that was set and why.
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
    """Turn an earlier checkpoint into a diffusers folder: ``unet/``, ``scheduler/``, ``model_index.json``.

    The configuration is read from the names and shapes of the weights. They cannot tell the number of attention
    heads and the image size; these come from ``overrides`` or from ``config`` metadata of a safetensors file.

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
    row = FORMATS[format]
    given = read_arguments(overrides or {}, IMPORT_ARGUMENTS)
    check_target(out)
    file = read_weights(path)
    tensors, notes = strip_prefix(path, file.tensors)
    notes = [*file.notes, *notes]
    tensors, converted = tidy_tensors(path, tensors)
    stored, unused = _read_metadata(path, read_json_metadata(path, file.metadata, "config"))
    try:
        if "num_heads" in given:  # the wish, not the width of heads that the file tells
            stored.pop("num_head_channels", None)
        settled = settle(tensors, row, {**stored, **given}, variant or file.metadata.get("variant"))
        config = settled.config
        tensors, dropped = _drop_unused_tokens(tensors, row, config)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = create_model(**config)
        _check_fit(model, tensors)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None
    if settled.options.get("use_new_attention_order"):
        tensors = to_legacy_order(tensors, config)
        notes.append("qkv: rows moved from the new order to [q; k; v] per head (use_new_attention_order=true)")
    model.load_state_dict(tensors, assign=True)
    scheduler, scheduler_note = scheduler_arguments(config, settled.options)
    write_folder(out, model, scheduler)
    sources = {**settled.reasons, **dict.fromkeys(stored, "from the file's metadata"), **dict.fromkeys(given, "given")}
    notes += [*converted, *unused, *dropped]
    notes += [f"{name}: {short(value)} ({sources.get(name, 'from the weights')})" for name, value in config.items()]
    return ImportReport(out, config, [*notes, scheduler_note])


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` items of a command line; values as in YAML, ``8,16`` as a sequence.

    Raises:
        ConfigError: an item without ``=``, or a key that appears twice.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key or key in overrides:
            problem = "appears twice" if key in overrides else "expected key=value, for example image_size=128"
            raise ConfigError(f"override '{item}': {problem}")
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides


def strip_prefix(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the network's tensors without what wrappers put before their names, and remarks.

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
        notes.append(f"names: {len(outside)} tensors outside '{prefix}' left aside: {some(outside)}")
    return inside, notes


def _read_metadata(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    known = [*model_arguments(), *IMPORT_ARGUMENTS, *EARLIER_NAMES]
    unused = [name for name in content if name not in known or name == "variant"]
    try:
        stored = read_arguments({k: v for k, v in content.items() if k not in unused}, IMPORT_ARGUMENTS)
    except ConfigError as error:
        raise CheckpointError(f"{path}: metadata 'config': {error}") from None
    return stored, [f"metadata: not used: {some(unused)}"] if unused else []


def _drop_unused_tokens(
    tensors: dict[str, Tensor], row: CheckpointFormat, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    if config["num_classes"] is not None or not row.unused_tokens:
        return tensors, []
    kept = {name: tensor for name, tensor in tensors.items() if ".encoder_kv." not in name}
    count = len(tensors) - len(kept)
    return kept, [f"encoder_kv: {count} tensors dropped; without classes they were never applied"] if count else []


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
