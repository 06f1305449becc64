"""Noise schedules against diffusers' tables, their inverses, and the schedulers saved with a run."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.schedule import NoiseSchedule, prediction_of, training_scheduler
from heterodiff.errors import ConfigError

CONFIGS = [
    DiffusionConfig(schedule=schedule, prediction=prediction, num_train_timesteps=steps)
    for schedule in ("linear", "cosine")
    for prediction in ("epsilon", "flow")
    for steps in (10, 100, 1000, 4000)
]


def test_linear_schedule_is_that_of_ddpm():
    schedule = NoiseSchedule.from_config(DiffusionConfig(schedule="linear"))
    expected = DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod
    torch.testing.assert_close(schedule.alpha.square().float(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [100, 1000])
def test_cosine_schedule_is_that_of_diffusers(steps):
    schedule = NoiseSchedule.from_config(DiffusionConfig(schedule="cosine", num_train_timesteps=steps))
    reference = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(schedule.alpha.square().float(), reference.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert schedule.alpha[-1] < 1e-3


def test_fewer_linear_steps_end_at_the_same_noise():
    ends = [
        float(NoiseSchedule.from_config(DiffusionConfig(schedule="linear", num_train_timesteps=steps)).log_snr[-1])
        for steps in (100, 1000, 4000)
    ]
    assert ends == pytest.approx([ends[1]] * 3, abs=1.2)
    assert max(ends) < -9.9


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tables_are_valid(config):
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert schedule.num_train_timesteps == config.num_train_timesteps
    assert (schedule.log_snr.diff() < 0).all()
    total = schedule.alpha**2 + schedule.sigma**2 if schedule.kind == "vp" else schedule.alpha + schedule.sigma
    torch.testing.assert_close(total, torch.ones_like(total))


def test_flow_network_time_is_sigma_times_steps():
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction="flow", num_train_timesteps=100))
    assert schedule.time[0] == 1
    assert schedule.time[-1] == 100
    torch.testing.assert_close(schedule.sigma * 100, schedule.time)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_at_hits_the_table_and_inverts(config):
    schedule = NoiseSchedule.from_config(config)
    alpha, sigma = schedule.at(schedule.time)
    torch.testing.assert_close(alpha, schedule.alpha, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sigma, schedule.sigma, rtol=1e-6, atol=1e-9)
    times = torch.rand(200, dtype=torch.float64) * (schedule.time[-1] - schedule.time[0]) + schedule.time[0]
    alpha, sigma = schedule.at(times)
    log_snr = 2 * (alpha.log() - sigma.log())
    torch.testing.assert_close(schedule.time_of_log_snr(log_snr), times, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_levels_beyond_the_table_are_clamped(prediction):
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    times = schedule.time_of_log_snr(torch.tensor([-torch.inf, -50.0, 50.0, torch.inf]))
    first, last = schedule.time[0].item(), schedule.time[-1].item()
    assert times.tolist() == pytest.approx([last, last, first, first], abs=1e-6)
    alpha, sigma = schedule.at(torch.tensor([-3.0, 5000.0]))
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha.double(), schedule.alpha[[0, -1]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sigma.double(), schedule.sigma[[0, -1]], rtol=1e-6, atol=1e-7)


def test_at_takes_a_number():
    schedule = NoiseSchedule.from_config(DiffusionConfig())
    alpha, sigma = schedule.at(10.5)
    assert schedule.alpha[11] < alpha < schedule.alpha[10]
    assert schedule.sigma[10] < sigma < schedule.sigma[11]


def test_add_noise_is_that_of_diffusers():
    config = DiffusionConfig(schedule="cosine", num_train_timesteps=50)
    x0, eps = torch.randn(2, 6, 3, 4, 5)
    t = torch.tensor([0, 3, 20, 30, 40, 49])
    expected = training_scheduler(config).add_noise(x0, eps, t)
    torch.testing.assert_close(NoiseSchedule.from_config(config).add_noise(x0, eps, t), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("learn_variance", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_saved_schedulers_give_the_schedule_back(prediction, schedule, learn_variance, steps, tmp_path):
    learn_variance = learn_variance and prediction != "flow"
    config = DiffusionConfig(
        prediction=prediction, schedule=schedule, learn_variance=learn_variance, num_train_timesteps=steps
    )
    training_scheduler(config).save_pretrained(tmp_path)
    kind = FlowMatchEulerDiscreteScheduler if prediction == "flow" else DDPMScheduler
    loaded = kind.from_pretrained(tmp_path)
    again, expected = NoiseSchedule.from_scheduler(loaded), NoiseSchedule.from_config(config)
    assert again.kind == expected.kind
    assert torch.equal(again.alpha, expected.alpha)
    assert torch.equal(again.sigma, expected.sigma)
    assert torch.equal(again.time, expected.time)
    assert prediction_of(loaded) == prediction
    if prediction != "flow":
        assert loaded.config.variance_type == ("learned_range" if learn_variance else "fixed_small")


def test_foreign_betas_are_read():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.alpha.square().float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_unusable_schedulers_are_refused():
    with pytest.raises(ConfigError, match="shift 1"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        NoiseSchedule.from_scheduler(AutoencoderKL())
    with pytest.raises(ConfigError, match="prediction_type"):
        prediction_of(DDPMScheduler(prediction_type="bogus"))
