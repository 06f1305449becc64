"""The typed configuration of a run: its sections, their keys, defaults and limits."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _pair(value: Any) -> Any:
    """Read one integer as a square (height, width)."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("expected [lowest, highest], the lower number first")
    return limits


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Levels = Annotated[tuple[Positive, ...], Field(min_length=1)]
Size = Annotated[tuple[Positive, Positive], BeforeValidator(_pair)]
Speed = Annotated[float, Field(ge=0, le=300)]
WalkingSpeed = Annotated[float, Field(ge=0.3, le=2.2)]
PendulumSpeed = Annotated[float, Field(ge=0, le=2.2)]
RunningSpeed = Annotated[float, Field(ge=2, le=8)]
Decibels = Annotated[float, Field(ge=-100, le=100)]
Aspect = Annotated[float, Field(ge=0, le=180)]
LesionRadius = Annotated[float, Field(ge=0.08, le=0.4)]
Elevation = Annotated[float, Field(ge=0, le=80)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class MicrodopplerSpeeds(Section):
    """Speeds in m/s from which each simulated target draws its own; the limits are those of the motion models."""

    walking: Annotated[tuple[WalkingSpeed, WalkingSpeed], AfterValidator(_ascending)] = (0.8, 1.8)
    running: Annotated[tuple[RunningSpeed, RunningSpeed], AfterValidator(_ascending)] = (2.5, 4.5)
    quadrotor: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = (1.0, 8.0)
    helicopter: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = (5.0, 30.0)
    bird: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = (4.0, 9.0)
    pendulum: Annotated[tuple[PendulumSpeed, PendulumSpeed], AfterValidator(_ascending)] = Field(
        (0.5, 1.5), description="of the bob at its lowest point"
    )


class MicrodopplerConfig(Section):
    """The simulated radar of the built-in source ``microdoppler`` and what it looks at."""

    images_per_class: Annotated[int, Field(gt=0, le=1_000_000)] = 200
    seed: Seed = Field(0, description="picture k of a class depends on seed, class and k alone")
    carrier_frequency_hz: Annotated[float, Field(ge=1e8, le=3e11)] = 10e9
    prf_hz: Annotated[float, Field(ge=16, le=1e7)] | None = Field(
        None, description="pulses a second, for all classes; default: per class, so that its fastest part cannot alias"
    )
    duration_s: Annotated[float, Field(gt=0, le=600)] | None = Field(
        None, description="length of a recording, for all classes; default: a few cycles of each class"
    )
    window_s: Annotated[float, Field(gt=0, le=60)] | None = Field(
        None, description="window of the short-time Fourier transform; default: per class"
    )
    snr_db: Annotated[tuple[Decibels, Decibels], AfterValidator(_ascending)] = Field(
        (10.0, 25.0), description="mean signal power over noise power, before the transform"
    )
    dynamic_range_db: Annotated[float, Field(ge=1, le=200)] = Field(
        45.0, description="pictures end so far below their strongest pixel"
    )
    aspect_deg: Annotated[tuple[Aspect, Aspect], AfterValidator(_ascending)] = Field(
        (0.0, 30.0), description="between the heading and the direction to the radar, seen from above"
    )
    elevation_deg: Annotated[tuple[Elevation, Elevation], AfterValidator(_ascending)] = Field(
        (10.0, 40.0), description="of flying targets above the radar; the others are level with it"
    )
    receding: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the targets turned around, which move away"
    )
    speeds_m_s: MicrodopplerSpeeds = MicrodopplerSpeeds()


class ShapesConfig(Section):
    """The drawn pictures of the built-in source ``shapes``: one or two coloured shapes, with true captions."""

    images: Annotated[int, Field(gt=1, le=10_000_000)] = 4000
    seed: Seed = Field(0, description="picture k depends on seed and k alone")
    pairs: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="share of the pictures with two shapes")
    unseen: tuple[str, ...] = Field(
        (), description="combinations such as `purple triangle` that no picture shows, to ask for them later"
    )


