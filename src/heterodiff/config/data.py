"""Section ``data``: sources of images, simulated ones included."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from heterodiff.config.base import Colour, Fraction, NonNegativeInt, Range, Section, Seed, Share, Size, UserPath, Width
from heterodiff.config.names import SOURCES, known_name

Speed = Annotated[float, Field(ge=0, le=300)]
WalkingSpeed = Annotated[float, Field(ge=0.3, le=2.2)]
PendulumSpeed = Annotated[float, Field(ge=0, le=2.2)]
RunningSpeed = Annotated[float, Field(ge=2, le=8)]
Decibels = Annotated[float, Field(ge=-100, le=100)]
Aspect = Annotated[float, Field(ge=0, le=180)]
LesionRadius = Annotated[float, Field(ge=0.08, le=0.4)]
Elevation = Annotated[float, Field(ge=0, le=80)]


class MicrodopplerSpeeds(Section):
    """Ranges of speeds in m/s, from which each simulated target draws its own; bounded by the motion models."""

    walking: Range[WalkingSpeed] = Field((0.8, 1.8), description="walking person")
    running: Range[RunningSpeed] = Field((2.5, 4.5), description="running person")
    quadrotor: Range[Speed] = Field((1.0, 8.0), description="flight of a quadrotor")
    helicopter: Range[Speed] = Field((5.0, 30.0), description="flight of a helicopter")
    bird: Range[Speed] = Field((4.0, 9.0), description="flight of a bird")
    pendulum: Range[PendulumSpeed] = Field((0.5, 1.5), description="bob of a pendulum at its lowest point")


class MicrodopplerConfig(Section):
    """Simulated radar and targets of the built-in source ``microdoppler``."""

    images_per_class: Annotated[int, Field(gt=0, le=1_000_000)] = Field(200, description="number of images per class")
    seed: Seed = Field(0, description="random seed; image k of a class depends on seed, class and k alone")
    carrier_frequency_hz: Annotated[float, Field(ge=1e8, le=3e11)] = Field(
        10e9, description="carrier frequency of the radar"
    )
    prf_hz: Annotated[float, Field(ge=16, le=1e7)] | None = Field(
        None, description="pulse repetition frequency; default: per class, high enough to avoid aliasing"
    )
    duration_s: Annotated[float, Field(gt=0, le=600)] | None = Field(
        None, description="length of a recording; default: a few motion cycles of each class"
    )
    window_s: Annotated[float, Field(gt=0, le=60)] | None = Field(
        None, description="window of the short-time Fourier transform; default: per class"
    )
    snr_db: Range[Decibels] = Field(
        (10.0, 25.0), description="mean signal power over noise power, before the transform"
    )
    dynamic_range_db: Annotated[float, Field(ge=1, le=200)] = Field(
        45.0, description="dynamic range of an image, below its strongest pixel"
    )
    aspect_deg: Range[Aspect] = Field((0.0, 30.0), description="horizontal angle between heading and line of sight")
    elevation_deg: Range[Elevation] = Field(
        (10.0, 40.0), description="elevation of flying targets; the others are level with the radar"
    )
    receding: Share = Field(0.5, description="fraction of targets that move away from the radar")
    speeds_m_s: MicrodopplerSpeeds = MicrodopplerSpeeds()


class ShapesConfig(Section):
    """Drawings of the built-in source ``shapes``: one or two coloured shapes, with captions."""

    images: Annotated[int, Field(gt=1, le=10_000_000)] = Field(4000, description="number of images")
    seed: Seed = Field(0, description="random seed; image k depends on seed and k alone")
    pairs: Share = Field(0.5, description="fraction of images with two shapes")
    unseen: tuple[str, ...] = Field(
        (), description="held-out combinations, such as `purple triangle`, to test generalisation"
    )


class BrainPhantomConfig(Section):
    """Simulated heads and lesions of the built-in source ``brain-phantom``."""

    patients: Annotated[int, Field(gt=1, le=100_000)] = Field(120, description="number of simulated patients")
    slices_per_patient: Annotated[int, Field(gt=0, le=1000)] = Field(16, description="slices per patient")
    seed: Seed = Field(0, description="random seed; slice k of a patient depends on seed, patient and k alone")
    unhealthy: Share = Field(0.4, description="fraction of the slices that show a lesion")
    lesion_radius: Range[LesionRadius] = Field(
        (0.10, 0.24),
        description="radius in the middle slice of a lesion, relative to half the shorter side of the image",
    )
    contrast: Annotated[float, Field(ge=0, le=3)] = Field(
        1.0,
        description="contrast between lesion and white matter; 1: slightly brighter than grey matter on FLAIR and T2",
    )
    bias: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="strength of the smooth intensity bias field of each modality"
    )
    noise: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.03, description="standard deviation of the noise; scalp and fluid are at about 0.8"
    )


class VolumesConfig(Section):
    """NIfTI volumes of patients, which source ``volumes`` slices."""

    layout: Literal["brats", "atlas"] = Field(
        "brats", description="file names; brats: `*_flair *_t1 *_t1ce *_t2 [*_seg]`; atlas: `*_T1w [*_mask]`"
    )
    modalities: dict[str, str] | None = Field(
        None,
        description="file name pattern of each channel, without .nii.gz, such as `{flair: '*FLAIR*', t1: '*T1*'}`; "
        "default: of layout",
    )
    mask: str | None = Field(None, description="file name pattern of the masks; default: of layout")
    cache: UserPath | None = Field(
        None, description="folder of the cached slices; default: data.path with _slices appended"
    )
    least_brain: Fraction = Field(0.02, description="minimum brain area of a slice, as a fraction of its area")
    normalization: Literal["patient", "slice"] = Field(
        "patient",
        description="scale of each channel; patient: 99th percentile of the patient's foreground to 1, so that "
        "brightness compares between slices; slice: minimum and maximum of each slice to 0 and 1, as in earlier runs",
    )

    @model_validator(mode="after")
    def _has_modalities(self) -> "VolumesConfig":
        if self.modalities is not None and not self.modalities:
            raise ValueError("modalities: expected at least one pattern; leave it out to use those of the layout")
        return self


class ConditionConfig(Section):
    """An image that is given beside each image, one of: other files, or something made of the image itself."""

    column: str | None = Field(
        None, description="column of metadata.csv/jsonl with the file of the condition image of each image"
    )
    folder: UserPath | None = Field(
        None, description="folder with a condition image for each image, under the same name but for the suffix"
    )
    downscale: Annotated[int, Field(ge=2, le=64)] | None = Field(
        None, description="the image itself in a resolution lower by this factor: super-resolution"
    )
    channels: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = Field(
        None, description="channels of the image, from 0, that are given; the others are drawn: modality synthesis"
    )
    edges: Literal[True] | None = Field(None, description="edges of the image: the magnitude of its gradient")
    mask: Literal[True] | None = Field(None, description="mask of the anomaly, of sources with masks")

    @property
    def kind(self) -> str:
        """The one key that is set."""
        return next(iter(self.model_fields_set))

    @property
    def value(self) -> Any:
        """Its value."""
        return getattr(self, self.kind)

    @model_validator(mode="before")
    @classmethod
    def _is_one(cls, given: Any) -> Any:
        chosen = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given
        if not isinstance(chosen, dict) or len(chosen) != 1:
            names = ", ".join(cls.model_fields)
            raise ValueError(f"expected one of {names}, such as {{downscale: 4}}")
        return chosen


class DataConfig(Section):
    """Images and their labels or captions."""

    source: Annotated[str, known_name("source", lambda: SOURCES)] = Field(
        "images",
        description="`images`, `captions`, `webdataset` (tar files), `hf-dataset` (of the package datasets), "
        "`volumes` (NIfTI, or slices in npz files), `latents` (written by `heterodiff encode`), or built in: `digits`, "
        "`microdoppler`, `shapes`, `brain-phantom`",
    )
    path: Path | None = Field(
        None,
        description="folder of images (class subfolders or metadata.csv/jsonl), images with captions, tar files (or "
        "`name-{000..031}.tar`, also at an http address), parquet files, volumes, or latents",
    )
    captions_file: Path | None = Field(
        None,
        description="captions, relative to data.path; default: annotations/captions_*.json, results.csv, captions.txt "
        "or metadata.csv/jsonl",
    )
    file_column: str = Field("file_name", description="column or key of file names in metadata.csv/jsonl")
    text_column: str = Field("text", description="column or key of captions in metadata.csv/jsonl")
    image_size: Size | None = Field(
        None, description="height and width after resizing, or one number for both; default: as stored"
    )
    channels: Width | None = Field(
        None,
        description="number of channels; 8-bit images are converted to 1, 3 or 4; default: as stored; for pictures of "
        "several kinds RGBA if any is transparent, else RGB",
    )
    background: Colour = Field(
        "white",
        description="colour under what is transparent in pictures that are converted to 1 or 3 channels: a name, or "
        "as `#102030`",
    )
    labels: Literal["auto", "required", "none"] = Field(
        "auto", description="auto: use labels if there are any; required: fail without labels; none: ignore labels"
    )
    value_range: tuple[float, float] | None = Field(
        None,
        description="stored values mapped to 0 and 1; default: 0 and 255 for 8 bits, else those of training images",
    )
    resize: Literal["crop", "stretch"] = Field(
        "crop", description="crop: keep the aspect ratio and crop the centre; stretch: resize both sides independently"
    )
    val_fraction: Fraction = Field(
        0.1, description="fraction of images, stratified by class, or patients for validation"
    )
    test_fraction: Fraction = Field(
        0.0,
        description="fraction of images or patients for the test set, unused in training; val_fraction is of the rest",
    )
    test_patients: tuple[str, ...] | None = Field(
        None, description="patients of the test set, in place of test_fraction"
    )
    split_by: Literal["patient", "image"] = Field(
        "patient", description="unit of the split, if images belong to patients; image: if there are too few patients"
    )
    split_seed: Seed = Field(0, description="random seed of the split")
    train_classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="classes to train on, such as [healthy]; others are for validation and test; default: all"
    )
    conditions: dict[str, Literal["class", "number"]] | None = Field(
        None,
        description="columns of metadata as further conditions, such as `{user: class, angle_deg: number}`; an empty "
        "cell means no condition. Also built in: `height` of slices; `speed_m_s`, `aspect_deg` and `elevation_deg` of "
        "microdoppler",
    )
    condition: ConditionConfig | None = Field(
        None,
        description="an image given beside each image, which the network sees as further channels: `{column: NAME}`, "
        "`{folder: PATH}`, `{downscale: 4}`, `{channels: [0, 1]}`, `{edges: true}` or `{mask: true}`; `heterodiff "
        "translate` draws images of such",
    )
    horizontal_flip: bool = Field(False, description="flip training images left to right with probability 0.5")
    random_crop: NonNegativeInt = Field(
        0, description="pad by this number of pixels (edge replication), then crop at random"
    )
    on_bad: Literal["error", "skip"] = Field("error", description="action for images that cannot be used")
    memory_limit_gb: NonNegativeFloat = Field(4.0, description="keep decoded images in memory if all fit in this size")
    keep_on_device: bool | Literal["auto"] = Field(
        "auto",
        description="keep training images on the GPU, as stored; auto: if they take at most 10 % of its free memory",
    )
    microdoppler: MicrodopplerConfig = Field(MicrodopplerConfig(), description="settings of source `microdoppler`")
    shapes: ShapesConfig = Field(ShapesConfig(), description="settings of source `shapes`")
    volumes: VolumesConfig = Field(VolumesConfig(), description="settings of source `volumes`")
    brain_phantom: BrainPhantomConfig = Field(BrainPhantomConfig(), description="settings of source `brain-phantom`")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of metadata that are read, besides file names, labels and captions."""
        of_condition = (self.condition.column,) if self.condition and self.condition.column else ()
        return (*(self.conditions or ()), *of_condition)

    @model_validator(mode="after")
    def _has_one_test_set(self) -> "DataConfig":
        if self.test_patients and self.test_fraction:
            raise ValueError("test_patients and test_fraction: both choose the test set; leave one out")
        return self
