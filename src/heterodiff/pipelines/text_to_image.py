"""Text to image, and as its base classes image to text, with a run of recipe ``text-image``."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.codecs.cnn import scaled
from heterodiff.config import SamplingConfig
from heterodiff.data.findings import show
from heterodiff.errors import ConfigError, RunError
from heterodiff.pipelines.captioning import CaptioningPipeline
from heterodiff.pipelines.drawing import Callback, check_output_type, to_output
from heterodiff.pipelines.editing import RESAMPLES, edit_images
from heterodiff.pipelines.embeddings import TextWarning, no_text_warnings, text_notes
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.text.tokenizer import encode_texts

__all__ = ["TextImagePipeline", "TextWarning", "no_text_warnings", "predict", "text_notes"]


def predict(network: Callable[..., Any], z_t: Tensor, time: Tensor, embeddings: Tensor, expected: Tensor) -> Tensor:
    """Call the denoiser, in training and in sampling, with the prior of z_t beside z_t.

    Args:
        network: the denoiser, possibly wrapped.
        z_t: (B, c, h, w); time: (B,) network times.
        embeddings: (B, D) of texts or images, of any length; a row of zeros is "no condition".
        expected: (B, c + f, h, w), prior of z and features given the embeddings, see
            :class:`heterodiff.codecs.cnn.CNNCodec`.

    Returns:
        (B, c or 2c, h, w), of the kind that the denoiser was trained to predict.
    """
    return network(torch.cat([z_t, expected.to(z_t)], dim=1), time, condition=scaled(embeddings)).sample


class TextImagePipeline(CaptioningPipeline):
    """Draws images of texts and writes captions of images; ``heterodiff.load`` builds it from a run folder."""

    condition_name = "prompt"

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> Any:
        """See :meth:`generate_from_text`."""
        return self.generate_from_text(prompts, **options)

    @torch.no_grad()
    def generate_from_text(
        self,
        prompts: str | Sequence[str],
        num_samples_per_prompt: int = 1,
        use_diffusion: bool = True,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        *,
        negative_prompts: str | Sequence[str] | None = None,
        sampler: str | None = None,
        candidates: int | None = None,
        batch_size: int = 64,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw pictures of ``prompts``, prompt after prompt.

        Sample k of a prompt depends on the prompt, the seed and k alone, not on the other prompts. A scheduler
        assigned to ``pipe.scheduler`` draws, unless ``sampler`` is given.

        Args:
            prompts: one or several; an empty one is "no condition".
            use_diffusion: False decodes the text's embedding directly: one pass, blurrier, always the same.
            num_inference_steps, guidance_scale, sampler, candidates: default to the run's ``sampling`` section.
            negative_prompts: texts to guide away from, instead of from "no condition"; one for all prompts, or one
                for each.
            batch_size, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: see
                :class:`heterodiff.pipelines.generate.GenerationPipeline`; the callback is called for each candidate.

        Returns:
            :class:`heterodiff.pipelines.drawing.GenerationOutput`, or with ``return_dict=False`` a tuple of its images.

        Raises:
            ConfigError: no prompts, a number that does not fit, an unknown sampler; a run without a denoiser.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or num_samples_per_prompt < 1 or batch_size < 1:
            raise ConfigError(
                f"{len(texts)} prompts, {num_samples_per_prompt} samples each, {batch_size} at once: expected at least "
                "one of each"
            )
        check_output_type(output_type)
        if not use_diffusion and candidates is not None:
            raise ConfigError("candidates are drawn by the diffusion; leave them out to decode directly")
        negative = None
        if negative_prompts is not None:
            if not use_diffusion:
                raise ConfigError("negative prompts steer the diffusion; leave them out to decode directly")
            against = [negative_prompts] * len(texts) if isinstance(negative_prompts, str) else list(negative_prompts)
            if len(against) != len(texts):
                raise ConfigError(f"{len(against)} negative prompts for {len(texts)} prompts: expected one or as many")
            negative = self.encode_text(against).repeat_interleave(num_samples_per_prompt, dim=0)
        images = self.generate_image_from_text(
            self.encode_text(texts).repeat_interleave(num_samples_per_prompt, dim=0),
            num_inference_steps,
            guidance_scale,
            use_diffusion=use_diffusion,
            negative_embeddings=negative,
            generators=[g for _ in texts for g in seeded_generators(seed, num_samples_per_prompt)],
            sampler=sampler,
            candidates=candidates,
            texts=[text for text in texts for _ in range(num_samples_per_prompt)],
            batch_size=batch_size,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return to_output(images, output_type, return_dict)

    @torch.no_grad()
    def generate_image_from_text(
        self,
        text_embeddings: Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        use_diffusion: bool = True,
        negative_embeddings: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        seed: int = 0,
        sampler: str | None = None,
        candidates: int | None = None,
        texts: Sequence[str] | None = None,
        batch_size: int = 64,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] of embeddings (B, D) of texts or images.

        Among several ``candidates`` the captioner chooses the one under whose encoding the text is likeliest (Ramesh et
        al. 2021 choose by another network, CLIP). The first candidate is the picture drawn without others.

        Args:
            text_embeddings: of any length; a row of zeros is "no condition".
            negative_embeddings: (B, D), see :meth:`generate_from_text`.
            generators: of the noise, one an image; default: from ``seed`` and the row.
            candidates: pictures to draw for each one that is kept; default: the run's ``sampling`` section.
            texts: texts of the embeddings, to judge candidates by; default: captions of the embeddings.

        Raises:
            ConfigError: embeddings of another width; a run without a denoiser; as :meth:`generate_from_text`.
        """
        condition = self._embeddings(text_embeddings)
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
        if not use_diffusion:
            return self._decode_directly(condition, batch_size)
        null = torch.zeros_like(condition) if negative_embeddings is None else self._embeddings(negative_embeddings)
        generators = seeded_generators(seed, len(condition)) if generators is None else list(generators)
        settings = self.sampling_settings(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, candidates=candidates
        )
        if settings.candidates < 1:
            raise ConfigError(f"candidates: expected at least 1, found {settings.candidates}")
        if settings.candidates > 1 and texts is None:
            texts = [found[0] for found in self.generate_text_from_image(condition, temperature=0)]
        if texts is not None and len(texts) != len(condition):
            raise ConfigError(f"{len(texts)} texts for {len(condition)} embeddings: expected as many")
        if not len(null) == len(generators) == len(condition):
            raise ConfigError(
                f"{len(condition)} embeddings with {len(null)} negative ones and {len(generators)} generators: "
                "expected as many of each"
            )
        callback = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        parts: list[Tensor] = []
        batches = -(-len(condition) // batch_size)
        with self.progress_bar(total=settings.num_inference_steps * settings.candidates * batches) as bar:
            options = {"sampler": sampler, "callback": callback, "progress": lambda total: bar.update(1)}
            for start in range(0, len(condition), batch_size):
                if self.interrupt:
                    break
                rows = slice(start, start + batch_size)
                drawn = (
                    self._draw(condition[rows], null[rows], generators[rows], settings, **options)
                    for _ in range(settings.candidates)
                    if not self.interrupt
                )
                several = settings.candidates > 1
                best = self._likeliest(drawn, (texts or ())[rows], condition[rows]) if several else next(drawn)
                parts.append(best.cpu())
        return torch.cat(parts)

    def _decode_directly(self, condition: Tensor, batch_size: int) -> Tensor:
        if not bool(condition.any(dim=1).all()):
            raise ConfigError("an empty prompt cannot be decoded directly; give a text, or use the diffusion")
        latents = map(self.image_codec.get_latent_from_embedding, condition.split(batch_size))
        return torch.cat([self.image_codec.decode_from_latent(part).cpu() for part in latents])

    def _likeliest(self, drawn: Iterator[Tensor], texts: Sequence[str], condition: Tensor) -> Tensor:
        """Return, row by row, the candidate image (C, H, W) under which the captioner finds its text likeliest.

        Rows without a condition keep their first.
        """
        best = next(drawn)
        tokens, _ = encode_texts(self.tokenizer, list(texts), self.captioner.config.max_tokens)
        ids, mask = tokens.ids.to(self.device), tokens.mask.to(self.device)
        surprise: Tensor | None = None
        for images in drawn:
            if surprise is None:
                surprise = self.captioner.losses(self._map(best), ids, mask)
            found = self.captioner.losses(self._map(images), ids, mask)
            better = (found < surprise) & condition.any(dim=1)
            best, surprise = torch.where(better[:, None, None, None], images, best), surprise.minimum(found)
        return best

    def _draw(
        self,
        condition: Tensor,
        null: Tensor,
        generators: list[torch.Generator],
        settings: SamplingConfig,
        **options: Any,
    ) -> Tensor:
        self._check_denoiser(", or decode directly (use_diffusion=False, --direct)")
        z = self.draw_latents(
            (condition, self.codec.prior(condition)),  # once, not at each step
            (null, self.codec.prior(null)),
            (len(condition), self.codec.latent_channels, *self.image_codec.latent_size),
            generators,
            settings,
            **options,
        )
        return self.codec.decode(z)

    def _check_denoiser(self, way_out: str = "") -> None:
        if self.unet is None:
            raise RunError(f"this run has no denoiser (recipe alignment); train one with recipe text-image{way_out}")

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        resamples: int = RESAMPLES,
        generator: torch.Generator | list[torch.Generator] | None = None,
        progress: Callable[[int, int], None] = lambda step, total: None,
    ) -> Tensor:
        """Change images to fit ``prompts``: one for all images, or one for each; default: no condition.

        Arguments, result and errors are otherwise as of
        :meth:`heterodiff.pipelines.generate.GenerationPipeline.edit`; also raises RunError for a run without a
        denoiser.
        """
        self._check_denoiser()
        images = torch.as_tensor(images, dtype=torch.float32)
        size = (self.image_codec.config.in_channels, *self.image_codec.config.sample_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != size or not len(images):
            expected = ", ".join(map(str, size))
            raise ConfigError(f"images {tuple(images.shape)}: this run edits (B, {expected}), B above 0")
        texts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if texts is not None and len(texts) != len(images):
            raise ConfigError(f"{len(texts)} prompts for {len(images)} images: expected one or as many")
        nothing = torch.zeros(len(images), self.text_encoder.config.embedding_dim, device=self.device)
        condition = nothing if texts is None else self.encode_text(texts)
        settings = self.sampling_settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        if not bool(condition.any()):
            settings = settings.model_copy(update={"guidance_scale": 1.0})  # both branches would be the same
        return edit_images(
            self,
            images,
            mask,
            (condition, self.codec.prior(condition)),
            (nothing, self.codec.prior(nothing)),
            settings,
            strength=strength,
            sampler=sampler,
            resamples=resamples,
            generator=generator,
            progress=progress,
        )

    def predict(self, z: Tensor, time: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """See :meth:`DrawingPipeline.predict`; the condition is embeddings (B, D) and the prior of their z."""
        return predict(self.unet, z.to(self.unet.dtype), time, *condition).to(torch.float32, copy=True)


def try_out(pipeline: TextImagePipeline, add: Callable[[bool, str, str], None]) -> None:
    """Write one caption of a picture of noise, and draw one picture of that caption."""
    config, draws = pipeline.image_codec.config, pipeline.unet is not None
    noise = torch.rand(1, config.in_channels, *config.sample_size, generator=torch.Generator().manual_seed(0))
    ((text,),) = pipeline.generate_text_from_image(noise, temperature=0.0)
    add(True, "caption", f"one caption of a picture of noise: '{show(text)}'")
    with no_text_warnings():
        images = pipeline.generate_from_text(text.strip() or "a picture", 1, draws, 2).images
    how = "2 steps" if draws else "decoded directly"
    add(bool(torch.isfinite(images).all()), "sample", f"one picture of a text {tuple(images.shape[1:])}, {how}")
