"""Text to image and image to text with a run of recipe ``text-image``."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from heterodiff.codecs.cnn import CNNCodec, ImageCodec, scaled
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.reading import read_images
from heterodiff.diffusion.guidance import guided_denoiser
from heterodiff.errors import ConfigError, RunError
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.drawing import (
    DrawingPipeline,
    GenerationOutput,
    StepCallback,
    check_output_type,
    to_output,
)
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.run_folder import RunFolder
from heterodiff.text.captioner import Captioner
from heterodiff.text.encoder import TextEncoder
from heterodiff.text.tokenizer import encode_texts


class TextWarning(UserWarning):
    """A text that is not used as it stands: cut, with unknown characters, or empty."""


@contextmanager
def text_notes() -> Iterator[list[str]]:
    """Catch warnings about texts; afterwards the list holds them, each once. Other warnings are passed on."""
    notes: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TextWarning)
            yield notes
    finally:
        for item in caught:
            if not issubclass(item.category, TextWarning):
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
            elif str(item.message) not in notes:
                notes.append(str(item.message))


@contextmanager
def no_text_warnings() -> Iterator[None]:
    """Draw pictures of texts that were warned of before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        yield


def predict(network: Callable[..., Any], z_t: Tensor, time: Tensor, embeddings: Tensor, expected: Tensor) -> Tensor:
    """What training and sampling both ask of the denoiser, which sees what is to be expected beside z_t.

    Args:
        network: the denoiser, possibly wrapped.
        z_t: (B, c, h, w); time: (B,) network times.
        embeddings: (B, D) of texts or images, of any length; a row of zeros is "no condition".
        expected: (B, c + f, h, w), z and features to be expected of these embeddings, see
            :meth:`heterodiff.codecs.cnn.CNNCodec.prior`.

    Returns:
        (B, c or 2c, h, w), of the kind that the denoiser was trained to predict.
    """
    return network(torch.cat([z_t, expected.to(z_t)], dim=1), time, condition=scaled(embeddings)).sample


