"""Weights of a KL autoencoder in the layout of latent diffusion (Rombach et al. 2022): one file, no configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from heterodiff.codecs.weight_files import read_weights, some, tidy_tensors
from heterodiff.errors import CheckpointError

FIRST, LAST = "encoder.conv_in.weight", "decoder.conv_in.weight"
"""Weights that every such autoencoder has; what stands before their names is a prefix."""
SCALE = "scale_factor"
"""Scale of the latents, which checkpoints of whole latent diffusion models hold."""
USUAL_SCALE = 0.18215
"""That of Stable Diffusion's autoencoder, where a file holds none."""

Shapes = Mapping[str, tuple[int, ...]]


def load_ldm_vae(path: Path) -> AutoencoderKL:
    """Load the autoencoder in ``path``, alone or as a part of a latent diffusion model.

    Raises:
        CheckpointError: a file that cannot be read, or weights of another network; what was expected and found.
    """
    file = read_weights(path)
    tensors = _autoencoder_of(path, file.tensors)
    scale = file.tensors.get(SCALE)
    try:
        config = ldm_vae_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors, _ = tidy_tensors(path, tensors)
    config["scaling_factor"] = USUAL_SCALE if scale is None else float(scale)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        vae = AutoencoderKL(**config)
    renamed = convert_ldm_vae_checkpoint(tensors, vae.config)
    expected = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in renamed.items()}
    if found != expected or len(renamed) != len(tensors):
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        unused = f"{len(tensors) - len(renamed)} more tensors than the network has"
        raise CheckpointError(f"{path}: not a KL autoencoder of latent diffusion: {some(wrong) or unused}")
    vae.load_state_dict(renamed, assign=True)
    return vae.requires_grad_(False).eval()


def _autoencoder_of(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's tensors, without what stands before their names and without losses and denoisers."""
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    prefixes = [prefix for prefix in prefixes if prefix + LAST in tensors]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} autoencoders" if prefixes else f"tensors {some(sorted(tensors))}"
        raise CheckpointError(
            f"{path}: expected one KL autoencoder in the layout of latent diffusion (with '{FIRST}'), found {found}"
        )
    own = re.compile(re.escape(prefixes[0]) + r"((encoder|decoder|quant_conv|post_quant_conv)\..*)")
    return {match[1]: tensor for name, tensor in tensors.items() if (match := own.fullmatch(name))}


def ldm_vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of the AutoencoderKL that weights of these shapes belong to.

    Raises:
        CheckpointError: a kind of autoencoder that diffusers' class has no arguments for.
    """
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = [_dim(shapes, f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(levels)]
    latents = _dim(shapes, LAST, 1)
    if _dim(shapes, FIRST, 0) != widths[0]:
        raise CheckpointError(f"first convolution of {_dim(shapes, FIRST, 0)} channels before blocks of {widths[0]}")
    if attended := sorted(name for name in shapes if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)):
        raise CheckpointError(f"attention outside of the middle, which AutoencoderKL does not have: {some(attended)}")
    quantised = "quant_conv.weight" in shapes
    if quantised and _dim(shapes, "quant_conv.weight", 0) != 2 * latents:
        moments = _dim(shapes, "quant_conv.weight", 0)
        raise CheckpointError(f"latents of {latents} channels, but {moments} moments; expected {2 * latents}")
    return {
        "in_channels": _dim(shapes, FIRST, 1),
        "out_channels": _dim(shapes, "decoder.conv_out.weight", 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": latents,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": quantised,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise CheckpointError(f"not a KL autoencoder of latent diffusion: blocks numbered {sorted(numbers)[:8]}")
    return len(numbers)


def _dim(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis:
        found = f"its shape is {shape}" if name in shapes else "missing"
        raise CheckpointError(f"not a KL autoencoder of latent diffusion: '{name}': {found}")
    return shape[axis]
