"""Memorised training images: distances to the nearest training images, a verdict and a picture."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from heterodiff.devices import default_device
from heterodiff.metrics.intervals import wilson_interval
from heterodiff.pictures import image_grid

CHUNK = 256
CHUNK_VALUES = 64_000_000  # values of one training chunk: 256 MB in float32
SUSPICIOUS_PAIRS = 16
THRESHOLD_QUANTILE = 0.01
MANY_COPIES = 0.05
FEW_HELD_OUT = 100
UNLIKE_DISTANCE = 2.0
NOISY_RATIO = 1.3  # more varied than real images by this factor: noise, or wrong classes


def nearest_neighbours(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest of ``train`` (M, C, H, W) for each of ``images`` (N, C, H, W), on the default device.

    Returns:
        Root mean square pixel differences (N,) and indices into ``train`` (N,), on the CPU.
    """
    device = default_device()
    queries = images.detach().to(device).float().flatten(1)
    pixels = queries.shape[1]
    chunk = max(1, min(4096, CHUNK_VALUES // pixels))
    best = torch.full((len(queries),), math.inf, device=device)
    index = torch.zeros(len(queries), dtype=torch.long, device=device)
    for start in range(0, len(train), chunk):
        candidates = train[start : start + chunk].detach().to(device).float().flatten(1)
        nearest = [torch.cdist(part, candidates).min(dim=1) for part in queries.split(CHUNK)]
        distance = torch.cat([found.values for found in nearest])
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        index = torch.where(nearer, torch.cat([found.indices for found in nearest]) + start, index)
    # cdist goes through a matrix product, which loses digits near zero: exactly where copies are.
    index = index.cpu()
    exact = [
        (part - train[rows].to(device).float().flatten(1)).square().mean(dim=1).sqrt()
        for part, rows in zip(queries.split(CHUNK), index.split(CHUNK), strict=True)
    ]
    return torch.cat(exact).cpu(), index


def _verdict(
    near: int, count: int, real_near: int, real_count: int, exact: int, duplicates: int, unlike: bool
) -> tuple[str, str]:
    """Judge the share of near copies against that of real held-out images, given the chance in both."""
    share = near / count
    more_than_chance = wilson_interval(near, count)[0] > wilson_interval(real_near, real_count)[1]
    text = (
        f"{100 * share:.1f} % of the generated images lie nearer to a training image than 99 % of real held-out "
        "images do; about 1 % is chance."
    )
    if real_count < FEW_HELD_OUT:
        text += f" With only {real_count} held-out images, this threshold is rough."
    if exact:
        text += f" {exact} generated images equal a training image exactly."
    if more_than_chance and share >= MANY_COPIES:
        more = "The model repeats training images, or draws simpler images than real ones. Look at the pairs."
        return "copies", f"{text} {more}"
    # Where real held-out images repeat training images too, equal images are no sign of memorising.
    if more_than_chance or (exact and not duplicates):
        return "some", f"{text} More than chance: look at the pairs."
    if unlike:
        return "unlike", f"{text} The images are unlike the data, so this check means nothing yet."
    return "none", f"{text} No sign of memorising."


def memorising(generated: Tensor, train: Tensor, val: Tensor, variety: float | None = None) -> dict[str, Any]:
    """Compare distances to the nearest training image: generated against real held-out images.

    A generated image is called a near copy if its distance is at most the 1st percentile of the held-out
    images' distances. All distances are root mean square pixel differences of values in [0, 1].

    Args:
        generated: (N, C, H, W).
        train: (M, C, H, W), not empty.
        val: (K, C, H, W), may be empty: then there is no threshold and no verdict.
        variety: ratio of the variety of generated to that of real images, where known.

    Returns:
        ``generated_median``, ``real_median``, ``threshold``, ``exact_copies`` (generated images equal to a
        training image), ``copies`` (count of near copies, exact ones among them), ``copy_share`` with
        ``copy_low`` and ``copy_high`` (95 % Wilson), ``real_share`` (the same for held-out images, about
        0.01), ``verdict`` (none; some: more than chance, or an exact copy; copies: more than chance and at
        least 5 %; unlike: no copies, but the images are too far from the data for that to mean anything;
        unknown), ``explanation``, ``held_out_duplicates`` (held-out images that equal a training
        image) and ``pairs``: the most suspicious ones, nearest first, each with ``generated`` and ``train``
        index and ``distance``.
    """
    distances, neighbours = nearest_neighbours(generated, train)
    order = distances.argsort(stable=True)[:SUSPICIOUS_PAIRS].tolist()
    exact = int((distances == 0).sum())
    result: dict[str, Any] = {
        "generated_median": distances.median().item(),
        "exact_copies": exact,
        "pairs": [
            {"generated": row, "train": int(neighbours[row]), "distance": distances[row].item()} for row in order
        ],
    }
    if len(val) == 0:
        return result | {
            "real_median": None,
            "threshold": None,
            "verdict": "unknown",
            "explanation": "No held-out images: there is no distance to compare with. "
            f"{exact} generated images equal a training image exactly.",
        }
    real = nearest_neighbours(val, train)[0]
    threshold = torch.quantile(real.double(), THRESHOLD_QUANTILE).item()
    copies = int((distances.double() <= threshold).sum())
    real_copies = int((real.double() <= threshold).sum())
    duplicates = int((real == 0).sum())
    low, high = wilson_interval(copies, len(generated))
    # Much farther from the training images than real ones, none could be a copy. High variety alone does not tell: good
    # images of wrong classes are varied too.
    real_median = real.median().item()
    farther = result["generated_median"] / real_median if real_median > 0 else 1.0
    unlike = farther > (NOISY_RATIO if variety is not None and variety > NOISY_RATIO else UNLIKE_DISTANCE)
    verdict, explanation = _verdict(copies, len(generated), real_copies, len(real), exact, duplicates, unlike)
    if duplicates:
        explanation += f" {duplicates} held-out images equal a training image: the held-out data leak."
    return result | {
        "real_median": real_median,
        "threshold": threshold,
        "copies": copies,
        "copy_share": copies / len(generated),
        "copy_low": low,
        "copy_high": high,
        "real_share": real_copies / len(real),
        "held_out_duplicates": duplicates,
        "verdict": verdict,
        "explanation": explanation,
    }


def nearest_picture(
    generated: Tensor, train_images: Tensor, metrics: Mapping[str, Any], mosaic: bool = False
) -> Image.Image:
    """Draw the most suspicious generated images, each above its nearest training image.

    Args:
        generated: (N, C, H, W) in [0, 1], as given to ``evaluate_generation``.
        train_images: (M, C, H, W) in [0, 1], likewise.
        metrics: as ``evaluate_generation`` returned them.
        mosaic: show every channel as a grey tile, see :func:`heterodiff.pictures.to_pil`.

    Raises:
        ValueError: ``metrics`` hold no pairs.
    """
    pairs = metrics.get("nearest", {}).get("pairs", [])
    if not pairs:
        raise ValueError("the metrics hold no nearest pairs to draw")
    columns = min(8, len(pairs))
    images, captions = [], []
    for start in range(0, len(pairs), columns):
        part = pairs[start : start + columns]
        blank = [torch.ones_like(generated[0])] * (columns - len(part))
        images += [generated[pair["generated"]].cpu() for pair in part] + blank
        images += [train_images[pair["train"]].cpu() for pair in part] + blank
        captions += [f"gen {pair['generated']}" for pair in part] + [""] * len(blank)
        captions += [f"d = {pair['distance']:.3f}" for pair in part] + [""] * len(blank)
    title = "Generated images (above) and their nearest training images (below)"
    return image_grid(torch.stack(images).float(), captions, columns, min_side=80, title=title, mosaic=mosaic)
