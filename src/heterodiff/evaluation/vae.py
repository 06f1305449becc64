"""Evaluation of a run of recipe ``vae``: reconstruction of held-out images, and the scale of their latents."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from heterodiff.devices import Device
from heterodiff.errors import DataError
from heterodiff.evaluation.held_out import held_out_images, images_of
from heterodiff.evaluation.runs import Evaluation, Request, run_data
from heterodiff.metrics.classifiers import ConvClassifier, SvmClassifier
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.pipelines.load import load_reconstruction
from heterodiff.pipelines.reconstruct import comparison_picture
from heterodiff.pipelines.sharing import team
from heterodiff.run_folder import RunFolder

SHOWN = 12
CNN_SEEDS = 3


def evaluate_vae(run: Path, seed: int = 0, data_path: Path | None = None, device: Device | None = None) -> Evaluation:
    """Reconstruct real images that the VAE was not trained on and measure what is lost.

    Writes ``samples.png`` (original, reconstruction, difference) and ``evaluation.json`` into the run.

    Args:
        data_path: images to use instead of the validation split.
        device: see :func:`heterodiff.load`.

    Raises:
        HeterodiffError: no usable run, no held-out images, or data that are not there any more.
    """
    pipeline = load_reconstruction(run, device)
    data = run_data(run)
    held_out = held_out_images(run, data, data_path)
    if len(held_out.images) == 0:
        raise DataError(f"{run}: no held-out images; name some with --data, or train with data.val_fraction above 0")
    reconstructed = pipeline(held_out.images).images
    metrics: dict[str, Any] = {
        "held_out": held_out.record,
        "seed": seed,
        "reconstruction": {
            "n": len(held_out.images),
            "psnr": spread(psnr(held_out.images, reconstructed)),
            "ssim": spread(ssim(held_out.images, reconstructed)),
        },
        "latent_std": pipeline.latent_std(held_out.images).tolist(),
        "readers": reading(images_of(data.train), held_out.images, reconstructed, held_out.labels, seed),
    }
    rows = torch.linspace(0, len(reconstructed) - 1, min(SHOWN, len(reconstructed))).long()
    folder = RunFolder(run)
    folder.write_picture(folder.samples_picture, comparison_picture(held_out.images[rows], reconstructed[rows]))
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.samples_picture)


def evaluate(run: Path, request: Request) -> Evaluation:
    """Evaluate a run of recipe ``vae`` as asked for on the command line."""
    team().first_alone()
    return evaluate_vae(run, request.seed, request.data, request.device)


def spread(values: Tensor) -> dict[str, float]:
    """Mean and tenth percentile of values (N,)."""
    return {"mean": float(values.mean()), "tenth": float(values.quantile(0.1))}


def reading(
    train: tuple[Tensor, Tensor], originals: Tensor, reconstructed: Tensor, labels: Tensor, seed: int
) -> dict[str, Any]:
    """Accuracy of classifiers trained on real images, on originals and on their reconstructions.

    Args:
        train: images (M, C, H, W) and labels (M,).
        originals, reconstructed: (N, C, H, W); labels: (N,), -1 for none.

    Returns:
        ``{svm, cnn}``, each ``{original, reconstruction}``: class accuracy (the CNN's over three seeds), and ``n``;
        empty where there are fewer than two classes to learn or no labelled image to classify.
    """
    known = labels >= 0
    if len(train[1][train[1] >= 0].unique()) < 2 or not bool(known.any()):
        return {}
    readers: dict[str, Sequence[SvmClassifier | ConvClassifier]] = {
        "svm": [SvmClassifier(seed).fit(*train)],
        "cnn": [ConvClassifier(seed + k).fit(*train) for k in range(CNN_SEEDS)],
    }
    sets = {"original": originals[known], "reconstruction": reconstructed[known]}
    found: dict[str, Any] = {"n": int(known.sum())}
    for name, group in readers.items():
        found[name] = {kind: fmean(r.accuracy(images, labels[known]) for r in group) for kind, images in sets.items()}
    return found
