"""Inversion of DDIM sampling: the z from which it draws a given image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.guidance import Denoise
from heterodiff.diffusion.samplers import check_timesteps
from heterodiff.diffusion.schedule import NoiseSchedule


def _solve(update: Callable[[Tensor], Tensor], z: Tensor, num_iterations: int, tolerance: float) -> Tensor:
    """Solve z = update(z) per sample by damped fixed-point iterations; returns the best z seen.

    A sample's step is halved when its residual grows: between two modes of the data full steps overshoot.
    """
    damping = torch.ones_like(z[:, :1, :1, :1])
    best, best_change, best_residual = z, torch.zeros_like(z), torch.full_like(damping, torch.inf)
    for _ in range(num_iterations):
        change = update(z) - z
        residual = change.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        # A solved sample stays as it is: the result must not depend on how long its neighbours take.
        better = (residual < best_residual) & (best_residual > tolerance)
        best = torch.where(better, z, best)
        best_change = torch.where(better, change, best_change)
        best_residual = torch.where(better, residual, best_residual)
        damping = torch.where(better, damping, damping / 2)
        if bool((best_residual <= tolerance).all()):
            break
        z = best + damping * best_change
    return best


@torch.no_grad()
def invert(
    denoise: Denoise,
    schedule: NoiseSchedule,
    prediction: str,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    num_iterations: int = 30,
    tolerance: float = 2e-7,
) -> Tensor:
    """Return the z at ``timesteps[0]`` from which ``ddim`` sampling along ``timesteps`` draws ``x0``.

    A DDIM step from angle phi to phi - delta is z' = cos(delta) z - sin(delta) v(z, t) with z scaled to unit
    variance (Salimans & Ho 2022, appendix D), so that z = (z' + sin(delta) v(z, t)) / cos(delta) must hold.
    Plain DDIM inversion (Song et al. 2021; Dhariwal & Nichol 2021, appendix F) evaluates v at z' and its own
    timestep instead; from there fixed-point iterations solve the equation (Pan et al. 2023; Meiri et al. 2023).
    Sample with the same ``denoise``, ``sampler="ddim"``, ``z_start`` and without clipping to get ``x0`` back.

    Args:
        denoise: as in :func:`heterodiff.diffusion.sampling.sample`.
        x0: (B, C, H, W) clean images or latents.
        timesteps: strictly decreasing training timesteps; a start below T - 1 encodes only partly.
        num_iterations: maximum per step; 0 is plain DDIM inversion.
        tolerance: root mean square of the residual at which a step is solved.

    Returns:
        (B, C, H, W) float32, z on the path of ``schedule``.

    Raises:
        ConfigError: timesteps outside the schedule or not decreasing; unknown prediction.
    """
    rising = check_timesteps(timesteps, schedule.num_train_timesteps)[::-1]
    norm = torch.hypot(schedule.alpha, schedule.sigma)
    denoiser = Denoiser(denoise, schedule, prediction)

    def velocity(z: Tensor, t: int) -> Tensor:
        """Return v = alpha eps - sigma x0 at unit-variance z."""
        z_network = z * norm[t].item()
        clean, eps = denoiser.x0_eps(denoiser.output(z_network, t), z_network, t)
        return (schedule.alpha[t].item() * eps - schedule.sigma[t].item() * clean) / norm[t].item()

    angles = torch.atan2(schedule.sigma, schedule.alpha)
    z, angle, here = x0.float(), torch.zeros((), dtype=torch.float64), rising[0]
    for t in rising:
        delta = angles[t] - angle
        cos, sin = delta.cos().item(), delta.sin().item()

        def step(estimate: Tensor, at: int = t, target: Tensor = z, cos: float = cos, sin: float = sin) -> Tensor:
            return (target + sin * velocity(estimate, at)) / cos

        start = step(z, at=here)
        z = _solve(step, start, num_iterations, tolerance) if num_iterations else start
        angle, here = angles[t], t
    return z * norm[rising[-1]].item()
