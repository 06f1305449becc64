"""How much memory training will need, and what to change when that is more than there is."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode

from heterodiff.codecs.cnn import STAGES
from heterodiff.codecs.kl_vae import latent_shape as latent_shape_of
from heterodiff.codecs.kl_vae import read_vae_config
from heterodiff.codecs.make import latent_shape
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.devices import default_device, free_memory
from heterodiff.errors import ConfigError
from heterodiff.models.profile import ModelProfile, count_saved_bytes, profile
from heterodiff.text.tokenizer import load_tokenizer, train_tokenizer
from heterodiff.training.precision import precision_of
from heterodiff.training.recipes.alignment import AlignmentModel
from heterodiff.training.recipes.diffusion import model_arguments
from heterodiff.training.recipes.text_image import denoiser_arguments
from heterodiff.training.recipes.text_networks import build_networks
from heterodiff.training.recipes.vae import Autoencoder, build_vae
from heterodiff.training.run_folder import parts_are_alike

BYTES_PER_PARAMETER = 5 * 4
"""Weights, gradients, the two moments of AdamW and the EMA weights, all in float32."""
TRANSIENT_SHARE = 0.25
"""Of what is kept where nothing is recomputed: what comes and goes while gradients flow back."""
SCRATCH_BYTES = 200e6
"""Room that kernels and the optimiser work in, as measured with small networks on a CPU."""
UNCERTAINTY = 1.6
"""The estimate is at most so many times what a process takes."""
USABLE_SHARE = 0.9
"""Of the free memory; the rest is for what no estimate sees (fragments, libraries, other programs)."""
SMALLER = {"vae": "vae.block_out_channels", "alignment": "alignment.block_out_channels"}
"""The setting that makes the network of a recipe smaller; of the others it is model.model_channels."""
RECOMPUTATION = ({"memory_optimization": True, "gradient_checkpointing": False}, {"gradient_checkpointing": True})
"""Keys of ``model`` that let the backward pass compute more again: what is cheap; everything."""


@dataclass(frozen=True)
class MemoryPlan:
    """A way to run a training step, and the memory it needs.

    Attributes:
        changes: ``key=value`` overrides of the configuration; () for the configuration as it is.
        peak_bytes: estimated peak of one process, beside what Python and its libraries take.
    """

    changes: tuple[str, ...]
    peak_bytes: float


def training_memory_bytes(config: RunConfig, spec: ImageSpec) -> float:
    """Estimated peak of a training step in one process, in bytes, beside what Python and its libraries take.

    The parameters five times over (weights, gradients, two moments of AdamW, EMA), what is kept for the backward pass
    of one part of the batch, what comes and goes meanwhile, and scratch space. In bfloat16 and float16 autocast adds a
    copy of the weights, and most of what is kept takes half.

    Raises:
        ConfigError: no network can be built for these images.
    """
    return _cost(config, spec).peak(images_at_once(config))


def images_at_once(config: RunConfig) -> int:
    """Images that one process has in the network at the same time."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, config.training.batch_size // (config.training.accumulation_steps * processes))


@dataclass(frozen=True)
class _Cost:
    """Parameters, bytes of the copies of the weights, and bytes an image keeps: with and without recomputation."""

    parameters: int
    copies: float
    kept: float
    kept_without: float

    @classmethod
    def of(cls, dtype: torch.dtype | None, parameters: int, saved: float, saved_without: float) -> "_Cost":
        """From the bytes that one image's pass saves, which under autocast contain the copies of the weights."""
        copies = 0 if dtype is None else dtype.itemsize * parameters
        kept, without = (max(0.0, bytes_saved - copies) for bytes_saved in (saved, saved_without))
        return cls(parameters, copies, kept, without)

    def peak(self, images: int) -> float:
        per_image = self.kept + TRANSIENT_SHARE * self.kept_without
        return BYTES_PER_PARAMETER * self.parameters + self.copies + SCRATCH_BYTES + images * per_image


