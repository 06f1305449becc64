"""Five images a class of another radar: an adapted run beside its base and beside a run on the five images alone.

    python -m benchmarks.few_shot --runs DIR

The base knows simulated micro-Doppler of a 10 GHz radar; the images are those of a 24 GHz radar with half the pulse
repetition frequency, seen from another side. Prints and writes benchmarks/results/few_shot.json; draws
docs/images/few_shot.png. Finished runs in DIR are used again. Half an hour on a busy CPU core, once the base is there.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.measure import write_results
from heterodiff.config.file import parse_config
from heterodiff.data.sources import load_data
from heterodiff.metrics.classifiers import ConvClassifier
from heterodiff.metrics.distances import frechet_distance
from heterodiff.metrics.generation import Labelled
from heterodiff.metrics.intervals import wilson_share
from heterodiff.pipelines.image_files import draw_classes
from heterodiff.pipelines.load import load_generation
from heterodiff.simulators.microdoppler import CLASSES
from heterodiff.training.start import train

RECEIVER = {"snr_db": [25, 40], "dynamic_range_db": 40, "duration_s": 1.0}
BASE_RADAR = {**RECEIVER, "carrier_frequency_hz": 10e9, "prf_hz": 10_000, "window_s": 0.01}
NEW_RADAR = {**RECEIVER, "carrier_frequency_hz": 24e9, "prf_hz": 5_000, "window_s": 0.006, "aspect_deg": [20, 50]}
SIDE, FEW = 32, 5
SEEDS = (11, 12, 13)
"""Each draws five images a class, initial weights and noise anew; settings were chosen with seed 1."""
JUDGE, TEST = (900, 100), (901, 60)
"""Seed and images a class of those that the classifier learns from, and of those that nothing has seen."""
PER_CLASS = 40
MODEL = {"variant": "unet-conv", "model_channels": 64, "channel_mult": [1, 2], "layers_per_block": 1, "patch_size": 4}
SAMPLING = {"guidance_scale": 1.5, "num_inference_steps": 20}
STEPS, GUIDANCE = 10, 1.5
"""Sampling of the images that are measured."""
QUIET = {"tensorboard": False, "log_every": 50}
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "few_shot.png"


def source(radar: dict[str, Any], seed: int, count: int, **more: Any) -> dict[str, Any]:
    """Section ``data`` of ``count`` images a class."""
    simulated = {**radar, "seed": seed, "images_per_class": count}
    return {"source": "microdoppler", "image_size": SIDE, "microdoppler": simulated, **more}


def images(radar: dict[str, Any], seed: int, count: int) -> Labelled:
    """Return ``count`` images a class (N, 1, 32, 32) in [0, 1], and labels (N,)."""
    data = load_data(parse_config({"data": source(radar, seed, count, val_fraction=0.0)}).data).train
    return data.batch(list(range(len(data))))


def base_run(folder: Path) -> Path:
    """Train the base, unless it is there."""
    content = {
        "output": str(folder / "base"),
        "data": source(BASE_RADAR, 0, 250, val_fraction=0.04),
        "model": MODEL,
        "sampling": SAMPLING,
        "training": {"steps": 3000, "batch_size": 16, "preview_every": 3000, "checkpoint_every": 600, **QUIET},
    }
    train(parse_config(content), quiet=True)
    return folder / "base"


def way(name: str, base: Path, seed: int) -> dict[str, Any]:
    """Configuration of a run on five images a class: adapted in part, in whole, or not at all."""
    content = {"recipe": "adapt", "data": source(NEW_RADAR, seed, FEW), "model": {"init_from": str(base)}}
    content["training"] = {"seed": seed, **QUIET}
    changes = {
        "lora": {},
        "all weights": {"model": {"init_from": str(base), "train": "all"}},
        "few alone": {"recipe": "diffusion", "model": MODEL, "sampling": SAMPLING},
    }
    return content | changes[name]


def adapt(folder: Path, name: str, base: Path, seed: int) -> tuple[Path, float]:
    """Train a run, unless it is there; return its folder and the seconds that its steps took."""
    run = folder / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    content = way(name, base, seed) | {"output": str(run)}
    if name == "few alone":  # as many steps as those that adapt
        steps = parse_config(way("all weights", base, seed)).training.steps
        content["training"] |= {"steps": steps, "batch_size": 16, "preview_every": steps}
        content["data"] |= {"val_fraction": 0.0}
    clock = run / "seconds.txt"
    if not clock.is_file():
        seconds = train(parse_config(content), quiet=True).seconds
        clock.write_text(f"{seconds:.1f}")
    return run, float(clock.read_text())


def share(classifier: ConvClassifier, images: Labelled) -> dict[str, Any]:
    """Share of images that are read as their class."""
    return wilson_share(int((classifier.predict(images[0]) == images[1]).sum()), len(images[1]))


def measure(run: Path, judge: ConvClassifier, few: Labelled, test: Labelled, seed: int) -> dict[str, Any]:
    """Draw images of a run, and measure them beside real ones."""
    pipeline = load_generation(run)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    drawn = draw_classes(pipeline, list(range(len(CLASSES))), PER_CLASS, seed, **options)
    both = ConvClassifier(seed).fit(*(torch.cat(pair) for pair in zip(few, drawn, strict=True)))
    hits = judge.predict(drawn[0]) == drawn[1]
    return {
        "accuracy": wilson_share(int(hits.sum()), len(hits)),
        "frechet_distance": frechet_distance(judge.features(drawn[0]), judge.features(test[0])),
        "classifier": share(both, test),
        "drawn": drawn,
    }


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds and its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    half = {3: 4.303, 2: 12.706}.get(len(values), 0.0) * (statistics.stdev(values) if len(values) > 1 else 0.0)
    return {"value": mean, "low": mean - half / len(values) ** 0.5, "high": mean + half / len(values) ** 0.5}


def trained_share(run: Path) -> dict[str, Any]:
    """Weights that an adapted run has trained, and the size of their file, as shares of the base's."""
    files = run / "adapter/adapter_model.safetensors", run / "unet/diffusion_pytorch_model.safetensors"
    counts = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    sizes = [file.stat().st_size for file in files]
    return {"weights": counts[0] / counts[1], "file": sizes[0] / sizes[1], "bytes": sizes[0]}


