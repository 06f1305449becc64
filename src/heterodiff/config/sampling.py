"""Sections ``sampling`` and ``segmentation``: use of a trained model."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from heterodiff.config.base import BatchSize, NonNegativeInt, PositiveInt, Section, Seed, Timesteps, UserPath, Width
from heterodiff.config.names import SAMPLERS, known_name


class SamplingConfig(Section):
    """Sampling of images: previews, `heterodiff sample`, evaluation."""

    sampler: Annotated[str, known_name("sampler", lambda: SAMPLERS)] = Field(
        "dpmpp", description="`ddpm`, `ddim`, `dpmpp`, `unipc`, `euler`, `heun` or `flow-euler`"
    )
    num_inference_steps: Timesteps = Field(20, description="number of denoising steps")
    guidance_scale: NonNegativeFloat = Field(
        2.0, description="classifier-free guidance scale; 1: unguided; larger follows class or prompt more closely"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="range of noise levels with guidance, 0 = clean and 1 = pure noise"
    )
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="quantile of |x0| for dynamic thresholding (Saharia et al. 2022); default: clip only"
    )
    candidates: BatchSize = Field(
        1, description="images drawn for each one returned: the one for which the captioner rates the prompt highest"
    )

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> "SamplingConfig":
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: expected 0 <= low <= high <= 1, found [{low}, {high}]")
        return self


class SegmentationConfig(Section):
    """Anomaly segmentation with a model of healthy and unhealthy images."""

    method: Literal["label-difference", "forward-process", "ddib", "partial-noising", "classifier-guidance"] = Field(
        "label-difference",
        description="label-difference: predictions for both labels and intensities, weighted as image labels teach; "
        "forward-process: AnoFPDM; ddib: DDIM encoding, healthy decoding; partial-noising: AnoDDPM, without labels; "
        "classifier-guidance: DDIM encoding, decoding guided by a classifier (Wolleb et al. 2022)",
    )
    classifier: UserPath | None = Field(
        None, description="classifier-guidance: run of recipe `classifier` on the same images"
    )
    classifier_scale: NonNegativeFloat = Field(
        100.0, description="classifier-guidance: factor of the classifier's gradient; 0: unguided"
    )
    depth: Timesteps | None = Field(
        None,
        description="noise depth: only timesteps below this one are used; default: label-difference up to a standard "
        "deviation of the noise of 0.7, others 600",
    )
    num_inference_steps: Timesteps | None = Field(
        None,
        description="evenly spaced steps below depth, two network calls each; default: label-difference 12, others 60",
    )
    patience: PositiveInt | None = Field(
        None,
        description="forward-process: stop after this number of steps in which the healthy and unconditional "
        "predictions of no channel differ more than before; default: take all steps",
    )
    guidance_scale: NonNegativeFloat = Field(
        3.0, description="classifier-free guidance scale; 1: unguided; in papers with (1 + w) healthy - w none: 1 + w"
    )
    score: Literal["method", "divergence", "peak"] = Field(
        "method",
        description="anomaly score of an image; method: that of the method (forward-process: cosine of the errors; "
        "others: their mean); divergence: largest difference of the predictions, mean of the channels; peak: maximum "
        "minus mean of the smoothed map",
    )
    threshold: Literal["quantile", "half-peak"] = Field(
        "quantile",
        description="threshold of the smoothed map; quantile: a quantile of the map, lower the more the predictions "
        "differ, as in AnoFPDM; half-peak: half its maximum, which also suits the noisy maps of short trainings",
    )
    smoothing: Width = Field(5, description="side in pixels of the smoothing window; 1: none, for small anomalies")
    drop_small: NonNegativeInt | None = Field(
        None,
        description="drop components of a mask of at most this area in pixels; default: 40 at 128x128, scaled by image "
        "area",
    )
    healthy: str = Field("healthy", description="class of healthy images; all other classes are unhealthy")
    channels: tuple[NonNegativeInt, ...] | None = Field(
        None, description="indices of the channels used for maps; default: all"
    )
    network_steps: NonNegativeInt = Field(
        800,
        description="training steps of a segmentation network that learns, at calibration, from the masks found in "
        "training images and from their labels; 0: none, masks are found by the denoiser",
    )
    seed: Seed = Field(0, description="random seed of the noise and of the segmentation network")

    @model_validator(mode="after")
    def _has_a_classifier(self) -> "SegmentationConfig":
        if self.method == "classifier-guidance" and self.classifier is None:
            raise ValueError("method classifier-guidance needs segmentation.classifier: a run of recipe classifier")
        return self

    @field_validator("smoothing")
    @classmethod
    def _window_has_a_centre(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number, so that the window has a centre pixel")
        return value
