"""Recipe ``alignment``: image codec, text encoder and captioner, trained together."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.cnn import CNNCodec
from heterodiff.compiling import compiles
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.diffusion.schedule import training_scheduler
from heterodiff.errors import DataError
from heterodiff.metrics.reconstruction import psnr
from heterodiff.metrics.retrieval import recall
from heterodiff.pictures import image_grid
from heterodiff.pipelines.text_to_image import TextImagePipeline, no_text_warnings
from heterodiff.text.aligned import AlignedNetworks
from heterodiff.text.caption_table import CaptionTable
from heterodiff.text.contrastive import contrastive_losses
from heterodiff.training.recipes.alignment_networks import (
    EMBEDDING_STRIDE,
    AlignmentModel,
    build_networks,
    make_tokenizer,
)
from heterodiff.training.recipes.base import Draws, Losses, Recipe, refuse_without_captions, spread, store_scale

PREVIEW_IMAGES = 8
SCALE_IMAGES = 1024
SCALE_BATCH = 64


@dataclass
class AlignmentDraws(Draws):
    """First of each image's captions (B,) in [0, 1), the noise on its map (B, c, h, w), and a coin (B,) bool."""

    choice: Tensor
    noise: Tensor
    coin: Tensor


class AlignmentRecipe(Recipe):
    """Training of the image codec and the text networks.

    The loss of an image and one or more of its captions is the sum of

    - symmetric InfoNCE (Radford et al. 2021) among the pairs that all processes compute at once;
    - mean squared errors: of the image decoded from its map; of every fourth image decoded from its own or the text's
      embedding; of the map predicted from both. An absolute error keeps the decoder at the median image for hundreds of
      steps. Errors of images are relative to that of the mean training image, so that weights mean the same for all
      data;
    - cross-entropy per token: of the caption given the map, and of a caption given the embeddings of every fourth image
      and of every text.

    The text encoder learns from the contrastive loss and from captioning its own embedding (half the targets are the
    text itself, half another caption of the image where a step has several), not from maps or images, which are blurred
    on average. The decoder learns from the image's own map alone, the encoder from that and, by a tenth, from captions.

    Args:
        config: the run.
        data: images with captions.

    Raises:
        DataError: images without captions.
        ConfigError, CheckpointError: no networks for these images.
    """

    def __init__(self, config: RunConfig, data: LoadedData):
        refuse_without_captions(config, data)
        self.config, self.spec, self.train = config, data.spec, data.train
        self.shown = data.val or data.train
        tokenizer = make_tokenizer(config, data)
        self.networks = build_networks(config, data.spec, tokenizer)
        self.captions = CaptionTable(
            tokenizer, data.captions, config.text.max_tokens, one_length=compiles(config.training)
        )
        self.warnings = self.captions.warnings
        self.model = AlignmentModel(self.networks)
        self.scale = mean_image_error(data.train)
        self.latent_shape = (config.alignment.latent_channels, *self.networks.image_codec.latent_size)
        self.summary = "image codec to {}x{}x{}, text encoder, captioner".format(*self.latent_shape)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> AlignmentDraws:
        choice = torch.rand(batch_size, generator=generator, device=device)
        noise = torch.randn((batch_size, *self.latent_shape), generator=generator, device=device)
        coin = torch.rand(batch_size, generator=generator, device=device) < 0.5
        return AlignmentDraws(choice, noise * self.config.alignment.latent_noise, coin)

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: AlignmentDraws) -> Losses:
        rows = self.captions.rows(labels, draws.choice, self.config.alignment.captions_per_image)
        tokens = self.captions.tokens(rows.flatten(), labels=labels)
        found = network(inputs, tokens.ids, tokens.mask, *self._arguments(draws))
        return self.losses_of(found, inputs, self.captions.on(inputs.device).wording[rows])

    def _arguments(self, draws: AlignmentDraws) -> tuple[Tensor, ...]:
        """Arguments of the model after images and tokens."""
        return draws.noise, draws.coin

    def losses_of(self, found: dict[str, Tensor], inputs: Tensor, wording: Tensor) -> Losses:
        """Losses from the outputs of :class:`AlignmentModel`; equal numbers in ``wording`` (B, K): equal captions."""
        weights = self.config.alignment
        contrastive = contrastive_of(found | {"wording": wording})
        some = found["from_embedding"] - inputs[::EMBEDDING_STRIDE]
        parts = {
            "contrastive": contrastive,
            "from_map": (found["from_map"] - inputs).square().flatten(1).mean(dim=1) / self.scale,
            "from_embedding": _over_all(some.square().flatten(1).mean(dim=1) / self.scale, len(inputs)),
            "caption_from_embedding": _over_all(found["caption_from_embedding"], len(inputs)),
        } | {name: found[name] for name in ("map", "caption", "retold")}
        reconstruction = sum(value for name, value in parts.items() if name != "contrastive")
        each = weights.contrastive_weight * contrastive + weights.reconstruction_weight * reconstruction
        return Losses(each, {name: value.detach() for name, value in parts.items()})

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Losses, PSNR in dB of the image from its map, and recall at 5 among the held-out images, both ways."""
        found: dict[str, list[Tensor]] = {}
        for number, (inputs, labels) in enumerate(batches):
            rows = self.captions.rows(labels, count=1)
            tokens = self.captions.tokens(rows[:, 0], inputs.device)
            generator = torch.Generator(inputs.device).manual_seed(seed + number)
            draws = self.draw(0, len(inputs), generator, inputs.device)
            draws = replace(draws, noise=torch.zeros_like(draws.noise))
            output = self.model(inputs, tokens.ids, tokens.mask, *self._arguments(draws))
            losses = self.losses_of(output, inputs, self.captions.wording[rows].to(inputs.device))
            quality = psnr((inputs + 1) / 2, ((output["from_map"] + 1) / 2).clamp(0, 1))
            embedded = {
                "images": output["image_embeddings"],
                "texts": output["text_embeddings"][:, 0],
                "rows": rows[:, 0],
            }
            for name, value in {"loss": losses.each, **losses.parts, "psnr": quality, **embedded}.items():
                found.setdefault(name, []).append(value)
        if not found:
            return {}
        images, texts, rows = (torch.cat(found.pop(name)) for name in ("images", "texts", "rows"))
        captions = [self.captions.texts[row] for row in rows.tolist()]
        retrieved = recall(images, texts, torch.arange(len(images)), captions, ks=(5,))
        measured = {name: float(torch.cat(values).mean()) for name, values in found.items()} | retrieved
        return {f"val_{name}": value for name, value in measured.items()}

    def pipeline(self) -> TextImagePipeline:
        return make_pipeline(self.config, self.spec, self.networks)

    def _ways(self) -> tuple[tuple[str, bool], ...]:
        """Ways from a text to an image: name, and whether the denoiser is used."""
        return (("text, directly", False),)

    def preview(self, seed: int) -> Image:
        """Rows of held-out images with their caption, decoded maps with the generated caption, and images of texts."""
        images, labels = self.shown.batch(spread(len(self.shown), PREVIEW_IMAGES).tolist())
        pipeline = self.pipeline()
        texts = [self.captions.captions[int(label)][0] for label in labels]
        written = [found[0] for found in pipeline.generate_text_from_image(images, seed=seed)]
        rows = [images, pipeline.codec.decode(pipeline.codec.encode(images.to(pipeline.device))).cpu()]
        names = [*texts, *written]
        for name, use_diffusion in self._ways():
            with no_text_warnings():
                rows.append(pipeline.generate_from_text(texts, use_diffusion=use_diffusion, seed=seed).images)
            names += [name] * len(texts)
        return image_grid(torch.cat(rows), names, columns=len(texts))

    def save(self, folder: Path) -> None:
        """Write all networks, with the mean and std of the maps of up to 4,096 training images in the codec's."""
        store_scale(CNNCodec(self.model.image_codec), self.train)
        super().save(folder)


