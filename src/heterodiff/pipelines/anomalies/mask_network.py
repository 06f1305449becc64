"""A segmentation network that learns from masks which a slower method found, and from the labels of images.

Found masks miss parts of lesions and mark healthy tissue, but not alike in all images: a network that is trained on
many of them learns what they share (self-training, as in Lee 2013). Labels help it twice: nothing is marked in healthy
images, and pixels of unhealthy images that the method is unsure about are left out.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from heterodiff.data.dataset import ImageDataset
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.anomalies.masks import drop_small as drop_small_components
from heterodiff.pipelines.anomalies.masks import small_area
from heterodiff.pipelines.anomalies.segment import Segmentation

CHANNELS, CHANNEL_MULT = 32, (1, 2, 4)
INNER_SIDE, PATCHES = 32, (1, 2, 4)
"""Side of the widest maps, to which patches bring larger images; sides of patches."""
BATCH, RATE, DECAY, WARMUP = 16, 2e-3, 0.05, 0.1
"""Images a step, half of them unhealthy; peak learning rate; weight decay; share of the steps until the peak."""
TURN, SCALE, SHIFT = 0.25, (0.85, 1.2), 0.06
"""Augmentation: radians, factors, and shares of half the side."""
GAIN, OFFSET, NOISE = 0.15, 0.03, 0.02
"""Augmentation: standard deviations of each channel's factor and offset, and of each pixel's noise."""
UNSURE = 0.6
"""Share of the least value inside of a mask from which pixels outside are unsure."""


class MaskNetwork:
    """Marks pixels of a lesion, with one network call for an image and one for its mirror image.

    Args:
        network: takes the chosen channels, gives log odds.
        channels: of an image, those that are looked at; default: all.
    """

    calls = 2

    def __init__(self, network: HAEUNet, channels: Sequence[int] | None = None):
        self.network, self.channels = network, channels

    @property
    def digest(self) -> str:
        """Hash (16 hex digits) of the weights."""
        digest = hashlib.blake2b(digest_size=8)
        for weights in self.network.state_dict().values():
            digest.update(weights.cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def log_odds(self, images: Tensor) -> Tensor:
        """Return the mean log odds (B, H, W) of images (B, C, H, W) in [0, 1] and of their mirror images."""
        images = _chosen(images, self.channels).to(self.network.device, torch.float32)
        return (_call(self.network, images) + _call(self.network, images.flip(3)).flip(2)) / 2

    def segment(self, images: Tensor, drop_small: int | None, limit: float) -> Segmentation:
        """Return masks, where a lesion is more likely than not, and decisions.

        Args:
            images: (B, C, H, W) in [0, 1].
            drop_small: components of at most this area are dropped, see :func:`masks.small_area`.
            limit: images are judged unhealthy if the mean of their largest log odds, of the least area that counts, is
                at least this.
        """
        odds = self.log_odds(images).cpu().numpy()
        area = min(small_area(odds.shape[1:], drop_small) + 1, odds[0].size)
        score = np.partition(odds.reshape(len(odds), -1), -area, axis=1)[:, -area:].mean(axis=1)
        masks = np.stack([drop_small_components(mask, drop_small) for mask in odds > 0])
        maps = torch.from_numpy(odds).sigmoid().numpy()
        return Segmentation(masks, score >= limit, maps, score, maps, np.full(len(odds), self.calls))


def _chosen(images: Tensor, channels: Sequence[int] | None) -> Tensor:
    return images if channels is None else images[:, list(channels)]


def _call(network: HAEUNet, images: Tensor) -> Tensor:
    nothing = torch.zeros(len(images), dtype=torch.long, device=images.device)
    found: Tensor = network(images * 2 - 1, nothing).sample[:, 0]
    return found


def unsure_pixels(masks: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Return where (N, H, W) ``maps`` are nearly as high as inside ``masks``; nowhere if a mask is empty."""
    least = np.where(masks, maps, np.inf).min(axis=(1, 2), keepdims=True)
    return (maps >= UNSURE * least) & ~masks


