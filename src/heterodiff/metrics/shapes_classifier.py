"""Classifier of the scenes in pictures of the source ``shapes``: a small network trained on real renders alone.

It answers "does the generated picture show what the prompt says?" independently of the model that drew it.
"""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from heterodiff.devices import default_device
from heterodiff.errors import CheckpointError
from heterodiff.files import write_bytes
from heterodiff.metrics.classifiers import train_network
from heterodiff.models.loading import refuse_nonfinite
from heterodiff.simulators.shapes.drawing import render
from heterodiff.simulators.shapes.scenes import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing, draw_scene

VERSION = "3"
"""Version of network, training and renders: change it with any of them, and stored weights are trained again."""
MAX_SIDE = 64
LAYOUTS = (*PLACES, *RELATIONS)
THINGS = 2
NO_SECOND = -1
PAIRS = 0.6
TRAIN_RENDERS, STEPS, BATCH_SIZE = 16_000, 800, 64
TEST_RENDERS = 500
READ_BATCH = 250
TRAIN_SEED, TEST_SEED = (20_240_229, 0), (20_240_229, 1)
MOST_BLUR, MOST_NOISE = 0.035, 0.06
"""Std of the Gaussian blur as a share of the shorter side, and of the noise on pixels in [0, 1]."""


def draw_renders(
    seed: Sequence[int],
    number: int,
    size: tuple[int, int],
    pairs: float = 0.5,
    forbidden: Collection[Thing] = frozenset(),
    needed: Collection[Thing] = frozenset(),
) -> tuple[list[Scene], Tensor]:
    """Draw fresh scenes and real renders of them.

    Args:
        seed: numbers below 2^32; picture k depends on them and k alone.
        size: (height, width).
        pairs: probability of two things.
        forbidden: things that no scene has.
        needed: things of which every scene has at least one; empty: no condition.

    Returns:
        Scenes, and images (number, 3, H, W) uint8.
    """
    scenes, images = [], torch.empty(number, 3, *size, dtype=torch.uint8)
    for k in range(number):
        rng = np.random.RandomState([*seed, k])
        scene = draw_scene(rng, pairs, forbidden)
        while needed and not set(needed) & set(scene.things):
            scene = draw_scene(rng, pairs, forbidden)
        scenes.append(scene)
        images[k] = torch.from_numpy(render(scene, rng, *size))
    return scenes, images


def _targets(scenes: Sequence[Scene]) -> Tensor:
    """Class labels (N, 5), in the order of the scores."""
    rows = []
    for scene in scenes:
        assert scene.place is not None
        row = [LAYOUTS.index(scene.place)]
        for thing in scene.things:
            row += [COLOURS.index(thing.colour), SHAPES.index(thing.shape)]
        rows.append(row + [NO_SECOND] * (1 + 2 * THINGS - len(row)))
    return torch.tensor(rows)


class _Network(nn.Module):
    """Four convolutions down to about 8x8 cells, attention of each thing over the cells, colour and shape from there.

    Both things share the layers that name them, wherever they are, which halves what there is to learn.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        halvings = max(1, min(4, round(math.log2(min(height, width) / 8))))
        layers: list[nn.Module] = []
        channels = 3
        for stage, wider in enumerate((16, 32, 48, 64)):
            stride = 2 if stage < halvings else 1
            layers += [nn.Conv2d(channels, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
            height, width = (-(-side // stride) for side in (height, width))
        self.cells = height * width
        self.body = nn.Sequential(*layers)
        self.where = nn.Sequential(
            nn.Conv2d(channels, 8, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * self.cells, 128),
            nn.ReLU(),
            nn.Linear(128, len(LAYOUTS) + THINGS * self.cells),
        )
        self.what = nn.Sequential(nn.Linear(channels, 96), nn.ReLU(), nn.Linear(96, len(COLOURS) + len(SHAPES)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores of the layout (B, 7), then of colour (B, 6) and shape (B, 4) of the first and the second thing."""
        features = self.body(images * 2 - 1)
        layout, attention = self.where(features).split([len(LAYOUTS), THINGS * self.cells], dim=1)
        attention = attention.unflatten(1, (THINGS, self.cells)).softmax(dim=2)
        named = self.what(attention @ features.flatten(2).transpose(1, 2))
        return [
            layout,
            *(part for thing in named.unbind(dim=1) for part in thing.split([len(COLOURS), len(SHAPES)], 1)),
        ]


