"""Networks of recipe ``alignment``: building them, with random or pretrained weights, and their forward pass."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, PretrainedConfig

from heterodiff.codecs.cnn import ImageCodec, default_stages
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import CheckpointError, reason
from heterodiff.files import refuse_header
from heterodiff.models.loading import refuse_nonfinite
from heterodiff.text.aligned import TOKENIZER_FOLDER, AlignedNetworks
from heterodiff.text.captioner import Captioner
from heterodiff.text.contrastive import LogitScale
from heterodiff.text.encoder import TextEncoder, check_tokenizer
from heterodiff.text.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

EMBEDDING_STRIDE = 4
CAPTION_SHARE = 0.1
"""Fraction of the captions' gradient that reaches the image encoder; 1 costs image quality, 0 caption quality."""


class AlignmentModel(nn.Module):
    """All networks but the denoiser, as one call, which distributed training needs."""

    def __init__(self, networks: AlignedNetworks):
        super().__init__()
        self.image_codec: ImageCodec = networks.image_codec
        self.text_encoder: TextEncoder = networks.text_encoder
        self.captioner: Captioner = networks.captioner
        self.logit_scale = LogitScale()

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, noise: Tensor, coin: Tensor) -> dict[str, Tensor]:
        """Compute everything that the losses need, by name.

        Args:
            images: (B, C, H, W) in [-1, 1].
            ids, mask: (B K, L), K captions of each image, one after another.
            noise: (B, c, h, w), added to the map before decoding.
            coin: (B,) bool, whether to decode the text's embedding rather than the image's (for every fourth image:
                decoding dominates the cost of a step), and whether a text's target caption is the text itself.
        """
        codec = self.image_codec
        latents = codec.encode(images)
        count = len(ids) // len(images)
        # The encoder learns from the image and, a little, from captions of its map: gradients from embeddings cost
        # more than they help. A decoder trained on predicted maps, which are blurred, would do worse on real ones.
        seen = latents.detach()
        decoder = {name: parameter.detach() for name, parameter in codec.decoder.named_parameters()}
        of_images = codec.embed(seen)
        of_texts = self.text_encoder(ids, mask).unflatten(0, (-1, count))
        by_image = codec.get_latent_from_embedding(of_images)[:, None]
        # Trained to predict maps, the text encoder would learn average layouts at the cost of the text's own content.
        by_texts = codec.get_latent_from_embedding(of_texts.detach().flatten(0, 1)).unflatten(0, (-1, count))
        errors = [
            (found.float() - seen.float()[:, None]).square().flatten(1).mean(dim=1) for found in (by_image, by_texts)
        ]
        shown = torch.where(coin[:, None, None, None], by_texts[:, 0], by_image[:, 0])[::EMBEDDING_STRIDE]
        read = seen.lerp(latents, CAPTION_SHARE)
        some = slice(None, None, EMBEDDING_STRIDE)
        # Half the targets are the text itself, so that nothing is lost, half another caption of the image, so that
        # content counts, not wording.
        own = torch.arange(len(ids), device=ids.device).view(-1, count)
        told = torch.where(coin[:, None], own, own.roll(-1, dims=1)).flatten()
        known = torch.cat([own[some, 0], told])  # of images and of texts, in one call
        of_embeddings = self.captioner.losses(
            torch.cat([of_images[some], of_texts.flatten(0, 1)]), ids[known], mask[known]
        )
        from_images, retold = of_embeddings.split([len(known) - len(told), len(told)])
        return {
            "latents": latents,
            "image_embeddings": of_images.float(),
            "text_embeddings": of_texts.float(),
            "logit_scale": self.logit_scale().expand(len(images)),
            "from_map": codec.decode(latents + noise).float(),
            "from_embedding": functional_call(codec.decoder, decoder, (shown,)).float(),
            "map": sum(errors) / 2,
            "caption": self.captioner.losses(read, ids[::count], mask[::count]),
            "caption_from_embedding": from_images,
            "retold": retold.view(-1, count).mean(dim=1),
        }


