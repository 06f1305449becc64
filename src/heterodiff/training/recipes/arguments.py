"""Arguments of the denoiser that a configuration describes."""

from typing import Any

from heterodiff.codecs.cnn import FEATURE_CHANNELS
from heterodiff.codecs.make import latent_shape
from heterodiff.config import RunConfig
from heterodiff.image_spec import ImageSpec
from heterodiff.models.defaults import (
    FILM_CHANNEL_MULT,
    LEAN_NORM_GROUPS,
    MODEL_CHANNELS,
    NUM_HEADS,
    check_size,
    default_levels,
)
from heterodiff.tasks import task_of

HAE_KEYS = (
    "patch_size",
    "num_head_channels",
    "use_scale_shift_norm",
    "attention_resolutions",
    "mid_attention",
    "condition_tokens",
    "resblock_updown",
    "memory_optimization",
    "attention_pattern",
    "sparsity",
    "activation",
    "class_embedding",
    "conv_resample",
    "bottleneck_ratio",
    "num_heads_upsample",
)
"""Keys of section ``model`` that only the networks of the HAE family read."""


def model_arguments(config: RunConfig, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of the configured denoiser for images as in ``spec``, defaults filled in.

    Raises:
        ConfigError: the image size does not suit the codec or the number of levels (the nearest sizes are named).
        CheckpointError: the codec's VAE is not there.
    """
    m = config.model
    channels, height, width = latent_shape(config.codec, spec.channels, spec.height, spec.width)
    with_text = "text" in task_of(config).sections
    # Beside the latents: the text's prior over the map and, but for joint training, over its features.
    prior_channels = channels + (0 if config.alignment.joint else FEATURE_CHANNELS) if with_text else 0
    of_condition = spec.condition_channels(spec.height // height)
    common = {
        "condition_dim": config.text.embedding_dim if with_text else None,
        "out_channels": channels * (2 if config.diffusion.learn_variance else 1),
        "model_channels": m.model_channels or MODEL_CHANNELS,
        "layers_per_block": m.layers_per_block,
        "dropout": m.dropout,
        "use_checkpoint": m.gradient_checkpointing,
    }
    if m.variant == "film-unet":
        return common | {
            "latent_channels": channels,
            "latent_size": (height, width),
            "guess_channels": prior_channels,
            "channel_mult": m.channel_mult or FILM_CHANNEL_MULT,
            "num_heads": m.num_heads or NUM_HEADS,
            "norm_groups": m.norm_groups or LEAN_NORM_GROUPS,
        }
    channel_mult, _ = default_levels((height, width), m.patch_size, m.channel_mult)
    factor = m.patch_size * 2 ** (len(channel_mult) - 1) * (spec.height // height)
    check_size(spec.height, spec.width, factor)  # in pixels, as the user gives them
    return common | {
        "sample_size": (height, width),
        "in_channels": channels + prior_channels + of_condition,
        "num_classes": len(spec.class_names) or None,
        "attributes": [len(attribute.classes) for attribute in spec.attributes] or None,
        "channel_mult": channel_mult,
        "num_heads": m.num_heads,
        "norm_groups": m.norm_groups,
        **{key: getattr(m, key) for key in HAE_KEYS},
    }
