"""Pipelines that draw images: schedulers, callbacks, precision and settings, as users of diffusers know them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.base import Codec
from heterodiff.config import SamplingConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.diffusers_loop import (
    check_scheduler,
    describes_training,
    sample_with_scheduler,
    training_scheduler_of,
)
from heterodiff.diffusion.noise import Generators, find_noise
from heterodiff.diffusion.samplers import check_noise
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule, prediction_of
from heterodiff.errors import CheckpointError, ConfigError, RunError, is_out_of_memory, unknown_name
from heterodiff.pictures import to_pil
from heterodiff.run_folder import RunFolder

OUTPUT_TYPES = ("pt", "np", "pil")
Images = Tensor | np.ndarray | list[Image]


@dataclass
class GenerationOutput(BaseOutput):
    """Images of a pipeline: a tensor (B, C, H, W) or an array (B, H, W, C) in [0, 1], or a list of PIL images."""

    images: Images


Callback = Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None]
"""Called after each step as (pipeline, step from 0, timestep, {"latents": z}), as in diffusers."""


class DrawingPipeline(DiffusionPipeline):
    """Base class of the pipelines that draw images.

    The scheduler that a pipeline is loaded with describes the training of its network, and ``defaults.sampler`` draws.
    A scheduler assigned to ``pipe.scheduler`` is checked, and then draws.

    Attributes:
        defaults: sampling settings of calls that give none.
        spec: size, classes, value range and number type of the training images; None where unknown.
        interrupt: set to True by a callback to stop after the present step.
        codec: the space in which the network denoises.
        condition_name: what images are drawn of, ``class`` or ``prompt``.
        noise: the noise of the training, one of :data:`heterodiff.diffusion.noise.NOISES`.
    """

    codec: Codec
    condition_name: str
    noise = "gaussian"
    _callback_tensor_inputs = ["latents"]
    interrupt = False

    def _take_settings(
        self, sampling: Mapping[str, Any] | None, image_spec: Mapping[str, Any] | None, draws_with_scheduler: bool
    ) -> None:
        """Take the settings kept in ``model_index.json``; ``__init__`` calls it after it registered the networks."""
        try:
            self.defaults = SamplingConfig.model_validate(dict(sampling or {}))
        except ValueError as error:
            raise CheckpointError(f"model_index.json: sampling settings cannot be used: {error}") from None
        self.spec = ImageSpec.from_dict(dict(image_spec)) if image_spec else None
        scheduler = self.scheduler
        self._trained = None if scheduler is None else training_scheduler_of(scheduler)
        self._replaced = scheduler is not None and (draws_with_scheduler or not describes_training(scheduler))
        if self._replaced:
            check_scheduler(scheduler, self._trained)

    def _settings(self) -> dict[str, Any]:
        """Settings to keep in ``model_index.json``, as :meth:`_take_settings` takes them."""
        return {
            "sampling": self.defaults.model_dump(mode="json"),
            "image_spec": self.spec.to_dict() if self.spec else None,
            "draws_with_scheduler": self._replaced,
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and self.__dict__.get("_trained") is not None:
            if value is not self._trained:
                check_scheduler(value, self._trained)
            self._replaced = value is not self._trained
        super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a pipeline folder with the settings, for ``heterodiff.load`` and ``from_pretrained``."""
        self.register_to_config(**self._settings())
        super().save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load a run folder, or one that :meth:`save_pretrained` wrote; see also ``heterodiff.load``."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **options)
        pipeline.read_run(Path(pretrained_model_name_or_path))
        return pipeline

    def read_run(self, folder: Path) -> None:
        """Take the settings in ``config.yaml`` and ``data.json`` of a run, if present."""
        run = RunFolder(folder)
        if run.has_config:
            self.defaults = run.config().sampling
        self.spec = run.spec() or self.spec

    # ---- drawing --------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Denoiser:
        """The network, with the schedule and prediction of its training, whatever scheduler draws."""
        return Denoiser(self.predict, NoiseSchedule.from_scheduler(self._trained), prediction_of(self._trained))

    def predict(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        """Return the network's output (B, C or 2C, H, W), float32, at z (B, C, H, W) and network times (B,)."""
        raise NotImplementedError

    @property
    def default_sampler(self) -> str:
        """Name of the sampler, or class of the assigned scheduler, of calls that name no sampler."""
        return type(self.scheduler).__name__ if self._replaced else self.defaults.sampler

    def sampling_settings(self, **given: Any) -> SamplingConfig:
        """Return the sampling settings of a call: those given that are not None, else the defaults."""
        return self.defaults.model_copy(update={name: value for name, value in given.items() if value is not None})

    def draw_noise(self, shape: Sequence[int], generator: Generators = None) -> Tensor:
        """Return noise (B, C, H, W) of unit variance, as the network was trained with."""
        return find_noise(self.noise).draw(shape, generator, self.device)

    def draw_latents(
        self,
        condition: Any,
        null_condition: Any,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        settings: SamplingConfig,
        *,
        sampler: str | None,
        callback: Callable[[int, Any, Tensor], Tensor],
        progress: Callable[[int], None],
        timesteps: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw z (B, C, H, W): with ``sampler``, else with an assigned scheduler, else with the default sampler.

        Args:
            callback: (step from 0, timestep, z) -> the z to go on with, called after each step.
            progress: called after each step with the number of steps.
        """
        denoiser = self.denoiser.guided(condition, null_condition, settings.guidance_scale, settings.guidance_interval)
        noise = self.draw_noise(shape, generator)

        def after_step(number: int, total: int, t: Any, z: Tensor) -> tuple[Tensor, bool]:
            progress(total)
            return callback(number - 1, t, z), not self.interrupt

        steps = settings.num_inference_steps
        if self._replaced and sampler is None:
            if not find_noise(self.noise).is_gaussian:
                raise ConfigError(
                    f"scheduler {self.default_sampler}: may add Gaussian noise, and the run was trained with "
                    f"{self.noise} noise; name a sampler="
                )
            return sample_with_scheduler(
                denoiser.network, self.scheduler, noise, steps, timesteps, generator, after_step
            )
        sampler = sampler or settings.sampler
        check_noise(sampler, self.noise)
        return sample(
            *denoiser,
            noise=noise,
            sampler=sampler,
            num_inference_steps=steps,
            timesteps=timesteps,
            generator=generator,
            learned_variance=(self.unet.config.out_channels or shape[1]) == 2 * shape[1],
            clip_sample=self.codec.clip_sample,
            dynamic_threshold=settings.dynamic_threshold if self.codec.clip_sample else None,
            after_step=after_step,
        )

    def _after_step(
        self, function: Callback | None, tensor_inputs: Sequence[str]
    ) -> Callable[[int, Any, Tensor], Tensor]:
        """Check the callback of a call and start uninterrupted; return it as :meth:`draw_latents` takes it."""
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ConfigError(
                unknown_name("callback_on_step_end_tensor_inputs", unknown[0], self._callback_tensor_inputs)
            )
        self.interrupt = False

        def call(step: int, t: Any, z: Tensor) -> Tensor:
            found = function(self, step, t, dict.fromkeys(tensor_inputs, z)) if function is not None else None
            return (found or {}).get("latents", z)

        return call


def check_output_type(output_type: str) -> None:
    """Raise ConfigError if ``output_type`` is unknown."""
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(unknown_name("output_type", output_type, OUTPUT_TYPES))


def to_output(images: Tensor, output_type: str, return_dict: bool) -> GenerationOutput | tuple[Images]:
    """Return images (B, C, H, W) in [0, 1] in the form that a call asked for."""
    found: Images = images
    if output_type == "np":
        found = images.permute(0, 2, 3, 1).numpy()
    elif output_type == "pil":
        found = [to_pil(image) for image in images]
    return GenerationOutput(images=found) if return_dict else (found,)


@contextmanager
def explaining_memory(batch_size: int, device: torch.device) -> Iterator[None]:
    """Raise a RunError with a way out if memory runs out while ``batch_size`` images are drawn at once."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = batch_size // 2
        way_out = f"draw fewer at once: --batch-size {fewer} (from Python batch_size={fewer})"
        if batch_size == 1:
            way_out = "draw smaller images, or on a --device (from Python device=) with more memory"
        count = "1 image" if batch_size == 1 else f"{batch_size} images at once"
        raise RunError(f"out of memory on {device}, drawing {count}; {way_out}") from error
