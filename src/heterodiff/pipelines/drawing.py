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

from heterodiff.config import SamplingConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.diffusion.diffusers_loop import (
    check_scheduler,
    describes_training,
    sample_with_scheduler,
    training_scheduler_of,
)
from heterodiff.diffusion.guidance import Denoise
from heterodiff.diffusion.sampling import draw_noise, sample
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


@dataclass(frozen=True)
class StepCallback:
    """What a user of a pipeline wants to be called with after each step, as in diffusers."""

    function: Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None] | None = None
    tensor_inputs: Sequence[str] = ("latents",)


class DrawingPipeline(DiffusionPipeline):
    """What the pipelines that draw images share.

    A scheduler that is assigned to ``pipe.scheduler`` is checked and then drawn with; the one that the pipeline was
    loaded with says how the network was trained, and ``defaults.sampler`` draws.

    Attributes:
        defaults: how images are drawn where a call does not say otherwise.
        spec: size, classes, value range and number type of the training images; None where unknown.
        interrupt: set to True by a callback to stop after the present step.
    """

    _callback_tensor_inputs = ["latents"]
    interrupt = False

    def _take_settings(
        self, sampling: Mapping[str, Any] | None, image_spec: Mapping[str, Any] | None, draws_with_scheduler: bool
    ) -> None:
        """Take what ``model_index.json`` keeps; called by ``__init__`` after the networks are registered."""
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
        """What :meth:`_take_settings` takes, to be kept in ``model_index.json``."""
        return {
            "sampling": self.defaults.model_dump(mode="json"),
            "image_spec": self.spec.to_dict() if self.spec else None,
            "draws_with_scheduler": self._replaced,
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and self.__dict__.get("_trained") is not None:
            replaced = value is not self._trained
            if replaced:
                check_scheduler(value, self._trained)
            self._replaced = replaced
        super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a pipeline folder that keeps the settings too; ``heterodiff.load`` and ``from_pretrained`` read it."""
        self.register_to_config(**self._settings())
        super().save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load a run folder, or what :meth:`save_pretrained` wrote, as diffusers does; see also ``heterodiff.load``."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **options)
        pipeline.read_run(Path(pretrained_model_name_or_path))
        return pipeline

    def read_run(self, folder: Path) -> None:
        """Take the settings of the run in ``folder``: its ``config.yaml`` and ``data.json``, where present.

        Raises:
            HeterodiffError: a damaged file.
        """
        run = RunFolder(folder)
        if run.has_config:
            self.defaults = run.config().sampling
        self.spec = run.spec() or self.spec

    # ---- drawing --------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the training, whatever scheduler draws."""
        return NoiseSchedule.from_scheduler(self._trained)

    @property
    def prediction(self) -> str:
        """The kind of prediction of the network."""
        return prediction_of(self._trained)

    @property
    def default_sampler(self) -> str:
        """The name of what draws where a call names no sampler: a sampler, or the class of an assigned scheduler."""
        return type(self.scheduler).__name__ if self._replaced else self.defaults.sampler

    def network(self, z: Tensor, time: Tensor, **condition: Any) -> Tensor:
        """The denoiser's output (B, C or 2C, H, W) in float32, computed in the precision of its weights.

        Args:
            z: (B, C, H, W); time: (B,) network times, float32.
        """
        output = self.unet(z.to(self.unet.dtype), time, **condition).sample
        return output.to(torch.float32, copy=True)  # a CUDA graph writes its next output to the same memory

    def draw_latents(
        self,
        denoise: Denoise,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        sampler: str | None,
        num_inference_steps: int,
        timesteps: Sequence[int] | None = None,
        clip_sample: bool = False,
        dynamic_threshold: float | None = None,
        callback: StepCallback = StepCallback(),
        progress: Callable[[int], None] = lambda total: None,
    ) -> Tensor:
        """Draw z (B, C, H, W): with ``sampler``, else with an assigned scheduler, else with the default sampler.

        Args:
            progress: called after each step with the number of steps.
        """
        noise = draw_noise(shape, generator, self.device)

        def after_step(number: int, total: int, t: Any, z: Tensor) -> tuple[Tensor, bool]:
            progress(total)
            if callback.function is not None:
                given = dict.fromkeys(callback.tensor_inputs, z)
                z = (callback.function(self, number - 1, t, given) or {}).get("latents", z)
            return z, not self.interrupt

        if self._replaced and sampler is None:
            return sample_with_scheduler(
                denoise, self.scheduler, noise, num_inference_steps, timesteps, generator, after_step
            )
        return sample(
            denoise,
            self.schedule,
            self.prediction,
            noise=noise,
            sampler=sampler or self.defaults.sampler,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            generator=generator,
            learned_variance=(self.unet.config.out_channels or shape[1]) == 2 * shape[1],
            clip_sample=clip_sample,
            dynamic_threshold=dynamic_threshold,
            after_step=after_step,
        )

    def _callback(self, function: Any, tensor_inputs: Sequence[str]) -> StepCallback:
        """Check the callback of a call and start it uninterrupted."""
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ConfigError(
                unknown_name("callback_on_step_end_tensor_inputs", unknown[0], self._callback_tensor_inputs)
            )
        self.interrupt = False
        return StepCallback(function, tuple(tensor_inputs))


def check_output_type(output_type: str) -> None:
    """Check the name of a form of images.

    Raises:
        ConfigError: it is unknown.
    """
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(unknown_name("output_type", output_type, OUTPUT_TYPES))


def to_output(images: Tensor, output_type: str) -> Images:
    """Images (B, C, H, W) in [0, 1] as a tensor, as an array (B, H, W, C), or as pictures."""
    if output_type == "np":
        return images.permute(0, 2, 3, 1).numpy()
    return images if output_type == "pt" else [to_pil(image) for image in images]


@contextmanager
def explaining_memory(batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn the failure to draw ``batch_size`` images at once for want of memory into a message with what helps.

    Raises:
        RunError: memory ran out.
    """
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
