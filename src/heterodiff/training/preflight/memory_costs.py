"""Memory that the networks of a task take in training: parameters, and activations saved for the backward pass."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
from heterodiff.devices import process_count
from heterodiff.models.classifier import NoisyClassifier
from heterodiff.models.defaults import MODEL_CHANNELS
from heterodiff.models.profile import ModelProfile, count_saved_bytes, profile
from heterodiff.models.variants import create_model
from heterodiff.text.tokenizer import load_tokenizer, train_tokenizer
from heterodiff.training.precision import precision_of
from heterodiff.training.recipes.adapting import train_part
from heterodiff.training.recipes.alignment_networks import AlignmentModel, build_networks
from heterodiff.training.recipes.arguments import model_arguments
from heterodiff.training.recipes.classifier import classifier_arguments
from heterodiff.training.recipes.text_image import denoiser_arguments
from heterodiff.training.recipes.vae import Autoencoder, build_vae

BYTES_PER_PARAMETER = 5 * 4
"""Weights, gradients, the two moments of AdamW and the EMA weights, all in float32."""
BYTES_PER_ADAPTED = 2 * 4
"""Weights and their sum with the low-rank updates, where these alone are trained."""
TRANSIENT_SHARE = 0.25
"""Transient memory of the backward pass, as a fraction of the activations that are saved without recomputation."""
SCRATCH_BYTES = 200e6
"""Working memory of kernels and optimiser, measured with small networks on a CPU."""


@dataclass(frozen=True)
class Cost:
    """Memory of networks in training.

    Attributes:
        parameters: their number.
        copies: bytes of the low-precision copies of the weights that autocast makes.
        kept, kept_without: bytes saved per image for the backward pass, and without recomputation.
        trained: number of those that have gradients, moments and averages; None for all.
        sharers: processes that share the weights and all that belongs to them; what each gathers to compute a block
            is left out.
    """

    parameters: int
    copies: float
    kept: float
    kept_without: float
    sharers: int = 1
    trained: int | None = None

    @classmethod
    def of(cls, dtype: torch.dtype | None, parameters: int, saved: float, saved_without: float) -> "Cost":
        """Make one from the bytes that the pass of one image saves, which under autocast contain the copies."""
        copies = 0 if dtype is None else dtype.itemsize * parameters
        kept, without = (max(0.0, bytes_saved - copies) for bytes_saved in (saved, saved_without))
        return cls(parameters, copies, kept, without)

    def peak(self, images: int) -> float:
        per_image = self.kept + TRANSIENT_SHARE * self.kept_without
        weights = BYTES_PER_PARAMETER * self.parameters
        if self.trained is not None:
            weights = BYTES_PER_ADAPTED * self.parameters + BYTES_PER_PARAMETER * self.trained
        return weights / self.sharers + self.copies + SCRATCH_BYTES + images * per_image


@dataclass(frozen=True)
class MemoryTerms:
    """Memory of the networks of a task.

    Attributes:
        cost: (config, spec) -> :class:`Cost`; raises ConfigError where no network can be built for these images.
        sizes: config -> widths, the first at the image's size, and blocks per level; a rough bound, to recognise small
            networks quickly.
        smaller: the key that makes the network smaller.
        recomputes: whether ``model.memory_optimization`` and ``model.gradient_checkpointing`` act on it.
    """

    cost: Callable[[RunConfig, ImageSpec], Cost]
    sizes: Callable[[RunConfig], tuple[Sequence[int], int]]
    smaller: str = "model.model_channels"
    recomputes: bool = False


def autocast(dtype: torch.dtype | None) -> Any:
    """Return the context that networks compute in: that of the CPU, which casts like GPUs do in all that matters here.

    Attention to condition tokens saves more on a GPU, see `attend_with_condition`; the estimate leaves that out.
    """
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _denoiser_cost(config: RunConfig, spec: ImageSpec) -> Cost:
    _, height, width = latent_shape(config.codec, spec.channels, spec.height, spec.width)

    def profile_with(**keys: bool) -> ModelProfile:
        model = config.model.model_copy(update=keys)
        arguments = model_arguments(config.model_copy(update={"model": model}), spec)
        return _profile(model.variant, height, width, dtype, tuple(arguments.items()))

    dtype = precision_of(config.training)
    found = profile_with()
    without = profile_with(memory_optimization=False, gradient_checkpointing=False)
    batches = 2 if config.model.prior_preservation else 1  # in one pass
    cost = Cost.of(dtype, found.parameters, 1e6 * found.saved_mb, 1e6 * without.saved_mb)
    cost = replace(cost, kept=batches * cost.kept, kept_without=batches * cost.kept_without)
    trained = None if config.model.train == "all" else _trained_weights(config, spec)
    return replace(cost, sharers=process_count() if config.training.fsdp else 1, trained=trained)


def _trained_weights(config: RunConfig, spec: ImageSpec) -> int:
    with torch.device("meta"):
        network = create_model(config.model.variant, **model_arguments(config, spec))
        train_part(network, config.model)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@lru_cache(maxsize=64)  # a plan needs the same few profiles many times, a second each
def _profile(
    variant: str, height: int, width: int, dtype: torch.dtype | None, arguments: tuple[tuple[str, Any], ...]
) -> ModelProfile:
    with autocast(dtype):
        return profile(variant, height, width, **dict(arguments))


def _denoiser_sizes(config: RunConfig) -> tuple[Sequence[int], int]:
    model = config.model
    width = model.model_channels or MODEL_CHANNELS
    return [width * mult for mult in model.channel_mult or (1, 8)], model.layers_per_block


def _vae_cost(config: RunConfig, spec: ImageSpec) -> Cost:
    """A VAE recomputes nothing; the discriminator, far smaller, is left out."""
    dtype = precision_of(config.training)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(dtype):
        start = config.vae.init_from
        vae = build_vae(config.vae, spec) if start is None else AutoencoderKL.from_config(read_vae_config(start))
        shape = latent_shape_of(vae.config, spec.channels, spec.height, spec.width)
        model = Autoencoder(vae)
        image = torch.empty(1, spec.channels, spec.height, spec.width)
        kept = count_saved_bytes(model, image, torch.empty(1, *shape))
    return Cost.of(dtype, sum(p.numel() for p in model.parameters()), kept, kept)


def _vae_sizes(config: RunConfig) -> tuple[Sequence[int], int]:
    return [*config.vae.block_out_channels, 2 * config.vae.latent_channels], config.vae.layers_per_block


def _alignment_cost(config: RunConfig, spec: ImageSpec, joint: bool = False) -> Cost:
    """Cost with captions of the greatest length; real tensors only where pretrained parts are loaded.

    The vocabulary, which depends on the captions, is left out: it takes little memory unless it is pretrained.
    """
    pretrained = config.text.encoder is not None or config.alignment.backbone is not None
    fake = nullcontext() if pretrained else FakeTensorMode(allow_non_fake_inputs=True)
    dtype = precision_of(config.training)
    with fake:
        encoder, length = config.text.encoder, config.text.max_tokens
        tokenizer = load_tokenizer(encoder) if encoder else train_tokenizer(["?"], config.text.vocabulary_size)
        networks = build_networks(config, spec, tokenizer)
        shape = (1, config.alignment.latent_channels, *networks.image_codec.latent_size)
        image = torch.zeros(1, spec.channels, spec.height, spec.width)
        ids = torch.zeros(config.alignment.captions_per_image, length, dtype=torch.long)
        inputs = (image, ids, torch.ones_like(ids), torch.zeros(shape), torch.zeros(1, dtype=torch.bool))
        model = AlignmentModel(networks)
        parameters = sum(p.numel() for p in model.parameters())
        with autocast(dtype):
            kept = count_saved_bytes(model, *inputs)
            if joint:
                found = profile(config.model.variant, *shape[2:], **denoiser_arguments(config, spec, shape[1:]))
                kept, parameters = kept + round(1e6 * found.saved_mb), parameters + found.parameters
    return Cost.of(dtype, parameters, kept, kept)


def _alignment_sizes(config: RunConfig) -> tuple[Sequence[int], int]:
    text, alignment = config.text, config.alignment
    denoiser, depth = _denoiser_sizes(config)
    widths = [*(alignment.block_out_channels or STAGES), *denoiser, alignment.latent_channels]
    return [*widths, text.width, text.captioner_width], max(depth, text.layers, text.captioner_layers)


def _classifier_cost(config: RunConfig, spec: ImageSpec) -> Cost:
    dtype = precision_of(config.training)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(dtype):
        model = NoisyClassifier(**classifier_arguments(config, spec)).train()
        image = torch.empty(1, spec.channels, spec.height, spec.width)
        kept = count_saved_bytes(model, image, torch.zeros(1))
    return Cost.of(dtype, sum(p.numel() for p in model.parameters()), kept, kept)


DENOISER = MemoryTerms(_denoiser_cost, _denoiser_sizes, recomputes=True)
CLASSIFIER = MemoryTerms(_classifier_cost, _denoiser_sizes)
VAE = MemoryTerms(_vae_cost, _vae_sizes, "vae.block_out_channels")
ALIGNMENT = MemoryTerms(_alignment_cost, _alignment_sizes, "alignment.block_out_channels")
JOINT = MemoryTerms(partial(_alignment_cost, joint=True), _alignment_sizes)
