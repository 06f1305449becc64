"""Recipe ``classifier``: classes of noisy images, for the guidance of denoisers (Dhariwal & Nichol 2021)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.devices import send
from heterodiff.diffusion.noise import find_noise
from heterodiff.diffusion.schedule import NoiseSchedule, training_scheduler
from heterodiff.errors import ConfigError, DataError
from heterodiff.models.classifier import NoisyClassifier
from heterodiff.pipelines.classify import ClassifierPipeline, noisy_picture
from heterodiff.training.recipes.arguments import model_arguments
from heterodiff.training.recipes.base import Draws, Losses, Recipe, shown_images, spread

SHOWN = 5


def classifier_arguments(config: RunConfig, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of the :class:`NoisyClassifier` of a run; raises ConfigError as :func:`model_arguments`."""
    own = {"variant": config.model.variant, "out_channels": len(spec.class_names), "num_classes": None}
    return model_arguments(config, spec) | own


@dataclass
class ClassifierDraws(Draws):
    """Timesteps (B,) and noise (B, C, H, W)."""

    t: Tensor
    noise: Tensor


class ClassifierRecipe(Recipe):
    """Training of a classifier by cross-entropy on images noised as for the denoiser.

    Timesteps are T u^2 with u uniform in [0, 1): half of them in the first quarter, since there is little to learn at
    high noise. Images without a label do not count.

    Args:
        config: the run.
        spec: of the images.
        shown: images of the preview.

    Raises:
        ConfigError: no network for these images.
    """

    def __init__(self, config: RunConfig, spec: ImageSpec, shown: ImageDataset):
        self.config, self.spec, self.shown = config, spec, shown
        self.model = NoisyClassifier(**classifier_arguments(config, spec))
        self.schedule = NoiseSchedule.from_config(config.diffusion)
        self.summary = f"classifier of {len(spec.class_names)} classes, {config.model.variant}"

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> ClassifierDraws:
        total = self.schedule.num_train_timesteps
        share = torch.rand(batch_size, generator=generator, device=device).square()
        t = (share * total).long().clamp(max=total - 1)
        shape = (batch_size, self.spec.channels, self.spec.height, self.spec.width)
        return ClassifierDraws(t, find_noise(self.config.diffusion.noise).draw(shape, generator, device))

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: ClassifierDraws) -> Losses:
        z = self.schedule.add_noise(inputs, draws.noise, draws.t)
        logits = network(z, self.schedule.time_at(draws.t).flatten())
        targets = send(labels, logits.device)
        each = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        return Losses(each, {"accuracy": (logits.detach().argmax(dim=1) == targets).float()})

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Loss and accuracy on labelled held-out images; timesteps spread evenly, the same noise at every call."""
        every = list(batches)
        known = sum(int((labels >= 0).sum()) for _, labels in every)
        if known == 0:
            return {}
        count, device = sum(len(labels) for _, labels in every), self.model.device
        draws = self.draw(0, count, torch.Generator(device).manual_seed(seed), device)
        steps = ((torch.arange(count) + 0.5) / count * self.schedule.num_train_timesteps).long()
        # Images come class after class, and each class should be seen at all levels.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        draws = replace(draws, t=steps[order].to(device))
        sums, start = {"val_loss": 0.0, "val_accuracy": 0.0}, 0
        for inputs, labels in every:
            part = slice(start, start + len(labels))
            found = self.losses(self.model, inputs, labels, draws.rows(part))
            sums["val_loss"] += float(found.each.sum())
            sums["val_accuracy"] += float(found.parts["accuracy"].sum())
            start = part.stop
        return {name: total / known for name, total in sums.items()}

    def pipeline(self) -> ClassifierPipeline:
        pipeline = ClassifierPipeline(
            self.model,
            training_scheduler(self.config.diffusion, clip_sample=True),
            {str(k): name for k, name in enumerate(self.spec.class_names)},
            self.spec.to_dict(),
            self.config.diffusion.noise,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def preview(self, seed: int) -> Image:
        """Held-out images at several noise levels with the classes found."""
        images, labels = self.shown.batch(spread(len(self.shown), SHOWN).tolist())
        return noisy_picture(self.pipeline(), images, labels, seed)


def build(config: RunConfig, data: LoadedData) -> ClassifierRecipe:
    """Build the recipe of a run that classifies noisy images.

    Raises:
        ConfigError: latents in place of images; else as :class:`ClassifierRecipe`.
        DataError: fewer than two classes.
    """
    if data.latents is not None:
        raise ConfigError("recipe classifier needs images, found data.source=latents; set data.source to images")
    names = data.spec.class_names
    if len(names) < 2:
        raise DataError(
            f"recipe classifier needs at least two classes, found {', '.join(names) or 'images without labels'}; "
            "label the images (a folder for each class), and leave data.train_classes out"
        )
    return ClassifierRecipe(config, data.spec, shown_images(data))
