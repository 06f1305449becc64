"""Anomaly detection with a class-conditional model: maps, masks and a decision for every image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.config import SegmentationConfig
from heterodiff.diffusion.anomaly import (
    AnomalyMaps,
    Progress,
    classifier_guidance,
    ddib,
    difference_timesteps,
    forward_process,
    label_difference,
    noising_timesteps,
    partial_noising,
)
from heterodiff.diffusion.guidance import null_labels
from heterodiff.errors import ConfigError
from heterodiff.pipelines.anomalies import masks as anomaly_masks
from heterodiff.pipelines.anomalies.label_weights import LabelWeights, intensity_planes, planes_of
from heterodiff.pipelines.anomalies.masks import Calibration
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.pipelines.load import load_classifier

LABEL_NOISE = 0.7
"""Standard deviation of the noise up to which labels are compared: beyond it, images hardly show where a lesion is."""
USUAL_DEPTH = 600
LABEL_FREE = ("partial-noising", "classifier-guidance")
"""Methods whose denoiser needs no labels."""


@dataclass(frozen=True)
class Segmentation:
    """Anomalies of images.

    Attributes:
        masks: (B, H, W) bool, without small components, also of images that are judged healthy.
        unhealthy: (B,) bool, the decision for each image.
        maps: (B, H, W) float32, mean of the channels' squared differences, in units of [-1, 1]; of method
            label-difference the probability, 0 to 1, that a pixel belongs to a lesion, which is not calibrated.
        score: (B,) the higher, the more anomalous.
        smoothed: (B, H, W) maps smoothed as for masks.
        calls: (B,) network calls that each image took.
    """

    masks: np.ndarray
    unhealthy: np.ndarray
    maps: np.ndarray
    score: np.ndarray
    smoothed: np.ndarray
    calls: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Segmentation"]) -> "Segmentation":
        """Concatenate ``parts``."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @property
    def mixed_masks(self) -> np.ndarray:
        """The masks (B, H, W), empty where the image is judged healthy."""
        return self.masks & self.unhealthy[:, None, None]


