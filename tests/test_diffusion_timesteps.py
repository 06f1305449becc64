"""Timestep samplers: unbiased, resumable."""

import pytest
import torch

from heterodiff.diffusion.timesteps import LossSecondMomentTimesteps, draw_by_race, make_timestep_sampler
from heterodiff.errors import ConfigError

LOSS = torch.linspace(0.1, 3.0, 20)


def warmed(losses=LOSS):
    sampler = LossSecondMomentTimesteps(20)
    for _ in range(10):
        sampler.update(torch.arange(20), losses)
    return sampler


def test_uniform():
    sampler = make_timestep_sampler("uniform", 10)
    t, weights = sampler.sample(5000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert torch.equal(weights, torch.ones(5000))
    assert (torch.bincount(t, minlength=10) / 5000 - 0.1).abs().max() < 0.02
    sampler.load_state_dict(sampler.state_dict())


def test_uniform_until_each_timestep_has_ten_losses():
    sampler = warmed()
    cold = LossSecondMomentTimesteps(20)
    for _ in range(10):
        cold.update(torch.arange(19), LOSS[:19])
    for _ in range(9):
        cold.update(torch.tensor([19]), LOSS[19:])
    torch.testing.assert_close(cold.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))
    cold.update(torch.tensor([19]), LOSS[19:])
    torch.testing.assert_close(cold.probabilities(), sampler.probabilities())


def test_probabilities_follow_the_losses():
    expected = 0.999 * LOSS.double() / LOSS.double().sum() + 0.001 / 20
    torch.testing.assert_close(warmed().probabilities(), expected)


def test_only_the_last_ten_losses_count():
    sampler = warmed(torch.full((20,), 100.0))
    for _ in range(10):
        sampler.update(torch.arange(20), LOSS)
    torch.testing.assert_close(sampler.probabilities(), warmed().probabilities())


def test_importance_weights_are_unbiased():
    t, weights = warmed().sample(40_000, torch.Generator().manual_seed(0))
    loss = (t.float() - 7).square()  # any loss, unrelated to the history
    full = (torch.arange(20.0) - 7).square().mean()
    assert (weights * loss).mean() == pytest.approx(full.item(), rel=0.04)
    assert loss.mean() != pytest.approx(full.item(), rel=0.2)


def test_a_race_draws_with_the_probabilities():
    probabilities = warmed().probabilities()
    drawn = draw_by_race(probabilities, 20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert (torch.bincount(drawn, minlength=20) / 20_000 - probabilities).abs().max() < 0.01


def test_non_finite_losses_are_left_out():
    sampler = warmed()
    sampler.update(torch.arange(20), torch.full((20,), torch.nan))
    torch.testing.assert_close(sampler.probabilities(), warmed().probabilities())


def test_losses_of_zero_stay_uniform():
    probabilities = warmed(torch.zeros(20)).probabilities()
    torch.testing.assert_close(probabilities, torch.full((20,), 0.05, dtype=torch.float64))


def test_state_resumes():
    sampler, again = warmed(), LossSecondMomentTimesteps(20)
    again.load_state_dict(sampler.state_dict())
    for one in (sampler, again):
        one.update(torch.tensor([3, 3]), torch.tensor([9.0, 8.0]))
    draws = [one.sample(50, torch.Generator().manual_seed(1))[0] for one in (sampler, again)]
    assert torch.equal(*draws)
    with pytest.raises(ConfigError, match="20 timesteps"):
        LossSecondMomentTimesteps(30).load_state_dict(sampler.state_dict())


def test_unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        make_timestep_sampler("unifrom", 10)


def test_history_is_that_of_one_loss_after_the_other():
    """Against a loop: also where a timestep occurs more often in a batch than its history is long."""
    sampler, rng = LossSecondMomentTimesteps(4), torch.Generator().manual_seed(0)
    history: list[list[float]] = [[] for _ in range(4)]
    for step in range(12):
        t = torch.randint(4 if step % 3 else 1, (25,), generator=rng)
        losses = torch.rand(25, generator=rng, dtype=torch.float64)
        losses[step] = torch.nan
        sampler.update(t, losses)
        for place, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if loss == loss:
                history[place] = [*history[place], loss][-10:]
    moments = torch.tensor([sum(loss**2 for loss in losses) / 10 for losses in history], dtype=torch.float64).sqrt()
    torch.testing.assert_close(sampler.probabilities(), 0.999 * moments / moments.sum() + 0.001 / 4)
