"""The forward-process method written down step by step, one image at a time, all steps kept; in float64."""

from collections.abc import Callable

import numpy as np

Network = Callable[[np.ndarray, int, int], np.ndarray]
"""(x_t (C, H, W), t, label) -> predicted noise."""


def literal_forward_process(
    network: Network,
    x: np.ndarray,
    depth: int,
    w: float,
    healthy: int = 0,
    none: int = -1,
    count: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """Every timestep of 0 .. depth - 1 on the linear schedule of 1,000.

    Args:
        x: (C, H, W) in [-1, 1].
        w: as in the papers, eps = (1 + w) eps_healthy - w eps_none.
        count: channels that count; default: all.

    Returns:
        map (C, H, W), divergence (C,), end (C,), cosine ().
    """
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - betas)
    x_t, squares, divergences, h, u = x.copy(), [], [], [], []
    chosen = list(range(len(x))) if count is None else count
    for t in range(depth):
        eps_none = network(x_t, t, none)
        eps_healthy = network(x_t, t, healthy)
        x0_none = np.clip((x_t - np.sqrt(1 - a[t]) * eps_none) / np.sqrt(a[t]), -1, 1)
        eps_guided = (1 + w) * eps_healthy - w * eps_none
        x0_healthy = np.clip((x_t - np.sqrt(1 - a[t]) * eps_guided) / np.sqrt(a[t]), -1, 1)
        squares.append((x0_healthy - x) ** 2)
        divergences.append([np.mean((x0_healthy[m] - x0_none[m]) ** 2) for m in chosen])
        h.append(np.mean((x0_healthy[chosen] - x[chosen]) ** 2))
        u.append(np.mean((x0_none[chosen] - x[chosen]) ** 2))
        eps = (x_t - np.sqrt(a[t]) * x0_none) / np.sqrt(1 - a[t])
        x_t = np.sqrt(a[t + 1]) * x0_none + np.sqrt(1 - a[t + 1]) * eps
    all_divergences = np.array(divergences)  # (L, C)
    end = all_divergences.argmax(axis=0)
    maps = np.stack(
        [np.mean([squares[t][m] for t in range(max(1, last))], axis=0) for m, last in zip(chosen, end, strict=True)]
    )
    return {
        "map": maps,
        "divergence": all_divergences.max(axis=0),
        "end": end,
        "cosine": np.dot(h, u) / (np.linalg.norm(h) * np.linalg.norm(u)),
    }


def literal_classifier_guidance(
    noise: Callable[[np.ndarray, int], np.ndarray],
    gradient: Callable[[np.ndarray, int], np.ndarray],
    x: np.ndarray,
    depth: int,
    scale: float,
) -> np.ndarray:
    """Encode and decode as in Wolleb et al. 2022, algorithm 1, every timestep below ``depth`` on the linear schedule.

    Args:
        noise: (x_t (C, H, W), t) -> predicted noise.
        gradient: (x_t, t) -> gradient of the log probability of the healthy class.

    Returns:
        squared difference (C, H, W).
    """
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x_t, angle, at = x.copy(), 0.0, 0
    for t in range(depth):  # z_t is where a DDIM step back would start from, v taken where it ends
        eps = noise(x_t, at)
        v = np.sqrt(a[at]) * eps - np.sqrt(1 - a[at]) * (x_t - np.sqrt(1 - a[at]) * eps) / np.sqrt(a[at])
        step = np.arccos(np.sqrt(a[t])) - angle
        x_t = (x_t + np.sin(step) * v) / np.cos(step)
        angle, at = angle + step, t
    for t in range(depth - 1, -1, -1):
        eps = noise(x_t, t) - scale * np.sqrt(1 - a[t]) * gradient(x_t, t)
        clean = np.clip((x_t - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t]), -1, 1)
        eps = (x_t - np.sqrt(a[t]) * clean) / np.sqrt(1 - a[t])
        before = a[t - 1] if t > 0 else 1.0
        x_t = np.sqrt(before) * clean + np.sqrt(1 - before) * eps
    return (x_t - x) ** 2
