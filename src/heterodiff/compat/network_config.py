"""The whole configuration of a network: what its weights determine, what was given, what the format implies."""

from collections.abc import Mapping
from typing import Any, Literal

from heterodiff.compat.formats import CheckpointFormat
from heterodiff.compat.inference import Shapes, infer
from heterodiff.errors import CheckpointError, ConfigError, unknown_name
from heterodiff.models.defaults import check_size
from heterodiff.models.variants import VARIANTS, HybridSpec

IMPORT_ARGUMENTS: dict[str, Any] = {
    "learn_sigma": bool,
    "use_new_attention_order": bool,
    "use_fp16": bool,
    "noise_schedule": Literal["linear", "cosine"],
    "diffusion_steps": int,
    "predict_xstart": bool,
}
"""Types of the arguments of earlier training scripts that are not arguments of the network itself."""
MOST_STEPS = 1_000_000
NOT_COMPARED = ("bottleneck_ratio", "use_hae")
"""Arguments of which several values fit the same weights, so that a given one is not compared with the inferred one."""


def complete_config(
    shapes: Shapes, row: CheckpointFormat, given: Mapping[str, Any], variant: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of the network that weights of these shapes belong to, and reasons for some of them.

    Args:
        given: arguments of the network and :data:`IMPORT_ARGUMENTS`, under today's names and of the right type.

    Raises:
        ConfigError, CheckpointError: arguments that do not fit the format, the weights or each other; missing ones
            that weights do not determine.
    """
    inferred = infer(shapes)
    for part, meaning in row.without.items():
        if any(part in name for name in shapes):
            raise CheckpointError(f"{meaning} found, which {row.origin} does not have; use --format anofpdm")
    _check_options(row, given, inferred.config)
    _check_against_weights(given, inferred.config)
    reasons = {} if variant is None else {"variant": "given"}
    variant = _choose_variant(inferred.hybrid, row, variant)
    identity = variant in row.identity_norms
    config = {"variant": variant, **inferred.config, "activation": "identity" if identity else "silu"}
    reasons["activation"] = (
        f"{row.origin}: {'its norms ignored their activation' if identity else 'SiLU after the norms'}"
    )
    if inferred.hybrid is not None and not inferred.hybrid.by_scale:
        config["attention_pattern"] = "sequence"
        reasons["attention_pattern"] = "the earlier pattern; its random keys are now drawn once, from pattern_seed"
    elif inferred.hybrid is None and VARIANTS[variant].hybrid is not None:
        config["use_hae"] = False
    compared = (inferred.config.keys() - NOT_COMPARED) | IMPORT_ARGUMENTS.keys()
    config |= {name: value for name, value in given.items() if name not in compared}
    _check_complete(config)
    return config, reasons


def _check_options(row: CheckpointFormat, given: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    if given.get("use_fp16"):
        raise ConfigError("use_fp16: imported weights are float32; leave it out and choose the precision when running")
    if given.get("use_new_attention_order") and not row.qkv_orders:
        raise ConfigError(f"use_new_attention_order: {row.origin} always used the legacy order; leave it out")
    if not 1 <= given.get("diffusion_steps", 1) <= MOST_STEPS:
        raise ConfigError(f"diffusion_steps: expected 1 to {MOST_STEPS:,}, found {given['diffusion_steps']}")
    learned = learned_variance(inferred)
    if given.get("learn_sigma", learned) != learned:
        channels = f"{inferred['in_channels']} channels in, {inferred['out_channels']} out"
        raise CheckpointError(f"learn_sigma: the weights imply {learned} ({channels}); leave it out")


def learned_variance(config: Mapping[str, Any]) -> bool:
    """Return whether a network with these arguments also predicts the variance of reverse steps."""
    return config["out_channels"] == 2 * config["in_channels"]


def _check_against_weights(given: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in inferred or name in NOT_COMPARED:
            continue
        expected = inferred[name]
        if name == "attention_resolutions":  # in any order; factors that are never reached make no difference
            same = set(expected) == {factor for factor in value if factor < 2 ** len(inferred["channel_mult"])}
        else:
            same = tuple(expected) == tuple(value) if isinstance(expected, tuple) else expected == value
        if not same:
            raise CheckpointError(f"{name}: the weights imply {short(expected)}, given {short(value)}; leave it out")


def _choose_variant(hybrid: HybridSpec | None, row: CheckpointFormat, wanted: str | None) -> str:
    """Return the wanted variant if the weights fit it, else the first that they fit."""
    if wanted is not None and wanted not in VARIANTS:
        raise ConfigError(unknown_name("model variant", wanted, VARIANTS))
    fitting = [name for name in row.variants if hybrid in (None, VARIANTS[name].hybrid)]
    if not fitting:
        raise CheckpointError(f"hybrid blocks of no known variant: {hybrid}")
    if wanted is not None and wanted not in fitting:
        raise CheckpointError(f"variant: the weights belong to {' or '.join(fitting)}, given {wanted}")
    return wanted or fitting[0]


def _check_complete(config: Mapping[str, Any]) -> None:
    size = config.get("sample_size")
    missing = ["image_size=N"] if size is None else []
    if config.get("num_heads") is None and config.get("num_head_channels") is None:
        missing.insert(0, "num_heads=N (or num_head_channels=N)")
    if size is None or missing:
        raise CheckpointError(
            f"weights do not determine these; give them as in the earlier training: {' '.join(missing)}"
        )
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ConfigError(f"image_size: expected at least 1, found {short(size)}")
    check_size(height, width, 2 ** (len(config["channel_mult"]) - 1))


def scheduler_arguments(config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the arguments of the DDPM scheduler, and a note that tells them."""
    steps, schedule = given.get("diffusion_steps", 1000), given.get("noise_schedule", "linear")
    learned = learned_variance(config)
    prediction = "sample" if given.get("predict_xstart") else "epsilon"
    arguments = {
        "num_train_timesteps": steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        # 1e-4 .. 0.02 for the 1000 steps of Ho et al. 2020, scaled for other numbers to reach the same noise.
        "beta_start": 0.1 / steps,
        "beta_end": min(20 / steps, 0.999),
        "prediction_type": prediction,
        "variance_type": "learned_range" if learned else "fixed_small",
        "clip_sample": False,
    }
    variance = "learned variance, because out_channels = 2 in_channels" if learned else "fixed variance"
    return arguments, f"scheduler: {schedule} noise schedule, {steps} steps, {prediction}, {variance}"


def short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
