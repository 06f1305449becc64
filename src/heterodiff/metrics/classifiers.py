"""Two classifiers of images, trained on real training images only.

They answer "does the generated image show the class that was asked for?". Two kinds, because a single classifier can be
fooled in its own way: a kernel machine on pixels and a small convolutional network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heterodiff.devices import default_device
from heterodiff.errors import DataError

MAX_TRAIN_IMAGES = 5_000
SVM_MAX_SIDE = 32
SVM_MAX_COMPONENTS = 128
CONV_MAX_SIDE = 64
CONV_FEATURES = 64
CONV_BATCH_SIZE = 64
# Steps and pixels seen in training; they keep `fit` below about half a minute on two CPU cores.
CONV_MAX_STEPS = 400
CONV_MIN_STEPS = 150
CONV_PIXEL_BUDGET = 50_000_000
PREDICT_BATCH_SIZE = 256


def shrink(images: Tensor, max_side: int) -> Tensor:
    """Average (N, C, H, W) down to sides of at most ``max_side``; smaller images stay as they are."""
    height, width = images.shape[-2:]
    if max(height, width) <= max_side:
        return images.float()
    size = (min(height, max_side), min(width, max_side))
    return torch.cat([F.adaptive_avg_pool2d(part.float(), size) for part in images.split(PREDICT_BATCH_SIZE)])


def conv_steps(batch_size: int, pixels: int) -> int:
    """Return the number of optimiser steps :class:`ConvClassifier` takes on images of ``pixels`` pixels a channel."""
    return min(CONV_MAX_STEPS, max(CONV_MIN_STEPS, CONV_PIXEL_BUDGET // (batch_size * pixels)))


def train_network(
    network: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Train with AdamW and a one-cycle learning rate, and leave the network in evaluation mode.

    Args:
        loss_of: loss of the training images in rows (batch_size,), on the network's device.
        count: number of training images.
        generator: CPU generator that shuffles them; default: the global one.
        progress: called with the number of steps done.
    """
    device = next(network.train().parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    rows_left = torch.empty(0, dtype=torch.long, device=device)
    for step in range(steps):
        if len(rows_left) < batch_size:
            rows_left = torch.randperm(count, generator=generator).to(device)
        rows, rows_left = rows_left[:batch_size], rows_left[batch_size:]
        optimizer.zero_grad()
        loss_of(rows).backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    network.eval()


class Classifier:
    """Classifier of images, which are averaged down to at most ``max_side`` and standardised by channel."""

    max_side: int
    mean: Tensor
    std: Tensor

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, images: Tensor, labels: Tensor) -> "Classifier":
        """Train on ``images`` (N, C, H, W) in [0, 1] with ``labels`` (N,); rows labelled -1 are left out.

        At most 5,000 images are used, drawn with the seed. Fewer than two classes raise a DataError, at the latest when
        they are to be predicted.
        """
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted class of each of ``images`` (N, C, H, W), a LongTensor (N,)."""
        raise NotImplementedError

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the class accuracy on ``images``; NaN without images."""
        return (self.predict(images) == labels.cpu()).float().mean().item()

    def _select(self, images: Tensor, labels: Tensor, labelled: bool = True) -> tuple[Tensor, Tensor]:
        """Draw the images to train on, shrunk, and their labels; ``labelled`` leaves out those labelled -1."""
        images, labels = images.detach().cpu(), labels.detach().cpu()
        rows = (labels >= 0).nonzero().squeeze(1) if labelled else torch.arange(len(labels))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = rows[torch.randperm(len(rows), generator=generator)[:MAX_TRAIN_IMAGES]]
        return shrink(images[chosen], self.max_side), labels[chosen]

    def _fit_scale(self, images: Tensor) -> None:
        """Take mean and standard deviation of each channel, (1, C, 1, 1); constant channels get 1."""
        self.mean = images.mean(dim=(0, 2, 3), keepdim=True)
        std = images.std(dim=(0, 2, 3), keepdim=True, correction=0)
        self.std = torch.where(std > 1e-6, std, torch.ones_like(std))

    def _prepare(self, images: Tensor) -> Tensor:
        return (shrink(images.detach().cpu(), self.max_side) - self.mean) / self.std


class SvmClassifier(Classifier):
    """Support vector machine with an RBF kernel on pixels (scikit-learn's ``SVC``).

    Images are averaged down to at most 32x32 and each channel is standardised; vectors of more than 128
    values are reduced by PCA first, which leaves distances nearly unchanged and keeps training short.
    """

    max_side = SVM_MAX_SIDE

    def fit(self, images: Tensor, labels: Tensor) -> "SvmClassifier":
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        images, labels = self._select(images, labels)
        if len(labels.unique()) < 2:
            raise DataError("a classifier needs training images of at least two classes")
        self._fit_scale(images)
        vectors = self._prepare(images).flatten(1).numpy()
        # 2 / values equals gamma = 0.001 on the 0..16 scale of scikit-learn's 8x8 digits example.
        machine = SVC(kernel="rbf", C=10.0, gamma=2.0 / vectors.shape[1])
        if vectors.shape[1] > SVM_MAX_COMPONENTS:
            components = min(SVM_MAX_COMPONENTS, len(vectors) - 1)
            reduction = PCA(components, svd_solver="randomized", random_state=self.seed)
            machine = make_pipeline(reduction, machine)
        self.machine = machine.fit(vectors, labels.numpy())
        return self

    def predict(self, images: Tensor) -> Tensor:
        if len(images) == 0:
            return torch.empty(0, dtype=torch.long)
        return torch.as_tensor(self.machine.predict(self._prepare(images).flatten(1).numpy()), dtype=torch.long)


