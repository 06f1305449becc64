"""Finding anomalies with a class-conditional model of a run: maps, masks and a decision for every image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.config import SegmentationConfig
from heterodiff.devices import DTYPES
from heterodiff.diffusion.anomaly import AnomalyMaps, ddib, forward_process, noising_timesteps, partial_noising
from heterodiff.diffusion.guidance import null_labels
from heterodiff.diffusion.sampling import draw_noise
from heterodiff.errors import CheckpointError, ConfigError, RunError, unknown_name
from heterodiff.files import read_json
from heterodiff.pipelines.anomaly_masks import (
    Calibration,
    anomaly_mask,
    drop_small,
    half_peak_mask,
    peak_score,
    smoothed_map,
)
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.run_folder import RunFolder

DEFAULT_PRECISION = "float32"
"""Of the network in segmentation where none is chosen; also that of calibrations that name none."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Segmentation:
    """What was found in images.

    Attributes:
        masks: (B, H, W) bool, without small components; not yet emptied where an image is judged healthy.
        unhealthy: (B,) bool, the decision for each image.
        maps: (B, H, W) float32, mean of the channels' squared differences, in units of [-1, 1].
        score: (B,) the higher, the more anomalous.
    """

    masks: np.ndarray
    unhealthy: np.ndarray
    maps: np.ndarray
    score: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Segmentation"]) -> "Segmentation":
        """That of all images of ``parts``, in their order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @property
    def mixed_masks(self) -> np.ndarray:
        """The masks (B, H, W), empty where the image is judged healthy."""
        return self.masks & self.unhealthy[:, None, None]


class Segmenter:
    """A run's model as a finder of anomalies.

    Args:
        pipeline: of a run on pixels whose classes include ``settings.healthy``.
        settings: method, steps and channels.

    Raises:
        ConfigError: a model of latents; settings that do not fit the model.
    """

    def __init__(self, pipeline: GenerationPipeline, settings: SegmentationConfig):
        self.pipeline, self.settings = pipeline, settings
        if pipeline.vae is not None:
            raise ConfigError("segmentation compares pixels; this run denoises latents of a VAE: train one on pixels")
        self.denoiser = pipeline.denoiser
        steps = self.denoiser.schedule.num_train_timesteps
        if settings.depth > steps:
            raise ConfigError(f"segmentation.depth={settings.depth}: the run was trained on {steps} timesteps")
        count = pipeline.unet.config.in_channels
        if wrong := [c for c in settings.channels or () if c >= count]:
            raise ConfigError(
                f"segmentation.channels: {wrong[0]} is none of the run's {count} channels, 0..{count - 1}"
            )
        self.channels = list(range(count) if settings.channels is None else settings.channels)
        self.timesteps = noising_timesteps(settings.depth, settings.num_inference_steps)
        self.healthy = -1
        if settings.method != "partial-noising":
            if settings.healthy not in pipeline.class_names:
                known = ", ".join(pipeline.class_names) or "none"
                raise ConfigError(
                    f"segmentation.healthy='{settings.healthy}': the run's classes are {known}; name the healthy one, "
                    "or set segmentation.method=partial-noising for a model of healthy images alone"
                )
            self.healthy = pipeline.class_names.index(settings.healthy)

    @torch.no_grad()
    def maps(self, images: Tensor, first: int = 0, progress: Progress = lambda step, total: None) -> AnomalyMaps:
        """Return anomaly maps of the channels compared, with the scores that images are judged by, on the CPU.

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
            noise = draw_noise(x.shape, seeded_generators(settings.seed, len(x), first), x.device)
            found = partial_noising(*self.denoiser, x, none, self.timesteps, noise=noise, **options)
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
            score = torch.tensor([peak_score(one, settings.smoothing) for one in maps.numpy()])
        return AnomalyMaps(maps, divergence, score, found.calls.cpu())

    def smoothed(self, found: AnomalyMaps) -> np.ndarray:
        """Return the mean over the channels of anomaly maps, (B, H, W), smoothed as for masks."""
        settings = self.settings
        return np.stack([smoothed_map(one, settings.threshold, settings.smoothing) for one in found.maps.numpy()])

    def masks(self, found: AnomalyMaps, calibration: Calibration) -> Segmentation:
        """Return masks and decisions of anomaly maps."""
        maps, divergence, score = (values.numpy() for values in (found.maps, found.divergence, found.score))
        largest, smoothing = np.array(calibration.largest_divergence), self.settings.smoothing
        if self.settings.threshold == "half-peak":
            masks = [half_peak_mask(one, smoothing) for one in maps]
        else:
            masks = [anomaly_mask(one, d, largest, smoothing) for one, d in zip(maps, divergence, strict=True)]
        masks = [drop_small(mask, self.settings.drop_small) for mask in masks]
        return Segmentation(np.stack(masks), score >= calibration.score_limit, maps.mean(axis=1), score)


def save_calibration(
    run: Path, calibration: Calibration, settings: SegmentationConfig, precision: str = DEFAULT_PRECISION
) -> Path:
    """Write ``calibration.json`` into the run's folder, with the settings and weights that it holds for.

    Args:
        precision: of the network, as ``bfloat16``; masks are found in the same.

    Raises:
        RunError: the file cannot be written.
    """
    folder = RunFolder(run)
    content: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "weights": folder.weights_digest(),
        "precision": precision,
        **calibration.to_dict(),
    }
    folder.write_json(folder.calibration_file, content)
    return folder.calibration_file


def calibrated_precision(run: Path) -> str:
    """The precision that the run was calibrated in; the default where it is not calibrated.

    Raises:
        RunError: one that is unknown here.
    """
    file = RunFolder(run).calibration_file
    try:
        found = read_json(file).get("precision", DEFAULT_PRECISION)
    except CheckpointError:
        return DEFAULT_PRECISION  # `load_calibration` says what is wrong
    if found not in DTYPES:
        raise RunError(
            f"{file}: {unknown_name('precision', found, DTYPES)}; run `heterodiff segment {run} --calibrate`"
        )
    return str(found)


def load_calibration(run: Path, settings: SegmentationConfig, channels: int | None = None) -> Calibration:
    """Read the calibration of the run for ``settings``.

    Args:
        channels: how many are compared, where that is known.

    Raises:
        RunError: there is none, it is damaged, or it was made with other settings or weights, or for other channels.
    """
    path = RunFolder(run).calibration_file
    way_out = f"run `heterodiff segment {run} --calibrate`"
    if not path.is_file():
        raise RunError(f"{run}: not calibrated yet, so there are no limits for masks; {way_out}")
    content = read_json(path, RunError, way_out)
    stored = content.pop("settings", None)
    wanted = settings.model_dump(mode="json")
    if stored != wanted:
        stored = stored if isinstance(stored, dict) else {}
        other = [key for key in (*wanted, *stored) if stored.get(key, ...) != wanted.get(key, ...)]
        raise RunError(f"{path}: calibrated with another segmentation.{other[0]}; {way_out}, or leave it as it was")
    if content.get("weights") != RunFolder(run).weights_digest():
        raise RunError(f"{path}: calibrated before the run was trained further, so its limits do not fit; {way_out}")
    try:
        return Calibration.from_dict(content, channels)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
