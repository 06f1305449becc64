"""The digits demo as a benchmark: quality by guidance scale and sampler, and what it costs.

    python -m benchmarks.digits [--run runs/digits]

Trains the shipped ``digits`` configuration (or goes on with the run), prints a table and writes
benchmarks/results/digits.json. Quality is read by an SVM and a CNN trained on the real training digits, whose accuracy
on real held-out digits stands beside.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_results
from benchmarks.runs import to_the_end
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.evaluation.held_out import images_of
from heterodiff.evaluation.runs import run_data
from heterodiff.metrics.generation import evaluate_generation
from heterodiff.pipelines.image_files import all_classes, draw_classes
from heterodiff.pipelines.load import load_generation

PER_CLASS = 20
SCALE = 1.25
"""The shipped guidance scale."""
ROWS: list[dict[str, Any]] = [
    *({"sampler": "dpmpp", "num_inference_steps": 20, "guidance_scale": w} for w in (1.0, 1.25, 1.5, 2.0, 3.0)),
    *({"sampler": "dpmpp", "num_inference_steps": n, "guidance_scale": SCALE} for n in (5, 10, 50)),
    *(
        {"sampler": s, "num_inference_steps": 20, "guidance_scale": SCALE}
        for s in ("ddim", "unipc", "euler", "heun", "ddpm")
    ),
    {"sampler": "ddpm", "num_inference_steps": 250, "guidance_scale": SCALE},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"))
    run = parser.parse_args().run
    steps = to_the_end(load_config(shipped_configs() / "digits.yaml", [f"output={run}"]))
    last_row = (run / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    training = {"steps": steps, "seconds": json.loads(last_row)["seconds"]}
    data, pipeline = run_data(run), load_generation(run)
    train_images, val_images = images_of(data.train), images_of(data.val)
    rows = []
    print(f"{'sampler':8} {'steps':>5} {'guidance':>8} {'SVM %':>6} {'CNN %':>6} {'Fréchet':>8} {'images/s':>9}")
    for options in ROWS:
        start = time.perf_counter()
        images, labels = draw_classes(pipeline, all_classes(pipeline), PER_CLASS, seed=0, **options)
        seconds = time.perf_counter() - start
        metrics = evaluate_generation(images, labels, train_images, val_images, data.spec.class_names)
        row = {
            **options,
            "svm": metrics["fidelity"]["svm"]["generated"]["share"],
            "cnn": metrics["fidelity"]["cnn"]["generated"]["share"],
            "frechet_distance": metrics["frechet_distance"]["generated"],
            "images_per_second": len(images) / seconds,
        }
        rows.append(row)
        print(
            f"{row['sampler']:8} {row['num_inference_steps']:5} {row['guidance_scale']:8} {100 * row['svm']:6.1f} "
            f"{100 * row['cnn']:6.1f} {row['frechet_distance']:8.3f} {row['images_per_second']:9.1f}"
        )
    real = {
        "svm": metrics["fidelity"]["svm"]["real"]["share"],
        "cnn": metrics["fidelity"]["cnn"]["real"]["share"],
        "frechet_distance": metrics["frechet_distance"]["real"],
    }
    print(
        f"real held-out digits:   {100 * real['svm']:6.1f} {100 * real['cnn']:6.1f} {real['frechet_distance']:8.3f}\n"
        f"training took {training['seconds']:.0f} s for {steps} steps on {torch.get_num_threads()} CPU threads"
    )
    content = {"training": training, "images_per_class": PER_CLASS, "rows": rows, "real": real}
    print(f"wrote {write_results('digits', content)}")


if __name__ == "__main__":
    main()
