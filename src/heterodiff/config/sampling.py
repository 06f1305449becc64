"""Sections ``sampling`` and ``segmentation``: what a trained model is used for."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from heterodiff.config.base import BatchSize, Positive, Section, Seed, Timesteps, Width
from heterodiff.config.names import SAMPLERS, known_name


class SamplingConfig(Section):
    """How pictures are drawn from the model: previews, `heterodiff sample`, evaluation."""

    sampler: Annotated[str, known_name("sampler", lambda: SAMPLERS)] = Field(
        "dpmpp", description="`ddpm`, `ddim`, `dpmpp`, `unipc`, `euler`, `heun` or `flow-euler`"
    )
    num_inference_steps: Timesteps = Field(20, description="denoising steps of a picture")
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        2.0,
        description="scale of classifier-free guidance; 1 is unguided, more follows the class or prompt more closely",
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="share of the noise levels, 0 = clean and 1 = pure noise, that is guided"
    )
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="quantile of |x0| that is scaled back to 1 (Saharia et al. 2022); default: clip only"
    )
    candidates: BatchSize = Field(
        1,
        description="recipe text-image: pictures drawn for each one asked for, of which that is kept in which the "
        "captioner finds the prompt likeliest",
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
    depth: Timesteps = Field(600, description="noise depth: timesteps below this one are used")
    num_inference_steps: Timesteps = Field(60, description="evenly spaced among them; a step takes two network calls")
    patience: Positive | None = Field(
        None,
        description="forward-process: leave an image once healthy and unconditional predictions of no channel differed "
        "more for so many steps; default: take all steps",
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        3.0, description="1 is unguided; papers that write (1 + w) healthy - w none mean this minus 1"
    )
    score: Literal["method", "divergence", "peak"] = Field(
        "method",
        description="what an image is judged by: the method's own score (forward-process: the cosine of its errors; "
        "others: their mean); how far the predictions part at most, mean of the channels; or how far the peak of its "
        "smoothed map stands above the map's mean",
    )
    threshold: Literal["quantile", "half-peak"] = Field(
        "quantile",
        description="from which value of the smoothed map on a mask marks: a quantile of the map, the lower the more "
        "the predictions differ, as AnoFPDM does; or half its peak, which suits noisy maps of a short training, too",
    )
    smoothing: Width = Field(
        5, description="side in pixels of the square over which maps are smoothed; 1: not at all, for small anomalies"
    )
    drop_small: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="components of masks of at most so many pixels are dropped; default: 40 of 128x128, and the same "
        "share of other sizes",
    )
    healthy: str = Field("healthy", description="class name of healthy images; all other classes are unhealthy")
    channels: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="channels whose maps count, from 0; default: all"
    )
    seed: Seed = Field(0, description="seed of the noise of partial-noising")

    @field_validator("smoothing")
    @classmethod
    def _square_has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number, so that the square has a middle pixel")
        return value
