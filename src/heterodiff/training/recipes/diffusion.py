"""Recipe ``diffusion``: a denoiser of images, conditioned on their class labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from heterodiff.codecs.kl_vae import KLVAECodec
from heterodiff.codecs.make import latent_shape, make_codec
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.conditions import split_condition, to_maps
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.devices import send
from heterodiff.diffusion.noise import find_noise
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.diffusion.samplers import check_noise, make_sampler
from heterodiff.diffusion.schedule import NoiseSchedule, training_scheduler
from heterodiff.diffusion.timesteps import make_timestep_sampler
from heterodiff.errors import ConfigError
from heterodiff.models.conditioning import NO_CLASS, Conditions
from heterodiff.models.variants import VARIANTS, create_model
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.pipelines.image_files import conditioned_grid
from heterodiff.training.batches import Stream, derive_seed
from heterodiff.training.latents import prepare_latents
from heterodiff.training.processes import HostGroup
from heterodiff.training.recipes.adapting import ADAPTER, adapted, merged, save_updates, train_part
from heterodiff.training.recipes.arguments import model_arguments
from heterodiff.training.recipes.base import Draws, Losses, Recipe, shown_images
from heterodiff.training.recipes.initial import start_from
from heterodiff.training.recipes.preservation import Preserved, drawn_images

PREPARED_AT_ONCE = 64
PREVIEW_CLASSES = 10
PREVIEW_COLUMNS = 8
PREVIEW_COLUMNS_LARGE = 4  # of images above 32x32, which take long to draw on a CPU


@dataclass
class DiffusionDraws(Draws):
    """Timesteps (B,) and their loss weights, noise (B, c, h, w), and where the condition is dropped (B,)."""

    t: Tensor
    weights: Tensor
    noise: Tensor
    drop: Tensor
    latent_noise: Tensor | None = None  # of the draw from the codec's posterior
    choice: Tensor | None = None  # among an image's captions
    drop_each: Tensor | None = None  # (B, A), where an attribute alone is dropped
    preserved: Tensor | None = None  # row among the images that the base run has drawn

    def twice(self) -> "DiffusionDraws":
        """The draws of two batches that share them."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: torch.cat([value, value]) for name, value in tensors.items()})


def make_objective(config: RunConfig) -> DiffusionObjective:
    """The objective of the denoiser.

    Raises:
        ConfigError: a sampler that does not work with it, which would otherwise stop the run at the first preview.
    """
    schedule = NoiseSchedule.from_config(config.diffusion)
    make_sampler(config.sampling.sampler, schedule, config.sampling.num_inference_steps)
    check_noise(config.sampling.sampler, config.diffusion.noise)
    return DiffusionObjective(config.diffusion, schedule)


