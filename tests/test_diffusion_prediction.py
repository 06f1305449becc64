"""Conversions between kinds of prediction, and thresholding."""

import numpy as np
import pytest
import torch

from heterodiff.diffusion.prediction import (
    PREDICTIONS,
    dynamic_threshold,
    limit_x0,
    target_of,
    to_x0_eps,
    x0_sensitivity,
)
from heterodiff.errors import ConfigError

LEVELS = [(0.8, 0.6), (0.999, (1 - 0.999**2) ** 0.5), (0.05, (1 - 0.05**2) ** 0.5), (0.3, 0.7), (0.9, 0.1)]


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_targets_convert_back(kind, alpha, sigma):
    x0, eps = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    z = alpha * x0 + sigma * eps
    again, noise = to_x0_eps(kind, target_of(kind, x0, eps, alpha, sigma), z, alpha, sigma)
    torch.testing.assert_close(again, x0)
    torch.testing.assert_close(noise, eps)


def test_definitions():
    x0, eps = torch.tensor(2.0), torch.tensor(-3.0)
    assert target_of("epsilon", x0, eps, 0.8, 0.6) == -3
    assert target_of("sample", x0, eps, 0.8, 0.6) == 2
    assert target_of("v", x0, eps, 0.8, 0.6) == pytest.approx(0.8 * -3 - 0.6 * 2)
    assert target_of("flow", x0, eps, 0.8, 0.2) == -5


def test_levels_may_differ_in_a_batch():
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    x0, eps = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    z = alpha * x0 + sigma * eps
    torch.testing.assert_close(to_x0_eps("v", target_of("v", x0, eps, alpha, sigma), z, alpha, sigma)[0], x0)


@pytest.mark.parametrize("kind", ["v", "flow"])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.0, 1.0)])
def test_v_and_flow_work_at_both_ends(kind, alpha, sigma):
    x0, eps = torch.randn(2, 4, 3, 5, 2)
    output = target_of(kind, x0, eps, alpha, sigma)
    again, noise = to_x0_eps(kind, output, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(again, x0)
    torch.testing.assert_close(noise, eps)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_sensitivity_is_the_derivative(kind):
    output = torch.zeros(1, 1, 1, 1, requires_grad=True)
    x0, _ = to_x0_eps(kind, output, torch.ones(1, 1, 1, 1), 0.8, 0.6)
    (gradient,) = torch.autograd.grad(x0.sum(), output)
    assert gradient.abs().item() == pytest.approx(x0_sensitivity(kind, 0.8, 0.6))


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        target_of("epsilom", torch.zeros(1), torch.zeros(1), 1.0, 0.0)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_matches_numpy(quantile):
    x0 = torch.randn(5, 3, 7, 6) * torch.tensor([0.1, 1.0, 2.0, 3.0, 10.0]).view(-1, 1, 1, 1)
    scale = np.quantile(x0.abs().flatten(1).numpy(), quantile, axis=1).clip(min=1)[:, None, None, None]
    expected = np.clip(x0.numpy(), -scale, scale) / scale
    np.testing.assert_allclose(dynamic_threshold(x0, quantile).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_limits():
    x0 = torch.linspace(-3, 3, 12).view(1, 1, 3, 4)
    assert limit_x0(x0, False, None) is x0
    assert torch.equal(limit_x0(x0, True, None), x0.clamp(-1, 1))
    assert torch.equal(limit_x0(x0, True, 1.0), x0 / 3)
    inside = x0 / 4
    torch.testing.assert_close(limit_x0(inside, True, 0.9), inside)