class TextImagePipeline(DrawingPipeline):
    """The networks of a run of recipe ``text-image`` or ``alignment``; ``heterodiff.load`` builds it from the folder.

    Args:
        image_codec, text_encoder, tokenizer, captioner: see their classes.
        unet, scheduler: the denoiser of the codec's maps and its schedule; without them images come from embeddings
            directly.
        sampling, image_spec, draws_with_scheduler, resize: what ``save_pretrained`` keeps of the attributes.
    """

    _optional_components = ["unet", "scheduler"]

    def __init__(
        self,
        image_codec: ImageCodec,
        text_encoder: TextEncoder,
        tokenizer: PreTrainedTokenizerFast,
        captioner: Captioner,
        unet: FiLMUNet | HAEUNet | None = None,
        scheduler: Any = None,
        sampling: dict | None = None,
        image_spec: dict | None = None,
        draws_with_scheduler: bool = False,
        resize: str = "crop",
    ):
        super().__init__()
        self.register_modules(
            image_codec=image_codec,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            captioner=captioner,
            unet=unet,
            scheduler=scheduler,
        )
        self.codec = CNNCodec(image_codec)
        self._take_settings(sampling, image_spec, draws_with_scheduler)
        self.resize: Any = resize

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "resize": self.resize}

    def read_run(self, folder: Path) -> None:
        super().read_run(folder)
        if RunFolder(folder).has_config:
            self.resize = RunFolder(folder).config().data.resize

    def set_up(self, config: RunConfig, spec: ImageSpec | None) -> "TextImagePipeline":
        """Take the sampling defaults and the way to read images from a run."""
        self.defaults, self.spec, self.resize = config.sampling, spec, config.data.resize
        self.set_progress_bar_config(disable=True)
        return self

    # ---- embeddings -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings (B, D) of ``texts``, of length 1; zeros ("no condition") for an empty text.

        Warns (:class:`TextWarning`) of texts that are cut, empty, or hold unknown characters.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens, notes = encode_texts(self.tokenizer, texts, self.text_encoder.config.max_tokens)
        around = self.tokenizer.num_special_tokens_to_add(pair=False)
        empty = tokens.mask.sum(dim=1) <= around  # of blanks and invisible characters, too, nothing is left
        if bool(empty.any()):
            notes = [*notes, "an empty text means no condition"]
        for note in notes:
            warnings.warn(note, TextWarning, stacklevel=2)
        embeddings = F.normalize(self.text_encoder(tokens.ids.to(self.device), tokens.mask.to(self.device)), dim=-1)
        return torch.where(empty.to(self.device)[:, None], 0, embeddings.float())

    def _embeddings(self, given: Tensor) -> Tensor:
        """``given`` (B, D), of texts or images, as the networks take it."""
        width = self.text_encoder.config.embedding_dim
        if given.ndim != 2 or given.shape[1] != width or len(given) == 0:
            raise ConfigError(f"embeddings: expected shape (B, {width}), found {tuple(given.shape)}")
        return given.to(self.device, torch.float32)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, C, H, W) in [0, 1], of length 1."""
        return F.normalize(self.image_codec.embed(self._map(images)), dim=-1)

    @torch.no_grad()
    def _map(self, images: Tensor) -> Tensor:
        """The codec's unscaled map of images in [0, 1]."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ConfigError(
                f"images: expected (B, C, H, W) in [0, 1], found {images.dtype} of shape {tuple(images.shape)}"
            )
        self.codec.latent_shape(*images.shape[1:])
        return self.codec.posterior(images.to(self.device)).chunk(2, dim=1)[0]

    # ---- text to image --------------------------------------------------------------------------------------

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> Any:
        """As :meth:`generate_from_text`."""
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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw pictures of ``prompts``, prompt after prompt.

        Sample k of a prompt depends on the prompt, the seed and k alone, not on the other prompts. A scheduler that was
        assigned to ``pipe.scheduler`` draws, unless ``sampler`` is given.

        Args:
            prompts: one or several; an empty one is "no condition".
            use_diffusion: False decodes the text's embedding directly: one pass, blurrier, always the same.
            num_inference_steps, guidance_scale, sampler, candidates: default to the run's ``sampling`` section.
            negative_prompts: what to steer away from: guidance against this text instead of "no condition"; one for
                all prompts, or one for each.
            batch_size: how many pictures to draw at once.
            output_type: ``"pt"`` for a tensor (N, C, H, W) in [0, 1], ``"np"`` for an array (N, H, W, C),
                ``"pil"`` for pictures.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see
                :class:`heterodiff.pipelines.generate.GenerationPipeline`; of the denoiser's steps, for each candidate.

        Returns:
            :class:`heterodiff.pipelines.drawing.GenerationOutput`, its pictures in ``images``; or with
            ``return_dict=False`` a tuple of them.

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
        found = to_output(images, output_type)
        return GenerationOutput(images=found) if return_dict else (found,)

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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of embeddings (B, D), those of texts or of images.

        Of several ``candidates`` the one is kept whose encoded image makes the text likeliest to the captioner: a model
        reads pictures better than it draws them (Ramesh et al. 2021 choose by another network, CLIP). The first
        candidate is the picture that is drawn without others.

        Args:
            text_embeddings: of any length; a row of zeros is "no condition".
            negative_embeddings: (B, D), see :meth:`generate_from_text`.
            generators: of the noise, one an image; default: from ``seed`` and the row.
            candidates: pictures to draw for each one that is kept; default: the run's ``sampling`` section.
            texts: what the embeddings stand for, by which candidates are judged; default: what they retell.

        Raises:
            ConfigError: embeddings of another width; a run without a denoiser; as :meth:`generate_from_text`.
        """
        condition = self._embeddings(text_embeddings)
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
        if not use_diffusion:
            if not bool(condition.any(dim=1).all()):
                raise ConfigError("an empty prompt cannot be decoded directly; give a text, or use the diffusion")
            return torch.cat(
                [
                    self.image_codec.decode_from_latent(self.image_codec.get_latent_from_embedding(part)).cpu()
                    for part in condition.split(batch_size)
                ]
            )
        null = torch.zeros_like(condition) if negative_embeddings is None else self._embeddings(negative_embeddings)
        if generators is None:
            generators = seeded_generators(seed, len(condition))
        candidates = self.defaults.candidates if candidates is None else candidates
        if candidates < 1:
            raise ConfigError(f"candidates: expected at least 1, found {candidates}")
        if candidates > 1 and texts is None:
            texts = [found[0] for found in self.generate_text_from_image(condition, temperature=0)]
        if texts is not None and len(texts) != len(condition):
            raise ConfigError(f"{len(texts)} texts for {len(condition)} embeddings: expected as many")
        if not len(null) == len(generators) == len(condition):
            raise ConfigError(
                f"{len(condition)} embeddings with {len(null)} negative ones and {len(generators)} generators: "
                "expected as many of each"
            )
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        callback = self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        parts: list[Tensor] = []
        with self.progress_bar(total=steps * candidates * -(-len(condition) // batch_size)) as bar:
            for start in range(0, len(condition), batch_size):
                if self.interrupt:
                    break
                rows = slice(start, start + batch_size)
                given = condition[rows], null[rows], list(generators[rows])
                drawn = (
                    self.codec.decode(self._draw(*given, steps, scale, sampler, callback, lambda _: bar.update(1)))
                    for _ in range(candidates)
                    if not self.interrupt
                )
                best = next(drawn) if candidates == 1 else self._likeliest(drawn, (texts or ())[rows], given[0])
                parts.append(best.cpu())
        return torch.cat(parts)

    def _likeliest(self, drawn: Iterator[Tensor], texts: Sequence[str], condition: Tensor) -> Tensor:
        """Of candidates, each images (B, C, H, W), the image a row that makes its text likeliest to the captioner.

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
        steps: int,
        scale: float,
        sampler: str | None,
        callback: StepCallback,
        progress: Callable[[int], None],
    ) -> Tensor:
        if self.unet is None:
            raise RunError(
                "this run has no denoiser (recipe alignment); train one with recipe text-image, or decode directly "
                "(use_diffusion=False, --direct)"
            )
        denoise = guided_denoiser(
            lambda z, time, given: predict(self.unet, z.to(self.unet.dtype), time, *given).to(torch.float32, copy=True),
            (condition, self.codec.prior(condition)),  # once, not at each step
            (null, self.codec.prior(null)),
            scale,
            self.schedule.num_train_timesteps,
            self.defaults.guidance_interval,
        )
        return self.draw_latents(
            denoise,
            (len(condition), self.codec.latent_channels, *self.image_codec.latent_size),
            generators,
            sampler=sampler,
            num_inference_steps=steps,
            callback=callback,
            progress=progress,
        )

    # ---- image to text --------------------------------------------------------------------------------------

    def generate_from_image(
        self, image_paths: str | Path | Sequence[str | Path], num_captions_per_image: int = 1, **options: Any
    ) -> list[list[str]]:
        """Captions of image files, a list for each.

        Args:
            image_paths: read, resized and scaled as the training images were.
            **options: see :meth:`generate_text_from_image`.

        Raises:
            DataError: a file that is missing or cannot be used.
            ConfigError: values out of their range.
        """
        return self.generate_text_from_image(self.read(image_paths), num_captions_per_image, **options)

    def read(self, image_paths: str | Path | Sequence[str | Path]) -> Tensor:
        """Image files as (B, C, H, W) in [0, 1], resized and scaled as the training images were.

        Raises:
            DataError: a file that is missing or cannot be used.
            RunError: the run's folder does not say how to read images.
        """
        if self.spec is None:
            raise RunError("the folder has no data.json, which says how to read images; caption tensors instead")
        paths = [image_paths] if isinstance(image_paths, str | Path) else list(image_paths)
        if not paths:
            raise ConfigError("no image files given")
        return read_images(paths, self.spec, self.resize)

    @torch.no_grad()
    def generate_text_from_image(
        self,
        image_embeddings_or_images: Tensor,
        num_captions_per_image: int = 1,
        *,
        temperature: float = 0.9,
        top_k: int = 50,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        use_cache: bool = True,
        batch_size: int = 64,
    ) -> list[list[str]]:
        """Captions of images (B, C, H, W) in [0, 1], or of embeddings (B, D), a list for each.

        Caption k of an image depends on the image, the seed and k alone. An embedding knows less than its image.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_k: sample among so many tokens; 0 for all.
            top_p: and among the likeliest ones that make up this probability.
            repetition_penalty: divides the scores of tokens that occurred; 1 for none.
            use_cache: keep the keys and values of earlier tokens.

        Raises:
            ConfigError: a wrong shape, or values out of their range.
        """
        given = image_embeddings_or_images
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
        latents = self._embeddings(given) if given.ndim == 2 else self._map(given)
        captions = []
        for part in latents.split(batch_size):
            found = self.captioner.generate(
                part,
                num_captions=num_captions_per_image,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                use_cache=use_cache,
            )
            captions += [[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in found]
        return captions