class DiffusionRecipe(Recipe):
    """Training of a denoiser.

    Args:
        config: the run.
        spec: of the images.

    Raises:
        ConfigError: no network can be built for these images.
        CheckpointError: the codec's VAE cannot be loaded.
    """

    shown: ImageDataset | None = None
    """Images whose conditions a preview shows."""

    def __init__(self, config: RunConfig, spec: ImageSpec):
        self.config, self.spec = config, spec
        self.latent_shape = latent_shape(config.codec, spec.channels, spec.height, spec.width)
        self.model = create_model(config.model.variant, **model_arguments(config, spec))
        train_part(self.model, config.model)
        self.preserved: Preserved | None = None
        self.codec = make_codec(config.codec)
        self.summary = config.model.variant
        if self.codec.factor > 1:
            self.summary += " on {}x{}x{} latents".format(*self.latent_shape)
        self.objective = make_objective(config)
        self.timesteps = make_timestep_sampler(config.diffusion.timestep_sampler, config.diffusion.num_train_timesteps)

    def to(self, device: torch.device) -> None:
        self.codec.to(device)
        self.timesteps.to(device)

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Encode the images, if the run caches their latents, fix the codec's scale, and take initial weights over."""
        notes: list[str] = []
        if begins and config.model.init_from is not None:
            notes = start_from(config.model.init_from, self.model, config.diffusion.prediction, data.spec.class_names)
        if config.model.prior_preservation:
            self._preserve(config, data.spec.class_names, hosts)
        return prepare_latents(config, self, data, hosts, quiet), notes

    def _preserve(self, config: RunConfig, names: Sequence[str], hosts: HostGroup) -> None:
        m, seed = config.model, derive_seed(config.training.seed, Stream.PRIOR)
        assert config.output is not None
        assert m.init_from is not None
        images, labels = drawn_images(config.output, m.init_from, m.prior_images, names, seed, hosts)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            parts = [self.codec.posterior(part.to(device)) for part in images.split(PREPARED_AT_ONCE)]
        self.preserved = Preserved(torch.cat(parts), labels.to(device))

    def prepare(self, images: Tensor) -> Tensor:
        """The codec's posterior of images (B, C, H, W) in [0, 1], then the maps of their condition images."""
        images, condition = split_condition(images, self.spec)
        posterior = self.codec.posterior(images)
        return posterior if condition is None else torch.cat([posterior, to_maps(condition, self.codec.factor)], dim=1)

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> DiffusionDraws:
        t, weights = self.timesteps.sample(batch_size, generator)
        shape = (batch_size, *self.latent_shape)
        noise = find_noise(self.config.diffusion.noise).draw(shape, generator, device)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.config.diffusion.p_uncond
        latent_noise = None
        if self.codec.random and self.config.codec.posterior == "sample":
            latent_noise = torch.randn(shape, generator=generator, device=device)
        drop_each = None
        if self.spec.attributes:
            each = torch.rand(batch_size, len(self.spec.attributes), generator=generator, device=device)
            drop_each = each < self.config.diffusion.p_uncond
        preserved = None
        if self.preserved is not None:
            count = len(self.preserved.labels)
            preserved = torch.randint(count, (batch_size,), generator=generator, device=device)
        return DiffusionDraws(t, weights, noise, drop, latent_noise, drop_each=drop_each, preserved=preserved)

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: DiffusionDraws) -> Losses:
        """Weighted losses of a batch.

        Args:
            network: ``self.model``, possibly wrapped.
            inputs: as :meth:`prepare` makes them, or stored posteriors.
            labels: (B,), -1 for none, or with attributes (B, 1 + A).
        """
        if draws.preserved is not None:
            return self._preserving_losses(network, inputs, labels, draws)
        count = self.spec.condition_channels(self.codec.factor)
        posterior, maps = inputs.split([inputs.shape[1] - count, count], dim=1)
        z = self.codec.draw(posterior, draws.latent_noise)
        model_call = self.conditioned(network, labels, draws, maps if count else None)
        losses, parts = self.objective.losses(model_call, z, draws.t, draws.noise)
        return Losses(losses * draws.weights, parts)

    def _preserving_losses(
        self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: DiffusionDraws
    ) -> Losses:
        """Losses of a batch, and of as many images drawn by the base, with the same noise, in one pass."""
        assert self.preserved is not None
        assert draws.preserved is not None
        inputs = torch.cat([inputs, self.preserved.inputs[draws.preserved]])
        labels = torch.cat([send(labels, inputs.device), self.preserved.labels[draws.preserved]])
        both = self.losses(network, inputs, labels, replace(draws.twice(), preserved=None))
        own, prior = both.each.chunk(2)
        parts = {name: value.chunk(2)[0] for name, value in both.parts.items()}
        return Losses(own + self.config.model.prior_preservation * prior, {**parts, "prior_loss": prior.detach()})

    def conditioned(
        self, network: Callable[..., Any], labels: Tensor, draws: DiffusionDraws, maps: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(z, time) -> prediction, conditioned on ``labels`` and ``maps`` but where ``draws`` drop the condition."""
        found = Conditions()
        if self.spec.class_names or self.spec.attributes:
            labels = send(labels, draws.drop.device)
        if self.spec.attributes:
            assert draws.drop_each is not None
            dropped = draws.drop[:, None] | draws.drop_each
            found = replace(found, attributes=labels[:, 1:].masked_fill(dropped, torch.nan))
            labels = labels[:, 0].long()
        if self.spec.class_names:
            found = replace(found, labels=labels.masked_fill(draws.drop, NO_CLASS))
        if maps is not None:
            found = replace(found, image=torch.where(draws.drop[:, None, None, None], 0, maps))
        return lambda z, time: found.call(network, z, time)

    def observe(self, draws: DiffusionDraws, losses: Tensor, left_out: Tensor) -> None:
        if self.timesteps.learns:
            self.timesteps.update(draws.t, (losses / draws.weights).masked_fill(left_out, torch.nan))

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Loss on held-out images; timesteps spread evenly, the same noise at every call."""
        every = list(batches)
        count = sum(len(labels) for _, labels in every)
        if count == 0:
            return {}
        device = every[0][0].device
        draws = self.draw(0, count, torch.Generator(device).manual_seed(seed), device)
        spread = (torch.arange(count, device=device) + 0.5) / count * self.config.diffusion.num_train_timesteps
        draws = replace(draws, t=spread.long(), weights=torch.ones_like(draws.weights), preserved=None)
        total, start = 0.0, 0
        for inputs, labels in every:
            part = slice(start, start + len(labels))
            total += float(self.losses(self.model, inputs, labels, draws.rows(part)).each.sum())
            start = part.stop
        return {"val_loss": total / count}

    @property
    def learned_weights(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """Write the pipeline, with low-rank updates added to the weights, and these by themselves."""
        own = self.model
        if not adapted(own):
            super().save(folder)
            return
        self.model = merged(own)
        try:
            super().save(folder)
        finally:
            self.model = own
        assert self.config.model.init_from is not None
        save_updates(own, folder / ADAPTER, self.config.model.init_from)

    def pipeline(self) -> Any:
        scheduler = training_scheduler(self.config.diffusion, clip_sample=self.codec.clip_sample)
        vae = self.codec.vae if isinstance(self.codec, KLVAECodec) else None
        pipeline = GenerationPipeline(self.model, scheduler, vae, noise=self.config.diffusion.noise)
        pipeline.defaults, pipeline.spec = self.config.sampling, self.spec
        pipeline.class_names = self.spec.class_names
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def two_images(self) -> Tensor:
        """Two images (2, C, H, W) drawn in two steps, to check that sampling works."""
        return self.pipeline()(num_images=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

    def preview(self, seed: int) -> Image:
        """A labelled grid of samples, one row per class; or held-out condition images, what is drawn of them, truth."""
        if self.shown is not None and (self.spec.condition or self.spec.attributes):
            return conditioned_grid(self.pipeline(), self.shown, seed)
        names = self.spec.class_names[:PREVIEW_CLASSES]
        rows = list(range(len(names))) if names else [NO_CLASS] * 4
        columns = PREVIEW_COLUMNS if self.spec.height * self.spec.width <= 32 * 32 else PREVIEW_COLUMNS_LARGE
        labels = [row for row in rows for _ in range(columns)]
        generators = seeded_generators(seed, len(labels))
        images = self.pipeline()(labels, generator=generators).images
        assert isinstance(images, Tensor)
        captions = [self.spec.class_names[k] for k in labels] if names else None
        return image_grid(images, captions, columns=columns)

    def state_dict(self) -> dict[str, Tensor]:
        return self.timesteps.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.timesteps.load_state_dict(state)


def build(config: RunConfig, data: LoadedData) -> DiffusionRecipe:
    """Build the recipe of a run on images with classes, or on their latents.

    Raises:
        ConfigError: latents without the VAE that they come from; else as :class:`DiffusionRecipe`.
    """
    if data.latents is not None and config.codec.kind != "kl-vae":
        vae = data.latents.vae_path
        raise ConfigError(f"data.source=latents needs the VAE they come from: set codec.kind=kl-vae codec.path={vae}")
    recipe = DiffusionRecipe(config, data.spec)
    recipe.shown = shown_images(data)
    return recipe


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    """Notes on valid settings of a denoiser that are hardly meant."""
    doubts = []
    conditional = data.spec.class_names or data.captions
    if conditional and config.diffusion.p_uncond == 0 and config.sampling.guidance_scale != 1:
        doubts.append("diffusion.p_uncond=0: the unconditional branch is not trained, so guidance will not work")
    if conditional and config.diffusion.p_uncond == 1:
        doubts.append("diffusion.p_uncond=1: the condition is never shown to the network")
    row = VARIANTS.get(config.model.variant)
    hybrid = row is not None and (row.pooled or row.hybrid is not None)
    if hybrid and config.model.channel_mult is not None and len(config.model.channel_mult) < 2:
        doubts.append(f"model.channel_mult has one level, so {config.model.variant} has no hybrid block: it is a unet")
    return doubts