def new_network(channels: int, height: int, width: int) -> HAEUNet:
    """Build a convolutional U-Net with fresh weights, of levels and patches that the size of the images allows."""
    fitting = [patch for patch in PATCHES if height % patch == width % patch == 0]
    patch = next((patch for patch in fitting if max(height, width) <= INNER_SIDE * patch), fitting[-1])
    levels = 1
    while levels < len(CHANNEL_MULT) and not (height // patch % 2**levels or width // patch % 2**levels):
        levels += 1
    return HAEUNet(
        variant="unet-conv",
        sample_size=(height, width),
        in_channels=channels,
        out_channels=1,
        model_channels=CHANNELS,
        channel_mult=CHANNEL_MULT[:levels],
        layers_per_block=1,
        patch_size=patch,
    )


def train_mask_network(
    images: ImageDataset,
    masks: np.ndarray,
    unsure: np.ndarray,
    unhealthy: np.ndarray,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    channels: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> MaskNetwork:
    """Train a network on found masks.

    Args:
        images: N of them, some healthy, and some unhealthy with a mask.
        masks: (N, H, W) bool; taken for empty in healthy images. Unhealthy images without a mask are left out.
        unsure: (N, H, W) bool, pixels that do not count.
        unhealthy: (N,) bool, the labels.
        channels: see :class:`MaskNetwork`.
        progress: called with the number of each step.
    """
    spec = images.spec
    sick, well = np.flatnonzero(unhealthy & masks.any(axis=(1, 2))), np.flatnonzero(~unhealthy)
    targets, rng = masks & unhealthy[:, None, None], np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        count = spec.channels if channels is None else len(channels)
        network = new_network(count, spec.height, spec.width).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARMUP)
    for step in range(1, steps + 1):
        rows = np.concatenate([rng.choice(sick, BATCH // 2), rng.choice(well, BATCH // 2)])
        shown = _chosen(images.batch(rows.tolist())[0], channels)
        found, doubted = (torch.from_numpy(part[rows]) for part in (targets, unsure))
        x, target, counts = (part.to(device) for part in augmented(shown, found, doubted, rng))
        loss = overlap_loss(_call(network, x), target, counts, torch.from_numpy(unhealthy[rows]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step)
    return MaskNetwork(network.eval(), channels)


def augmented(images: Tensor, masks: Tensor, unsure: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Turn, scale, shift and mirror a batch, and change the intensities of its channels.

    Args:
        images: (B, C, H, W) in [0, 1].
        masks, unsure: (B, H, W) bool.

    Returns:
        images, masks as 0 or 1, and 1 for each pixel that counts.
    """
    count, channels = images.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    turn, scale = rng.uniform(-TURN, TURN, count), rng.uniform(*SCALE, count)
    mirror = rng.choice([-1.0, 1.0], count)
    change = np.zeros((count, 2, 3))
    change[:, 0, 0], change[:, 0, 1] = scale * np.cos(turn) * mirror, -scale * np.sin(turn)
    change[:, 1, 0], change[:, 1, 1] = scale * np.sin(turn) * mirror, scale * np.cos(turn)
    change[:, :, 2] = rng.uniform(-SHIFT, SHIFT, (count, 2))
    grid = functional.affine_grid(torch.from_numpy(change).float(), list(images.shape), align_corners=False)
    planes = torch.cat([images, masks[:, None].float(), unsure[:, None].float()], dim=1)
    planes = functional.grid_sample(planes, grid, align_corners=False)
    moved = planes[:, :channels]
    moved = moved * (1 + GAIN * normal(count, channels, 1, 1)) + OFFSET * normal(count, channels, 1, 1)
    moved = moved + NOISE * normal(*images.shape)
    return moved, (planes[:, -2] > 0.5).float(), (planes[:, -1] <= 0.5).float()


def overlap_loss(logits: Tensor, target: Tensor, counts: Tensor, unhealthy: Tensor) -> Tensor:
    """Return the binary cross-entropy of the pixels that count, plus 1 - soft Dice, the mean over unhealthy images.

    Args:
        logits, target, counts: (B, H, W); the last two 0 or 1.
        unhealthy: (B,) bool.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    found, true = logits.sigmoid() * counts, target * counts
    dice = (2 * (found * true).sum(dim=(1, 2)) + 1) / (found.sum(dim=(1, 2)) + true.sum(dim=(1, 2)) + 1)
    sick = unhealthy.float()
    return (entropy * counts).sum() / counts.sum() + 1 - (dice * sick).sum() / sick.sum()
