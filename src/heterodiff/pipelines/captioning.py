"""Captions of images or of their embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodiff.data.reading import read_images
from heterodiff.errors import ConfigError, RunError
from heterodiff.pipelines.embeddings import EmbeddingPipeline


class CaptioningPipeline(EmbeddingPipeline):
    """Writes captions of images."""

    def generate_from_image(
        self, image_paths: str | Path | Sequence[str | Path], num_captions_per_image: int = 1, **options: Any
    ) -> list[list[str]]:
        """Return captions of image files, a list for each; see :meth:`read` and :meth:`generate_text_from_image`."""
        return self.generate_text_from_image(self.read(image_paths), num_captions_per_image, **options)

    def read(self, image_paths: str | Path | Sequence[str | Path]) -> Tensor:
        """Read image files as (B, C, H, W) in [0, 1], resized and scaled as the training images were.

        Raises DataError for a file that cannot be used, and RunError if the run's folder has no ``data.json``.
        """
        if self.spec is None:
            raise RunError("the folder has no data.json, which describes how to read images; caption tensors instead")
        paths = [image_paths] if isinstance(image_paths, str | Path) else list(image_paths)
        if not paths:
            raise ConfigError("no image files given")
        return read_images(paths, self.spec, self.resize, self.background)

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
        """Return captions of images (B, C, H, W) in [0, 1], or of embeddings (B, D), a list for each.

        Caption k of an image depends on the image, the seed and k alone. Embeddings hold less than their images.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_k: number of likeliest tokens to sample from; 0 for all.
            top_p: cumulative probability of the likeliest tokens to sample from.
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
