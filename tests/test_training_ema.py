"""The average of weights, against diffusers' own."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from heterodiff.training.optimization import EMA


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    fixed = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (1,), (5,))] + [fixed]


def change(values: list[nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for value in values[:-1]:
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(step)))


def test_equals_diffusers_over_steps() -> None:
    for decay in (0.0, 0.5, 0.9999):
        ours, theirs = parameters(), parameters()
        ema, expected = EMA(ours, decay), EMAModel(theirs, decay=decay)
        for step in range(40):
            change(ours, step)
            change(theirs, step)
            ema.step(ours, torch.tensor(0.0))
            expected.step(theirs)
            torch.testing.assert_close(ema.shadow_params, expected.shadow_params, rtol=1e-6, atol=1e-6)
        assert ema.optimization_step == 40


def test_steps_left_out_change_nothing_and_do_not_count() -> None:
    values = parameters()
    ema, without = EMA(values, 0.99), EMA(values, 0.99)
    for step in range(20):
        change(values, step)
        left_out = step % 3 == 1
        ema.step(values, torch.tensor(float(left_out)))
        if not left_out:
            without.step(values, torch.tensor(0.0))
    assert ema.optimization_step == without.optimization_step == 13
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, without.shadow_params, strict=True))


def test_a_parameter_that_is_not_a_number_does_not_reach_the_average_of_a_step_left_out() -> None:
    """Such a step keeps the weights as they were, which are finite; NaN weights stay visible."""
    values = parameters()
    ema = EMA(values, 0.9)
    with torch.no_grad():
        values[0].fill_(torch.nan)
    ema.step(values, torch.tensor(0.0))
    assert bool(torch.isnan(ema.shadow_params[0]).all())
    assert bool(torch.isfinite(ema.shadow_params[1]).all())


def test_averages_stand_in_for_the_weights_for_a_while() -> None:
    values = parameters()
    ema = EMA(values, 0.9)
    before = [value.detach().clone() for value in values]
    change(values, 0)
    changed = [value.detach().clone() for value in values]
    with ema.applied_to(values):
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, changed, strict=True))