class ShapesClassifier:
    """Small convolutional network, trained from scratch on renders of scenes that no run has drawn.

    It is trained on all combinations of colour and shape, also those that a run leaves out, and on slightly blurred and
    noisy pictures. It always predicts a scene of one or two things: it cannot report a third one, or an empty picture.
    The result depends on the size and the rounding of the default device alone, and the caller's random state is left
    alone.

    Args:
        height, width: size of the pictures; they are averaged down to a shorter side of 64.
    """

    def __init__(self, height: int, width: int) -> None:
        shrink = max(1.0, min(height, width) / MAX_SIDE)
        self.picture_size = (height, width)
        self.size = (round(height / shrink), round(width / shrink))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(TRAIN_SEED[0])
            self.network = _Network(*self.size).eval().to(default_device())
        self.device = default_device()

    def fit(
        self, steps: int = STEPS, renders: int = TRAIN_RENDERS, progress: Callable[[int], None] = lambda done: None
    ) -> "ShapesClassifier":
        """Train on ``renders`` pictures; about a minute at 64x64 on a CPU core.

        Args:
            progress: called with the number of steps done.
        """
        scenes, images = draw_renders(TRAIN_SEED, renders, self.size, PAIRS)
        images, targets = images.to(self.device), _targets(scenes).to(self.device)
        generator = torch.Generator().manual_seed(TRAIN_SEED[0])

        def loss_of(rows: Tensor) -> Tensor:
            scores = self.network(augmented(images[rows] / 255, generator))
            losses = [
                F.cross_entropy(score, targets[rows, k], ignore_index=NO_SECOND) for k, score in enumerate(scores)
            ]
            return torch.stack(losses).sum()

        train_network(self.network, loss_of, len(images), BATCH_SIZE, steps, generator, progress)
        return self

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Scene]:
        """Predict the scene of each of ``images`` (N, 3, H, W) in [0, 1], with its place or relation."""
        found = []
        for part in images.split(READ_BATCH):
            part = part.detach().to(self.device).float()
            if tuple(part.shape[2:]) != self.size:
                part = F.adaptive_avg_pool2d(part, self.size)
            found += torch.stack([score.argmax(dim=1) for score in self.network(part)], dim=1).tolist()
        return [_scene(*row) for row in found]

    def accuracy(self, number: int = TEST_RENDERS) -> float:
        """Share of ``number`` fresh renders, not of the training, whose scene is predicted entirely right."""
        scenes, images = draw_renders(TEST_SEED, number, self.picture_size, PAIRS)
        read = [scene for part in images.split(READ_BATCH) for scene in self.read(part / 255)]
        return float(np.mean([seen == scene for seen, scene in zip(read, scenes, strict=True)]))

    def _key(self) -> dict[str, str]:
        return {"version": VERSION, "size": "x".join(map(str, self.picture_size))}

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(self.network.state_dict(), self._key()))

    def load(self, path: Path) -> bool:
        """Load the weights that :meth:`save` wrote; False if missing, damaged, or of another size or version."""
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() != self._key():
                    return False
                self.network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            refuse_nonfinite(self.network.state_dict(), path)
        except (OSError, SafetensorError, RuntimeError, CheckpointError):
            return False
        return True


def _scene(layout: int, *things: int) -> Scene:
    named = [Thing(COLOURS[things[k]], SHAPES[things[k + 1]]) for k in (0, 2)]
    return Scene(tuple(named[: 1 if layout < len(PLACES) else 2]), LAYOUTS[layout])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the batches of images (B, C, H, W) and add some noise to all, as generated pictures may have."""
    blurred, share = torch.rand(2, generator=generator).tolist()
    if blurred < 0.5:
        images = blur(images, share * MOST_BLUR * min(images.shape[2:]))
    noise = torch.randn(images.shape, generator=generator) * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + MOST_NOISE * noise.to(images.device)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Convolve images (B, C, H, W) with a Gaussian of std ``sigma`` pixels; edges are replicated."""
    reach = math.ceil(3 * sigma)
    if reach == 0:
        return images
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).repeat(images.shape[1], 1, 1, 1)  # (C, 1, 1, 2 reach + 1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights, groups=images.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=images.shape[1])
