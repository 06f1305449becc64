"""Recipe ``text-image``: a denoiser of the image codec's maps, conditioned on texts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.cnn import FEATURE_CHANNELS, CNNCodec, given_rows, scaled
from heterodiff.config import CodecConfig, RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageSpec
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.errors import ConfigError
from heterodiff.models.variants import create_model
from heterodiff.pictures import image_grid
from heterodiff.pipelines.text_to_image import TextImagePipeline, no_text_warnings, predict
from heterodiff.progress import progress_tasks
from heterodiff.text.aligned import AlignedNetworks, load_aligned_networks
from heterodiff.text.caption_table import CaptionTable
from heterodiff.training.processes import HostGroup
from heterodiff.training.recipes.alignment import AlignmentDraws, AlignmentModel, AlignmentRecipe, make_pipeline
from heterodiff.training.recipes.arguments import model_arguments
from heterodiff.training.recipes.base import Losses, refuse_without_captions, spread
from heterodiff.training.recipes.diffusion import DiffusionDraws, DiffusionRecipe, make_objective
from heterodiff.training.recipes.prior import STEPS, fit_prior, known_embeddings

PRIOR = "guess."
"""Prefix of the prior's weights in a checkpoint; the word of earlier versions, whose runs can still be resumed."""
PREVIEW_TEXTS = 8
STATISTICS_MOMENTUM = 0.05
WHITENING_CAPTIONS, WHITENING_BATCH = 2_048, 256


class TextImageRecipe(DiffusionRecipe):
    """Training of a denoiser on the maps of a finished run of recipe ``alignment``.

    That run's networks are frozen but for the prior over maps, which is trained before the first step. The maps are
    stored latents; in each step, the condition is the embedding of one caption of each image.

    Args:
        config: the run.
        data: images, or their stored latents, with captions.

    Raises:
        DataError: images without captions.
        ConfigError: no network can be built for these images.
        CheckpointError: no finished alignment at ``codec.path``.
    """

    def __init__(self, config: RunConfig, data: LoadedData):
        refuse_without_captions(config, data)
        assert config.codec.path is not None
        self.networks = load_aligned_networks(config.codec.path)
        encoder = self.networks.text_encoder
        width, wanted = encoder.config.embedding_dim, config.text.embedding_dim
        if width != wanted:
            raise ConfigError(f"text.embedding_dim={wanted}: {config.codec.path} has {width}; set it to that")
        super().__init__(config, data.spec)
        self.networks.image_codec.add_features(FEATURE_CHANNELS)
        self.codec: CNNCodec = CNNCodec(self.networks.image_codec)
        self.captions = CaptionTable(self.networks.tokenizer, data.captions, encoder.config.max_tokens)
        self.warnings = self.captions.warnings
        self._whiten(data)
        shown = data.val or data.train
        rows = spread(len(shown), PREVIEW_TEXTS).tolist()
        self.shown_texts = [data.captions[shown.labels[row]][0] for row in rows]

    @torch.no_grad()
    def _whiten(self, data: LoadedData) -> None:
        """Whiten the denoiser's condition by the embeddings of captions of training images."""
        labels = torch.from_numpy(data.train.labels)[spread(len(data.train), WHITENING_CAPTIONS)]
        rows = self.captions.rows(labels, torch.rand(len(labels), generator=torch.Generator().manual_seed(0)))
        parts = (self.captions.tokens(part) for part in rows.split(WHITENING_BATCH))
        encoder = self.networks.text_encoder
        self.model.whiten_conditions(torch.cat([scaled(encoder(part.ids, part.mask).float()) for part in parts]))

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Encode the images, and train the prior, which resumed runs have in their checkpoint."""
        data, notes = super().before_training(config, data, hosts, begins, quiet)
        if begins:
            known = known_embeddings(self.networks, self.captions, data, self.codec)
            with progress_tasks(quiet or hosts.rank > 0) as task:
                error = fit_prior(self.codec, *known, progress=task("training the prior", STEPS))
            notes = [*notes, f"prior over maps: {error:.2f} of the mean map's squared error on held-out images"]
        return data, notes

    def to(self, device: torch.device) -> None:
        self.networks.to(device)
        super().to(device)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> DiffusionDraws:
        draws = super().draw(step, batch_size, generator, device)
        return replace(draws, choice=torch.rand(batch_size, generator=generator, device=device))

    def conditioned(
        self, network: Callable[..., Any], labels: Tensor, draws: DiffusionDraws, maps: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(z, time) -> prediction, conditioned on a caption of each image but where ``draws`` drop it."""
        tokens = self.captions.tokens(self.captions.rows(labels, draws.choice), labels=labels)
        with torch.no_grad():
            of_texts = self.networks.text_encoder(tokens.ids, tokens.mask).float()
        embeddings = torch.where(draws.drop[:, None], 0, of_texts)
        expected = self.codec.prior(embeddings)
        return lambda z, time: predict(network, z, time, embeddings, expected)

    def pipeline(self) -> TextImagePipeline:
        return make_pipeline(self.config, self.spec, self.networks, self.model)

    def state_dict(self) -> dict[str, Tensor]:
        projection = self.networks.image_codec.projection.state_dict(prefix=PRIOR)
        return super().state_dict() | dict(projection)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        of_prior = {name.removeprefix(PRIOR): value for name, value in state.items() if name.startswith(PRIOR)}
        self.networks.image_codec.projection.load_state_dict(of_prior)
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(PRIOR)})

    def two_images(self) -> Tensor:
        with no_text_warnings():
            return self.pipeline().generate_from_text(self.shown_texts[0], 2, num_inference_steps=2).images

    def preview(self, seed: int) -> Image:
        """A column for each held-out caption: two images of the denoiser, one decoded from the text's embedding."""
        texts, pipeline = self.shown_texts, self.pipeline()
        with no_text_warnings():
            drawn = pipeline.generate_from_text(texts, num_samples_per_prompt=2, seed=seed).images
            direct = pipeline.generate_from_text(texts, use_diffusion=False).images
        names = [*texts, *["another"] * len(texts), *["directly"] * len(texts)]
        return image_grid(torch.cat([drawn[::2], drawn[1::2], direct]), names, columns=len(texts))


