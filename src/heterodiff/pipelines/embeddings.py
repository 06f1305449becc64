"""Embeddings of texts and images in the space that a run of recipe ``text-image`` or ``alignment`` shares."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from heterodiff.codecs.cnn import CNNCodec, ImageCodec
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.decoding.pillow import BACKGROUND
from heterodiff.errors import ConfigError
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.drawing import DrawingPipeline
from heterodiff.run_folder import RunFolder
from heterodiff.text.captioner import Captioner
from heterodiff.text.encoder import TextEncoder
from heterodiff.text.tokenizer import encode_texts


class TextWarning(UserWarning):
    """A text that is not used as it stands: cut, with unknown characters, or empty."""


@contextmanager
def text_notes() -> Iterator[list[str]]:
    """Collect the warnings about texts, each once, in the list; other warnings are passed on."""
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
    """Silence warnings about texts, where they were shown before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        yield


class EmbeddingPipeline(DrawingPipeline):
    """The networks of a run of recipe ``text-image`` or ``alignment``, and the embeddings that they make.

    Args:
        image_codec, text_encoder, tokenizer, captioner: see their classes.
        unet, scheduler: the denoiser of the codec's maps and its schedule; without them images are decoded from
            embeddings directly.
        sampling, image_spec, draws_with_scheduler, resize, background: attributes as ``save_pretrained`` keeps them.
    """

    codec: CNNCodec
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
        background: str = BACKGROUND,
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
        self.background = background

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "resize": self.resize, "background": self.background}

    def read_run(self, folder: Path) -> None:
        super().read_run(folder)
        if RunFolder(folder).has_config:
            data = RunFolder(folder).config().data
            self.resize, self.background = data.resize, data.background

    def set_up(self, config: RunConfig, spec: ImageSpec | None) -> Self:
        """Take sampling defaults and preprocessing from a run."""
        self.defaults, self.spec = config.sampling, spec
        self.resize, self.background = config.data.resize, config.data.background
        self.set_progress_bar_config(disable=True)
        return self

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Return embeddings (B, D) of ``texts``, of length 1; zeros ("no condition") for an empty text.

        Warns (:class:`TextWarning`) about texts that are cut, empty, or hold unknown characters.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens, notes = encode_texts(self.tokenizer, texts, self.text_encoder.config.max_tokens)
        around = self.tokenizer.num_special_tokens_to_add(pair=False)
        empty = tokens.mask.sum(dim=1) <= around  # also texts of blanks and invisible characters
        if bool(empty.any()):
            notes = [*notes, "an empty text means no condition"]
        for note in notes:
            warnings.warn(note, TextWarning, stacklevel=2)
        embeddings = F.normalize(self.text_encoder(tokens.ids.to(self.device), tokens.mask.to(self.device)), dim=-1)
        return torch.where(empty.to(self.device)[:, None], 0, embeddings.float())

    def _embeddings(self, given: Tensor) -> Tensor:
        """Check embeddings (B, D) and move them to the networks."""
        width = self.text_encoder.config.embedding_dim
        if given.ndim != 2 or given.shape[1] != width or len(given) == 0:
            raise ConfigError(f"embeddings: expected shape (B, {width}), found {tuple(given.shape)}")
        return given.to(self.device, torch.float32)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D), of length 1, of images (B, C, H, W) in [0, 1]."""
        return F.normalize(self.image_codec.embed(self._map(images)), dim=-1)

    @torch.no_grad()
    def _map(self, images: Tensor) -> Tensor:
        """Return the codec's unscaled map (B, c, h, w) of images in [0, 1]."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ConfigError(
                f"images: expected (B, C, H, W) in [0, 1], found {images.dtype} of shape {tuple(images.shape)}"
            )
        self.codec.latent_shape(*images.shape[1:])
        return self.codec.posterior(images.to(self.device)).chunk(2, dim=1)[0]
