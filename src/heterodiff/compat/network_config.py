"""Settling a network's configuration: what the weights say, what was given, and what the format implies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from heterodiff.compat.formats import CheckpointFormat
from heterodiff.compat.inference import Inferred, Shapes, has_condition_tokens, infer
from heterodiff.errors import CheckpointError, ConfigError, unknown_name
from heterodiff.models.unet import check_size
from heterodiff.models.variants import VARIANTS

IMPORT_ARGUMENTS: dict[str, Any] = {
    "learn_sigma": bool,
    "use_new_attention_order": bool,
    "use_fp16": bool,
    "noise_schedule": Literal["linear", "cosine"],
    "diffusion_steps": int,
}
"""Arguments of earlier training scripts that are no arguments of the network itself."""
SHAPES_DECIDE = ("bottleneck_ratio", "use_hae")
"""Given values of these are not compared with the inferred ones: several of them fit the same weights."""


@dataclass(frozen=True)
class Settled:
    """The network's ``config``, the import's own ``options``, and ``reasons`` for values the weights do not tell."""

    config: dict[str, Any]
    options: dict[str, Any]
    reasons: dict[str, str]


def settle(
    tensors: Mapping[str, Tensor], row: CheckpointFormat, given: Mapping[str, Any], variant: str | None
) -> Settled:
    """Settle what ``tensors`` of a format are, with the ``given`` arguments (today's names, checked types).

    Raises:
        ConfigError, CheckpointError: arguments that do not fit the format, the weights or each other, or a lack of
            those that weights cannot tell.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    inferred = infer(shapes)
    _check_format(row, shapes, inferred)
    options = {name: given[name] for name in IMPORT_ARGUMENTS if name in given}
    given = {name: value for name, value in given.items() if name not in IMPORT_ARGUMENTS}
    _check_options(row, options, inferred.config)
    _check_against_weights(given, inferred.config)
    reasons = {} if variant is None else {"variant": "given"}
    variant = _choose_variant(inferred, row, variant)
    config: dict[str, Any] = {"variant": variant, **inferred.config, "activation": row.activations.get(variant, "silu")}
    reasons["activation"] = f"{row.origin}: {_why(config['activation'])}"
    if inferred.hybrid is not None:
        config["attention_pattern"] = "sequence"
        reasons["attention_pattern"] = "the earlier pattern; its random keys are now drawn once, from pattern_seed"
    elif VARIANTS[variant].hybrid is not None:
        config["use_hae"] = False
    config |= {name: value for name, value in given.items() if name not in inferred.config or name in SHAPES_DECIDE}
    _check_unknowable(config)
    return Settled(config, options, reasons)


def _check_against_weights(given: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    for name in [name for name in given if name in inferred and name not in SHAPES_DECIDE]:
        if not _same(name, inferred[name], given[name], len(inferred["channel_mult"])):
            found = f"the weights say {short(inferred[name])}, given {short(given[name])}"
            raise CheckpointError(f"{name}: {found}; leave it out")


def _why(activation: str) -> str:
    return "its norms ignored their activation" if activation == "identity" else "SiLU after the norms"


def _check_format(row: CheckpointFormat, shapes: Shapes, inferred: Inferred) -> None:
    if has_condition_tokens(shapes) and not row.condition_tokens:
        raise CheckpointError(
            f"condition tokens (encoder_kv) found, which {row.origin} does not have; use --format anofpdm"
        )
    if inferred.hybrid is not None and row.variants == ("unet",):
        raise CheckpointError(f"hybrid blocks found, which {row.origin} does not have; use --format anofpdm")


def _choose_variant(inferred: Inferred, row: CheckpointFormat, wanted: str | None) -> str:
    """The wanted variant if the weights fit it, else the first that they fit."""
    if wanted is not None and wanted not in VARIANTS:
        raise ConfigError(unknown_name("model variant", wanted, VARIANTS))
    fitting = [name for name in row.variants if inferred.hybrid in (None, VARIANTS[name].hybrid)]
    if not fitting:
        raise CheckpointError(f"hybrid blocks of no known variant: {inferred.hybrid}")
    if wanted is not None and wanted not in fitting:
        raise CheckpointError(f"variant: the weights belong to {' or '.join(fitting)}, given {wanted}")
    return wanted or fitting[0]


def _check_options(row: CheckpointFormat, options: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    if options.get("use_fp16"):
        raise ConfigError("use_fp16: imported weights are float32; leave it out and choose the precision when running")
    if options.get("use_new_attention_order") and not row.qkv_orders:
        raise ConfigError(f"use_new_attention_order: {row.origin} always used the legacy order; leave it out")
    if not 1 <= options.get("diffusion_steps", 1000) <= 1_000_000:
        raise ConfigError(f"diffusion_steps: expected at least 1, found {options['diffusion_steps']}")
    learned = _learned_variance(inferred)
    if options.get("learn_sigma", learned) != learned:
        channels = f"{inferred['in_channels']} channels in, {inferred['out_channels']} out"
        raise CheckpointError(f"learn_sigma: the weights say {learned} ({channels}); leave it out")


def _learned_variance(config: Mapping[str, Any]) -> bool:
    return config["out_channels"] == 2 * config["in_channels"]


def _same(name: str, inferred: Any, given: Any, levels: int) -> bool:
    if name == "attention_resolutions":  # the order says nothing, and neither do factors that are never reached
        return set(inferred) == {factor for factor in given if factor < 2**levels}
    return tuple(inferred) == tuple(given) if isinstance(inferred, tuple) else inferred == given


def _check_unknowable(config: Mapping[str, Any]) -> None:
    missing = []
    if config.get("num_heads") is None and config.get("num_head_channels") is None:
        missing.append("num_heads=N (or num_head_channels=N)")
    if config.get("sample_size") is None:
        missing.append("image_size=N")
    if missing:
        raise CheckpointError(f"weights cannot tell these; give them as in the earlier training: {' '.join(missing)}")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ConfigError(f"image_size: expected at least 1, found {short(size)}")
    check_size(height, width, 2 ** (len(config["channel_mult"]) - 1))


def scheduler_arguments(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Arguments of the DDPM scheduler, and the remark that tells them."""
    steps, schedule = options.get("diffusion_steps", 1000), options.get("noise_schedule", "linear")
    learned = _learned_variance(config)
    arguments = {
        "num_train_timesteps": steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        # 1e-4 .. 0.02 for the 1000 steps of Ho et al. 2020, scaled for other numbers to reach the same noise.
        "beta_start": 0.1 / steps,
        "beta_end": min(20 / steps, 0.999),
        "prediction_type": "epsilon",
        "variance_type": "learned_range" if learned else "fixed_small",
        "clip_sample": False,
    }
    variance = "learned variance, because out_channels = 2 in_channels" if learned else "fixed variance"
    return arguments, f"scheduler: {schedule} noise schedule, {steps} steps, epsilon, {variance}"


def short(value: Any) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple | list) else str(value)