class BrainPhantomConfig(Section):
    """The simulated heads of the built-in source ``brain-phantom``, and how hard their lesions are to see."""

    patients: Annotated[int, Field(gt=1, le=100_000)] = 120
    slices_per_patient: Annotated[int, Field(gt=0, le=1000)] = 16
    seed: Seed = Field(0, description="slice k of a patient depends on seed, patient and k alone")
    unhealthy: Annotated[float, Field(ge=0, le=1)] = Field(0.4, description="share of the slices that show a lesion")
    lesion_radius: Annotated[tuple[LesionRadius, LesionRadius], AfterValidator(_ascending)] = Field(
        (0.10, 0.24), description="in its middle slice, in units of half the shorter side of the picture"
    )
    contrast: Annotated[float, Field(ge=0, le=3)] = Field(
        1.0, description="of lesions against white matter; 1: on FLAIR and T2 little brighter than grey matter"
    )
    bias: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="strength of the smooth field that brightens one side of a modality"
    )
    noise: Annotated[float, Field(ge=0, le=0.5)] = Field(0.03, description="std; scalp and fluid reach about 0.8")


class VolumesConfig(Section):
    """NIfTI volumes of patients, of which source ``volumes`` makes slices."""

    layout: Literal["brats", "atlas"] = Field(
        "brats", description="file names: brats: *_flair *_t1 *_t1ce *_t2 [*_seg]; atlas: *_T1w [*_mask]"
    )
    modalities: dict[str, str] | None = Field(
        None,
        description="own file name patterns without .nii.gz, a channel each, such as {flair: '*FLAIR*', t1: '*T1*'}",
    )
    mask: str | None = Field(None, description="own pattern of the mask's file name")
    cache: UserPath | None = Field(None, description="where slices are kept; default: data.path with _slices appended")
    least_brain: Fraction = Field(0.02, description="share of its area that a slice must show of the brain to count")

    @model_validator(mode="after")
    def _modalities_are_some(self) -> "VolumesConfig":
        if self.modalities is not None and not self.modalities:
            raise ValueError("modalities: expected at least one pattern; leave it out for those of the layout")
        return self


class DataConfig(Section):
    """Where images and their labels or captions come from."""

    source: str = Field(
        "images",
        description="`images`, `captions`, `volumes` (NIfTI), `latents` (written by `heterodiff encode`), or built in: "
        "`digits`, `microdoppler`, `shapes`, `brain-phantom`",
    )
    path: Path | None = Field(
        None,
        description="folder of images (class subfolders or metadata.csv/jsonl), of images with captions, or of latents",
    )
    captions_file: Path | None = Field(
        None,
        description="captions of source `captions`, relative to data.path; default: annotations/captions_*.json, "
        "results.csv, captions.txt, or metadata.csv/jsonl, whichever is there",
    )
    file_column: str = Field("file_name", description="column or key of the file name in metadata.csv/jsonl")
    text_column: str = Field("text", description="column or key of the caption in metadata.csv/jsonl")
    image_size: Size | None = Field(None, description="height and width after resizing; default: as stored")
    channels: Positive | None = Field(
        None,
        description="expected channels; 8-bit pictures are converted to 1, 3 or 4; default: those of the first image",
    )
    labels: Literal["auto", "required", "none"] = Field(
        "auto", description="auto: labels if there are any; required: an error without; none: ignore them"
    )
    value_range: tuple[float, float] | None = Field(
        None,
        description="stored values mapped to 0 and 1; default: 0..255 for 8 bits, else measured on the training images",
    )
    resize: Literal["crop", "stretch"] = Field(
        "crop", description="crop: keep the aspect ratio and cut the centre; stretch: both sides to image_size"
    )
    val_fraction: Fraction = Field(
        0.1, description="share of images held out, drawn per class; of source `brain-phantom`, of the patients"
    )
    test_fraction: Fraction = Field(
        0.0,
        description="share of images, or patients, that training never reads, kept for the last measurement; "
        "val_fraction is of the others",
    )
    test_patients: tuple[str, ...] | None = Field(
        None, description="patients kept for the last measurement by name, in place of a share of them"
    )
    split_by: Literal["patient", "image"] = Field(
        "patient",
        description="what val_fraction is a share of, where images belong to patients; with very few patients: image, "
        "so that all of them are learned from",
    )
    split_seed: Seed = 0
    horizontal_flip: bool = Field(False, description="flip half of the training images left to right")
    random_crop: Annotated[int, Field(ge=0)] = Field(
        0, description="pad by so many pixels (replicated) and crop back at a random position"
    )
    on_bad: Literal["error", "skip"] = Field("error", description="what to do with images that cannot be used")
    memory_limit_gb: Annotated[float, Field(ge=0)] = Field(
        4.0, description="decode all images once into memory when they need at most this"
    )
    microdoppler: MicrodopplerConfig = Field(MicrodopplerConfig(), description="settings of source `microdoppler`")
    shapes: ShapesConfig = Field(ShapesConfig(), description="settings of source `shapes`")
    volumes: VolumesConfig = Field(VolumesConfig(), description="settings of source `volumes`")
    brain_phantom: BrainPhantomConfig = Field(BrainPhantomConfig(), description="settings of source `brain-phantom`")

    @model_validator(mode="after")
    def _test_images_are_chosen_in_one_way(self) -> "DataConfig":
        if self.test_patients and self.test_fraction:
            raise ValueError("test_patients and test_fraction: patients are kept by name or as a share; leave one out")
        return self


