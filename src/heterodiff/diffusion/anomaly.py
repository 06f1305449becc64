"""Anomaly maps: where an image differs from what a model expects of a healthy one.

Five methods:

    label-difference     noise the image a little, compare the predictions for unhealthy and for healthy, sign kept
    forward-process      encode without condition, compare healthy predictions on the way (AnoFPDM, Che et al. 2025)
    ddib                 encode without condition, decode guided to healthy (Su et al. 2023; Sanchez et al. 2022)
    partial-noising      noise the image in part, denoise without condition, compare (AnoDDPM, Wyatt et al. 2022)
    classifier-guidance  encode without condition, decode along the gradient of a classifier (Wolleb et al. 2022)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.guidance import LogProbability, ModelCall, classifier_guided, join_conditions
from heterodiff.diffusion.inversion import invert
from heterodiff.diffusion.samplers import check_timesteps
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AnomalyMaps:
    """Result of a method for C chosen channels of images (B, *, H, W).

    Attributes:
        maps: (B, C, H, W) squared difference of each channel, in units of the network's [-1, 1]; of label-difference
            the difference itself.
        divergence: (B, C) largest difference between healthy and unconditional predictions, or the mean of the map.
        score: (B,) the higher, the more anomalous the image. Forward process: minus the cosine between the errors of
            healthy and unconditional predictions along the steps, which differ in anomalous images; label difference:
            0; else the mean map.
        calls: (B,) int64, network calls that each image took.
    """

    maps: Tensor
    divergence: Tensor
    score: Tensor
    calls: Tensor


@torch.no_grad()
def label_difference(
    model_call: ModelCall,
    schedule: NoiseSchedule,
    prediction: str,
    x: Tensor,
    healthy: Tensor,
    unhealthy: Sequence[Tensor],
    timesteps: Sequence[int],
    *,
    noise: Callable[[], Tensor],
    channels: Sequence[int] | None = None,
    progress: Progress = lambda step, total: None,
) -> AnomalyMaps:
    """Compare what the model expects of an unhealthy image and of a healthy one where this image is, sign kept.

    At each timestep the image is noised anew, and the clean images that are predicted for the two labels are
    subtracted. The maps are the mean of unhealthy minus healthy over the timesteps: positive where a lesion is brighter
    than healthy tissue, negative where it is darker, and near 0 where the label makes no difference. Which channels
    and signs matter is not known here, so the score is 0 for all images.

    Args:
        model_call, schedule, prediction, x, channels, progress: as :func:`forward_process`.
        healthy: condition of B rows.
        unhealthy: one condition of B rows for each class that is not healthy; the mean of their predictions counts.
        timesteps: strictly decreasing; each takes one network call and one for each unhealthy class.
        noise: returns noise (B, C, H, W) as of the training, anew for each timestep.

    Raises:
        ConfigError: timesteps outside the schedule or not decreasing.
    """
    x = x.float()
    denoiser = Denoiser(model_call, schedule, prediction)
    falling = check_timesteps(timesteps, schedule.num_train_timesteps)
    condition: Any = healthy
    for other in unhealthy:
        condition = join_conditions(condition, other)
    bound, branches = denoiser.guided(condition), 1 + len(unhealthy)
    total = torch.zeros_like(x)
    for number, t in enumerate(falling, start=1):
        z = schedule.alpha[t].item() * x + schedule.sigma[t].item() * noise()
        z = z.repeat(branches, 1, 1, 1)
        clean = denoiser.x0_eps(bound.output(z, t), z, t)[0].unflatten(0, (branches, len(x)))
        total += clean[1:].mean(dim=0) - clean[0]
        progress(number, len(falling))
    maps = (total if channels is None else total[:, list(channels)]) / len(falling)
    calls = torch.full((len(x),), branches * len(falling), device=x.device)
    return AnomalyMaps(maps, maps.square().mean(dim=(2, 3)), x.new_zeros(len(x)), calls)


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
    progress: Progress = lambda step, total: None,
) -> AnomalyMaps:
    """Compare, on the way from the image to noise, the healthy prediction of the image with the image itself.

    Che et al. 2025 (AnoFPDM). At each timestep one batch holds both branches; the unconditional one also gives the
    next, noisier z (DDIM). A channel's map is the mean squared error of the healthy prediction before the step (at the
    first step: at it) where healthy and unconditional predictions differ most.

    Args:
        model_call, schedule, prediction: see :class:`heterodiff.diffusion.denoiser.Denoiser`.
        x: (B, C, H, W) in [-1, 1].
        healthy, none: conditions of B rows each.
        timesteps: strictly decreasing, as for sampling; each takes two network calls an image.
        guidance_scale: w in uncond + w (healthy - uncond), 1 more than in the paper.
        patience: stop an image after this number of steps without a new largest difference; default: never.
        channels: channels that maps, score and patience use; default: all.
        progress: called after each step with its number, from 1, and the number of steps.

    Raises:
        ConfigError: timesteps outside the schedule or not decreasing.
    """
    denoiser = Denoiser(model_call, schedule, prediction)
    rising = check_timesteps(timesteps, schedule.num_train_timesteps)[::-1]
    z = x = x.float()
    chosen = list(range(x.shape[1]) if channels is None else channels)
    seen = x[:, chosen]
    total, maps, divergence = torch.zeros_like(seen), torch.zeros_like(seen), seen.new_full(seen.shape[:2], -torch.inf)
    rows = torch.arange(len(x), device=x.device)  # images that are not stopped yet
    idle = torch.zeros(seen.shape[:2], dtype=torch.long, device=x.device)
    of_healthy, of_none = x.new_zeros(2, len(x), len(rising))  # zeros add nothing to a cosine
    calls = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for number, t in enumerate(rising, start=1):
        both = denoiser.guided(join_conditions(none[rows], healthy[rows]))
        free, conditional = both.output(torch.cat([z, z]), t)[:, : x.shape[1]].chunk(2)
        steered = free + guidance_scale * (conditional - free)
        x0_none, x0_healthy = (denoiser.x0_eps(output, z, t)[0].clamp(-1, 1) for output in (free, steered))
        error = (x0_healthy[:, chosen] - seen[rows]).square()
        difference = (x0_healthy - x0_none)[:, chosen].square().mean(dim=(2, 3))
        greater = difference > divergence[rows]
        before = total[rows] / (number - 1) if number > 1 else error
        maps[rows] = torch.where(greater[:, :, None, None], before, maps[rows])
        divergence[rows] = torch.where(greater, difference, divergence[rows])
        total[rows] += error
        of_healthy[rows, number - 1] = error.mean(dim=(1, 2, 3))
        of_none[rows, number - 1] = (x0_none[:, chosen] - seen[rows]).square().mean(dim=(1, 2, 3))
        calls[rows] += 2
        progress(number, len(rising))
        if number == len(rising):
            break
        later = rising[number]
        eps = (z - schedule.alpha[t].item() * x0_none) / schedule.sigma[t].item()  # of the clipped prediction
        z = schedule.alpha[later].item() * x0_none + schedule.sigma[later].item() * eps
        if patience is not None:
            idle[rows] = torch.where(greater, 0, idle[rows] + 1)
            going = (idle[rows] < patience).any(dim=1)
            rows, z = rows[going], z[going]
            if not len(rows):
                break
    cosine = torch.nn.functional.cosine_similarity(of_healthy, of_none, dim=1, eps=1e-12)
    return AnomalyMaps(maps, divergence, -cosine, calls)


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
    progress: Progress = lambda step, total: None,
) -> AnomalyMaps:
    """Encode ``x`` without condition, decode it guided to healthy, and square the difference.

    Dual diffusion bridges (Su et al. 2023), for lesions Sanchez et al. 2022. Arguments as :func:`forward_process`.
    """
    x = x.float()
    denoiser = Denoiser(model_call, schedule, prediction)
    steered = denoiser.guided(healthy, none, guidance_scale)
    z = invert(*denoiser.guided(none), x, timesteps, num_iterations=0)
    branches = 1 if guidance_scale in (0, 1) else 2
    return _decoded_maps(x, steered, z, timesteps, channels, progress, (1 + branches) * len(timesteps))


@torch.no_grad()
def classifier_guidance(
    model_call: ModelCall,
    schedule: NoiseSchedule,
    prediction: str,
    x: Tensor,
    none: Any,
    timesteps: Sequence[int],
    *,
    log_healthy: LogProbability,
    scale: float = 100.0,
    channels: Sequence[int] | None = None,
    progress: Progress = lambda step, total: None,
) -> AnomalyMaps:
    """Encode ``x`` without condition, decode it guided to healthy by a classifier, and square the difference.

    Wolleb et al. 2022. The denoiser needs no labels.

    Args:
        log_healthy: log probability of the healthy class, see
            :func:`heterodiff.diffusion.guidance.classifier_guided`, as ``scale``.
        model_call, schedule, prediction, x, none, timesteps, channels, progress: as :func:`forward_process`.
    """
    x = x.float()
    free = Denoiser(model_call, schedule, prediction).guided(none)
    z = invert(*free, x, timesteps, num_iterations=0)
    steered = free._replace(network=classifier_guided(*free, log_healthy, scale))
    return _decoded_maps(x, steered, z, timesteps, channels, progress, 3 * len(timesteps))


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
    progress: Progress = lambda step, total: None,
) -> AnomalyMaps:
    """Noise ``x`` to the first of ``timesteps``, denoise it without condition, and square the difference.

    AnoDDPM (Wyatt et al. 2022), for models that were trained on healthy images alone.

    Args:
        noise: (B, C, H, W) as of the training, on which the difference depends.
        channels, progress: as :func:`forward_process`.
    """
    x, start = x.float(), max(timesteps)
    z = schedule.alpha[start].item() * x + schedule.sigma[start].item() * noise
    free = Denoiser(model_call, schedule, prediction).guided(none)
    return _decoded_maps(x, free, z, timesteps, channels, progress, len(timesteps))


def difference_timesteps(depth: int, count: int) -> list[int]:
    """Return at most ``count`` evenly spaced timesteps, decreasing from ``depth`` - 1; both at least 1.

    Unlike :func:`noising_timesteps` they leave out timestep 0, at which an image shows everything and labels nothing.
    """
    if depth < 1 or count < 1:
        raise ValueError(f"depth {depth} in {count} steps: expected at least 1 of each")
    count = min(depth, count)
    return [(depth * (k + 1)) // count - 1 for k in range(count)][::-1]


def noising_timesteps(depth: int, count: int) -> list[int]:
    """Return at most ``count`` evenly spaced timesteps below ``depth``, both at least 1, decreasing, 0 included."""
    if depth < 1 or count < 1:
        raise ValueError(f"depth {depth} in {count} steps: expected at least 1 of each")
    stride = -(-depth // count)
    return list(range(0, depth, stride))[::-1]


def _decoded_maps(
    x: Tensor,
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Sequence[int],
    channels: Sequence[int] | None,
    progress: Progress,
    calls: int,
) -> AnomalyMaps:
    """Denoise ``z``, and square its difference from ``x``."""
    healthy = sample(
        *denoiser,
        z_start=z,
        sampler="ddim",
        timesteps=timesteps,
        clip_sample=True,
        callback=lambda step, total, x0: progress(step, total),
    )
    maps = (healthy - x).square()[:, slice(None) if channels is None else list(channels)]
    each = torch.full((len(x),), calls, device=x.device)
    return AnomalyMaps(maps, maps.mean(dim=(2, 3)), maps.mean(dim=(1, 2, 3)), each)
