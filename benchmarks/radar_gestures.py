"""Latent diffusion on real radar: what the VAE keeps, and what generated pictures are worth as training data.

    python -m benchmarks.radar_gestures [--runs runs] [--data ../shared/data/radar_gestures/png]

Trains the shipped ``radar_gestures_latent`` configuration on DATA/train (or goes on with the run), reads DATA/test,
which holds other recordings, and writes benchmarks/results/radar_gestures.json and pictures to docs/images.
"""

import argparse
import itertools
import os
import shutil
from pathlib import Path

from benchmarks.measure import write_results
from benchmarks.runs import ROOT, seconds_of, to_the_end
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.evaluation.augmentation import augmentation_summary, evaluate_augmentation
from heterodiff.evaluation.class_images import evaluate_run
from heterodiff.evaluation.vae import evaluate_vae
from heterodiff.report.writing import summary_lines
from heterodiff.run_folder import RunFolder

DATA = Path(os.environ.get("HETERODIFF_DATA") or ROOT.parent / "shared" / "data") / "radar_gestures" / "png"
SEEDS = range(3)
PER_CLASS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    vae, run = (arguments.runs / f"radar_gestures_{name}" for name in ("vae", "latent"))
    unseen = arguments.data / "test"
    overrides = [f"data.path={arguments.data / 'train'}", f"codec.path={vae}", f"output={run}"]
    to_the_end(load_config(shipped_configs() / "radar_gestures_latent.yaml", overrides))
    print(f"training took {seconds_of(vae):.0f} s for the VAE and {seconds_of(run):.0f} s for the diffusion")

    reconstruction = evaluate_vae(vae, data_path=unseen)
    generation = evaluate_run(run, PER_CLASS, data_path=unseen)
    study = evaluate_augmentation(run, unseen, seeds=SEEDS)
    lines = (*map(summary_lines, (reconstruction.metrics, generation.metrics)), augmentation_summary(study))
    print(*itertools.chain(*lines), sep="\n")
    for picture, name in (
        (reconstruction.picture, "radar_reconstructions"),
        (generation.picture, "radar_samples"),
        (RunFolder(run).augmentation_picture, "radar_augmentation"),
    ):
        shutil.copy(picture, ROOT / "docs" / "images" / f"{name}.png")
    content = {
        "seconds": {"vae": seconds_of(vae), "diffusion": seconds_of(run)},
        "vae": {k: v for k, v in reconstruction.metrics.items() if k != "held_out"},
        "fidelity": generation.metrics["fidelity"],
        "frechet_distance": generation.metrics["frechet_distance"],
        "nearest": generation.metrics["nearest"]["verdict"],
        "study": {k: v for k, v in study.items() if k != "held_out"},
    }
    print(f"wrote {write_results('radar_gestures', content)}")


if __name__ == "__main__":
    main()