class ModelConfig(Section):
    """The denoiser; see ``heterodiff models`` and the docs of the HAE family."""

    variant: str = "hae-v2"
    model_channels: Positive = 64
    channel_mult: Levels | None = Field(None, description="default chosen from the image size")
    layers_per_block: Positive = 2
    patch_size: Positive = Field(
        1, description="see patches of so many pixels a side as one position: 2 costs a fourth (not film-unet)"
    )
    attention_resolutions: tuple[Positive, ...] | None = Field(
        None, description="downsampling factors with attention; default: the last two levels below 32x32"
    )
    dropout: Fraction = 0.0
    num_heads: Positive = 4
    num_head_channels: Positive | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    attention_pattern: Literal["multiscale", "sequence"] = "multiscale"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    memory_optimization: bool | None = Field(
        None, description="compute what is cheap again in the backward pass; default: for hae-v2-conservative"
    )
    gradient_checkpointing: bool = Field(False, description="compute everything again, block by block")


class DiffusionConfig(Section):
    """The forward process and what the network learns."""

    schedule: Literal["linear", "cosine"] = Field("linear", description="betas; not used by prediction: flow")
    num_train_timesteps: Annotated[int, Field(ge=10)] = 1000
    prediction: Literal["epsilon", "v", "sample", "flow"] = "epsilon"
    learn_variance: bool = False
    weighting: Literal["none", "min-snr"] = "none"
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    p_uncond: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="probability of dropping the condition in training"
    )

    @model_validator(mode="after")
    def _flow_has_no_variance(self) -> "DiffusionConfig":
        if self.learn_variance and self.prediction == "flow":
            raise ValueError("learn_variance needs prediction epsilon, v or sample; flow has no variance")
        return self


class SamplingConfig(Section):
    """How pictures are drawn from the model: previews, `heterodiff sample`, evaluation."""

    sampler: str = "dpmpp"
    num_inference_steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=0)] = Field(2.0, description="1 = unguided")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="share of the noise levels, 0 = clean and 1 = pure noise, that is guided"
    )
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="quantile of |x0| that is scaled back to 1 (Saharia et al. 2022); default: clip only"
    )
    candidates: Positive = Field(
        1,
        description="recipe text-image: draw so many for each picture and keep the one in which the captioner finds "
        "the prompt likeliest",
    )

    @model_validator(mode="after")
    def _interval_is_one(self) -> "SamplingConfig":
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: expected 0 <= low <= high <= 1, found [{low}, {high}]")
        return self


