"""Distances between feature sets against closed forms, scipy and naive loops."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from heterodiff.metrics.distances import frechet_distance, kernel_distance, mean_pairwise_rmse
from heterodiff.metrics.intervals import wilson_interval


def gaussian(count, mean, covariance, seed):
    """Draw points whose sample mean and covariance are exactly those given."""
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = points - points.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_axis_aligned_gaussians_in_closed_form():
    means = torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, -1.0]], dtype=torch.float64)
    stds = torch.tensor([[1.0, 2.0, 0.5], [1.5, 2.0, 0.25]], dtype=torch.float64)
    sets = [gaussian(50 + seed, means[seed], stds[seed].square().diag(), seed) for seed in range(2)]
    expected = ((means[0] - means[1]) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
    assert frechet_distance(*sets) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_any_gaussians_against_scipy():
    roots = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    covariances = [root @ root.T + 0.1 * torch.eye(6) for root in roots]
    sets = [gaussian(80, roots[seed, 0], covariances[seed], seed) for seed in range(2)]
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    shift = (roots[0, 0] - roots[1, 0]).square().sum().item()
    expected = shift + np.trace(covariances[0].numpy() + covariances[1].numpy() - 2 * root)
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_points_than_dimensions():
    points = torch.randn(10, 64)
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-4)


def naive_kid(x, y):
    def kernel(a, b):
        return (sum(float(i) * float(j) for i, j in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(points):
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j]
        return sum(kernel(points[i], points[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def test_kernel_distance_against_a_naive_double_loop():
    x, y = torch.randn(14, 3), torch.randn(20, 3) + 0.5
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(3):
        rows, reference_rows = (torch.randperm(len(part), generator=generator)[:7] for part in (x, y))
        expected.append(naive_kid(x[rows].double(), y[reference_rows].double()))
    mean, std, size = kernel_distance(x, y, seed=7, subsets=3)
    assert size == 7
    assert mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert std == pytest.approx(np.std(expected), rel=1e-9)


def test_kernel_distance_is_unbiased_at_any_size():
    generator = torch.Generator().manual_seed(0)
    values = []
    for seed in range(60):
        x, y = torch.randn(2, 16, 4, generator=generator)
        values.append(kernel_distance(x, y, seed, subsets=4)[0])
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error


def test_kernel_distance_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    kernel_distance(torch.ones(4, 2), torch.zeros(4, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (3, 10), (97, 200), (1, 1)])
def test_wilson_interval_against_scipy(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)


def test_mean_pairwise_rmse_against_a_double_loop():
    images = torch.rand(5, 2, 3, 4)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected = np.mean([(images[i] - images[j]).square().mean().sqrt().item() for i, j in pairs])
    assert mean_pairwise_rmse(images) == pytest.approx(expected, rel=1e-5)
