"""Every sampler with every prediction and schedule, against distributions and paths known in closed form."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.guidance import guided_denoiser
from heterodiff.diffusion.noise import gaussian_noise
from heterodiff.diffusion.samplers import list_samplers, make_sampler
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError
from tests.oracles.gaussian_mixture import ideal_denoiser, three_blobs

MIXTURE = three_blobs()


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they save on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


COUNT = 4000
PROCESSES = [
    ("epsilon", "linear"),
    ("v", "linear"),
    ("sample", "linear"),
    ("epsilon", "cosine"),
    ("v", "cosine"),
    ("sample", "cosine"),
    ("flow", "linear"),
]
DETERMINISTIC = [name for name in list_samplers() if name != "ddpm"]


def process(prediction, schedule_name="linear", steps=1000):
    config = DiffusionConfig(prediction=prediction, schedule=schedule_name, num_train_timesteps=steps)
    schedule = NoiseSchedule.from_config(config)
    return schedule, ideal_denoiser(MIXTURE, schedule, prediction)


def draw(prediction, schedule, denoise, count=COUNT, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    noise = gaussian_noise((count, 2, 1, 1), generator)
    return sample(denoise, schedule, prediction, noise=noise, generator=generator, **options)


def distances(z, mixture=MIXTURE):
    """Largest errors of mean, covariance and component weights; infinite where sampling blew up."""
    if not (z.abs() < 1e3).all():
        return torch.full((3,), torch.inf, dtype=torch.float64)
    flat = z.double().flatten(1)
    weights = mixture.responsibilities(z, 1.0, 0.0).mean(dim=0)
    return torch.stack(
        [
            (flat.mean(dim=0) - mixture.mean).abs().max(),
            (torch.cov(flat.T) - mixture.covariance).abs().max(),
            (weights - mixture.weights).abs().max(),
        ]
    )


# Four standard errors of 4,000 draws (0.5 / sqrt(4000) = 0.008) for mean and weights, and for the covariance
# about three plus the discretisation's share.
TOLERANCES = torch.tensor([0.032, 0.025, 0.032], dtype=torch.float64)


@pytest.mark.parametrize(("prediction", "schedule_name"), PROCESSES)
@pytest.mark.parametrize("sampler", list_samplers())
def test_distribution(sampler, prediction, schedule_name):
    schedule, denoise = process(prediction, schedule_name)
    steps = 250 if sampler == "ddpm" else 50
    z = draw(prediction, schedule, denoise, sampler=sampler, num_inference_steps=steps)
    assert z.dtype == torch.float32
    assert (distances(z) < TOLERANCES).all(), distances(z)


@pytest.mark.parametrize(("prediction", "schedule_name"), [("v", "cosine"), ("epsilon", "linear"), ("flow", "linear")])
def test_ddpm_with_all_steps(prediction, schedule_name):
    schedule, denoise = process(prediction, schedule_name, steps=400)
    z = draw(prediction, schedule, denoise, sampler="ddpm", num_inference_steps=400)
    assert (distances(z) < TOLERANCES).all(), distances(z)


@pytest.mark.parametrize(("prediction", "schedule_name"), PROCESSES)
def test_twenty_steps_of_dpmpp(prediction, schedule_name):
    schedule, denoise = process(prediction, schedule_name)
    z = draw(prediction, schedule, denoise)
    assert (distances(z) < TOLERANCES).all(), distances(z)


@pytest.mark.parametrize("wrong", ["prediction", "time", "steps"])
@pytest.mark.parametrize("sampler", list_samplers())
def test_the_tolerances_can_fail(sampler, wrong):
    """Each of these mistakes is caught by :func:`test_distribution`."""
    schedule, right = process("v", "cosine")
    late = 200 if wrong == "time" else 0
    steps = 3 if wrong == "steps" else 250 if sampler == "ddpm" else 50
    z = draw(
        "epsilon" if wrong == "prediction" else "v",
        schedule,
        lambda z, time: right(z, (time + late).clamp(max=999)),
        sampler=sampler,
        num_inference_steps=steps,
    )
    assert not (distances(z) < TOLERANCES).all()


def exact_path_end(noise, schedule, start):
    """End of the probability flow ODE dy/ds = (y - E[x0 | y]) / s, y = x0 + s eps (Karras et al. 2022, eq. 3)."""
    level = (schedule.sigma[start] / schedule.alpha[start]).item()
    shape = noise.shape

    def slope(s, flat):
        y = torch.from_numpy(flat).view(shape)
        return ((y - MIXTURE.expected_x0(y, 1.0, s)) / s).flatten().numpy()

    begin = noise.double().flatten().numpy() * np.hypot(1, level)
    solution = solve_ivp(slope, (level, 1e-4), begin, rtol=1e-6, atol=1e-7)
    return torch.from_numpy(solution.y[:, -1]).view(shape)


def path_error(sampler, prediction, schedule, denoise, noise, exact):
    """Root mean square distance, over samples and dimensions, of 120 steps to the exact end."""
    z = sample(denoise, schedule, prediction, noise=noise, sampler=sampler, num_inference_steps=120)
    return (z - exact).square().mean().sqrt()


def path_tolerance(sampler):
    return 0.03 if sampler in ("ddim", "euler", "flow-euler") else 0.008


@pytest.mark.parametrize(("prediction", "schedule_name"), [("v", "linear"), ("epsilon", "cosine"), ("flow", "linear")])
def test_deterministic_samplers_follow_the_exact_path(prediction, schedule_name):
    """Far sharper than moments, with counter-examples: a wrong schedule, times late by 30 of 1,000."""
    schedule, denoise = process(prediction, schedule_name)
    noise = gaussian_noise((60, 2, 1, 1), torch.Generator().manual_seed(0))
    exact = exact_path_end(noise, schedule, make_sampler("ddim", schedule, 120).steps[0][1])
    mistaken = process("v", "linear" if schedule_name == "cosine" else "cosine")[0]
    for sampler in DETERMINISTIC:
        tolerance = path_tolerance(sampler)
        assert path_error(sampler, prediction, schedule, denoise, noise, exact) < tolerance, sampler
        assert path_error(sampler, prediction, mistaken, denoise, noise, exact) > tolerance, sampler

        def late(z, time):
            return denoise(z, (time + 30).clamp(max=1000 if prediction == "flow" else 999))

        assert path_error(sampler, prediction, schedule, late, noise, exact) > tolerance, sampler


@pytest.mark.parametrize(("prediction", "schedule_name"), PROCESSES)
def test_first_order_samplers_are_one(prediction, schedule_name):
    """DDIM, Euler in sigma and Euler on the flow path are the same steps in other scales of z."""
    schedule, denoise = process(prediction, schedule_name)
    results = [
        draw(prediction, schedule, denoise, count=50, sampler=sampler, num_inference_steps=30)
        for sampler in ("ddim", "euler", "flow-euler")
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", list_samplers())
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_batch_equals_singles(sampler, prediction):
    schedule, denoise = process(prediction, "cosine", steps=100)

    def run(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = gaussian_noise((len(seeds), 2, 1, 1), generators)
        return sample(
            denoise, schedule, prediction, noise=noise, generator=generators, sampler=sampler, num_inference_steps=12
        )

    batch = run([3, 4, 5])
    torch.testing.assert_close(batch, torch.cat([run([3]), run([4]), run([5])]), rtol=0, atol=1e-5)
    assert torch.equal(batch, run([3, 4, 5]))


@pytest.mark.parametrize("sampler", list_samplers())
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 99, 100])
def test_every_step_count(sampler, prediction, steps):
    for name in ("linear", "cosine"):
        schedule, denoise = process(prediction, name, steps=100)
        if steps == 100 and prediction == "epsilon" and name == "cosine":
            continue  # alpha of the last timestep is 5e-5: x0 from epsilon has no digits there
        if steps == 100 and prediction == "epsilon":
            assert make_sampler(sampler, schedule, steps).steps[0][1] == 99
        z = draw(prediction, schedule, denoise, count=20, sampler=sampler, num_inference_steps=steps)
        assert z.isfinite().all()
        assert z.abs().max() < 3


@pytest.mark.parametrize("sampler", list_samplers())
def test_explicit_timesteps(sampler):
    schedule, denoise = process("v", "linear")
    uneven = [*range(999, 500, -20), *range(490, 100, -12), *range(100, 0, -6), 0]
    seen = []

    def spy(z, time):
        seen.append(int(time[0]))
        return denoise(z, time)

    z = draw("v", schedule, spy, sampler=sampler, timesteps=uneven)
    assert sorted(set(seen), reverse=True) == uneven
    limits = 2 * TOLERANCES if sampler == "ddpm" else TOLERANCES
    assert (distances(z) < limits).all(), distances(z)


@pytest.mark.parametrize("sampler", list_samplers())
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_long_jumps_and_ends_stay_finite(sampler, prediction):
    schedule, denoise = process(prediction, "cosine")
    for timesteps in ([999], [999, 0], [999, 500], [2, 1, 0], [999, 998, 1, 0]):
        z = draw(prediction, schedule, denoise, count=20, sampler=sampler, timesteps=timesteps)
        assert z.isfinite().all(), timesteps


@pytest.mark.parametrize("sampler", list_samplers())
@pytest.mark.parametrize("steps", [4000, 10_000])
def test_fine_schedules(sampler, steps):
    schedule, denoise = process("flow", steps=steps)
    z = draw("flow", schedule, denoise, count=20, sampler=sampler, timesteps=list(range(100, -1, -1)))
    assert z.isfinite().all()


def test_network_evaluations_and_callback():
    schedule, denoise = process("v", "linear", steps=100)
    for sampler in list_samplers():
        calls, reports = [], []

        def spy(z, time, calls=calls):
            calls.append(time[0].item())
            return denoise(z, time)

        def report(number, total, x0, reports=reports):
            reports.append((number, total, tuple(x0.shape)))

        draw("v", schedule, spy, count=3, sampler=sampler, num_inference_steps=10, callback=report)
        expected = 19 if sampler == "heun" else 10
        assert len(calls) == expected
        assert reports == [(i, expected, (3, 2, 1, 1)) for i in range(1, expected + 1)]
        assert calls[0] > 95
        assert calls == sorted(calls, reverse=True)


@pytest.mark.parametrize("sampler", list_samplers())
def test_clipping(sampler):
    schedule, _ = process("v", "linear", steps=100)

    def double(z, time):  # an x0 twice too large, as guidance makes it
        alpha, sigma = (float(level) for level in schedule.at(time[0].double()))
        x0 = 2 * MIXTURE.expected_x0(z, alpha, sigma)
        return (alpha * (z - alpha * x0) / sigma - sigma * x0).float()

    free = draw("v", schedule, double, count=100, sampler=sampler)
    clipped = draw("v", schedule, double, count=100, sampler=sampler, clip_sample=True)
    dynamic = draw("v", schedule, double, count=100, sampler=sampler, dynamic_threshold=1.0)
    assert free.abs().max() > 1.2
    assert clipped.abs().max() <= 1 + 1e-5
    assert dynamic.abs().max() <= 1 + 1e-5
    assert not torch.equal(clipped, dynamic)


def test_learned_variance_is_used_by_ddpm_alone():
    schedule, ideal = process("epsilon", "linear", steps=200)

    def network(value):
        def denoise(z, time):
            out = ideal(z, time)
            return torch.cat([out, torch.full_like(out, value)], dim=1)

        return denoise

    def run(value, sampler, learned):
        options = {"sampler": sampler, "num_inference_steps": 50, "learned_variance": learned}
        return draw("epsilon", schedule, network(value), count=50, **options)

    # Variance channels of -1 mean the posterior variance: DDPM's fixed_small.
    torch.testing.assert_close(run(-1.0, "ddpm", True), run(5.0, "ddpm", False), rtol=0, atol=1e-3)
    assert (run(1.0, "ddpm", True) - run(-1.0, "ddpm", True)).abs().max() > 0.05
    for sampler in DETERMINISTIC:
        assert torch.equal(run(1.0, sampler, True), run(-1.0, sampler, False))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guided_classes(scale):
    schedule, _ = process("v", "cosine")
    label = torch.full((1000,), 1)

    def network(z, time, labels):
        alpha, sigma = schedule.at(time[0].double())
        return MIXTURE.prediction("v", z, alpha.item(), sigma.item(), labels)

    denoise = guided_denoiser(network, label, torch.full_like(label, -1), scale, 1000)
    z = draw("v", schedule, denoise, count=1000).double().flatten(1)
    mean, covariance = (MIXTURE.means[1], MIXTURE.covariances[1]) if scale == 1 else (MIXTURE.mean, MIXTURE.covariance)
    assert (z.mean(dim=0) - mean).abs().max() < 0.06
    assert (torch.cov(z.T) - covariance).abs().max() < 0.04


def test_mistakes():
    schedule, denoise = process("v", "linear", steps=100)
    with pytest.raises(ConfigError, match="did you mean 'dpmpp'"):
        make_sampler("dpmp", schedule, 10)
    for steps in (0, -1, 101):
        with pytest.raises(ConfigError, match="expected 1 to 100"):
            make_sampler("ddim", schedule, steps)
    for timesteps in ([], [5, 5], [1, 2], [100, 3], [3, -1]):
        with pytest.raises(ConfigError, match="strictly decreasing"):
            make_sampler("ddim", schedule, 10, timesteps)
    with pytest.raises(ConfigError, match="unknown prediction"):
        draw("w", schedule, denoise, count=2)
