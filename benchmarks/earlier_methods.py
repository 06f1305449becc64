"""Earlier methods of finding anomalies on simulated heads of 32x32, beside ours, from short trainings.

    python -m benchmarks.earlier_methods --runs runs labels     classifier guidance beside the methods of label guidance
    python -m benchmarks.earlier_methods --runs runs healthy    partial noising with Gaussian and with simplex noise

Seven minutes of a CPU core each. Writes benchmarks/results/earlier_{labels,healthy}.json.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.measure import write_results
from benchmarks.runs import seconds_of, to_the_end
from heterodiff.config import SegmentationConfig
from heterodiff.config.file import load_config, parse_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.data.sources import load_test
from heterodiff.evaluation.anomalies import all_maps, parts_of
from heterodiff.evaluation.runs import Request, evaluate_task, image_config, run_data
from heterodiff.metrics.segmentation import mean_and_interval, overlap, precision_recall_area, threshold_baseline
from heterodiff.pipelines.anomalies.label_weights import FOREGROUND, LabelWeights, fit_label_weights
from heterodiff.pipelines.anomalies.masks import drop_small, half_peak_mask, small_area, smoothed_map
from heterodiff.pipelines.anomalies.segment import Segmenter, weighed
from heterodiff.pipelines.load import load_generation
from heterodiff.run_folder import RunFolder

SMALL = ["data.image_size=32", "training.steps=900", "training.preview_every=900"]
HEALTHY_ALONE = [
    "data.train_classes=[healthy]",
    "diffusion.p_uncond=1",
    "segmentation.method=partial-noising",
    "segmentation.guidance_scale=3",
]
CLASSIFIER_TRAINING = {
    "steps": 600,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.998,
    "preview_every": 200,
}
COMPARED, SMOOTHING, STEPS, DEPTHS = 128, 3, 12, (100, 250, 400)
"""Test slices, evenly spread; side of the smoothing window; steps of a method; noise levels up to which it goes."""
NOISES = ("gaussian", "simplex")


def trained(run: Path, overrides: list[str]) -> Path:
    """Train the shipped phantom at 32x32 in folder ``run``, with changes."""
    to_the_end(load_config(shipped_configs() / "phantom.yaml", [f"output={run}", *SMALL, *overrides]))
    return run


def measured(run: Path, ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Segment the test slices of a run in several ways, with settings chosen on nothing but what ``ways`` says.

    Masks are where the smoothed map reaches half its peak, scores its peak over its mean, for all ways but
    label-difference, whose weights are learned from validation labels.
    """
    folder, pipeline = RunFolder(run), load_generation(run, dtype="float32")
    spec = folder.spec()
    assert spec is not None
    test = load_test(image_config(run), spec, split=folder.split())
    assert test.mask is not None
    rows = np.linspace(0, len(test.images) - 1, COMPARED).round().astype(int).tolist()
    chosen, patients = test.images.take(rows), np.array(test.patients)[rows]
    truth = np.stack([test.mask(row) for row in rows])
    images = np.concatenate([part.numpy() for part in parts_of(chosen)])
    foreground, ill = images.mean(axis=1) > FOREGROUND, truth.any(axis=(1, 2))
    of_threshold = threshold_baseline(images[ill], truth[ill], foreground[ill], drop_small, SMOOTHING)
    each = of_threshold.pop("each")
    found: dict[str, Any] = {"threshold": {**of_threshold, "dice": mean_and_interval(each, patients[ill])}}
    for name, changes in ways.items():
        settings = SegmentationConfig(**{"healthy": "healthy", "score": "peak", "smoothing": SMOOTHING, **changes})
        segmenter = Segmenter(pipeline, settings)
        every = list(all_maps(segmenter, chosen, lambda done: None))
        maps, score = (torch.cat([getattr(one, key) for one in every]).numpy() for key in ("maps", "score"))
        if segmenter.by_labels:
            weighted = weighed(maps, _label_weights(run, segmenter), settings, 0.0, np.zeros(len(maps)))
            masks, smooth, score = weighted.masks, weighted.maps, weighted.score
        else:
            masks = np.stack([drop_small(half_peak_mask(one, SMOOTHING)) for one in maps])
            smooth = np.stack([smoothed_map(one, "half-peak", SMOOTHING) for one in maps])
        found[name] = {
            "settings": {key: value for key, value in changes.items() if key != "classifier"},
            "dice": mean_and_interval(overlap(masks, truth)[0][ill], patients[ill]),
            "auprc": precision_recall_area(truth[ill], smooth[ill], foreground[ill]),
            "auroc": float(roc_auc_score(ill, score)),
            "calls": float(torch.cat([one.calls for one in every]).float().mean()),
        }
        row = found[name]
        print(
            f"{name:28} Dice {100 * row['dice']['mean']:.1f} %  AUPRC {100 * row['auprc']:.1f} %  AUROC "
            f"{row['auroc']:.3f}  {row['calls']:.0f} calls",
            flush=True,
        )
    print(f"{'threshold':28} Dice {100 * found['threshold']['dice']['mean']:.1f} %", flush=True)
    return found


