"""Distances between sets of features, and within a set of images."""

import math

import torch
from torch import Tensor, nn

from heterodiff.devices import default_device

KID_SUBSETS = 50
KID_MAX_SUBSET_SIZE = 1_000


class _Features(nn.Module):
    """Stands in for the Inception network of torchmetrics where features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features.

    |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al. 2017, eq. 6), by torchmetrics.
    It is biased upwards for small sets, so compare values of equal sizes only.

    Args:
        features: (N, D) with N >= 2.
        reference: (M, D) with M >= 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]), normalize=True)
    metric.update(features.double(), real=False)
    metric.update(reference.double(), real=True)
    return max(0.0, float(metric.compute()))


def kernel_distance(
    features: Tensor, reference: Tensor, seed: int = 0, subsets: int = KID_SUBSETS
) -> tuple[float, float, int]:
    """Return the unbiased kernel distance (KID) between two sets of features.

    Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Bińkowski et al. 2018), by
    torchmetrics, over random subsets. Unbiased: values around 0, also below, mean "no difference".

    Args:
        features: (N, D) with N >= 2.
        reference: (M, D) with M >= 2.

    Returns:
        Mean over the subsets, their standard deviation, and the subset size: half of the smaller set, so
        that subsets differ, and at most 1,000.
    """
    from torchmetrics.image.kid import poly_mmd

    size = max(2, min(KID_MAX_SUBSET_SIZE, min(len(features), len(reference)) // 2))
    generator = torch.Generator().manual_seed(seed)
    features, reference = features.double(), reference.double()
    values = []
    for _ in range(subsets):
        rows = torch.randperm(len(features), generator=generator)[:size]
        reference_rows = torch.randperm(len(reference), generator=generator)[:size]
        values.append(float(poly_mmd(reference[reference_rows], features[rows])))
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std(correction=0).item(), size


def mean_pairwise_rmse(images: Tensor) -> float:
    """Return the mean root mean square pixel difference over all pairs of ``images`` (N >= 2, C, H, W)."""
    vectors = images.detach().to(default_device()).float().flatten(1)
    return (torch.pdist(vectors) / math.sqrt(vectors.shape[1])).mean().item()