class JointModel(AlignmentModel):
    """All networks as one call; the denoiser's target is the current map, without gradient.

    Args:
        networks: all but the denoiser.
        unet: the denoiser.
        objective: its loss.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, networks: AlignedNetworks, unet: Any, objective: DiffusionObjective):
        super().__init__(networks)
        self.unet = unet
        self.objective = objective
        channels = networks.image_codec.config.latent_channels
        self.register_buffer("latents_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("latents_std", torch.zeros(channels, 1, 1))  # zero: nothing measured yet

    def _target(self, latents: Tensor) -> Tensor:
        """The map normalised by running statistics, which are updated in training; no gradient."""
        latents = latents.detach().float()
        if self.training:
            mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)).clamp_min(1e-6)
            share = torch.where(self.latents_std.any(), STATISTICS_MOMENTUM, 1.0)
            finite = torch.isfinite(std).all()  # else the step is left out, and so are its statistics
            for kept, found in ((self.latents_mean, mean), (self.latents_std, std)):
                kept.copy_(torch.where(finite, kept.lerp(found.view(-1, 1, 1), share), kept))
        return self._scaled(latents)

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.latents_mean) / self.latents_std.clamp_min(1e-6)

    @torch.no_grad()
    def _prior(self, embeddings: Tensor) -> Tensor:
        maps = self.image_codec.get_latent_from_embedding(embeddings)
        return given_rows(embeddings, self._scaled(maps.float()))

    def forward(self, *arguments: Tensor) -> dict[str, Tensor]:
        """Return the outputs of :class:`AlignmentModel`, and the denoiser's loss (B,).

        Args:
            arguments: those of :class:`AlignmentModel`, then timesteps t (B,), noise eps (B, c, h, w), and drop (B,)
                bool, whose text is dropped.
        """
        *of_alignment, t, eps, drop = arguments
        found = super().forward(*of_alignment)
        embeddings = torch.where(drop[:, None], 0, found["text_embeddings"][:, 0])
        target = self._target(found["latents"])
        expected = self._prior(embeddings)
        losses, _ = self.objective.losses(
            lambda z, time: predict(self.unet, z, time, embeddings, expected), target, t, eps
        )
        return found | {"diffusion": losses}


@dataclass
class JointDraws(AlignmentDraws):
    """Draws of the alignment, timesteps (B,), their noise (B, c, h, w), and where the text is dropped (B,)."""

    t: Tensor
    eps: Tensor
    drop: Tensor


class JointRecipe(AlignmentRecipe):
    """Training of the alignment and the denoiser at once.

    Raises:
        DataError, ConfigError, CheckpointError: as :class:`AlignmentRecipe`.
    """

    def __init__(self, config: RunConfig, data: LoadedData):
        if config.diffusion.timestep_sampler != "uniform":
            raise ConfigError(
                f"diffusion.timestep_sampler={config.diffusion.timestep_sampler} does not go with "
                "alignment.joint=true; leave it out"
            )
        super().__init__(config, data)
        unet = create_model(config.model.variant, **denoiser_arguments(config, data.spec, self.latent_shape))
        self.model = JointModel(self.networks, unet, make_objective(config))
        self.summary += f", {config.model.variant}, jointly"

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> JointDraws:
        draws = super().draw(step, batch_size, generator, device)
        eps = torch.randn(draws.noise.shape, generator=generator, device=device)
        steps = self.config.diffusion.num_train_timesteps
        t = (torch.rand(batch_size, generator=generator, device=device) * steps).long().clamp(max=steps - 1)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.config.diffusion.p_uncond
        return JointDraws(**vars(draws), t=t, eps=eps, drop=drop)

    def _arguments(self, draws: AlignmentDraws) -> tuple[Tensor, ...]:
        assert isinstance(draws, JointDraws)
        return (*super()._arguments(draws), draws.t, draws.eps, draws.drop)

    def losses_of(self, found: dict[str, Tensor], inputs: Tensor, wording: Tensor) -> Losses:
        losses = super().losses_of(found, inputs, wording)
        each = losses.each + self.config.alignment.diffusion_weight * found["diffusion"]
        return Losses(each, losses.parts | {"diffusion": found["diffusion"].detach()})

    def pipeline(self) -> TextImagePipeline:
        return make_pipeline(self.config, self.spec, self.networks, self.model.unet)

    def preview(self, seed: int) -> Image:
        """Preview as for the alignment; the codec's scale is set to that of the denoiser's target now."""
        model = self.model
        if bool(model.latents_std.any()):
            CNNCodec(model.image_codec).set_statistics(model.latents_mean.flatten(), model.latents_std.flatten())
        return super().preview(seed)

    def _ways(self) -> tuple[tuple[str, bool], ...]:
        return (*super()._ways(), ("text, by diffusion", True))


def denoiser_arguments(config: RunConfig, spec: ImageSpec, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments of the denoiser for latents of ``latent_shape``, whose codec need not be saved yet."""
    channels, height, width = latent_shape
    on_latents = replace(spec, channels=channels, height=height, width=width)
    return model_arguments(config.model_copy(update={"codec": CodecConfig()}), on_latents)