class Segmenter:
    """Detects anomalies with a run's model.

    Args:
        pipeline: of a run on pixels whose classes include ``settings.healthy``, unless the method needs no labels.

    Attributes:
        needs_labels: whether the method needs a denoiser of classes.

    Raises:
        ConfigError: a model of latents; settings, or a classifier, that do not fit the model.
        RunError, CheckpointError: no usable classifier.
    """

    def __init__(self, pipeline: GenerationPipeline, settings: SegmentationConfig):
        self.pipeline, self.settings = pipeline, settings
        if pipeline.vae is not None:
            raise ConfigError("segmentation compares pixels; this run denoises latents of a VAE: train one on pixels")
        if pipeline.spec is not None and pipeline.spec.condition is not None:
            raise ConfigError(
                "segmentation compares images with their counterparts of another class; this run draws them of images "
                "(data.condition): train one without"
            )
        self.denoiser = pipeline.denoiser
        steps = self.denoiser.schedule.num_train_timesteps
        self.by_labels = settings.method == "label-difference"
        depth = settings.depth or self._default_depth()
        if depth > steps:
            raise ConfigError(f"segmentation.depth={depth}: the run was trained on {steps} timesteps")
        count = pipeline.unet.config.in_channels
        if wrong := [c for c in settings.channels or () if c >= count]:
            raise ConfigError(
                f"segmentation.channels: {wrong[0]} is not one of the run's {count} channels, 0..{count - 1}"
            )
        self.channels = list(range(count) if settings.channels is None else settings.channels)
        timesteps = difference_timesteps if self.by_labels else noising_timesteps
        self.timesteps = timesteps(depth, settings.num_inference_steps or (12 if self.by_labels else 60))
        self.healthy = -1
        self.needs_labels = settings.method not in LABEL_FREE
        if settings.classifier is not None:
            name = f"segmentation.classifier={settings.classifier}"
            self.classifier = load_classifier(settings.classifier, pipeline.device)
            self.classifier.check_fits(name, pipeline, pipeline.class_names, settings.healthy)
        if self.needs_labels:
            if settings.healthy not in pipeline.class_names:
                known = ", ".join(pipeline.class_names) or "none"
                raise ConfigError(
                    f"segmentation.healthy='{settings.healthy}': the run's classes are {known}; name the healthy one, "
                    "or set segmentation.method=partial-noising for a model of healthy images alone"
                )
            self.healthy = pipeline.class_names.index(settings.healthy)
            if self.by_labels and len(pipeline.class_names) < 2:
                raise ConfigError(
                    f"segmentation.method=label-difference: the run knows the class '{settings.healthy}' alone; train "
                    "with unhealthy images, too, or set segmentation.method=partial-noising"
                )

    def _default_depth(self) -> int:
        schedule = self.denoiser.schedule
        if self.by_labels:
            return max(1, int((schedule.sigma <= LABEL_NOISE).sum()))
        return min(USUAL_DEPTH, schedule.num_train_timesteps)

    @torch.no_grad()
    def maps(self, images: Tensor, first: int = 0, progress: Progress = lambda step, total: None) -> AnomalyMaps:
        """Return anomaly maps of the channels compared, with the scores that images are judged by, on the CPU.

        With method label-difference the maps are the planes of
        :func:`heterodiff.pipelines.anomalies.label_weights.planes_of`, and scores follow from the calibration.

        Args:
            images: (B, C, H, W) in [0, 1].
            first: number of the first of them among all images, which seeds its noise.
        """
        settings = self.settings
        x = images.to(self.pipeline.device, torch.float32) * 2 - 1
        healthy = torch.full((len(x),), self.healthy, device=x.device)
        none = null_labels(healthy)
        options: dict[str, Any] = {"channels": self.channels, "progress": progress}
        if settings.method == "partial-noising":
            noise = self.pipeline.draw_noise(x.shape, seeded_generators(settings.seed, len(x), first))
            found = partial_noising(*self.denoiser, x, none, self.timesteps, noise=noise, **options)
        elif self.by_labels:
            generators = seeded_generators(settings.seed, len(x), first)
            others = [k for k in range(len(self.pipeline.class_names)) if k != self.healthy]
            unhealthy = [torch.full_like(healthy, k) for k in others]
            options["noise"] = partial(self.pipeline.draw_noise, x.shape, generators)
            found = label_difference(*self.denoiser, x, healthy, unhealthy, self.timesteps, **options)
            shown = planes_of(found.maps.cpu().numpy(), images.cpu().numpy(), self.channels, settings.smoothing)
            return AnomalyMaps(torch.from_numpy(shown), found.divergence.cpu(), found.score.cpu(), found.calls.cpu())
        elif settings.method == "classifier-guidance":
            options["log_healthy"] = self.classifier.log_probability(settings.healthy)
            options["scale"] = settings.classifier_scale
            found = classifier_guidance(*self.denoiser, x, none, self.timesteps, **options)
        else:
            options["guidance_scale"] = settings.guidance_scale
            method = ddib
            if settings.method == "forward-process":
                method, options["patience"] = forward_process, settings.patience
            found = method(*self.denoiser, x, healthy, none, self.timesteps, **options)
        maps, divergence, score = found.maps.cpu(), found.divergence.cpu(), found.score.cpu()
        if settings.score == "divergence":
            score = divergence.mean(dim=1)
        if settings.score == "peak":
            score = torch.tensor([anomaly_masks.peak_score(one, settings.smoothing) for one in maps.numpy()])
        return AnomalyMaps(maps, divergence, score, found.calls.cpu())

    def masks(self, found: AnomalyMaps, calibration: Calibration) -> Segmentation:
        """Return masks and decisions of anomaly maps."""
        maps, divergence, score = (values.numpy() for values in (found.maps, found.divergence, found.score))
        largest, smoothing = np.array(calibration.largest_divergence), self.settings.smoothing
        if calibration.evidence is not None:
            return weighed(maps, calibration.evidence, self.settings, calibration.score_limit, found.calls.numpy())
        if self.settings.threshold == "half-peak":
            masks = [anomaly_masks.half_peak_mask(one, smoothing) for one in maps]
        else:
            pairs = zip(maps, divergence, strict=True)
            masks = [anomaly_masks.anomaly_mask(one, each, largest, smoothing) for one, each in pairs]
        masks = [anomaly_masks.drop_small(mask, self.settings.drop_small) for mask in masks]
        smoothed = np.stack([anomaly_masks.smoothed_map(one, self.settings.threshold, smoothing) for one in maps])
        unhealthy = score >= calibration.score_limit
        return Segmentation(np.stack(masks), unhealthy, maps.mean(axis=1), score, smoothed, found.calls.numpy())


def weighed(
    planes: np.ndarray, weights: LabelWeights, settings: SegmentationConfig, limit: float, calls: np.ndarray
) -> Segmentation:
    """Return masks, from half the peak of each image up, and decisions of weighted ``planes`` (B, P, H, W).

    Args:
        limit: images of at least this score are judged unhealthy.
        calls: (B,) network calls that the planes took.
    """
    values, maps = weights.values(planes), weights.probabilities(planes)
    masks = [anomaly_masks.half_peak_mask(one[None], 1) for one in maps]  # the planes have been smoothed
    score = weights.scores(values)
    dropped = np.stack([anomaly_masks.drop_small(mask, settings.drop_small) for mask in masks])
    return Segmentation(dropped, score >= limit, maps, score, maps, calls)


def intensity_alone(
    images: np.ndarray, calibration: Calibration, settings: SegmentationConfig, channels: list[int]
) -> Segmentation:
    """Return what the intensities of images (B, C, H, W) in [0, 1], weighted by image labels, find without a model.

    The calibration must hold their weights. Decisions are those of values above 0: no threshold is learned for them.
    """
    assert calibration.intensity is not None
    planes = intensity_planes(images, channels, settings.smoothing)
    return weighed(planes, calibration.intensity, settings, 0.0, np.zeros(len(images), np.int64))