def make_pipeline(config: RunConfig, spec: ImageSpec, networks: AlignedNetworks, unet: Any = None) -> TextImagePipeline:
    """A pipeline around ``networks`` and the denoiser ``unet``, if any."""
    scheduler = None if unet is None else training_scheduler(config.diffusion, clip_sample=False)
    pipeline = TextImagePipeline(
        networks.image_codec, networks.text_encoder, networks.tokenizer, networks.captioner, unet, scheduler
    )
    return pipeline.set_up(config, spec)


def _over_all(values: Tensor, count: int) -> Tensor:
    """Losses of every fourth image as losses of all (count,), so that their mean is that of those computed."""
    each = values.new_zeros(count)
    each[::EMBEDDING_STRIDE] = values * (count / len(values))
    return each


def mean_image_error(train: ImageDataset) -> float:
    """Mean squared error, in [-1, 1], of the mean image, on up to 1,024 training images."""
    rows = spread(len(train), SCALE_IMAGES)
    parts = [part.tolist() for part in rows.split(SCALE_BATCH)]
    mean = sum(train.batch(part)[0].double().sum(dim=0) for part in parts) / len(rows) * 2 - 1
    squared = 0.0
    for part in parts:
        difference = train.batch(part)[0].double() * 2 - 1 - mean
        squared += float(difference.square().mean(dim=(1, 2, 3)).sum())
    if squared == 0:
        raise DataError("all training images are identical; there is nothing to learn")
    return squared / len(rows)


def contrastive_of(found: dict[str, Tensor]) -> Tensor:
    """InfoNCE of each pair of this process (B,), in training among the pairs of all processes; mean over K captions.

    Args:
        found: ``image_embeddings`` (B, D), ``text_embeddings`` (B, K, D), ``logit_scale`` (B,), and ``wording`` (B, K):
            equal numbers are equal captions.
    """
    images, texts, wording = (found[name] for name in ("image_embeddings", "text_embeddings", "wording"))
    count = len(images)
    if torch.is_grad_enabled():
        images, texts, wording = everywhere(images), everywhere(texts), everywhere(wording)
    first = count * dist.get_rank() if len(images) > count else 0
    scale = found["logit_scale"].mean()
    each_caption = [
        contrastive_losses(images, some, scale, same[:, None] == same[None])
        for some, same in zip(texts.unbind(1), wording.unbind(1), strict=True)
    ]
    return torch.stack(each_caption).mean(dim=0)[first : first + count]


def everywhere(values: Tensor) -> Tensor:
    """``values`` (B, ...) of all processes in the order of their ranks, gradients included."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    if values.requires_grad:
        return torch.cat(differentiable.all_gather(values))
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Note on batches that the contrastive loss learns nothing from."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.training.batch_size != config.training.accumulation_steps * processes:
        return []
    return ["batches of one image: the contrastive loss has nothing to compare it with and teaches nothing"]