class SegmentationConfig(Section):
    """How anomalies are found with a model of healthy and unhealthy images."""

    method: Literal["forward-process", "ddib", "partial-noising"] = Field(
        "forward-process",
        description="forward-process: AnoFPDM; ddib: encode, decode as healthy; partial-noising: AnoDDPM, which needs "
        "no labels in training",
    )
    depth: Positive = Field(600, description="noise depth: timesteps below this one are used")
    num_inference_steps: Positive = Field(60, description="evenly spaced among them; a step takes two network calls")
    patience: Positive | None = Field(
        None,
        description="forward-process: leave an image once healthy and unconditional predictions of no channel differed "
        "more for so many steps; default: take all steps",
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        3.0, description="1 is unguided; papers that write (1 + w) healthy - w none mean this minus 1"
    )
    score: Literal["method", "peak"] = Field(
        "method",
        description="what an image is judged by: the method's own score (forward-process: the cosine of its errors; "
        "others: their mean), or the peak of its map, its 99 % quantile",
    )
    healthy: str = Field("healthy", description="class name of healthy images; all other classes are unhealthy")
    channels: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="channels whose maps count, from 0; default: all"
    )
    seed: Seed = Field(0, description="of the noise of partial-noising")


class TrainingConfig(Section):
    """The loop."""

    steps: Positive = 20_000
    batch_size: Positive = Field(64, description="images per optimiser step, over all processes")
    accumulation_steps: Positive = Field(1, description="parts a process computes its share of a batch in")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the GPU has it, else float32"
    )
    compile: bool = Field(
        False,
        description="torch.compile the network: minutes at the start, faster steps; needs a C++ compiler on a CPU",
    )
    num_workers: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0
    log_every: Positive = 20
    preview_every: Positive = 1000
    checkpoint_every: Positive = 1000
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    max_nonfinite_steps: Positive = Field(10, description="stop after so many non-finite losses in a row")
    tensorboard: bool = True


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
        if self.kind == "pixels" and self.training is not None:
            raise ValueError("codec.training is for a VAE; set codec.kind=kl-vae and codec.path")
        if self.kind == "kl-vae" and self.path is None:
            raise ValueError(
                "kind kl-vae needs codec.path: a run folder of recipe `vae`, or a folder with a diffusers AutoencoderKL"
            )
        if self.kind == "pixels" and self.path is not None:
            raise ValueError("codec.path is a VAE, which kind pixels does not use; set codec.kind=kl-vae")
        return self


class VAEConfig(Section):
    """The autoencoder that recipe `vae` trains: diffusers' AutoencoderKL, and its losses."""

    init_from: UserPath | None = Field(
        None, description="start from this VAE (a run, or a diffusers AutoencoderKL) instead of from scratch"
    )
    latent_channels: Positive = 4
    block_out_channels: Levels = Field(
        (32, 64, 64), description="channels of each level; every level after the first halves height and width"
    )
    layers_per_block: Positive = 1
    mid_block_attention: bool = False
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        1e-6, description="of the KL divergence of an image's posterior, summed over its latent, in nats"
    )
    structural_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of 1 - SSIM, averaged over scales; 0 leaves it out"
    )
    adversarial_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the patch discriminator's verdict, beside its adaptive weight; 0 leaves it out"
    )
    adversarial_start: Annotated[int, Field(ge=0)] = Field(
        2000, description="step at which the patch discriminator begins to train and to count"
    )


class TextConfig(Section):
    """Of captions: their tokens, the encoder that reads them and the captioner that writes them."""

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
    width: Positive = Field(256, description="of the encoder trained from scratch")
    layers: Positive = 4
    num_heads: Positive = Field(4, description="of the encoder trained from scratch and of the captioner")
    dropout: Fraction = 0.0
    embedding_dim: Positive = Field(512, description="of the vector that stands for a text, and of that for an image")
    captioner_width: Positive = 256
    captioner_layers: Positive = 4


class AlignmentConfig(Section):
    """The image codec of recipe `text-image`, and the losses that train it together with the text networks."""

    latent_channels: Positive = 256
    block_out_channels: Levels | None = Field(
        None,
        description="channels of the encoder's stages, each of which halves height and width; default: from 32 up to "
        "256, as many stages as bring the image to about 8x8",
    )
    backbone: UserPath | None = Field(
        None, description="folder of a pretrained convolutional network of transformers, in place of the stages"
    )
    contrastive_weight: Annotated[float, Field(ge=0)] = 1.0
    reconstruction_weight: Annotated[float, Field(ge=0)] = Field(
        0.5, description="of the image from its map and from both embeddings, and of the caption from the image"
    )
    diffusion_weight: Annotated[float, Field(ge=0)] = Field(0.3, description="of the denoiser, with joint: true")
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


