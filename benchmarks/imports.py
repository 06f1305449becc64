"""A network of guided-diffusion's layout before and after its import, and trained on from there.

    python -m benchmarks.imports [--out runs/imports]

Trains a plain U-Net with guided-diffusion's settings (noise prediction, linear schedule), writes its weights as
guided-diffusion does (one .pt file), imports the file as a run (``heterodiff import --config``) and trains that on for
as many steps. Prints how far predictions of both are apart, and how many samples a classifier of the real digits takes
for their class. Writes benchmarks/results/imports.json.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import machine, write_results
from benchmarks.runs import to_the_end
from heterodiff.compat.import_run import import_run
from heterodiff.config.file import load_config
from heterodiff.evaluation.held_out import images_of
from heterodiff.evaluation.runs import run_data
from heterodiff.metrics.classifiers import ConvClassifier
from heterodiff.metrics.intervals import wilson_share
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_generation

CONFIG: dict[str, Any] = {
    "data": {"source": "digits", "val_fraction": 0.2},
    "sampling": {"guidance_scale": 1.25},
    "training": {"steps": 600, "batch_size": 64, "learning_rate": 1e-3},
}
NETWORK: dict[str, Any] = {
    "model": {"variant": "unet", "model_channels": 32, "layers_per_block": 1, "class_embedding": "direct"},
    "diffusion": {"prediction": "epsilon", "schedule": "linear"},
}
NETWORK["model"]["condition_tokens"] = "none"
PER_CLASS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/imports"))
    parser.add_argument("--picture", type=Path, help="where to write a picture of some samples")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "base.yaml").write_text(yaml.safe_dump(CONFIG | NETWORK))
    (out / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    base, imported = out / "base", out / "imported"
    to_the_end(load_config(out / "base.yaml", [f"output={base}"]))
    before = load_generation(base, dtype="float32")
    torch.save(before.unet.state_dict(), out / "model.pt")
    shutil.rmtree(imported, ignore_errors=True)
    import_run(out / "model.pt", "guided-diffusion", imported, out / "mine.yaml", {"num_heads": 4})
    after = load_generation(imported, dtype="float32")
    z, t = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) * 15
    labels = torch.arange(64) % 11 - 1
    with torch.no_grad():
        first, second = (pipe.unet(z, t, labels).sample for pipe in (before, after))
    difference = float((first - second).abs().max())
    print(f"predictions differ by at most {difference:.1e}", flush=True)
    to_the_end(load_config(imported / "config.yaml"))
    data = run_data(base)
    classifier = ConvClassifier().fit(*images_of(data.train))
    asked = torch.arange(10).repeat_interleave(PER_CLASS)
    rows, shown = dict[str, Any](), []
    tuned = load_generation(imported, dtype="float32")
    for name, pipe in (("before", before), ("imported", after), ("trained on", tuned)):
        images = pipe(asked, generator=seeded_generators(0, len(asked))).images
        hits = classifier.predict(images).cpu() == asked
        rows[name] = wilson_share(int(hits.sum()), len(hits))
        print(f"{name:12} {100 * rows[name]['share']:5.1f} % of {len(asked)} samples are of their class", flush=True)
        shown.append(images[::PER_CLASS])
    write_results("imports", {"difference": difference, "rows": rows, **machine()})
    if options.picture:
        image_grid(torch.cat(shown), [*rows], columns=10).save(options.picture)


if __name__ == "__main__":
    main()
