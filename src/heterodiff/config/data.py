"""Section ``data``: where images come from, and the images that are made here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from heterodiff.config.base import Fraction, Section, Seed, Size, UserPath, Width
from heterodiff.config.names import SOURCES, known_name


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("expected [lowest, highest], the lower number first")
    return limits


Speed = Annotated[float, Field(ge=0, le=300)]
WalkingSpeed = Annotated[float, Field(ge=0.3, le=2.2)]
PendulumSpeed = Annotated[float, Field(ge=0, le=2.2)]
RunningSpeed = Annotated[float, Field(ge=2, le=8)]
Decibels = Annotated[float, Field(ge=-100, le=100)]
Aspect = Annotated[float, Field(ge=0, le=180)]
LesionRadius = Annotated[float, Field(ge=0.08, le=0.4)]
Elevation = Annotated[float, Field(ge=0, le=80)]


class MicrodopplerSpeeds(Section):
    """Speeds in m/s from which each simulated target draws its own; the limits are those of the motion models."""

    walking: Annotated[tuple[WalkingSpeed, WalkingSpeed], AfterValidator(_ascending)] = Field(
        (0.8, 1.8), description="of a walking person"
    )
    running: Annotated[tuple[RunningSpeed, RunningSpeed], AfterValidator(_ascending)] = Field(
        (2.5, 4.5), description="of a running person"
    )
    quadrotor: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = Field(
        (1.0, 8.0), description="of a quadrotor's flight"
    )
    helicopter: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = Field(
        (5.0, 30.0), description="of a helicopter's flight"
    )
    bird: Annotated[tuple[Speed, Speed], AfterValidator(_ascending)] = Field(
        (4.0, 9.0), description="of a bird's flight"
    )
    pendulum: Annotated[tuple[PendulumSpeed, PendulumSpeed], AfterValidator(_ascending)] = Field(
        (0.5, 1.5), description="of the bob at its lowest point"
    )


class MicrodopplerConfig(Section):
    """The simulated radar of the built-in source ``microdoppler`` and what it looks at."""

    images_per_class: Annotated[int, Field(gt=0, le=1_000_000)] = Field(
        200, description="simulated pictures of each class"
    )
    seed: Seed = Field(0, description="picture k of a class depends on seed, class and k alone")
    carrier_frequency_hz: Annotated[float, Field(ge=1e8, le=3e11)] = Field(
        10e9, description="carrier frequency of the radar"
    )
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
        45.0, description="range of a picture below its strongest pixel"
    )
    aspect_deg: Annotated[tuple[Aspect, Aspect], AfterValidator(_ascending)] = Field(
        (0.0, 30.0), description="angle between the heading and the direction to the radar, seen from above"
    )
    elevation_deg: Annotated[tuple[Elevation, Elevation], AfterValidator(_ascending)] = Field(
        (10.0, 40.0), description="angle of flying targets above the radar; the others are level with it"
    )
    receding: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the targets turned around, which move away"
    )
    speeds_m_s: MicrodopplerSpeeds = MicrodopplerSpeeds()


class ShapesConfig(Section):
    """The drawn pictures of the built-in source ``shapes``: one or two coloured shapes, with true captions."""

    images: Annotated[int, Field(gt=1, le=10_000_000)] = Field(4000, description="number of pictures")
    seed: Seed = Field(0, description="picture k depends on seed and k alone")
    pairs: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="share of the pictures with two shapes")
    unseen: tuple[str, ...] = Field(
        (), description="combinations such as `purple triangle` that no picture shows, to ask for them later"
    )


class BrainPhantomConfig(Section):
    """The simulated heads of the built-in source ``brain-phantom``, and how hard their lesions are to see."""

    patients: Annotated[int, Field(gt=1, le=100_000)] = Field(120, description="number of simulated patients")
    slices_per_patient: Annotated[int, Field(gt=0, le=1000)] = Field(16, description="slices of each patient")
    seed: Seed = Field(0, description="slice k of a patient depends on seed, patient and k alone")
    unhealthy: Annotated[float, Field(ge=0, le=1)] = Field(0.4, description="share of the slices that show a lesion")
    lesion_radius: Annotated[tuple[LesionRadius, LesionRadius], AfterValidator(_ascending)] = Field(
        (0.10, 0.24),
        description="radius in the lesion's middle slice, in units of half the shorter side of the picture",
    )
    contrast: Annotated[float, Field(ge=0, le=3)] = Field(
        1.0, description="contrast of lesions against white matter; 1: on FLAIR and T2 little brighter than grey matter"
    )
    bias: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="strength of the smooth field that brightens one side of a modality"
    )
    noise: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.03, description="std of the noise; scalp and fluid reach about 0.8"
    )


class VolumesConfig(Section):
    """NIfTI volumes of patients, of which source ``volumes`` makes slices."""

    layout: Literal["brats", "atlas"] = Field(
        "brats", description="file names; brats: `*_flair *_t1 *_t1ce *_t2 [*_seg]`; atlas: `*_T1w [*_mask]`"
    )
    modalities: dict[str, str] | None = Field(
        None,
        description="own file name patterns without .nii.gz, a channel each, such as `{flair: '*FLAIR*', t1: '*T1*'}`",
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

    source: Annotated[str, known_name("source", lambda: SOURCES)] = Field(
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
    image_size: Size | None = Field(
        None, description="height and width after resizing, or one number for both; default: as stored"
    )
    channels: Width | None = Field(
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
    split_seed: Seed = Field(0, description="seed of the draw of held-out and test images")
    train_classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="classes that are trained on, such as [healthy]; others are only validated and tested with; "
        "default: all",
    )
    horizontal_flip: bool = Field(False, description="flip half of the training images left to right")
    random_crop: Annotated[int, Field(ge=0)] = Field(
        0, description="pixels by which images are padded (replicated) and then cropped back at a random position"
    )
    on_bad: Literal["error", "skip"] = Field("error", description="what to do with images that cannot be used")
    memory_limit_gb: Annotated[float, Field(ge=0)] = Field(
        4.0, description="decode all images once into memory when they need at most this"
    )
    keep_on_device: bool | Literal["auto"] = Field(
        "auto",
        description="keep all training images on the GPU as they are stored; auto: where they take at most a tenth "
        "of its free memory",
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