class RunConfig(Section):
    """Everything that defines a run; saved as ``config.yaml`` in its folder, which is enough to repeat it."""

    recipe: Literal["diffusion", "vae", "alignment", "text-image"] = Field(
        "diffusion",
        description="text-image: text to image and back; alignment: its first half alone, all but the denoiser",
    )
    output: Path | None = Field(None, description="run folder; default: runs/<name of the config file>")
    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    vae: VAEConfig = Field(VAEConfig(), description="the autoencoder of recipe `vae`")
    text: TextConfig = Field(TextConfig(), description="text networks of recipe `text-image`")
    alignment: AlignmentConfig = Field(AlignmentConfig(), description="image codec and losses of recipe `text-image`")
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    segmentation: SegmentationConfig = Field(
        SegmentationConfig(), description="of runs whose classes are healthy and unhealthy images"
    )
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_text_image(cls, content: Any) -> Any:
        """The codec and denoiser of recipe `text-image` where the user names none."""
        if not isinstance(content, dict) or content.get("recipe") != "text-image":
            return content
        sections = {name: content.get(name) or {} for name in ("codec", "model", "alignment", "training")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return content  # wrong types are reported as such
        codec: dict[str, Any] = {"kind": "cnn"}
        if not sections["alignment"].get("joint") and sections["codec"].get("path") is None:
            output = content.get("output") or "runs/text-image"
            codec |= {"path": f"{output}/alignment", "training": sections["training"]}
        model = {"variant": "film-unet", "model_channels": 128, "channel_mult": (1, 2, 4)}
        if sections["model"].get("variant", "film-unet") != "film-unet":
            model = {}
        given = {name: value for name, value in sections["codec"].items() if (name, value) != ("path", None)}
        return content | {"codec": codec | given, "model": model | sections["model"]}

    @model_validator(mode="after")
    def _recipe_and_codec_go_together(self) -> "RunConfig":
        with_text = self.recipe == "text-image"
        if with_text != (self.codec.kind == "cnn"):
            raise ValueError(
                f"recipe {self.recipe} with codec.kind={self.codec.kind}: kind cnn is for recipe text-image, which has "
                "no other; leave codec.kind out"
            )
        if with_text and self.alignment.joint and (self.codec.path or self.codec.training):
            raise ValueError("alignment.joint=true trains the codec too; leave codec.path and codec.training out")
        if self.recipe == "alignment" and self.alignment.joint:
            raise ValueError(
                "recipe alignment trains no denoiser, so alignment.joint=true has none to join; set recipe=text-image"
            )
        if self.model.variant == "film-unet" and not with_text:
            raise ValueError("model.variant film-unet is steered by texts; it is for recipe text-image")
        if self.sampling.candidates > 1 and not with_text:
            raise ValueError("sampling.candidates are judged by the captioner of recipe text-image; leave it out")
        return self

    @model_validator(mode="after")
    def _sections_go_together(self) -> "RunConfig":
        if self.recipe == "vae" and self.codec.kind != "pixels":
            raise ValueError("recipe vae trains a VAE with section `training` and has no codec; leave `codec` out")
        if self.codec.kind != "pixels" and self.sampling.dynamic_threshold is not None:
            raise ValueError("sampling.dynamic_threshold is for pixels, latents have no fixed range; leave it out")
        return self

    @model_validator(mode="after")
    def _stored_latents_are_fixed(self) -> "RunConfig":
        data, cached = self.data, self.codec.cache or self.data.source == "latents"
        if self.codec.kind != "pixels" and not self.alignment.joint and cached:
            for key, value in (("horizontal_flip", data.horizontal_flip), ("random_crop", data.random_crop)):
                if value:
                    raise ValueError(
                        f"data.{key}={value} cannot act on stored latents; set codec.cache=false (images are encoded "
                        "with every batch, which is slower), or leave it out"
                    )
        return self
