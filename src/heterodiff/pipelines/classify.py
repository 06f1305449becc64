"""Classes of noisy images, for the guidance of denoisers."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from heterodiff.data.dataset import ImageSpec
from heterodiff.diffusion.guidance import LogProbability
from heterodiff.diffusion.noise import find_noise
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError
from heterodiff.models.classifier import NoisyClassifier
from heterodiff.pictures import image_grid
from heterodiff.pipelines.drawing import DrawingPipeline

AT_ONCE = 64
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of the timesteps at which a classifier is looked at."""
AS_THE_DENOISER = "train a classifier with the data and diffusion sections of the denoiser"


class ClassifierPipeline(DiffusionPipeline):
    """The classifier of a run of recipe ``classifier``; ``heterodiff.load`` builds it from the run folder.

    Args:
        classifier: the network.
        scheduler: the diffusers scheduler that describes the noise schedule of the training.
        id2label: names of the classes by index.
        image_spec: size, classes, value range and number type of the training images.
        noise: name of the noise of the training.

    Attributes:
        class_names: by index.
        spec: :class:`heterodiff.image_spec.ImageSpec`.
        schedule: noise schedule of the training.
    """

    def __init__(
        self,
        classifier: NoisyClassifier,
        scheduler: Any,
        id2label: dict | None = None,
        image_spec: dict | None = None,
        noise: str = "gaussian",
    ):
        super().__init__()
        self.register_modules(classifier=classifier, scheduler=scheduler)
        self.register_to_config(id2label=id2label, image_spec=image_spec, noise=noise)
        names = id2label or {}
        self.class_names = tuple(str(names[key]) for key in sorted(names, key=int))
        self.spec = ImageSpec.from_dict(dict(image_spec)) if image_spec else None
        self.schedule = NoiseSchedule.from_scheduler(scheduler)
        find_noise(noise)
        self.noise = noise

    @torch.no_grad()
    def __call__(self, images: Tensor, level: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Return probabilities (B, classes), on the CPU, of images (B, C, H, W) in [0, 1] after they are noised.

        Args:
            level: share of the timesteps, from 0 (hardly noised) to 1 (pure noise).
            generator: of the noise.

        Raises:
            ConfigError: images of another shape than the network takes, or a level outside the range.
        """
        time = self.schedule.time[self.timestep(level)].item()
        parts = self.noised(images, level, generator).split(AT_ONCE)
        return torch.cat([self.classifier(part.to(self.device), time).softmax(dim=1).cpu() for part in parts])

    def timestep(self, level: float) -> int:
        """Return the training timestep of a ``level`` between 0 and 1; raises ConfigError for another number."""
        if not 0 <= level <= 1:  # NaN as well
            raise ConfigError(f"level {level}: expected a share of the noise levels, from 0 to 1")
        return round(level * (self.schedule.num_train_timesteps - 1))

    def noised(self, images: Tensor, level: float, generator: torch.Generator | None = None) -> Tensor:
        """Return images (B, C, H, W) in [0, 1], scaled to [-1, 1] and noised as in training, on the CPU."""
        t = self.timestep(level)
        noise = find_noise(self.noise).draw(images.shape, generator, "cpu")
        return self.schedule.alpha[t].item() * (images.float() * 2 - 1) + self.schedule.sigma[t].item() * noise

    def log_probability(self, label: str) -> LogProbability:
        """Return (z, network time) -> log p(label | z), with gradient; ``label`` is the name of a class."""
        index = self.class_names.index(label)
        return lambda z, time: self.classifier.log_probability(z, time, index)

    def check_fits(self, name: str, denoiser: DrawingPipeline, class_names: tuple[str, ...], label: str) -> None:
        """Check that the classifier can guide a denoiser to the class ``label``.

        Args:
            name: the setting that names the classifier, which begins the message.
            class_names: classes of the denoiser; () for one without labels.

        Raises:
            ConfigError: no such class; other images, noise, noise schedule or classes than the denoiser's.
        """
        trained = denoiser.denoiser.schedule
        if label not in self.class_names:
            known = ", ".join(self.class_names)
            raise ConfigError(f"{name}: knows the classes {known}; none of them is segmentation.healthy={label}")
        facts: dict[str, tuple[Any, Any]] = {
            "noise": (denoiser.noise, self.noise),
            "schedule": (f"kind {trained.kind}", f"kind {self.schedule.kind}"),
            "number of noise levels": (trained.num_train_timesteps, self.schedule.num_train_timesteps),
        }
        if self.spec is not None and denoiser.spec is not None:
            theirs, own = (f"{spec.channels}x{spec.height}x{spec.width}" for spec in (denoiser.spec, self.spec))
            facts = {"image size": (theirs, own), **facts}
        if class_names:
            facts["classes"] = (", ".join(sorted(class_names)), ", ".join(sorted(self.class_names)))
        for key, (expected, found) in facts.items():
            if expected != found:
                raise ConfigError(
                    f"{name}: expected the {key} of the denoiser, {expected}, found {found}; {AS_THE_DENOISER}"
                )
        if not torch.allclose(trained.alpha, self.schedule.alpha, atol=1e-6):
            raise ConfigError(
                f"{name}: expected the diffusion.schedule of the denoiser, found another; {AS_THE_DENOISER}"
            )


def noisy_picture(pipeline: ClassifierPipeline, images: Tensor, labels: Tensor, seed: int) -> Image:
    """Draw rows of ``images`` (B, C, H, W) in [0, 1] at several noise levels, with the class found.

    Args:
        labels: (B,) true classes, -1 for none; a found class that is wrong is marked.
    """
    tiles, titles = [], []
    for level in LEVELS:
        noisy = pipeline.noised(images, level, torch.Generator().manual_seed(seed))
        tiles.append(((noisy + 1) / 2).clamp(0, 1))
        found = pipeline(images, level, torch.Generator().manual_seed(seed)).argmax(dim=1)
        for index, label in zip(found.tolist(), labels.tolist(), strict=True):
            titles.append(pipeline.class_names[index] + (" (wrong)" if label not in (-1, index) else ""))
    return image_grid(torch.cat(tiles), titles, columns=len(images))


def try_out(pipeline: ClassifierPipeline, add: Callable[[bool, str, str], None]) -> None:
    """Classify one picture of noise."""
    config = pipeline.classifier.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    noise = torch.rand(1, config.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    found = pipeline(noise, 0.5, torch.Generator().manual_seed(0))
    count = found.shape[1]
    add(bool(torch.isfinite(found).all()), "classes", f"probabilities of {count} classes of a picture of noise")