def build_networks(config: RunConfig, spec: ImageSpec, tokenizer: Any) -> AlignedNetworks:
    """New networks for images as in ``spec`` and texts of ``tokenizer``.

    Raises:
        ConfigError: images or settings that no network can be built for.
        CheckpointError: missing pretrained parts, or a tokenizer with more tokens than the pretrained encoder.
    """
    text = config.text
    fingerprint = tokenizer_fingerprint(tokenizer)
    if text.encoder is not None:
        encoder = TextEncoder.from_bert(text.encoder, text.embedding_dim, text.max_tokens, fingerprint, text.frozen)
        check_tokenizer(encoder, tokenizer)
    else:
        encoder = TextEncoder(
            vocabulary_size=len(tokenizer),
            width=text.width,
            layers=text.layers,
            num_heads=text.num_heads,
            max_tokens=text.max_tokens,
            embedding_dim=text.embedding_dim,
            dropout=text.dropout,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer_fingerprint=fingerprint,
        )
    codec = build_image_codec(config, spec)
    captioner = Captioner(
        vocabulary_size=len(tokenizer),
        latent_channels=codec.config.latent_channels,
        latent_size=codec.latent_size,
        embedding_dim=text.embedding_dim,
        width=text.captioner_width,
        layers=text.captioner_layers,
        num_heads=text.num_heads,
        max_tokens=text.max_tokens,
        dropout=text.dropout,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AlignedNetworks(tokenizer, codec, encoder, captioner)


def make_tokenizer(config: RunConfig, data: LoadedData) -> Any:
    """The tokenizer of the run folder, of the pretrained encoder, or a new one trained on the training captions.

    Raises:
        CheckpointError: no pretrained one there.
    """
    saved = None if config.output is None else config.output / TOKENIZER_FOLDER
    if saved is not None and saved.is_dir():
        return load_tokenizer(saved)
    if config.text.encoder is not None:
        return load_tokenizer(config.text.encoder)
    known = [data.captions[label] for label in data.train.labels]  # held-out captions stay unknown
    return train_tokenizer((text for texts in known for text in texts), config.text.vocabulary_size)


def codec_arguments(config: RunConfig, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of :class:`ImageCodec` for images as in ``spec``.

    Raises:
        CheckpointError: ``alignment.backbone`` is no folder of a network of transformers.
    """
    alignment = config.alignment
    backbone = alignment.backbone and _backbone_config(alignment.backbone).to_dict()
    return {
        "in_channels": spec.channels,
        "sample_size": (spec.height, spec.width),
        "block_out_channels": alignment.block_out_channels or default_stages(spec.height, spec.width),
        "latent_channels": alignment.latent_channels,
        "embedding_dim": config.text.embedding_dim,
        "backbone": backbone,
    }


def _backbone_config(path: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # transformers would fetch and run a kernel of that name
        with torch.device("meta"):
            AutoModel.from_config(config, trust_remote_code=False)
        return config
    except Exception as error:  # its validation has a family of errors of its own
        raise CheckpointError(
            f"alignment.backbone={path}: expected a folder with config.json and model.safetensors of a convolutional "
            f"network of transformers, such as a ResNet ({reason(error)})"
        ) from None


def build_image_codec(config: RunConfig, spec: ImageSpec) -> ImageCodec:
    """A new image codec, with the pretrained backbone's weights if there is one.

    Raises:
        ConfigError: images that it cannot take.
        CheckpointError: a backbone that cannot be loaded.
    """
    codec = ImageCodec(**codec_arguments(config, spec))
    path = config.alignment.backbone
    if path is not None:
        codec.encoder[0].network.load_state_dict(_backbone_weights(path))
        _freeze_unused(codec, spec)
    return codec


def _freeze_unused(codec: ImageCodec, spec: ImageSpec) -> None:
    """Freeze weights that maps do not depend on, such as norms of a pooled output: they would get no gradient."""
    with torch.enable_grad():
        codec.eval().encode(torch.zeros(1, spec.channels, spec.height, spec.width)).sum().backward()
    for parameter in codec.encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    codec.train().zero_grad(set_to_none=True)


def _backbone_weights(path: Path) -> dict[str, Tensor]:
    for file in sorted(path.glob("*.safetensors")):
        refuse_header(file, "copy it again")
    try:
        network, info = AutoModel.from_pretrained(
            path,
            config=_backbone_config(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"alignment.backbone={path}: {reason(error)}") from None
    weights = network.state_dict()
    if missing := sorted(info["missing_keys"]):  # these would be random
        raise CheckpointError(f"alignment.backbone={path}: weights missing ({', '.join(missing[:4])}); copy it again")
    refuse_nonfinite(weights, f"alignment.backbone={path}", "copy it again")
    return weights
