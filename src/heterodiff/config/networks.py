"""Sections ``model``, ``codec``, ``vae``, ``text`` and ``alignment``: the networks."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from heterodiff.config.base import Depth, Fraction, Levels, Section, UserPath, Width
from heterodiff.config.names import known_name
from heterodiff.config.training import TrainingConfig
from heterodiff.models.defaults import (
    FILM_CHANNEL_MULT,
    FILM_MODEL_CHANNELS,
    LAYERS_PER_BLOCK,
    MODEL_CHANNELS,
    NUM_HEADS,
    SPARSITY,
)
from heterodiff.models.variants import list_models


class ModelConfig(Section):
    """The denoiser; ``heterodiff models`` lists the networks with their sizes and costs."""

    variant: Annotated[str, known_name("model variant", list_models)] = Field(
        "hae-v2",
        description="`unet`, `hae`, `hae-lite`, `hae-v2` or `hae-v2-conservative`; recipe `text-image` also has "
        "`film-unet`, its default",
    )
    model_channels: Width = Field(
        MODEL_CHANNELS,
        description="base width, a multiple of 32: level i has model_channels * channel_mult[i] channels",
    )
    channel_mult: Levels | None = Field(
        None,
        description="width factor of each level; every level after the first halves height and width (not film-unet); "
        "default: chosen from the image size",
    )
    layers_per_block: Depth = Field(
        LAYERS_PER_BLOCK, description="residual blocks in each level of the encoder; the decoder has one more"
    )
    patch_size: Width = Field(1, description="patch side in pixels; 2 costs about a quarter (not film-unet)")
    attention_resolutions: tuple[Width, ...] | None = Field(
        None, description="downsampling factors with attention; default: those with maps of at most 16x16"
    )
    dropout: Fraction = Field(0.0, description="dropout probability in residual blocks and Transformer MLPs")
    num_heads: Width = Field(NUM_HEADS, description="attention heads")
    num_head_channels: Width | None = Field(None, description="width of an attention head, in place of num_heads")
    use_scale_shift_norm: bool = Field(
        False, description="condition residual blocks by scale and shift (FiLM), not by a sum"
    )
    resblock_updown: bool = Field(
        False, description="resample inside residual blocks, not by convolutions between them"
    )
    attention_pattern: Literal["multiscale", "sequence"] = Field(
        "multiscale",
        description="keys of the hybrid blocks' sparse attention: multiscale: a window, distant positions and coarser "
        "maps; sequence: a band and random keys, as in earlier checkpoints",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        SPARSITY, description="share of the keys that a query of the sparse attention does not see"
    )
    memory_optimization: bool | None = Field(
        None,
        description="recompute norms, activations and attention in the backward pass, for less memory; default: true "
        "for hae-v2-conservative",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute every block in the backward pass: the least memory, more time"
    )


class CodecConfig(Section):
    """The space in which diffusion happens."""

    kind: Literal["pixels", "kl-vae", "cnn"] = Field(
        "pixels", description="cnn: the image codec of recipe `text-image`, whose only kind it is"
    )
    path: UserPath | None = Field(
        None,
        description="the VAE of kind kl-vae: a run of recipe `vae`, or a folder with a diffusers AutoencoderKL; the "
        "networks of kind cnn: a run of recipe `alignment`, by default the folder alignment of the run",
    )
    cache: bool = Field(
        True, description="encode the images once, at the start of a run, into its folder; false: encode every batch"
    )
    posterior: Literal["sample", "mode"] = Field(
        "sample", description="latents to train on: drawn anew from the posterior each time, or its mean"
    )
    statistics: Literal["stored", "measured"] = Field(
        "stored",
        description="mean and std that bring latents to unit variance: those stored with the VAE, or measured on the "
        "training images (for a codec that was trained on other images)",
    )
    training: TrainingConfig | None = Field(
        None,
        description="where codec.path holds nothing finished: first train a VAE there (section `vae`), or for kind cnn "
        "the image codec and the text networks (section `alignment`), like this",
    )

    @model_validator(mode="after")
    def _has_a_vae(self) -> "CodecConfig":
        if self.kind == "kl-vae" and self.path is None:
            raise ValueError(
                "kind kl-vae needs codec.path: a run folder of recipe `vae`, or a folder with a diffusers AutoencoderKL"
            )
        return self


class VAEConfig(Section):
    """The autoencoder that recipe `vae` trains: diffusers' AutoencoderKL, and its losses."""

    init_from: UserPath | None = Field(
        None, description="start from this VAE (a run, or a diffusers AutoencoderKL) instead of from scratch"
    )
    latent_channels: Width = Field(4, description="channels of the latents")
    block_out_channels: Levels = Field(
        (32, 64, 64), description="channels of each level; every level after the first halves height and width"
    )
    layers_per_block: Depth = Field(1, description="residual blocks in each level of the encoder")
    mid_block_attention: bool = Field(False, description="self-attention at the coarsest level")
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        1e-6, description="weight of the KL divergence of an image's posterior, summed over its latent, in nats"
    )
    structural_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of 1 - SSIM, averaged over scales; 0 leaves it out"
    )
    adversarial_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the patch discriminator's loss, beside its adaptive weight; 0 leaves it out"
    )
    adversarial_start: Annotated[int, Field(ge=0)] = Field(
        2000, description="step at which the patch discriminator begins to train and to count"
    )


