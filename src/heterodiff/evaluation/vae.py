"""Evaluating a run of recipe ``vae``: how much of real held-out images comes back, and the scale of their latents."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from heterodiff.codecs.scaling import measure, scaled_std
from heterodiff.devices import Device
from heterodiff.errors import DataError
from heterodiff.evaluation.class_images import Evaluation, Request, held_out_images, images_of, run_data
from heterodiff.metrics.classifiers import ConvReader, SvmReader
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.pipelines.load import load_reconstruction
from heterodiff.pipelines.reconstruct import ENCODE_BATCH, ReconstructionPipeline, comparison_picture
from heterodiff.report.writing import write_report
from heterodiff.run_folder import RunFolder

SHOWN = 12
CNN_SEEDS = 3


def evaluate_vae(run: Path, seed: int = 0, data_path: Path | None = None, device: Device | None = None) -> Evaluation:
    """Reconstruct real images that the VAE was not trained on and measure what is lost.

    Writes ``samples.png`` (original, reconstruction, difference), ``evaluation.json`` and ``report.html`` into the run.

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
        "latent_std": _latent_std(pipeline, held_out.images),
        "readers": reading(images_of(data.train), held_out.images, reconstructed, held_out.labels, seed),
    }
    rows = torch.linspace(0, len(reconstructed) - 1, min(SHOWN, len(reconstructed))).long()
    folder = RunFolder(run)
    folder.write_picture(folder.samples_picture, comparison_picture(held_out.images[rows], reconstructed[rows]))
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.samples_picture, write_report(run))


def evaluate(run: Path, request: Request) -> tuple[Evaluation, list[str]]:
    """Evaluate a run of recipe ``vae`` as asked for on the command line; its main numbers."""
    found = evaluate_vae(run, request.seed, request.data, request.device)
    return found, vae_summary(found.metrics)


def spread(values: Tensor) -> dict[str, float]:
    """Mean of values (N,), and the value that a tenth of them stay below."""
    return {"mean": float(values.mean()), "tenth": float(values.quantile(0.1))}


def _latent_std(pipeline: ReconstructionPipeline, images: Tensor) -> list[float]:
    codec = pipeline.codec
    posteriors = (codec.posterior(part.to(pipeline.device)) for part in images.split(ENCODE_BATCH))
    return scaled_std(codec, *measure(posteriors, codec.latent_channels)).tolist()


def reading(
    train: tuple[Tensor, Tensor], originals: Tensor, reconstructed: Tensor, labels: Tensor, seed: int
) -> dict[str, Any]:
    """How well classifiers trained on real images read originals, and their reconstructions.

    Args:
        train: images (M, C, H, W) and labels (M,).
        originals, reconstructed: (N, C, H, W); labels: (N,), -1 for none.

    Returns:
        ``{svm, cnn}``, each ``{original, reconstruction}``: shares read as their class (the CNN's over three seeds),
        and ``n``; empty where there are fewer than two classes to learn or no labelled image to read.
    """
    known = labels >= 0
    if len(train[1][train[1] >= 0].unique()) < 2 or not bool(known.any()):
        return {}
    readers: dict[str, Sequence[SvmReader | ConvReader]] = {
        "svm": [SvmReader(seed).fit(*train)],
        "cnn": [ConvReader(seed + k).fit(*train) for k in range(CNN_SEEDS)],
    }
    sets = {"original": originals[known], "reconstruction": reconstructed[known]}
    found: dict[str, Any] = {"n": int(known.sum())}
    for name, group in readers.items():
        found[name] = {kind: fmean(r.accuracy(images, labels[known]) for r in group) for kind, images in sets.items()}
    return found


def vae_summary(metrics: dict[str, Any]) -> list[str]:
    """The main numbers of an evaluated VAE, a line each."""
    found = metrics["reconstruction"]
    lines = [
        f"PSNR     {found['psnr']['mean']:.2f} dB (a tenth of {found['n']} held-out images below "
        f"{found['psnr']['tenth']:.2f})",
        f"SSIM     {found['ssim']['mean']:.4f} (a tenth below {found['ssim']['tenth']:.4f})",
        f"latents  std {' '.join(f'{value:.3f}' for value in metrics['latent_std'])} after scaling, expected 1",
    ]
    for name, title in (("svm", "SVM"), ("cnn", "CNN")):
        if reader := metrics["readers"].get(name):
            lines.append(
                f"{title:8} reads {100 * reader['reconstruction']:.1f} % of reconstructions right, "
                f"{100 * reader['original']:.1f} % of the originals"
            )
    return lines
