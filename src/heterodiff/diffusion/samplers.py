"""The table of samplers, and their diffusers schedulers prepared for the timesteps of a run."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch

from heterodiff.diffusion.noise import find_noise
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError, unknown_name

# DPM-Solver's bound for the cosine schedule (Lu et al. 2022, appendix D.3): log(alpha / sigma) of the first step.
# Noisier levels hold no image, and second-order solvers err on the long steps down from them.
MIN_LOG_ALPHA_SIGMA = -5.1


@dataclass(frozen=True)
class SamplerRow:
    """One sampler: a diffusers scheduler, its arguments and the scale of its z.

    ``space``: ``vp`` z has unit variance; ``edm`` z = x0 + (sigma / alpha) eps; ``flow`` alpha + sigma = 1.
    """

    scheduler: type[Any]
    space: Literal["vp", "edm", "flow"]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stochastic: bool = False


_ROWS = {
    "ddpm": SamplerRow(diffusers.DDPMScheduler, "vp", {"clip_sample": False}, stochastic=True),
    "ddim": SamplerRow(diffusers.DDIMScheduler, "vp", {"clip_sample": False}),
    "dpmpp": SamplerRow(diffusers.DPMSolverMultistepScheduler, "vp", {"algorithm_type": "dpmsolver++"}),
    "unipc": SamplerRow(diffusers.UniPCMultistepScheduler, "vp"),
    "euler": SamplerRow(diffusers.EulerDiscreteScheduler, "edm"),
    "heun": SamplerRow(diffusers.HeunDiscreteScheduler, "edm"),
    "flow-euler": SamplerRow(diffusers.FlowMatchEulerDiscreteScheduler, "flow"),
}


def list_samplers() -> list[str]:
    """Return the names of all samplers."""
    return list(_ROWS)


def check_noise(name: str, noise: str) -> None:
    """Raise ConfigError if the sampler called ``name`` adds Gaussian noise and the training was with another one."""
    if name in _ROWS and _ROWS[name].stochastic and not find_noise(noise).is_gaussian:
        others = ", ".join(other for other, row in _ROWS.items() if not row.stochastic)
        raise ConfigError(
            f"sampler '{name}' adds Gaussian noise at each step, and the run was trained with {noise} noise; take one "
            f"of {others}"
        )


@dataclass(frozen=True)
class PreparedSampler:
    """A diffusers scheduler set to the given timesteps; use it for one run, it keeps a state.

    The scheduler takes predicted x0 (``flow``: the velocity) and counts its own timesteps. ``steps`` pairs
    each of them with the training timestep at which the network is evaluated.
    """

    row: SamplerRow
    scheduler: Any
    steps: list[tuple[Any, int]]
    start_scale: float
    learned_variance: bool


def _timestep_grid(schedule: NoiseSchedule, num_inference_steps: int) -> list[int]:
    """Evenly spaced training timesteps, strictly decreasing from pure noise; the last step goes to z = x0.

    "Trailing" spacing (Lin et al. 2024, table 2). Ending at t = 0 instead makes the last interval very long in
    log-SNR, and multistep solvers extrapolate across it: two to four times the error at 20 steps.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ConfigError(
            f"num_inference_steps {num_inference_steps}: expected 1 to {total}, the timesteps of training"
        )
    usable = max(int((schedule.log_snr / 2 >= MIN_LOG_ALPHA_SIGMA).sum()), num_inference_steps)
    return [round(usable * k / num_inference_steps) - 1 for k in range(num_inference_steps, 0, -1)]


def check_timesteps(timesteps: Sequence[int], total: int) -> list[int]:
    """Return timesteps as a list; raises ConfigError unless they decrease strictly within total - 1..0."""
    steps = [int(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not falling or steps[0] >= total or steps[-1] < 0:
        raise ConfigError(f"timesteps {steps}: expected strictly decreasing values within {total - 1}..0")
    return steps


def _respaced_betas(schedule: NoiseSchedule, grid: list[int]) -> list[float]:
    """Betas of the chain that visits only ``grid`` (Nichol & Dhariwal 2021, eq. 19), least noise first.

    A scheduler built on them knows no other timesteps: any list of timesteps works with any of them, and
    levels of a flow are levels of a variance-preserving chain with the same SNR.
    """
    alpha_bar = torch.sigmoid(schedule.log_snr[grid[::-1]])
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    # Schedulers keep 1 - beta in float32, which loses less than 1e-6 at either end; the levels that this clamp
    # moves are pure noise, or clean to a thousandth.
    return (1 - alpha_bar / previous).clamp(1e-6, 1 - 1e-6).tolist()


def _prepare_flow(row: SamplerRow, schedule: NoiseSchedule, grid: list[int]) -> PreparedSampler:
    levels = torch.sigmoid(-schedule.log_snr[grid] / 2)  # sigma / (alpha + sigma)
    scheduler = row.scheduler(num_train_timesteps=schedule.num_train_timesteps, shift=1.0)
    scheduler.set_timesteps(sigmas=levels.tolist())
    start_scale = float(torch.hypot(1 - levels[0], levels[0]))
    steps = list(zip(scheduler.timesteps, grid, strict=True))
    return PreparedSampler(row, scheduler, steps, start_scale, learned_variance=False)


def _prepare_chain(
    row: SamplerRow, schedule: NoiseSchedule, grid: list[int], learned_variance: bool
) -> PreparedSampler:
    variance = {"variance_type": "learned_range"} if learned_variance else {}
    scheduler = row.scheduler(
        num_train_timesteps=len(grid),
        trained_betas=_respaced_betas(schedule, grid),
        prediction_type="sample",
        timestep_spacing="trailing",  # with as many steps as timesteps: all of them
        **row.arguments,
        **variance,
    )
    scheduler.set_timesteps(len(grid))
    steps = [(index, grid[len(grid) - 1 - int(index)]) for index in scheduler.timesteps]
    start_scale = float((1 + scheduler.sigmas[0].double() ** 2) ** 0.5) if row.space == "edm" else 1.0
    return PreparedSampler(row, scheduler, steps, start_scale, learned_variance)


def make_sampler(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> PreparedSampler:
    """Prepare the sampler called ``name`` for a network trained on ``schedule``.

    Args:
        num_inference_steps: steps from noise to image, 1..T; ``heun`` evaluates the network twice in each
            but the last. Not used if ``timesteps`` are given.
        timesteps: explicit training timesteps, strictly decreasing, instead of evenly spaced ones.
        learned_variance: ``ddpm`` draws with the variance that the network predicts; other samplers ignore it.

    Raises:
        ConfigError: unknown name, or steps outside the training schedule.
    """
    if name not in _ROWS:
        raise ConfigError(unknown_name("sampler", name, _ROWS))
    row = _ROWS[name]
    if timesteps is None:
        grid = _timestep_grid(schedule, num_inference_steps)
    else:
        grid = check_timesteps(timesteps, schedule.num_train_timesteps)
    with warnings.catch_warnings():
        # diffusers calls numpy.array on tensors; numpy 2 warns about that with some versions of torch.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        if row.space == "flow":
            return _prepare_flow(row, schedule, grid)
        return _prepare_chain(row, schedule, grid, learned_variance and row.scheduler is diffusers.DDPMScheduler)
