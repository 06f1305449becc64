"""Sections ``model``, ``codec``, ``vae``, ``text`` and ``alignment``: networks and their losses."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from heterodiff.config.base import Depth, Fraction, Levels, NonNegativeInt, PositiveInt, Section, UserPath, Width
from heterodiff.config.names import known_name
from heterodiff.config.training import TrainingConfig
from heterodiff.models.defaults import (
    HEAD_CHANNELS,
    LAYERS_PER_BLOCK,
    MODEL_CHANNELS,
    NUM_HEADS,
    SPARSITY,
)
from heterodiff.models.variants import list_models


class ModelConfig(Section):
    """Denoiser; ``heterodiff models`` lists the networks with their sizes and costs."""

    variant: Annotated[str, known_name("model variant", list_models)] = Field(
        "unet-conv",
        description="`unet`, `hae`, `hae-lite`, `hae-v2`, `hae-v2-conservative`, `hae-v3`, `unet-lean`, "
        "`unet-conv` or, for texts, `film-unet`",
    )
    model_channels: Width | None = Field(
        None,
        description="base width, a multiple of 32; level i has model_channels * channel_mult[i] channels; default: "
        f"{MODEL_CHANNELS}, or 32 to 128 by what training.minutes allow",
    )
    channel_mult: Levels | None = Field(
        None,
        description="width factor of each level; each level after the first halves height and width (not in "
        "film-unet); default: chosen by image size, [1, 2] for film-unet",
    )
    layers_per_block: Depth = Field(
        LAYERS_PER_BLOCK, description="residual blocks per encoder level; the decoder has one more"
    )
    patch_size: Width = Field(1, description="patch side in pixels; 2 costs about a quarter")
    attention_resolutions: tuple[Width, ...] | None = Field(
        None,
        description="downsampling factors with attention, [] for none; default: unet, hae, hae-lite and hae-v2: where "
        "maps are at most 16x16; unet-lean: at most 8x8; unet-conv and hae-v3: none",
    )
    mid_attention: bool | None = Field(
        None, description="attention at the coarsest level, in the middle; default: false for unet-conv, else true"
    )
    condition_tokens: Literal["full", "one", "none"] | None = Field(
        None,
        description="keys that stand for the condition in attention: full: one for each channel of its embedding, as "
        "in earlier checkpoints; one; none; default: one for unet-lean, unet-conv and hae-v3, else full",
    )
    norm_groups: Annotated[int, Field(gt=0, le=32)] | None = Field(
        None,
        description="groups of the norms, a divisor of 32; default: 32, as in earlier checkpoints; 8 for unet-lean, "
        "unet-conv, hae-v3 and film-unet",
    )
    dropout: Fraction = Field(0.0, description="dropout probability in residual blocks and Transformer MLPs")
    num_heads: Width | None = Field(
        None,
        description=f"attention heads; default: {NUM_HEADS}; heads of {HEAD_CHANNELS} channels for hae-v3, unet-lean "
        "and unet-conv",
    )
    num_head_channels: Width | None = Field(None, description="channels per attention head, in place of num_heads")
    use_scale_shift_norm: bool | None = Field(
        None,
        description="condition by scale and shift (FiLM), not by addition; default: true for hae-v3, unet-lean and "
        "unet-conv",
    )
    resblock_updown: bool = Field(False, description="resample in residual blocks instead of convolutions between them")
    attention_pattern: Literal["multiscale", "sequence"] = Field(
        "multiscale",
        description="sparse attention of the hybrid blocks; multiscale: a window, distant positions and coarser maps; "
        "sequence: a band and random keys, as in earlier checkpoints",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        SPARSITY, description="fraction of keys that a sparse attention query skips"
    )
    memory_optimization: bool | None = Field(
        None,
        description="recompute norms, activations and attention in the backward pass to save memory; default: true for "
        "hae-v2-conservative",
    )
    activation: Literal["silu", "identity"] = Field(
        "silu", description="activation of the norms; identity: none, as in some imported networks"
    )
    class_embedding: Literal["mlp", "direct"] = Field(
        "mlp", description="mlp: class embedding through an MLP; direct: one table, as in networks of guided-diffusion"
    )
    conv_resample: bool = Field(True, description="resample with a convolution; false: in some imported networks")
    bottleneck_ratio: Annotated[float, Field(gt=0, le=4)] = Field(
        0.25, description="hidden width of the MLP in hybrid blocks with a bottleneck, relative to their channels"
    )
    num_heads_upsample: Width | None = Field(
        None, description="attention heads of the decoder; default: as in the encoder"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute all blocks in the backward pass: least memory, slower"
    )
    init_from: UserPath | None = Field(
        None,
        description="run or imported model whose weights training begins with, of the same architecture; classes it "
        "knows by name keep their embedding; default: fresh weights",
    )
    train: Literal["all", "lora", "conditions"] = Field(
        "all",
        description="weights that are trained, the others staying those of model.init_from; lora: low-rank updates of "
        "attention, linear and convolution layers, and the class table (Hu et al. 2021); conditions: class table and "
        "other weights of the condition",
    )
    lora_rank: Annotated[int, Field(gt=0, le=1024)] | None = Field(
        None, description="rank of the updates; default: the largest up to 16 that trains at most 5 % of the weights"
    )
    prior_preservation: NonNegativeFloat = Field(
        0.0,
        description="weight of the loss of images that model.init_from draws, so that they are not forgotten (Ruiz "
        "et al. 2023); such steps take twice as long; 0: off",
    )
    prior_images: PositiveInt = Field(32, description="images that are drawn of each class for prior_preservation")


class CodecConfig(Section):
    """Space in which diffusion takes place: pixels, or latents of an autoencoder."""

    kind: Literal["pixels", "kl-vae", "cnn"] = Field(
        "pixels", description="kl-vae: latents of a VAE; cnn: the image codec of recipe `text-image`, its only kind"
    )
    path: UserPath | None = Field(
        None,
        description="kl-vae: run of recipe `vae`, folder with a diffusers AutoencoderKL, or file of weights in the "
        "layout of latent diffusion; cnn: run of recipe `alignment`, default: folder alignment in the run folder",
    )
    cache: bool = Field(
        True, description="encode the images once and store the latents in the run folder; false: encode every batch"
    )
    posterior: Literal["sample", "mode"] = Field(
        "sample", description="train on latents drawn anew from the posterior at each step, or on its mode"
    )
    statistics: Literal["stored", "measured"] = Field(
        "stored",
        description="normalisation of the latents; stored: of the codec; measured: of the training images, for a codec "
        "trained on others",
    )
    training: TrainingConfig | None = Field(
        None,
        description="training of the codec in folder codec.path, unless it is finished: the VAE (section `vae`), or "
        "for kind cnn the image codec with the text networks (section `alignment`)",
    )

    @model_validator(mode="after")
    def _has_a_vae(self) -> "CodecConfig":
        if self.kind == "kl-vae" and self.path is None:
            raise ValueError(
                "kind kl-vae needs codec.path: a run folder of recipe `vae`, or a folder with a diffusers AutoencoderKL"
            )
        return self


class VAEConfig(Section):
    """Autoencoder of recipe `vae` (diffusers' AutoencoderKL) and its losses."""

    init_from: UserPath | None = Field(
        None, description="VAE to start from (a run, or a diffusers AutoencoderKL); default: train from scratch"
    )
    latent_channels: Width = Field(4, description="channels of the latents")
    block_out_channels: Levels = Field(
        (32, 64, 64), description="channels of each level; each level after the first halves height and width"
    )
    layers_per_block: Depth = Field(1, description="residual blocks per level of the encoder")
    mid_block_attention: bool = Field(False, description="self-attention at the coarsest level")
    kl_weight: NonNegativeFloat = Field(1e-6, description="weight of the KL divergence, in nats per image")
    structural_weight: NonNegativeFloat = Field(0.0, description="weight of the multi-scale 1 - SSIM; 0: off")
    adversarial_weight: NonNegativeFloat = Field(
        0.0, description="weight of the adversarial loss of a patch discriminator, times its adaptive weight; 0: off"
    )
    adversarial_start: NonNegativeInt = Field(2000, description="first step with the patch discriminator")


class TextConfig(Section):
    """Tokenizer, text encoder and captioner."""

    encoder: str | None = Field(
        None,
        description="pretrained BERT (a folder, or a hub name in the local cache); default: a small one from scratch",
    )
    frozen: bool = Field(False, description="freeze the weights of text.encoder; only its projection is trained")
    vocabulary_size: Annotated[int, Field(ge=100, le=200_000)] = Field(
        8000, description="size of the vocabulary learned from training captions"
    )
    max_tokens: Annotated[int, Field(ge=4, le=512)] = Field(
        64, description="maximum number of tokens, start and end included; longer texts are cut, with a warning"
    )
    width: Width = Field(128, description="width of the encoder trained from scratch")
    layers: Depth = Field(2, description="layers of the encoder trained from scratch")
    num_heads: Width = Field(4, description="attention heads of the encoder trained from scratch and of the captioner")
    dropout: Fraction = Field(0.0, description="dropout of the encoder trained from scratch and of the captioner")
    embedding_dim: Width = Field(256, description="width of text and image embeddings")
    captioner_width: Width = Field(128, description="width of the captioner, a multiple of text.num_heads")
    captioner_layers: Depth = Field(2, description="layers of the captioner")


class AlignmentConfig(Section):
    """Image codec of recipe `text-image`, and the losses that train it together with the text networks."""

    latent_channels: Width = Field(16, description="channels of the latent maps; more for images above 64x64")
    block_out_channels: Levels | None = Field(
        None,
        description="channels of the encoder's stages, each of which halves height and width; default: from 32 up to "
        "256, with enough stages to reach maps of about 8x8",
    )
    backbone: UserPath | None = Field(
        None, description="pretrained convolutional network of transformers (a folder), in place of the stages"
    )
    contrastive_weight: NonNegativeFloat = Field(1.0, description="weight of the contrastive loss")
    reconstruction_weight: NonNegativeFloat = Field(
        0.5, description="weight of reconstructing images and captions from maps and embeddings"
    )
    diffusion_weight: NonNegativeFloat = Field(0.3, description="weight of the denoiser's loss in joint training")
    latent_noise: NonNegativeFloat = Field(
        0.1, description="std of the noise added to the map, of rms 1, before decoding"
    )
    captions_per_image: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="captions per image and step, if it has several"
    )
    joint: bool = Field(
        False,
        description="train the denoiser with all other networks; false: afterwards, on stored latents, which is faster",
    )


def condition_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """Fill in what suits images as conditions: these say so much that guidance only exaggerates."""
    data, sampling = content.get("data"), content.get("sampling") or {}
    if not isinstance(data, dict) or not data.get("condition") or not isinstance(sampling, dict):
        return content
    return {**content, "sampling": {"guidance_scale": 1.0, **sampling}}


def text_image_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` of a configuration with codec and denoiser of recipe `text-image` where the user names none."""
    sections = {name: content.get(name) or {} for name in ("codec", "model", "alignment", "training")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return content  # wrong types are reported as such
    codec: dict[str, Any] = {"kind": "cnn"}
    if not sections["alignment"].get("joint") and sections["codec"].get("path") is None:
        output = content.get("output") or "runs/text-image"
        codec |= {"path": f"{output}/alignment", "training": sections["training"]}
    model = {"variant": "film-unet"}
    given = {name: value for name, value in sections["codec"].items() if (name, value) != ("path", None)}
    return content | {"codec": codec | given, "model": model | sections["model"]}