class TextConfig(Section):
    """The text networks: tokens of captions, the encoder that reads them and the captioner that writes them."""

    encoder: str | None = Field(
        None,
        description="a BERT to start from, in place of a small one from scratch: a local folder of transformers, or a "
        "hub name that is in the local cache",
    )
    frozen: bool = Field(False, description="leave the weights of text.encoder as they are; only its projection learns")
    vocabulary_size: Annotated[int, Field(ge=100, le=200_000)] = Field(
        8000, description="word pieces learned from the training captions, where text.encoder brings none"
    )
    max_tokens: Annotated[int, Field(ge=4, le=512)] = Field(
        64, description="longest text, start and end token included; longer ones are cut, with a warning"
    )
    width: Width = Field(256, description="width of the encoder trained from scratch")
    layers: Depth = Field(4, description="layers of the encoder trained from scratch")
    num_heads: Width = Field(4, description="attention heads of the encoder trained from scratch and of the captioner")
    dropout: Fraction = Field(
        0.0, description="dropout probability of the encoder trained from scratch and of the captioner"
    )
    embedding_dim: Width = Field(512, description="width of the embedding of a text, and of an image")
    captioner_width: Width = Field(256, description="width of the captioner, a multiple of text.num_heads")
    captioner_layers: Depth = Field(4, description="layers of the captioner")


class AlignmentConfig(Section):
    """The image codec of recipe `text-image`, and the losses that train it together with the text networks."""

    latent_channels: Width = Field(256, description="channels of the maps that stand for images")
    block_out_channels: Levels | None = Field(
        None,
        description="channels of the encoder's stages, each of which halves height and width; default: from 32 up to "
        "256, as many stages as bring the image to about 8x8",
    )
    backbone: UserPath | None = Field(
        None, description="folder of a pretrained convolutional network of transformers, in place of the stages"
    )
    contrastive_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the contrastive loss between images and captions"
    )
    reconstruction_weight: Annotated[float, Field(ge=0)] = Field(
        0.5, description="weight of reconstructing images and captions from maps and embeddings"
    )
    diffusion_weight: Annotated[float, Field(ge=0)] = Field(
        0.3, description="weight of the denoiser's loss, with joint: true"
    )
    latent_noise: Annotated[float, Field(ge=0)] = Field(
        0.1, description="std of the noise on the map that the decoder learns to undo, the map's own rms being 1"
    )
    captions_per_image: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="captions of each image in a step, where it has several"
    )
    joint: bool = Field(
        False,
        description="train the denoiser with everything else, not afterwards on stored latents, which is faster",
    )


def text_image_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` of a configuration with codec and denoiser of recipe `text-image` where the user names none."""
    sections = {name: content.get(name) or {} for name in ("codec", "model", "alignment", "training")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return content  # wrong types are reported as such
    codec: dict[str, Any] = {"kind": "cnn"}
    if not sections["alignment"].get("joint") and sections["codec"].get("path") is None:
        output = content.get("output") or "runs/text-image"
        codec |= {"path": f"{output}/alignment", "training": sections["training"]}
    model = {"variant": "film-unet", "model_channels": FILM_MODEL_CHANNELS, "channel_mult": FILM_CHANNEL_MULT}
    if sections["model"].get("variant", "film-unet") != "film-unet":
        model = {}
    given = {name: value for name, value in sections["codec"].items() if (name, value) != ("path", None)}
    return content | {"codec": codec | given, "model": model | sections["model"]}
