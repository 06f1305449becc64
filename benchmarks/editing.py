"""Inpainted halves of digits: how often a classifier takes them for their class.

    python -m benchmarks.editing [--run runs/digits]

Takes the demo's run (or trains the shipped ``digits`` configuration), masks the lower half of every held-out digit and
draws it anew with and without its class. Classifiers are trained on the real training digits. Beside it: the real
images, and those whose masked half is filled with the mean training image. Writes benchmarks/results/editing.json.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, write_results
from benchmarks.runs import to_the_end
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.evaluation.held_out import images_of
from heterodiff.evaluation.runs import run_data
from heterodiff.metrics.classifiers import ConvClassifier, SvmClassifier
from heterodiff.metrics.intervals import wilson_share
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_generation

SHOWN = 10
RESAMPLES = (1, 4, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/digits"))
    parser.add_argument("--picture", type=Path, help="where to write a picture of some results")
    options = parser.parse_args()
    to_the_end(load_config(shipped_configs() / "digits.yaml", [f"output={options.run}"]))
    data, pipeline = run_data(options.run), load_generation(options.run)
    train, train_labels = images_of(data.train)
    real, labels = images_of(data.val)
    mask = torch.zeros(1, 1, *real.shape[2:])
    mask[..., real.shape[2] // 2 :, :] = 1
    classifiers = {"svm": SvmClassifier().fit(train, train_labels), "cnn": ConvClassifier().fit(train, train_labels)}
    filled = torch.where(mask > 0, train.mean(dim=0, keepdim=True), real)
    sets: dict[str, Tensor] = {"real": real, "mean": filled}
    for resamples in RESAMPLES:
        for name, asked in (("class", labels), ("no class", torch.full_like(labels, -1))):
            generators = seeded_generators(0, len(real))
            sets[f"{name}, {resamples} resamples"] = pipeline.edit(
                real, mask, asked, resamples=resamples, generator=generators
            )
    rows: dict[str, Any] = {}
    for name, images in sets.items():
        assert torch.equal(images[:, :, : real.shape[2] // 2], real[:, :, : real.shape[2] // 2])
        hits = {key: classifier.predict(images).cpu() == labels for key, classifier in classifiers.items()}
        rows[name] = {key: wilson_share(int(hit.sum()), len(hit)) for key, hit in hits.items()}
        shares = "  ".join(f"{key} {100 * rows[name][key]['share']:5.1f} %" for key in rows[name])
        print(f"{name:24} {shares}  of {len(real)} held-out digits", flush=True)
    write_results("editing", {"rows": rows, **machine()})
    if options.picture:
        names = list(sets)
        chosen = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()[:SHOWN]]
        image_grid(torch.cat([sets[name][chosen] for name in names]), names, columns=len(chosen)).save(options.picture)


if __name__ == "__main__":
    main()
