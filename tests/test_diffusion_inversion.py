"""Inversion: sampling from the inverted z returns the image."""

import pytest
import torch

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.inversion import invert
from heterodiff.diffusion.samplers import make_sampler
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError
from tests.oracles.gaussian_mixture import ideal_denoiser, three_blobs

MIXTURE = three_blobs()
X0 = MIXTURE.draw(100, torch.Generator().manual_seed(1))[0].float()


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they save on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def round_trip(prediction, schedule_name, timesteps=None, sampler="ddim", **options):
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction, schedule=schedule_name))
    denoise = ideal_denoiser(MIXTURE, schedule, prediction)
    steps = timesteps or [t for _, t in make_sampler("ddim", schedule, 100).steps]
    z = invert(denoise, schedule, prediction, X0, steps, **options)
    again = sample(denoise, schedule, prediction, z_start=z, sampler=sampler, timesteps=steps)
    return z, (again - X0).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("epsilon", "linear"), ("v", "cosine"), ("sample", "linear"), ("flow", "linear")],
)
def test_round_trip_is_exact(prediction, schedule):
    z, error = round_trip(prediction, schedule)
    assert error.max() < 1e-4
    assert 0.7 < z.std() < 1.3


def test_plain_inversion_is_not():
    _, error = round_trip("v", "cosine", num_iterations=0)
    assert error.median() > 1e-3
    assert error.max() > 1e-2


def test_round_trip_in_another_sampler_of_first_order():
    assert round_trip("flow", "linear", sampler="flow-euler")[1].max() < 1e-4


def test_partial_uneven_round_trip():
    steps = [600, 550, 500, 430, 400, 350, 300, 260, 200, 150, 120, 90, 60, 40, 20, 10, 3, 0]
    z, error = round_trip("v", "cosine", timesteps=steps, num_iterations=100)
    assert error.median() < 1e-5
    assert error.max() < 1e-3
    assert z.std() > X0.std()


def test_batch_equals_singles():
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction="v", schedule="cosine"))
    denoise = ideal_denoiser(MIXTURE, schedule, "v")
    steps = [800, 500, 250, 80, 10]
    batch = invert(denoise, schedule, "v", X0[:6], steps, num_iterations=10)
    singles = torch.cat([invert(denoise, schedule, "v", x[None], steps, num_iterations=10) for x in X0[:6]])
    torch.testing.assert_close(batch, singles, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [[], [10, 10], [10, 20], [1000, 5], [5, -1]])
def test_bad_timesteps(steps):
    with pytest.raises(ConfigError, match="strictly decreasing"):
        round_trip("v", "linear", timesteps=[*steps] or [3, 3])