def strip(rows: Sequence[torch.Tensor]) -> Image.Image:
    """Rows of images (N, 1, H, W) in [0, 1] as one picture, twice as large, in viridis."""
    padded = [torch.nn.functional.pad(row[:, 0], (0, 2, 0, 4), value=torch.nan) for row in rows]
    values = torch.cat([torch.cat(list(row), dim=1) for row in padded]).numpy()
    coloured = matplotlib.colormaps["viridis"](np.nan_to_num(values))[..., :3]
    coloured[np.isnan(values)] = 1
    picture = Image.fromarray((255 * coloured).astype(np.uint8))
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


NAMES = ("few alone", "lora", "all weights")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--ways", nargs="+", default=list(NAMES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    base = base_run(arguments.runs)
    print(f"base trained or found after {time.perf_counter() - start:.0f} s", flush=True)
    train_set, test = images(NEW_RADAR, *JUDGE), images(NEW_RADAR, *TEST)
    judge = ConvClassifier(0).fit(*train_set)
    real = share(judge, test)
    floor = frechet_distance(judge.features(train_set[0]), judge.features(test[0]))
    print(f"judge: {real['share']:.3f} of unseen images of the new radar, Frechet distance {floor:.2f}", flush=True)
    rows: list[dict[str, Any]] = []
    shown: dict[str, torch.Tensor] = {}
    for seed in arguments.seeds:
        few = images(NEW_RADAR, seed, FEW)
        alone = share(ConvClassifier(seed).fit(*few), test)
        for name in ("base", *arguments.ways):
            run, seconds = (base, 0.0) if name == "base" else adapt(arguments.runs, name, base, seed)
            found = measure(run, judge, few, test, seed)
            drawn, labels = found.pop("drawn")
            if seed == arguments.seeds[0]:
                shown |= {name: torch.cat([drawn[labels == k][:2] for k in range(len(CLASSES))])}
                shown["images"] = torch.cat([few[0][few[1] == k][:2] for k in range(len(CLASSES))])
            rows.append({"way": name, "seed": seed, "seconds": seconds, "classifier_on_few": alone, **found})
            print(
                f"seed {seed} {name:16} accuracy {found['accuracy']['share']:.3f}  "
                f"Frechet {found['frechet_distance']:7.2f}  "
                f"classifier {alone['share']:.3f} -> {found['classifier']['share']:.3f}  {seconds:.0f} s",
                flush=True,
            )
    summary: dict[str, Any] = {}
    for name in ("base", *arguments.ways):
        of_way = [row for row in rows if row["way"] == name]
        numbers = {
            "accuracy": [row["accuracy"]["share"] for row in of_way],
            "frechet_distance": [row["frechet_distance"] for row in of_way],
            "classifier_on_few": [row["classifier_on_few"]["share"] for row in of_way],
            "classifier_on_few_and_drawn": [row["classifier"]["share"] for row in of_way],
        }
        for other in ("base", "few alone"):
            against = [row["accuracy"]["share"] for row in rows if row["way"] == other]
            if against:
                numbers[f"accuracy_above_{other.replace(' ', '_')}"] = [
                    a - b for a, b in zip(numbers["accuracy"], against, strict=True)
                ]
        summary[name] = {key: mean_with_interval(values) for key, values in numbers.items()}
        for key, value in summary[name].items():
            print(f"{name:16} {key:28} {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})", flush=True)
    if tuple(arguments.seeds) != SEEDS or tuple(arguments.ways) != NAMES:
        return
    lora = trained_share(adapt(arguments.runs, "lora", base, SEEDS[0])[0])
    content = {"real": real, "real_frechet_distance": floor, "lora": lora, "summary": summary, "rows": rows}
    write_results("few_shot", content)
    print("lora", lora)
    PICTURE.parent.mkdir(exist_ok=True)
    strip([shown[name] for name in ("base", "images", "lora", "few alone")]).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
