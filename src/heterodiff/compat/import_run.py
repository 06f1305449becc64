"""Import of an earlier checkpoint as a run: its network, with the data and settings of a configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterodiff.codecs.make import latent_shape
from heterodiff.compat.importing import (
    ImportedNetwork,
    ImportReport,
    build_network,
    check_layout,
    check_target,
    read_source,
    scheduler_arguments,
)
from heterodiff.compat.names import read_arguments
from heterodiff.compat.network_config import IMPORT_ARGUMENTS, learned_variance, short
from heterodiff.config import RunConfig
from heterodiff.config.file import apply_override, parse_config, read_yaml
from heterodiff.config.readers import unread_keys
from heterodiff.errors import CheckpointError, ConfigError
from heterodiff.image_spec import ImageSpec
from heterodiff.tasks import task_of
from heterodiff.training.build import load_run_data
from heterodiff.training.codec_stage import codec_run
from heterodiff.training.recipes.diffusion import HAE_KEYS
from heterodiff.training.start import begin_with

OF_NETWORK = ("variant", "model_channels", "layers_per_block", "channel_mult", "num_heads", "norm_groups", *HAE_KEYS)
"""Keys of section ``model`` that a checkpoint decides, but for ``FREE_KEYS``."""
FREE_KEYS = ("memory_optimization",)
HEADS = ("num_heads", "num_head_channels")
OF_SCRIPT = {"schedule": "noise_schedule", "num_train_timesteps": "diffusion_steps"}
"""Keys of section ``diffusion``, and the arguments of earlier training scripts, which weights do not determine."""


def import_run(
    path: str | Path,
    format: str,
    out: str | Path,
    config: str | Path,
    overrides: Mapping[str, Any] | None = None,
    variant: str | None = None,
    changes: Sequence[str] = (),
) -> ImportReport:
    """Make a run of an earlier checkpoint, to sample, segment, evaluate and train on.

    Data, sampling, segmentation and training come from the configuration. What it leaves open of the network and its
    noise schedule comes from the checkpoint. The run is at step 0, and training goes on from the imported weights.

    Args:
        path, format, overrides, variant: as of :func:`heterodiff.compat.importing.import_checkpoint`; the image size
            is that of the data.
        out: folder of the run, which does not exist yet or is empty.
        config: YAML file.
        changes: ``key.path=value`` for the configuration.

    Raises:
        ConfigError: the configuration cannot be used, or contradicts the checkpoint; both values are named.
        CheckpointError: the checkpoint cannot be used, or does not fit the data.
        DataError: the data cannot be used.
    """
    path, out, config = Path(path), Path(out), Path(config)
    check_target(out)
    given = read_arguments(overrides or {}, IMPORT_ARGUMENTS)
    content = read_yaml(config)
    for change in changes:
        apply_override(content, change)
    content["output"] = str(out)
    wanted = parse_config(content, str(config), tolerated=None)  # keys are read, or not, by the network's variant
    _refuse_other_kinds(wanted, config)
    source = read_source(path, format)
    check_layout(source)  # before data are read
    data = load_run_data(wanted)
    shape = latent_shape(wanted.codec, data.spec.channels, data.spec.height, data.spec.width)
    _check_size(path, {**source.stored, **given}.get("sample_size"), shape[1:])
    model, diffusion = _said(wanted, "model"), _said(wanted, "diffusion")
    heads = HEADS if not any(name in given for name in HEADS) else ()
    undetermined = {name: model[name] for name in (*heads, "num_heads_upsample", "dropout") if name in model}
    undetermined |= {OF_SCRIPT[key]: value for key, value in diffusion.items() if key in OF_SCRIPT}
    given = {**undetermined, **given, "sample_size": shape[1:]}
    network = build_network(source, given, variant or model.get("variant"))
    if not network.config.get("use_hae", True):
        raise CheckpointError(f"{path}: no hybrid blocks, so its variant is unet, not {network.config['variant']}")
    note = scheduler_arguments(network.config, network.arguments)[1]
    _check_data(path, network.model.config, data.spec, shape[0])
    full = _completed(content, config, network)
    _refuse_contradictions(wanted, full, config, path)
    notes = begin_with(full, data, network.model.state_dict(), network.model.config)
    classes = ", ".join(f"{k} {name}" for k, name in enumerate(data.spec.class_names[:10]))
    numbers = [f"classes: {classes}: the numbers by which the checkpoint has to know them"] if classes else []
    return ImportReport(out, network.config, [*network.notes, note, *numbers, *notes])


def _refuse_other_kinds(config: RunConfig, where: Path) -> None:
    if "sample" not in task_of(config).commands:
        raise ConfigError(f"{where}: recipe {config.recipe}, but a checkpoint here is a denoiser; set recipe=diffusion")
    if config.model.init_from is not None:
        raise ConfigError(
            f"{where}: model.init_from={config.model.init_from}, but the weights are the checkpoint's; leave it out"
        )
    if codec_run(config) is not None:
        raise ConfigError(
            f"{where}: codec.training would train a new VAE, of which the checkpoint knows nothing; set codec.path to "
            "the VAE that it was trained with, and leave codec.training out"
        )


def _said(config: RunConfig, section: str) -> dict[str, Any]:
    """Return the keys that the user gave in a section."""
    own = getattr(config, section)
    return {name: getattr(own, name) for name in own.model_fields_set if getattr(own, name) is not None}


def _check_size(path: Path, known: Any, found: tuple[int, int]) -> None:
    pair = (known, known) if isinstance(known, int) else known
    if pair is not None and tuple(pair) != found:
        raise ConfigError(
            f"{path}: image_size is {short(known)}, but the network would see {'x'.join(map(str, found))} (data, "
            "codec); set data.image_size, or leave image_size out"
        )


def _check_data(path: Path, network: Any, spec: ImageSpec, channels: int) -> None:
    if network.in_channels != channels:
        raise CheckpointError(
            f"{path}: the network takes {network.in_channels} channels, data and codec bring {channels}; "
            "set data.channels, or choose other data"
        )
    names = spec.class_names
    if (network.num_classes or 0) != len(names):
        found = f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else "none"
        way_out = "" if network.num_classes else "set data.labels=none, or "
        raise CheckpointError(
            f"{path}: the network knows {network.num_classes or 'no'} classes, the data have {found}; {way_out}import "
            "it without --config and train with model.init_from, which takes other classes"
        )


def _completed(content: dict[str, Any], where: Path, network: ImportedNetwork) -> RunConfig:
    """Return the configuration with all that the network decides, whatever ``content`` says of it."""
    own, scheduler = network.model.config, scheduler_arguments(network.config, network.arguments)[0]
    if any(factor != int(factor) for factor in own.channel_mult):
        raise ConfigError(
            f"channel_mult {short(own.channel_mult)}: a configuration holds whole factors; import without --config"
        )
    model = {name: own[name] for name in OF_NETWORK if name not in FREE_KEYS} | {"dropout": own.dropout}
    diffusion = {
        "prediction": scheduler["prediction_type"],
        "schedule": "linear" if scheduler["beta_schedule"] == "linear" else "cosine",
        "num_train_timesteps": scheduler["num_train_timesteps"],
        "learn_variance": learned_variance(network.config),
    }
    merged = {**content, "model": {**(content.get("model") or {}), **model}}
    merged["diffusion"] = {**(content.get("diffusion") or {}), **diffusion}
    unread = {one.key for one in unread_keys(parse_config(merged, str(where), tolerated=None))}
    unsaid = {name for name in model if name not in (content.get("model") or {})}
    merged["model"] = {k: v for k, v in merged["model"].items() if not (k in unsaid and f"model.{k}" in unread)}
    return parse_config(merged, str(where))


def _refuse_contradictions(wanted: RunConfig, full: RunConfig, where: Path, path: Path) -> None:
    lines = []
    for section in ("model", "diffusion"):
        for key, value in _said(wanted, section).items():
            own = getattr(getattr(full, section), key)
            if key in FREE_KEYS or (sorted(own) == sorted(value) if key == "attention_resolutions" else own == value):
                continue
            hint = " (predict_xstart=true where it predicts clean images)" if key == "prediction" else ""
            lines.append(f"{section}.{key}: {short(value)} in {where}, {short(own)} in the checkpoint{hint}")
    if lines:
        raise ConfigError(
            f"{path}: another network than the configuration asks for; leave out:\n  " + "\n  ".join(lines)
        )
