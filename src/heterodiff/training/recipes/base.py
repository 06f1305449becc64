"""Base of the recipes: the interface that the training loop calls, and steps that several recipes share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from heterodiff.codecs.scaling import LatentCodec, measure
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset, ImageSpec
from heterodiff.errors import DataError
from heterodiff.training.processes import HostGroup

VALIDATION_IMAGES = 256
STATISTICS_IMAGES = 4096
STATISTICS_BATCH = 32


@dataclass
class Draws:
    """Random numbers of a step; tensors have a row for each image."""

    def rows(self, part: slice) -> Self:
        """Return the draws of the images in ``part``."""
        tensors = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass
class Losses:
    """Losses of a batch.

    Attributes:
        each: loss of each image (B,), with gradient.
        parts: its terms, each (B,) and detached, to log.
        outputs: output of the network (B, ...), detached, where an adversary needs it.
    """

    each: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None


class Recipe(ABC):
    """Networks, losses and previews of one kind of run.

    Attributes:
        model: the network that is trained and averaged (EMA).
        adversary: a second network with an optimiser of its own, trained against the first; or None.
        spec: of the images.
        summary: the network in a few words.
        codec: encodes images before ``model`` sees them; None where such a codec is what is trained.
        warnings: problems of the data, to report before training.
    """

    model: Any
    adversary: nn.Module | None = None
    spec: ImageSpec
    summary: str
    codec: Any = None
    warnings: Sequence[str] = ()

    @property
    def learned_weights(self) -> int:
        """Number of the model's weights, by which a learning rate is chosen where none is given."""
        return sum(p.numel() for p in self.model.parameters())

    def to(self, device: torch.device) -> None:  # noqa: B027 (not every recipe has something to do here)
        """Move to ``device`` what is used but not trained."""

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Prepare for the first step (``begins``) or the next one.

        Returns:
            The data to train on, ``data`` or their latents, and notes to print.
        """
        return data, []

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> input of :meth:`losses`, which stored latents are already; here the images in [-1, 1].

        Args:
            images: (B, C, H, W), with the channels of a stored condition image after those of the image.
        """
        return images[:, : self.spec.channels] * 2 - 1

    @abstractmethod
    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Any:
        """All random numbers of ``step``, for the whole batch of ``batch_size`` images, as :class:`Draws`."""

    @abstractmethod
    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: Any) -> Losses:
        """The losses of prepared ``inputs`` (B, ...).

        Args:
            network: ``self.model``, possibly wrapped.
            labels: (B,) on the CPU, where they can be read without waiting for the device; -1 for none.
        """

    def adversary_losses(self, network: Callable[..., Any], inputs: Tensor, outputs: Tensor) -> Tensor:
        """The adversary's loss of each image (B,)."""
        raise AssertionError(f"{type(self).__name__} has no adversary")

    def judges(self, draws: Any) -> bool:
        """Return whether the adversary takes part in the step of ``draws``."""
        return False

    def observe(self, draws: Any, losses: Tensor, left_out: Tensor) -> None:  # noqa: B027
        """Take note of the losses (B,) of a whole batch after its step, unless it was ``left_out`` (bool scalar)."""

    @abstractmethod
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Numbers to log, from batches of prepared held-out inputs and labels; the same noise at every call."""

    @abstractmethod
    def preview(self, seed: int) -> Image:
        """A picture of the network's current results."""

    @abstractmethod
    def pipeline(self) -> Any:
        """A diffusers pipeline around the networks as they are now."""

    def save(self, folder: Path) -> None:
        """Write the networks as they are now as a diffusers pipeline folder."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)

    def state_dict(self) -> dict[str, Tensor]:
        """State outside the networks that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take over what :meth:`state_dict` returned."""


def spread(count: int, most: int) -> Tensor:
    """Up to ``most`` rows of ``count``, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def shown_images(data: LoadedData) -> ImageDataset:
    """The images of previews: held-out ones, or training images where there are none."""
    return data.val if len(data.val) else data.train


def store_scale(codec: LatentCodec, train: ImageDataset) -> None:
    """Measure mean and std of the latents of up to 4,096 training images and store them with the codec's network.

    Raises:
        DataError: NaN or infinite latents, or a channel that never varies.
    """
    parts = spread(len(train), STATISTICS_IMAGES).split(STATISTICS_BATCH)
    posteriors = (codec.posterior(train.batch(part.tolist())[0].to(codec.device)) for part in parts)
    codec.set_statistics(*measure(posteriors, codec.latent_channels))


def refuse_without_captions(config: RunConfig, data: LoadedData) -> None:
    """Raise DataError for data that have no captions."""
    if not data.captions:
        raise DataError(
            f"data.source={config.data.source}: recipe {config.recipe} needs captions, and these images have none; use "
            "source captions (a folder of images with metadata.csv|jsonl, captions.txt, results.csv or COCO's "
            "annotations), or shapes"
        )
