"""Losses: weighting, learned variance against independent formulas, and where the optimum lies."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.objective import DiffusionObjective, min_snr_weights
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.diffusion.variance import VarianceBound, discretised_gaussian_nll, gaussian_kl
from heterodiff.errors import ConfigError
from tests.oracles.gaussian_mixture import three_blobs

KINDS = ["epsilon", "v", "sample", "flow"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they save on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**options):
    config = DiffusionConfig(**options)
    return DiffusionObjective(config, NoiseSchedule.from_config(config))


def test_min_snr_weights_are_those_of_the_paper():
    schedule = NoiseSchedule.from_config(DiffusionConfig())
    snr = (schedule.alpha / schedule.sigma) ** 2
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(min_snr_weights(schedule, "epsilon", 5.0), capped / snr)
    torch.testing.assert_close(min_snr_weights(schedule, "v", 5.0), capped / (snr + 1))
    torch.testing.assert_close(min_snr_weights(schedule, "sample", 5.0), capped)
    flow = NoiseSchedule.from_config(DiffusionConfig(prediction="flow"))
    capped = ((flow.alpha / flow.sigma) ** 2).clamp(max=5.0)
    torch.testing.assert_close(min_snr_weights(flow, "flow", 5.0), capped * flow.sigma**2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["none", "min-snr"])
def test_loss_is_the_weighted_error(kind, weighting):
    objective = build(prediction=kind, weighting=weighting, num_train_timesteps=100)
    x0, noise = torch.randn(2, 3, 2, 4, 5)
    t = torch.tensor([0, 50, 99])
    received = {}

    def model(z, time):
        received.update(z=z, time=time)
        return torch.zeros_like(z)

    loss, parts = objective.losses(model, x0, t, noise)
    alpha, sigma = objective.schedule.alpha[t].view(-1, 1, 1, 1), objective.schedule.sigma[t].view(-1, 1, 1, 1)
    target = {"epsilon": noise, "sample": x0, "flow": noise - x0, "v": alpha * noise - sigma * x0}[kind]
    mse = target.square().mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(parts["mse"], mse)
    weight = min_snr_weights(objective.schedule, kind, 5.0)[t].float() if weighting == "min-snr" else 1
    torch.testing.assert_close(loss, weight * mse)
    torch.testing.assert_close(received["z"], (alpha * x0 + sigma * noise).float())
    assert received["time"].tolist() == ([1, 51, 100] if kind == "flow" else [0, 50, 99])
    assert received["time"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["none", "min-snr"])
def test_ideal_denoiser_is_the_optimum(kind, weighting):
    """No scaled or shifted prediction beats the analytic one on the same draws."""
    mixture, count = three_blobs(), 4000
    objective = build(prediction=kind, weighting=weighting, num_train_timesteps=100, schedule="cosine")
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.draw(count, generator)[0].float()
    noise = torch.randn(x0.shape, generator=generator)
    for step in (5, 40, 80):
        alpha, sigma = objective.schedule.alpha[step].item(), objective.schedule.sigma[step].item()

        def loss(scale=1.0, shift=0.0, step=step, alpha=alpha, sigma=sigma):
            def model(z, time):
                return scale * mixture.prediction(kind, z, alpha, sigma) + shift

            return objective.losses(model, x0, torch.full((count,), step), noise)[0].mean().item()

        perturbed = [loss(scale=0.9), loss(scale=1.1), loss(shift=0.1), loss(shift=-0.1)]
        assert loss() < min(perturbed)


def test_posterior_variance_against_ddpm():
    schedule = NoiseSchedule.from_config(DiffusionConfig(schedule="cosine", num_train_timesteps=50))
    bound = VarianceBound(schedule)
    reference = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    for t in range(1, 50):
        a, previous = reference.alphas_cumprod[t].double(), reference.alphas_cumprod[t - 1].double()
        expected = (1 - previous) / (1 - a) * (1 - a / previous)
        assert bound.posterior_variance[t].item() == pytest.approx(expected.item(), rel=1e-3)
        assert bound.log_beta[t].exp().item() == pytest.approx(reference.betas[t].item(), rel=1e-4)
    assert bound.log_posterior_variance[0] == bound.log_posterior_variance[1]


def test_posterior_is_bayes_rule():
    """Mean and variance of q(z_{t-1} | z_t, x0) from multiplying the two Gaussians."""
    schedule = NoiseSchedule.from_config(DiffusionConfig(num_train_timesteps=50))
    bound, t, x0, z = VarianceBound(schedule), 20, 0.3, -0.8
    a, previous = schedule.alpha[t].item() ** 2, schedule.alpha[t - 1].item() ** 2
    step = a / previous
    precision = step / (1 - step) + 1 / (1 - previous)
    mean = (step**0.5 * z / (1 - step) + previous**0.5 * x0 / (1 - previous)) / precision
    assert bound.posterior_variance[t].item() == pytest.approx(1 / precision)
    assert (bound.x0_coefficient[t] * x0 + bound.z_coefficient[t] * z).item() == pytest.approx(mean)


def test_kl_against_torch():
    means, others = torch.randn(2, 100, dtype=torch.float64)
    logs, other_logs = torch.randn(2, 100, dtype=torch.float64)
    expected = kl_divergence(Normal(means, (logs / 2).exp()), Normal(others, (other_logs / 2).exp()))
    torch.testing.assert_close(gaussian_kl(means, logs, others, other_logs), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.2), (0.97, 0.05), (-1.3, 0.3), (0.1, 0.004)])
def test_decoder_is_a_distribution(mean, std):
    levels = torch.linspace(-1, 1, 256)
    nll = discretised_gaussian_nll(levels, torch.tensor(mean), torch.tensor(2 * math.log(std)))
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-4)
    middle = 140
    edges = Normal(mean, std).cdf(levels[middle] + torch.tensor([1, -1]) / 255)
    expected = (edges[0] - edges[1]).clamp(min=1e-12).log().item()
    assert -nll[middle].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_hybrid_loss(kind):
    objective = build(prediction=kind, learn_variance=True, num_train_timesteps=50)
    schedule = objective.schedule
    x0, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4)
    t = torch.tensor([0, 1, 20, 49])
    output = torch.randn(4, 6, 4, 4)
    loss, parts = objective.losses(lambda z, time: output, x0, t, noise)
    torch.testing.assert_close(loss, parts["mse"] + 0.001 * 50 * parts["vlb"])
    # The bound at t = 20, written out with torch.distributions.
    alpha_bar, previous = schedule.alpha[20] ** 2, schedule.alpha[19] ** 2
    beta = 1 - alpha_bar / previous
    posterior = beta * (1 - previous) / (1 - alpha_bar)
    z = alpha_bar.sqrt() * x0[2] + (1 - alpha_bar).sqrt() * noise[2]
    mean, channels = output[2, :3].double(), output[2, 3:].double()
    predicted = {
        "epsilon": (z - (1 - alpha_bar).sqrt() * mean) / alpha_bar.sqrt(),
        "v": alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * mean,
        "sample": mean,
    }[kind]

    def step(clean):
        return (previous.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - previous) * z) / (1 - alpha_bar)

    log_variance = (channels + 1) / 2 * beta.log() + (1 - channels) / 2 * posterior.log()
    divergence = kl_divergence(
        Normal(step(x0[2].double()), posterior.sqrt()), Normal(step(predicted), (log_variance / 2).exp())
    )
    assert parts["vlb"][2].item() == pytest.approx(divergence.mean().item() / math.log(2), rel=1e-3)


def test_bound_trains_the_variance_only():
    objective = build(prediction="epsilon", schedule="linear", learn_variance=True, num_train_timesteps=50)
    x0, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4)
    t = torch.tensor([0, 1, 20, 49])
    output = torch.randn(4, 6, 4, 4, requires_grad=True)
    loss, _ = objective.losses(lambda z, time: output, x0, t, noise)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    expected = 2 * (output[:, :3] - noise) / noise[0].numel()
    torch.testing.assert_close(gradient[:, :3], expected.detach())
    assert gradient[:, 3:].abs().amax(dim=(1, 2, 3)).min() > 0
    assert gradient.isfinite().all()


def test_perfect_prediction_has_no_bound_above_zero():
    objective = build(prediction="epsilon", schedule="linear", learn_variance=True, num_train_timesteps=50)
    x0, noise = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4)
    smallest = torch.full_like(noise, -1.0)
    _, parts = objective.losses(
        lambda z, time: torch.cat([noise, smallest], dim=1), x0, torch.tensor([5, 20, 49]), noise
    )
    torch.testing.assert_close(parts["vlb"], torch.zeros(3), rtol=0, atol=1e-4)


def test_mistakes():
    x0, t = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="learn_variance: true on 3 channels"):
        build(learn_variance=True).losses(lambda z, time: z, x0, t, x0)
    flow = NoiseSchedule.from_config(DiffusionConfig(prediction="flow"))
    with pytest.raises(ConfigError, match="cannot be trained on a flow schedule"):
        DiffusionObjective(DiffusionConfig(), flow)