def _label_weights(run: Path, segmenter: Segmenter) -> LabelWeights:
    """Weights of differences and intensities, as calibration learns them from validation slices."""
    val = run_data(run).val
    unhealthy = val.labels != val.spec.class_names.index("healthy")
    planes = torch.cat([one.maps for one in all_maps(segmenter, val, lambda done: None)]).numpy()
    return fit_label_weights(planes, unhealthy, small_area(planes.shape[2:]) + 1)


def healthy(runs: Path) -> dict[str, Any]:
    """Partial noising by networks trained on healthy slices, with both kinds of noise."""
    found: dict[str, Any] = {}
    for noise in NOISES:
        run = trained(runs / f"earlier_{noise}", [*HEALTHY_ALONE, f"diffusion.noise={noise}"])
        ways = {
            f"{noise}, depth {depth}": {"method": "partial-noising", "depth": depth, "num_inference_steps": STEPS}
            for depth in DEPTHS
        }
        found[noise] = {"training_seconds": seconds_of(run), **measured(run, ways)}
    return found


def labels(runs: Path) -> dict[str, Any]:
    """Guidance by a classifier beside guidance by labels, with one denoiser."""
    run, classifier = trained(runs / "earlier_denoiser", []), runs / "earlier_classifier"
    shared = load_config(run / "config.yaml").model_dump(mode="json", include={"data", "model"})
    shared["model"]["norm_groups"] = 8  # of 32, each channel's mean is lost
    diffusion = {"prediction": "epsilon", "schedule": "linear"}
    content = {"recipe": "classifier", "output": str(classifier), **shared, "diffusion": diffusion}
    to_the_end(parse_config({**content, "training": CLASSIFIER_TRAINING}))
    ways: dict[str, dict[str, Any]] = {
        "label-difference": {"method": "label-difference"},
        "forward-process": {"method": "forward-process", "depth": 250, "guidance_scale": 30},
    }
    for depth in DEPTHS[:2]:
        for scale in (3, 30):
            ways[f"ddib, depth {depth}, scale {scale}"] = {"method": "ddib", "depth": depth, "guidance_scale": scale}
        for scale in (0, 10, 100, 1000):
            guided = {"method": "classifier-guidance", "classifier": classifier, "classifier_scale": scale}
            ways[f"classifier, depth {depth}, scale {scale}"] = {**guided, "depth": depth}
    found = measured(run, {name: {**way, "num_inference_steps": STEPS} for name, way in ways.items()})
    accuracy = evaluate_task(classifier, Request()).metrics["noise_levels"]
    seconds = {"denoiser": seconds_of(run), "classifier": seconds_of(classifier)}
    return {"training_seconds": seconds, "classifier_accuracy": accuracy, **found}


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {"labels": labels, "healthy": healthy}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=MEASURES, help="what to measure")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    for name in options.names:
        print(f"wrote {write_results(f'earlier_{name}', MEASURES[name](options.runs))}")


if __name__ == "__main__":
    main()
