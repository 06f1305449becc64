"""Anomaly maps: where an image differs from what a class-conditional model expects of a healthy one.

Three methods, each one function of an image, of a network call and of timesteps:

    forward-process   encode without condition; at each step compare the healthy prediction (AnoFPDM, Che et al. 2025)
    ddib              encode without condition, decode guided to healthy, compare (Su et al. 2023; Sanchez et al. 2022)
    partial-noising   noise the image in part, denoise without condition, compare (AnoDDPM, Wyatt et al. 2022)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heterodiff.diffusion.guidance import ModelCall, guided_denoiser, join_conditions
from heterodiff.diffusion.inversion import invert
from heterodiff.diffusion.prediction import to_x0_eps
from heterodiff.diffusion.samplers import check_timesteps
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule

Progress = Callable[[int, int], None]


def _silent(step: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class AnomalyMaps:
    """What a method says of C chosen channels of images (B, *, H, W).

    Attributes:
        maps: (B, C, H, W) squared difference of each channel, in units of the network's [-1, 1].
        divergence: (B, C) how far healthy and unconditional predictions part at most; how anomalous a channel is.
        score: (B,) the higher, the more anomalous the image. Of the forward process minus the cosine between the errors
            of healthy and unconditional predictions along the steps, which part in anomalous images; of the others the
            mean divergence.
        calls: (B,) int64, network calls that each image took.
    """

    maps: Tensor
    divergence: Tensor
    score: Tensor
    calls: Tensor


@dataclass
class _Running:
    """Sums along the steps, of the same size however many steps there are."""

    total: Tensor
    maps: Tensor
    divergence: Tensor
    count: int = 0

    @classmethod
    def like(cls, x: Tensor) -> "_Running":
        return cls(torch.zeros_like(x), torch.zeros_like(x), x.new_full(x.shape[:2], -torch.inf))

    def add(self, rows: Tensor, error: Tensor, divergence: Tensor) -> Tensor:
        """Take in S_t (b, C, H, W) and D_t (b, C) of ``rows``, all of those so far or fewer.

        Where D_t is the greatest so far, the map is the mean of S before t; at the first step, before which there is
        nothing, S there.

        Returns:
            where that is so, (b, C) bool.
        """
        before = self.total[rows] / self.count if self.count else error
        greater = divergence > self.divergence[rows]
        self.maps[rows] = torch.where(greater[:, :, None, None], before, self.maps[rows])
        self.divergence[rows] = torch.where(greater, divergence, self.divergence[rows])
        self.total[rows] += error
        self.count += 1
        return greater


@torch.no_grad()
def forward_process(
    model_call: ModelCall,
    schedule: NoiseSchedule,
    prediction: str,
    x: Tensor,
    healthy: Tensor,
    none: Tensor,
    timesteps: Sequence[int],
    *,
    guidance_scale: float = 3.0,
    patience: int | None = None,
    channels: Sequence[int] | None = None,
    progress: Progress = _silent,
) -> AnomalyMaps:
    """Compare, on the way from the image to noise, the healthy prediction of the image with the image itself.

    Che et al. 2025 (AnoFPDM). At each timestep one batch holds both branches; the unconditional one also gives the
    next, noisier z (DDIM). A channel's map is the mean squared error of the healthy prediction before the step at
    which healthy and unconditional predictions differ most.

    Args:
        model_call: (z (B, C, H, W), time (B,), condition) -> (B, C or 2C, H, W) of kind ``prediction``.
        x: (B, C, H, W) in [-1, 1].
        healthy, none: conditions of B rows each.
        timesteps: strictly decreasing, as for sampling; their number times two are the network calls, at most.
        guidance_scale: w in uncond + w (healthy - uncond), 1 more than in the paper.
        patience: leave an image once no channel's predictions differed more for so many steps; default: never.
        channels: that count, for maps, score and patience; default: all.
        progress: called after each step with its number, from 1, and the number of steps.

    Raises:
        ConfigError: timesteps outside the schedule or not decreasing.
    """
    rising = check_timesteps(timesteps, schedule.num_train_timesteps)[::-1]
    count = len(x)
    z = x = x.float()
    chosen = list(range(x.shape[1]) if channels is None else channels)
    seen = x[:, chosen]
    running = _Running.like(seen)
    rows = torch.arange(count, device=x.device)  # of the images that are not left yet
    idle = torch.zeros(seen.shape[:2], dtype=torch.long, device=x.device)
    of_healthy, of_none = x.new_zeros(2, count, len(rising))  # zeros add nothing to a cosine
    calls = torch.zeros(count, dtype=torch.long, device=x.device)
    for number, t in enumerate(rising, start=1):
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        time = torch.full((2 * len(rows),), schedule.time[t].item(), device=x.device)
        both = join_conditions(none[rows], healthy[rows])
        output = model_call(torch.cat([z, z]), time, both).float()[:, : x.shape[1]]
        free, conditional = output.chunk(2)
        steered = free + guidance_scale * (conditional - free)
        x0_none, x0_healthy = (to_x0_eps(prediction, p, z, alpha, sigma)[0].clamp(-1, 1) for p in (free, steered))
        error = (x0_healthy[:, chosen] - seen[rows]).square()
        greater = running.add(rows, error, (x0_healthy - x0_none)[:, chosen].square().mean(dim=(2, 3)))
        of_healthy[rows, number - 1] = error.mean(dim=(1, 2, 3))
        of_none[rows, number - 1] = (x0_none[:, chosen] - seen[rows]).square().mean(dim=(1, 2, 3))
        calls[rows] += 2
        progress(number, len(rising))
        if number == len(rising):
            break
        later = rising[number]
        eps = (z - alpha * x0_none) / sigma  # that of the clipped prediction
        z = schedule.alpha[later].item() * x0_none + schedule.sigma[later].item() * eps
        if patience is not None:
            idle[rows] = torch.where(greater, 0, idle[rows] + 1)
            going = (idle[rows] < patience).any(dim=1)
            rows, z = rows[going], z[going]
            if not len(rows):
                break
    cosine = torch.nn.functional.cosine_similarity(of_healthy, of_none, dim=1, eps=1e-12)
    return AnomalyMaps(running.maps, running.divergence, -cosine, calls)


@torch.no_grad()
def ddib(
    model_call: ModelCall,
    schedule: NoiseSchedule,
    prediction: str,
    x: Tensor,
    healthy: Any,
    none: Any,
    timesteps: Sequence[int],
    *,
    guidance_scale: float = 3.0,
    channels: Sequence[int] | None = None,
    progress: Progress = _silent,
) -> AnomalyMaps:
    """Encode ``x`` without condition, decode it guided to healthy, and square the difference.

    Dual diffusion bridges (Su et al. 2023), for lesions Sanchez et al. 2022. Arguments as :func:`forward_process`.
    """
    x = x.float()
    train_steps = schedule.num_train_timesteps
    free = guided_denoiser(model_call, none, none, 1.0, train_steps)
    steered = guided_denoiser(model_call, healthy, none, guidance_scale, train_steps)
    z = invert(free, schedule, prediction, x, timesteps, num_iterations=0)
    decoded = _decoded(steered, schedule, prediction, z, timesteps, progress)
    branches = 1 if guidance_scale in (0, 1) else 2
    return _of_difference(x, decoded, channels, (1 + branches) * len(timesteps))


@torch.no_grad()
def partial_noising(
    model_call: ModelCall,
    schedule: NoiseSchedule,
    prediction: str,
    x: Tensor,
    none: Any,
    timesteps: Sequence[int],
    *,
    noise: Tensor,
    channels: Sequence[int] | None = None,
    progress: Progress = _silent,
) -> AnomalyMaps:
    """Noise ``x`` to the first of ``timesteps``, denoise it without condition, and square the difference.

    AnoDDPM (Wyatt et al. 2022), for models that were trained on healthy images alone.

    Args:
        noise: (B, C, H, W) standard normal, on which the difference depends.
        channels: as :func:`forward_process`.
    """
    x, start = x.float(), max(timesteps)
    z = schedule.alpha[start].item() * x + schedule.sigma[start].item() * noise
    free = guided_denoiser(model_call, none, none, 1.0, schedule.num_train_timesteps)
    decoded = _decoded(free, schedule, prediction, z, timesteps, progress)
    return _of_difference(x, decoded, channels, len(timesteps))


def noising_timesteps(depth: int, count: int) -> list[int]:
    """Return at most ``count`` evenly spaced timesteps below ``depth``, decreasing, 0 included.

    Raises:
        ValueError: depth or count below 1.
    """
    if depth < 1 or count < 1:
        raise ValueError(f"depth {depth} in {count} steps: expected at least 1 of each")
    stride = -(-depth // count)
    return list(range(0, depth, stride))[::-1]


def _decoded(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    z: Tensor,
    timesteps: Sequence[int],
    progress: Progress,
) -> Tensor:
    return sample(
        denoise,
        schedule,
        prediction,
        z_start=z,
        sampler="ddim",
        timesteps=timesteps,
        clip_sample=True,
        callback=lambda step, total, x0: progress(step, total),
    )


def _of_difference(x: Tensor, healthy: Tensor, channels: Sequence[int] | None, calls: int) -> AnomalyMaps:
    maps = (healthy - x).square()[:, slice(None) if channels is None else list(channels)]
    each = torch.full((len(x),), calls, device=x.device)
    return AnomalyMaps(maps, maps.mean(dim=(2, 3)), maps.mean(dim=(1, 2, 3)), each)