def autocast(dtype: torch.dtype | None) -> Any:
    """The context that networks compute in; that of the CPU, which casts as GPUs do in what matters here.

    Attention to condition tokens keeps more on a GPU, see `attend_with_condition`, which the estimate leaves out.
    """
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _cost(config: RunConfig, spec: ImageSpec) -> _Cost:
    if config.recipe == "vae":
        return _vae_cost(config, spec)
    if config.recipe == "alignment" or config.alignment.joint:
        return _alignment_cost(config, spec)
    _, height, width = latent_shape(config.codec, spec.channels, spec.height, spec.width)

    def profile_with(**keys: bool) -> ModelProfile:
        model = config.model.model_copy(update=keys)
        arguments = model_arguments(config.model_copy(update={"model": model}), spec)
        return _profile(model.variant, height, width, dtype, tuple(arguments.items()))

    dtype = precision_of(config.training)
    found = profile_with()
    without = profile_with(memory_optimization=False, gradient_checkpointing=False)
    return _Cost.of(dtype, found.parameters, 1e6 * found.saved_mb, 1e6 * without.saved_mb)


@lru_cache(maxsize=64)  # a plan looks at the same few networks many times, a second each
def _profile(
    variant: str, height: int, width: int, dtype: torch.dtype | None, arguments: tuple[tuple[str, Any], ...]
) -> ModelProfile:
    with autocast(dtype):
        return profile(variant, height, width, **dict(arguments))


def _vae_cost(config: RunConfig, spec: ImageSpec) -> _Cost:
    """A VAE recomputes nothing; the discriminator, far smaller, is left out."""
    dtype = precision_of(config.training)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(dtype):
        start = config.vae.init_from
        vae = build_vae(config.vae, spec) if start is None else AutoencoderKL.from_config(read_vae_config(start))
        shape = latent_shape_of(vae.config, spec.channels, spec.height, spec.width)
        model = Autoencoder(vae)
        image = torch.empty(1, spec.channels, spec.height, spec.width)
        kept = count_saved_bytes(model, image, torch.empty(1, *shape))
    return _Cost.of(dtype, sum(p.numel() for p in model.parameters()), kept, kept)


def _alignment_cost(config: RunConfig, spec: ImageSpec) -> _Cost:
    """Of real tensors where pretrained parts are loaded; with captions of the greatest length.

    The vocabulary, which the captions decide, is left out: of the memory it takes little unless it is pretrained.
    """
    pretrained = config.text.encoder is not None or config.alignment.backbone is not None
    with nullcontext() if pretrained else FakeTensorMode(allow_non_fake_inputs=True):
        return _alignment_cost_here(config, spec)


def _alignment_cost_here(config: RunConfig, spec: ImageSpec) -> _Cost:
    size, length = config.text.vocabulary_size, config.text.max_tokens
    encoder = config.text.encoder
    tokenizer = train_tokenizer(["?"], size) if encoder is None else load_tokenizer(encoder)
    networks = build_networks(config, spec, tokenizer)
    shape = (1, config.alignment.latent_channels, *networks.image_codec.latent_size)
    image = torch.zeros(1, spec.channels, spec.height, spec.width)
    ids = torch.zeros(config.alignment.captions_per_image, length, dtype=torch.long)
    inputs = (image, ids, torch.ones_like(ids), torch.zeros(shape), torch.zeros(1, dtype=torch.bool))
    model = AlignmentModel(networks)
    dtype = precision_of(config.training)
    parameters = sum(p.numel() for p in model.parameters())
    with autocast(dtype):
        kept = count_saved_bytes(model, *inputs)
    if config.alignment.joint:
        arguments = denoiser_arguments(config, spec, shape[1:])
        with autocast(dtype):
            found = profile(config.model.variant, *shape[2:], **arguments)
        kept, parameters = kept + round(1e6 * found.saved_mb), parameters + found.parameters
    return _Cost.of(dtype, parameters, kept, kept)


def check_fits(config: RunConfig, spec: ImageSpec) -> None:
    """Refuse training that cannot fit into the memory of this machine, before anything large is built.

    Small networks on small images are not estimated, which takes seconds.

    Raises:
        ConfigError: it needs far more memory than is free; what would fit is named.
    """
    free, where = free_memory(default_device())
    pixels = spec.height * spec.width
    batch = 2 * 4 * spec.channels * pixels * config.training.batch_size  # images and noise, in float32
    if batch > free:
        fits = int(free / (batch / config.training.batch_size))
        raise ConfigError(
            f"training.batch_size={config.training.batch_size}: its images alone take {batch / 1e9:,.1f} GB, "
            f"{free / 1e9:.1f} GB are free {where}; up to {fits} would fit beside nothing else: choose far fewer"
        )
    if _at_most(config, spec) < free or training_memory_bytes(config, spec) < UNCERTAINTY * free:
        return
    _, text = advice(config, spec, free)
    raise ConfigError(f"{free / 1e9:.1f} GB free {where}; training needs {text}")