class _ConvNet(nn.Module):
    """Three convolutions, a 2x2 summary, 64 features, class scores."""

    def __init__(self, channels: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        height, width = size
        for block, out_channels in enumerate((32, 64, 64)):
            # Larger images start with a stride rather than an average: learned, so fine detail is seen.
            strided = block == 0 and min(height, width) >= 24
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=2 if strided else 1, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            if strided:
                height, width = (height + 1) // 2, (width + 1) // 2
            pool = (2 if height >= 6 else 1, 2 if width >= 6 else 1)
            layers.append(nn.AvgPool2d(pool))
            height, width = height // pool[0], width // pool[1]
            channels = out_channels
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        # Features are taken before the activation: units that are nearly always off would have a tiny
        # spread, and a single image that turns one on would outweigh everything else in a distance.
        self.penultimate = nn.Linear(4 * channels, CONV_FEATURES)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(CONV_FEATURES, num_classes))

    def features(self, images: Tensor) -> Tensor:
        return self.penultimate(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class ConvClassifier(Classifier):
    """Small convolutional network, trained from scratch on the default device; its features compare distributions.

    Images are averaged down to at most 64x64 and each channel is standardised. The result depends on the data, the seed
    and the device's rounding only, and the caller's random state is left alone. Random numbers are drawn on the CPU;
    results are returned there.

    Args:
        seed: seed of the weights, the order of the images and their choice.
        batch_size: images of an optimiser step (fewer where there are fewer). The number of steps follows from it
            and from the image size alone, so classifiers with equal batches train equally long.

    Attributes:
        trained: False if there were fewer than two classes to learn: :meth:`features` then come from
            random weights, which still tell distributions apart, and there is nothing to predict.
    """

    max_side = CONV_MAX_SIDE

    def __init__(self, seed: int = 0, batch_size: int = CONV_BATCH_SIZE) -> None:
        super().__init__(seed)
        self.batch_size = batch_size
        self.device = default_device()
        self.trained = False

    def fit(self, images: Tensor, labels: Tensor) -> "ConvClassifier":
        self.classes = labels[labels >= 0].unique().cpu()
        self.trained = len(self.classes) >= 2
        # Callers may sit in no_grad or inference_mode; only this classifier trains here. `default_generator`
        # rather than torch.manual_seed: the latter would reseed the caller's GPUs too.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            images, labels = self._select(images, labels, labelled=self.trained)
            self._fit_scale(images)
            images = ((images - self.mean) / self.std).to(self.device)
            size = (images.shape[2], images.shape[3])
            self.network = network = _ConvNet(images.shape[1], size, max(1, len(self.classes))).to(self.device)
            if self.trained:
                targets = torch.searchsorted(self.classes, labels).to(self.device)
                batch_size = min(self.batch_size, len(images))
                steps = conv_steps(batch_size, images[0, 0].numel())

                def loss_of(rows: Tensor) -> Tensor:
                    return F.cross_entropy(network(images[rows]), targets[rows])

                train_network(network, loss_of, len(images), batch_size, steps)
            else:
                with torch.no_grad():
                    network.train()(images[:1024])
        network.eval()
        # Standardised on the training images, so that distances do not depend on the scale of a layer.
        raw = self._raw_features(images)
        std = raw.std(dim=0, correction=0)
        self.feature_mean, self.feature_std = raw.mean(dim=0), torch.where(std > 1e-4, std, torch.ones(()))
        return self

    @torch.no_grad()
    def _raw_features(self, standardised: Tensor) -> Tensor:
        """Features on the CPU, of images on any device."""
        parts = standardised.split(PREDICT_BATCH_SIZE)
        return torch.cat([self.network.features(part.to(self.device)).cpu() for part in parts])

    def features(self, images: Tensor) -> Tensor:
        """Return the standardised penultimate features (N, 64) of ``images`` (N, C, H, W) in [0, 1]."""
        if len(images) == 0:
            return torch.empty(0, CONV_FEATURES)
        return (self._raw_features(self._prepare(images)) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        if not self.trained:
            raise DataError("this classifier was trained on fewer than two classes and cannot predict")
        if len(images) == 0:
            return torch.empty(0, dtype=torch.long)
        features = self._raw_features(self._prepare(images)).to(self.device)
        return self.classes[self.network.head(features).argmax(dim=1).cpu()]
