"""Networks of text to image and back without the denoiser: tokenizer, image codec, text encoder, captioner."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterodiff.codecs.cnn import FOLDER, ImageCodec, load_image_codec
from heterodiff.errors import CheckpointError
from heterodiff.files import COPY_AGAIN
from heterodiff.text.captioner import Captioner, load_captioner
from heterodiff.text.encoder import TextEncoder, check_tokenizer, load_text_encoder
from heterodiff.text.tokenizer import load_tokenizer

TOKENIZER_FOLDER = "tokenizer"


@dataclass
class AlignedNetworks:
    """Result of a run of recipe ``alignment``."""

    tokenizer: Any
    image_codec: ImageCodec
    text_encoder: TextEncoder
    captioner: Captioner

    def to(self, device: Any) -> None:
        for network in (self.image_codec, self.text_encoder, self.captioner):
            network.to(device)


def load_aligned_networks(run: Path) -> AlignedNetworks:
    """Load the networks of a run of recipe ``alignment`` or ``text-image``, in evaluation mode and frozen.

    Raises:
        CheckpointError: parts that are missing, damaged, or do not belong together.
    """
    parts = (FOLDER, "text_encoder", TOKENIZER_FOLDER, "captioner")
    missing = [name for name in parts if not (run / name).is_dir()]
    if len(missing) == len(parts):
        raise CheckpointError(
            f"{run}: no finished run of recipe alignment ({FOLDER}/ is missing); set codec.training to train one "
            "there, or correct codec.path"
        )
    if missing:
        raise CheckpointError(f"{run}: incomplete, {', '.join(missing)} missing; {COPY_AGAIN}")
    networks = AlignedNetworks(
        load_tokenizer(run / TOKENIZER_FOLDER),
        load_image_codec(run),
        load_text_encoder(run / "text_encoder"),
        load_captioner(run / "captioner"),
    )
    check_tokenizer(networks.text_encoder, networks.tokenizer)
    _check_sizes(networks, run)
    return networks


def _check_sizes(networks: AlignedNetworks, run: Path) -> None:
    codec, encoder, captioner = networks.image_codec, networks.text_encoder.config, networks.captioner.config
    for part, first, second in (
        ("embeddings of the image codec and the text encoder", codec.config.embedding_dim, encoder.embedding_dim),
        ("embeddings of the text encoder and the captioner", encoder.embedding_dim, captioner.embedding_dim),
        ("map of the image codec and the captioner", codec.config.latent_channels, captioner.latent_channels),
        ("map of the image codec and the captioner", tuple(codec.latent_size), tuple(captioner.latent_size)),
        ("vocabulary of the tokenizer and the captioner", len(networks.tokenizer), captioner.vocabulary_size),
    ):
        if first != second:
            raise CheckpointError(f"{run}: parts of different runs ({part}: {first} and {second}); {COPY_AGAIN}")