def _at_most(config: RunConfig, spec: ImageSpec) -> float:
    """More bytes than training takes with any network of these widths, roughly."""
    model, vae, text, alignment = config.model, config.vae, config.text, config.alignment
    widths, depth = [model.model_channels * mult for mult in model.channel_mult or (1, 8)], model.layers_per_block
    if config.recipe == "vae":
        widths, depth = [*vae.block_out_channels, 2 * vae.latent_channels], vae.layers_per_block
    elif config.recipe == "alignment" or alignment.joint:
        widths = [*(alignment.block_out_channels or STAGES), *widths, alignment.latent_channels]
        widths += [text.width, text.captioner_width]
        depth = max(depth, text.layers, text.captioner_layers)
    kept = 500 * depth * widths[0] * spec.height * spec.width * images_at_once(config)
    return kept + 10 * depth * BYTES_PER_PARAMETER * 9 * max(widths) ** 2


def suggest_plan(config: RunConfig, spec: ImageSpec, budget_bytes: float) -> MemoryPlan | None:
    """The fastest way to take the same training step within ``budget_bytes``; None if there is none.

    Recomputing what is cheap costs about a tenth more time, smaller parts of a batch next to none; so parts of at
    least eight images come before recomputation, and that before smaller parts. None of it changes what is learned.
    """
    best: tuple[tuple[float, ...], MemoryPlan] | None = None
    for order, (changes, cost) in enumerate(_recomputations(config, spec)):
        now = config.training.accumulation_steps
        for parts in _divisors(config.training.batch_size, now) if parts_are_alike(config) else [now]:
            images = config.training.batch_size // parts
            peak = cost.peak(images)
            if peak > budget_bytes:
                continue
            split = () if parts == now else (f"training.accumulation_steps={parts}",)
            rank = (images < min(8, config.training.batch_size), order, parts)
            if best is None or rank < best[0]:
                best = rank, MemoryPlan((*split, *changes), peak)
            break
    return None if best is None else best[1]


def largest_batch(config: RunConfig, spec: ImageSpec, budget_bytes: float) -> int:
    """Images that fit into ``budget_bytes`` at once with this configuration's recomputation; 0 if none does."""
    cost = _cost(config, spec)
    rest = budget_bytes - cost.peak(0)
    return max(0, int(rest / (cost.peak(1) - cost.peak(0))))


def _recomputations(config: RunConfig, spec: ImageSpec) -> Iterator[tuple[tuple[str, ...], _Cost]]:
    """From what the configuration recomputes to more, with the overrides that ask for it and its cost."""
    least = _cost(config, spec)
    yield (), least
    if config.recipe in SMALLER or config.alignment.joint:
        return
    for keys in RECOMPUTATION:
        model = config.model.model_copy(update=keys)
        cost = _cost(config.model_copy(update={"model": model}), spec)
        if cost.kept < least.kept:
            least = cost
            yield tuple(f"model.{key}={str(value).lower()}" for key, value in keys.items() if value), cost


def _divisors(batch_size: int, least: int) -> list[int]:
    return [n for n in range(least, batch_size + 1) if batch_size % n == 0 and n % least == 0]


def advice(config: RunConfig, spec: ImageSpec, free_bytes: float) -> tuple[bool, str]:
    """Whether training fits into ``free_bytes``, and a line that says how much it needs and what would help."""
    needed = training_memory_bytes(config, spec)
    budget = USABLE_SHARE * free_bytes
    text = f"about {needed / 1e9:.2f} GB for {images_at_once(config)} images at once"
    if needed <= budget:
        return True, f"{text}; up to {largest_batch(config, spec, budget)} would fit"
    plan = suggest_plan(config, spec, budget)
    smaller = SMALLER.get(config.recipe, "model.model_channels")
    if plan is None:
        return False, f"{text}; even one image at a time is too much: choose a smaller {smaller}"
    return False, f"{text}; the same training in {plan.peak_bytes / 1e9:.2f} GB: {' '.join(plan.changes)}"
