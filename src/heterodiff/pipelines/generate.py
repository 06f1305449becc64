"""Drawing images from a trained class-conditional model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from heterodiff.codecs.base import Codec, PixelCodec
from heterodiff.codecs.kl_vae import KLVAECodec, latent_shape
from heterodiff.diffusion.guidance import null_labels
from heterodiff.diffusion.noise import find_noise
from heterodiff.errors import ConfigError, nearest_name
from heterodiff.models.conditioning import NO_CLASS, Conditions
from heterodiff.models.defaults import check_size
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.conditions import conditions_of, translate
from heterodiff.pipelines.drawing import Callback, DrawingPipeline, check_output_type, to_output
from heterodiff.pipelines.editing import RESAMPLES, edit_images
from heterodiff.run_folder import RunFolder

Labels = int | str | Sequence[int | str] | Tensor


class GenerationPipeline(DrawingPipeline):
    """Draws images of classes; ``heterodiff.load`` builds it from a run folder.

    Args:
        unet: the denoiser, called as ``unet(z, time, class_labels=...)``.
        scheduler: the diffusers scheduler that describes the training schedule and the prediction type; one of another
            kind also draws.
        vae: for a denoiser of latents, the AutoencoderKL that they come from, with their mean and std.
        id2label: names of the classes by index.
        sampling, image_spec, draws_with_scheduler, noise: attributes as ``save_pretrained`` keeps them.
    """

    _optional_components = ["vae"]
    condition_name = "class"

    def __init__(
        self,
        unet: HAEUNet,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        sampling: dict | None = None,
        image_spec: dict | None = None,
        draws_with_scheduler: bool = False,
        noise: str = "gaussian",
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.codec: Codec = PixelCodec() if vae is None else KLVAECodec(vae)
        self._take_settings(sampling, image_spec, draws_with_scheduler)
        find_noise(noise)
        self.noise = noise
        names = id2label or {}  # JSON keeps the indices as texts
        self.class_names: tuple[str, ...] = tuple(str(names[key]) for key in sorted(names, key=int))
        height, width = _pair(unet.config.sample_size)
        self.image_size = (height * self.codec.factor, width * self.codec.factor)

    def _settings(self) -> dict[str, Any]:
        names = {str(k): name for k, name in enumerate(self.class_names)}
        return {**super()._settings(), "id2label": names, "noise": self.noise}

    def read_run(self, folder: Path) -> None:
        super().read_run(folder)
        if self.spec is not None and RunFolder(folder).data_file.is_file():
            self.class_names = self.spec.class_names

    def class_index(self, label: int | str) -> int:
        """Return the index of a class from an index (-1: no condition), a name, or text; raises ConfigError if none."""
        count = self.unet.config.num_classes or 0
        text = str(label)
        if isinstance(label, str) and text in self.class_names:
            return self.class_names.index(text)
        index = int(text) if text.lstrip("-").isdecimal() else count
        if NO_CLASS <= index < count:
            return index
        known = ", ".join(self.class_names[:20])
        names = f" (classes: {known}{', ...' if len(self.class_names) > 20 else ''})" if known else ""
        if count == 0:
            raise ConfigError(f"class '{label}': this model was trained without classes; leave the class out")
        hint = nearest_name(text, self.class_names)
        raise ConfigError(f"class '{label}'{hint}: expected a class name, 0..{count - 1}, or -1 for none{names}")

    def _labels(self, class_labels: Labels | None, num_images: int | None) -> Tensor:
        if class_labels is None or isinstance(class_labels, int | str):
            count = 1 if num_images is None else max(0, num_images)
            return torch.full((count,), NO_CLASS if class_labels is None else self.class_index(class_labels))
        items = class_labels.tolist() if isinstance(class_labels, Tensor) else class_labels
        if num_images not in (None, len(items)):
            raise ConfigError(f"num_images={num_images}, but {len(items)} class labels were given; leave one out")
        return torch.tensor([self.class_index(item) for item in items], dtype=torch.long)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition_images: Tensor | None = None,
        conditions: Mapping[str, Any] | Tensor | None = None,
        guide: Sequence[str] | None = None,
        size: int | tuple[int, int] | None = None,
        batch_size: int = 100,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw images.

        A scheduler assigned to ``pipe.scheduler`` draws, with the spacing of steps and the clipping of its own
        settings, unless ``sampler`` is given.

        Args:
            class_labels: class names or indices, one an image (-1: no condition); or a single one.
            num_images: number of images, where ``class_labels`` is a single class or None.
            num_inference_steps, guidance_scale, sampler, guidance_interval, dynamic_threshold: default to the
                run's ``sampling`` section; see :class:`heterodiff.config.SamplingConfig`.
            timesteps: explicit training timesteps, descending, instead of num_inference_steps.
            generator: one for all images, or a list of one an image; with a list, an image does not depend on
                which others are drawn with it.
            condition_images: (B, C', H, W) in [0, 1], for runs with ``data.condition``; default: no condition.
            conditions: value of each column of ``data.conditions``, one for all images or a sequence of one an image;
                columns that are left out, and None, are no condition. Or (B, A) as networks see them, NaN for none.
            guide: guide by these columns alone; default: by the class and all conditions together.
            size: (height, width) of the images, or a number for both; default: that of the condition images, or of the
                training images.
            batch_size: number of images to draw at once.
            output_type: ``"pt"`` for a tensor (B, C, H, W) in [0, 1], ``"np"`` for an array (B, H, W, C),
                ``"pil"`` for pictures.
            callback_on_step_end: called after each step of each batch as (pipeline, step from 0, timestep,
                {"latents": z}); may return {"latents": z} to go on with. If it sets ``pipeline.interrupt``, the batch
                is returned as it is then, and no other is drawn.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: "latents".

        Returns:
            :class:`heterodiff.pipelines.drawing.GenerationOutput`, or with ``return_dict=False`` a tuple of its images.

        Raises:
            ConfigError: unknown class, sampler or output type; a label outside the range; steps that do not fit.
        """
        check_output_type(output_type)
        callback = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        labels = self._labels(class_labels, num_images)
        if len(labels) < 1 or batch_size < 1:
            raise ConfigError(f"{len(labels)} images in batches of {batch_size}: expected at least one of each")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ConfigError(f"{len(generator)} generators for {len(labels)} images: expected one an image")
        given, null = conditions_of(self, labels, condition_images, conditions, guide)
        if dynamic_threshold is not None:
            self._check_dynamic_threshold(dynamic_threshold, sampler)
        settings = self.sampling_settings(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
        )
        if size is None and condition_images is not None:
            size = (condition_images.shape[2], condition_images.shape[3])
        latent_size = self._latent_size(_pair(size) if size is not None else self.image_size)
        parts: list[Tensor] = []
        for start in range(0, len(labels), batch_size):
            if self.interrupt:
                break
            rows = slice(start, start + batch_size)
            some = given.rows(rows).to(self.device)
            unconditional = not given.rows(rows).any() and settings.guidance_scale >= 0
            with self.progress_bar(total=1) as bar:

                def progress(total: int, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(1)

                z = self.draw_latents(
                    some,
                    null.rows(rows).to(self.device),
                    (len(labels[rows]), self.latent_channels, *latent_size),
                    generator[rows] if isinstance(generator, list) else generator,
                    # Both branches of guidance would be the same.
                    settings.model_copy(update={"guidance_scale": 1.0}) if unconditional else settings,
                    sampler=sampler,
                    timesteps=timesteps,
                    callback=callback,
                    progress=progress,
                )
            parts.append(self.codec.decode(z).cpu())
        return to_output(torch.cat(parts), output_type, return_dict)

    def translate(
        self, images: Tensor, class_labels: Labels | None = None, num_images: int = 1, **options: Any
    ) -> Tensor:
        """Draw images of condition images, for runs with ``data.condition``.

        Args:
            images: (B, C', h, w) in [0, 1]; for super-resolution, smaller than what is drawn by the factor.
            class_labels: one for each condition image, or one for all.
            num_images: drawn of each.
            **options: ``ready=False`` for whole images, of which conditions are made as in training; others as of
                :meth:`__call__`.

        Returns:
            (B, num_images, C, H, W) in [0, 1].

        Raises:
            ConfigError: a run without such a condition, images of other channels or sizes.
        """
        return translate(self, images, class_labels, num_images, **options)

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        class_labels: Labels | None = None,
        *,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        resamples: int = RESAMPLES,
        generator: torch.Generator | list[torch.Generator] | None = None,
        progress: Callable[[int, int], None] = lambda step, total: None,
    ) -> Tensor:
        """Change images: what is masked is drawn anew (RePaint), or the whole of them is noised and denoised (SDEdit).

        Args:
            images: (B, C, H, W) in [0, 1].
            mask: (B, 1, H, W) or (1, 1, H, W), 1 where to draw anew, 0 where pixels stay exactly as they are; None for
                image to image.
            class_labels: classes of the results, as of :meth:`__call__`; default: no condition.
            strength: share of the noise levels that images pass in image to image, above 0 and at most 1; default 0.6.
            num_inference_steps: steps from the highest noise level; image to image takes the share ``strength`` of
                them.
            guidance_scale, sampler: default to the run's; inpainting has a sampler of its own, DDIM.
            resamples: times that each step of inpainting is taken; see :func:`heterodiff.pipelines.editing.inpaint`.
            generator: one for all images, or a list of one an image.
            progress: called after each step as (steps done, steps in all).

        Returns:
            (B, C, H, W) in [0, 1], on the CPU.

        Raises:
            ConfigError: images or a mask of another shape; a mask that is not of zeros and ones, or the same
                everywhere; strength with a mask; unknown classes or sampler.

        Source: Meng et al. 2022 (SDEdit); Lugmayr et al. 2022 (RePaint).
        """
        images = torch.as_tensor(images, dtype=torch.float32)
        channels = self.spec.channels if self.spec else self.unet.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or not len(images):
            raise ConfigError(f"images {tuple(images.shape)}: this run edits (B, {channels}, H, W), B above 0")
        self._latent_size((images.shape[2], images.shape[3]))
        labels = self._labels(class_labels, len(images)).to(self.device)
        settings = self.sampling_settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        if not bool((labels >= 0).any()):
            settings = settings.model_copy(update={"guidance_scale": 1.0})  # both branches would be the same
        return edit_images(
            self,
            images,
            mask,
            labels,
            null_labels(labels),
            settings,
            strength=strength,
            sampler=sampler,
            resamples=resamples,
            generator=generator,
            progress=progress,
        )

    def predict(self, z: Tensor, time: Tensor, condition: Conditions | Tensor) -> Tensor:
        """See :meth:`DrawingPipeline.predict`; the condition is :class:`Conditions`, or class labels (B,) alone."""
        given = condition if isinstance(condition, Conditions) else Conditions(condition)
        if self.unet.config.num_classes is None:
            given = replace(given, labels=None)
        if given.image is None and (channels := self.unet.config.in_channels - z.shape[1]):
            given = replace(given, image=z.new_zeros(len(z), channels, *z.shape[2:]))
        output = given.call(self.unet, z.to(self.unet.dtype), time)
        return output.to(torch.float32, copy=True)  # a CUDA graph writes its next output to the same memory

    @property
    def latent_channels(self) -> int:
        """Channels of what is drawn: those that the network takes, less those of condition images."""
        count: int = self.unet.config.in_channels
        return count - (self.spec.condition_channels(self.codec.factor) if self.spec else 0)

    def _check_dynamic_threshold(self, quantile: float, sampler: str | None) -> None:
        if not 0 < quantile <= 1:
            raise ConfigError(f"dynamic_threshold {quantile}: expected a quantile above 0 and at most 1")
        if not self.codec.clip_sample:
            raise ConfigError("dynamic_threshold is for models of pixels; latents have no fixed range")
        if self._replaced and sampler is None:
            raise ConfigError("dynamic_threshold needs a sampler=; an assigned scheduler clips by its own settings")

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.vae is None:
            return size
        found = latent_shape(self.vae.config, self.vae.config.in_channels, *size)[1:]
        check_size(*size, self.codec.factor * self.unet.factor)  # in pixels, as the user gives them
        return found


def seeded_generators(seed: int, count: int, first: int = 0) -> list[torch.Generator]:
    """Return one generator an image, so that image k of a seed depends on neither number nor batch size."""
    generators = []
    for k in range(first, first + count):
        generator = torch.Generator()
        generators.append(generator.manual_seed((seed * 1_000_003 + k) & 0x7FFFFFFFFFFFFFFF))
    return generators


def try_out(pipeline: GenerationPipeline, add: Callable[[bool, str, str], None]) -> None:
    """Draw one image."""
    images = pipeline(num_images=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    add(bool(torch.isfinite(images).all()), "sample", f"one image {tuple(images.shape[1:])}, 2 steps")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
