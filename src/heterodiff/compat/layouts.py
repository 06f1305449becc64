"""The layouts of weights that are known here, to name those nearest to an unknown one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from diffusers import AutoencoderKL

from heterodiff.codecs.weight_files import some
from heterodiff.compat.formats import FORMATS
from heterodiff.models.variants import create_model

MOST_PREFIX = 3
"""Parts of a name, at most, that wrappers put before it."""
SHOWN = 3


@dataclass(frozen=True)
class Layout:
    """A layout: the names of its weights with ``#`` for each number, and how such a file is read."""

    name: str
    names: frozenset[str]
    way_in: str


def describe_unknown(names: Iterable[str]) -> str:
    """Return the known layouts nearest to weights of these names, and names that the nearest does not have."""
    own = sorted(names)
    found = sorted(((*_share(own, layout), layout) for layout in known_layouts()), key=lambda row: -row[0])
    near = "; ".join(f"{layout.name} {share:.0%} ({layout.way_in})" for share, _, layout in found[:SHOWN])
    foreign = [name for name in own if _generic(name, found[0][1]) not in found[0][2].names]
    return f"nearest layouts, by the share of names: {near}; foreign to the first: {some(foreign) or 'none'}"


def _share(names: list[str], layout: Layout) -> tuple[float, int]:
    """Share of ``names`` that are in a layout, and the parts of a prefix to leave out for that."""
    counts = [sum(_generic(name, cut) in layout.names for name in names) for cut in range(MOST_PREFIX + 1)]
    best = max(range(len(counts)), key=lambda cut: (counts[cut], -cut))
    return counts[best] / max(1, len(names)), best


def _generic(name: str, cut: int = 0) -> str:
    return re.sub(r"\d+", "#", ".".join(name.split(".")[cut:]))


@cache
def known_layouts() -> tuple[Layout, ...]:
    """All layouts that the package reads, a row each."""
    networks = []
    for name, row in FORMATS.items():
        every = frozenset[str]().union(*map(_names_of_variant, row.variants))
        own = frozenset(one for one in every if not any(part in one for part in row.without))
        networks.append(Layout(name, own, f"--format {name}"))
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
        )
    return (
        *networks,
        Layout("KL autoencoder of latent diffusion", _ldm_names(), "codec.path=FILE"),
        Layout("AutoencoderKL of diffusers", frozenset(map(_generic, vae.state_dict())), "codec.path=FOLDER"),
    )


def _names_of_variant(variant: str) -> frozenset[str]:
    """Names of the weights of a variant, whatever its arguments."""
    names: set[str] = set()
    for updown, direct in product((False, True), repeat=2):
        with torch.device("meta"):
            model = create_model(
                variant,
                sample_size=16,
                model_channels=32,
                layers_per_block=1,
                channel_mult=(1, 2),
                attention_resolutions=(1, 2),
                num_classes=2,
                resblock_updown=updown,
                class_embedding="direct" if direct else "mlp",
            )
        names |= set(map(_generic, model.state_dict()))
    return frozenset(names)


def _ldm_names() -> frozenset[str]:
    """Names of Rombach et al. 2022, whose blocks differ from ``diffusers``' only in what they are called."""
    block = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    middle = [f"mid.block_#.{layer}" for layer in block] + [
        f"mid.attn_#.{x}" for x in ("norm", "q", "k", "v", "proj_out")
    ]
    sides = {"encoder": ("down", "downsample"), "decoder": ("up", "upsample")}
    layers = [
        f"{side}.{layer}"
        for side, (way, resample) in sides.items()
        for layer in (
            "conv_in",
            "norm_out",
            "conv_out",
            f"{way}.#.{resample}.conv",
            *(f"{way}.#.block.#.{part}" for part in block),
            *middle,
        )
    ]
    every = [*layers, "quant_conv", "post_quant_conv"]
    return frozenset(_generic(f"{layer}.{kind}") for layer in every for kind in ("weight", "bias"))
