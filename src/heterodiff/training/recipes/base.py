"""What the loop asks of a recipe."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from heterodiff.codecs.scaling import LatentCodec, measure
from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset
from heterodiff.errors import DataError
from heterodiff.training.processes import HostGroup

VALIDATION_IMAGES = 256
STATISTICS_IMAGES = 4096
STATISTICS_BATCH = 32


class Draws(Protocol):
    """The random numbers of a step, one row an image."""

    def rows(self, part: slice) -> Any:
        """Those of the images in ``part``."""
        ...


@dataclass
class Losses:
    """Of a batch.

    Attributes:
        each: the loss of each image (B,), with gradient.
        parts: what it is made of, each (B,) and detached, to log.
        outputs: what the network made (B, ...), detached, if anybody is to look at it.
    """

    each: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None


class Recipe(Protocol):
    """What one run trains.

    Attributes:
        model: the network that is trained and averaged (EMA).
        adversary: a second network with an optimiser of its own, trained against the first; or None.
        summary: the network in a few words.
        codec: what images go through before ``model`` sees them; None where such a codec is what is trained.
        warnings: what is to be said of the data before training.
    """

    summary: str
    codec: Any
    warnings: Sequence[str]

    @property
    def model(self) -> nn.Module: ...

    @property
    def adversary(self) -> nn.Module | None: ...

    def to(self, device: torch.device) -> None:
        """Move what is not trained to ``device``."""
        ...

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        """Do what is done once before the first step (``begins``) or the next one.

        Returns:
            What the loop is to train on, ``data`` or their latents, and notes to print.
        """
        ...

    def prepare(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> what :meth:`losses` takes; cached latents hold it ready."""
        ...

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Any:
        """All random numbers of ``step`` for ``batch_size`` images (the whole batch, whoever computes which part)."""
        ...

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: Any) -> Losses:
        """The losses of prepared ``inputs`` (B, ...); ``network`` is the model, possibly wrapped.

        Labels (B,) lie on the CPU, where they can be looked at without waiting for the device.
        """
        ...

    def adversary_losses(self, network: Callable[..., Any], inputs: Tensor, outputs: Tensor) -> Tensor:
        """The adversary's loss of each image (B,)."""
        ...

    def judges(self, draws: Any) -> bool:
        """Whether the adversary takes part in the step of ``draws``."""
        ...

    def observe(self, draws: Any, losses: Tensor, left_out: Tensor) -> None:
        """Take note of the losses (B,) of a whole batch after its step, unless it was ``left_out`` (bool scalar)."""
        ...

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        """Numbers to log, from batches of prepared held-out inputs and labels; the same noise at every call."""
        ...

    def preview(self, seed: int) -> Image:
        """A picture of what the network can do now."""
        ...

    def save(self, folder: Path) -> None:
        """Write the network as it is now as a diffusers pipeline folder."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """State outside the networks that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def store_scale(codec: LatentCodec, train: ImageDataset) -> None:
    """Measure mean and std of the latents of up to 4,096 training images and store them with the codec's network.

    Raises:
        DataError: NaN or infinite latents, or a channel that never varies.
    """
    rows = torch.linspace(0, len(train) - 1, min(STATISTICS_IMAGES, len(train))).long().tolist()
    parts = (rows[k : k + STATISTICS_BATCH] for k in range(0, len(rows), STATISTICS_BATCH))
    posteriors = (codec.posterior(train.batch(part)[0].to(codec.device)) for part in parts)
    codec.set_statistics(*measure(posteriors, codec.latent_channels))


def refuse_without_captions(config: RunConfig, data: LoadedData) -> None:
    """Raise DataError for data that have no captions."""
    if not data.captions:
        raise DataError(
            f"data.source={config.data.source}: no captions, which recipe {config.recipe} learns from; use source "
            "captions (a folder of images with metadata.csv|jsonl, captions.txt, results.csv or COCO's annotations), "
            "or shapes"
        )
