"""Images and numbers as conditions: super-resolution, a missing MRI sequence, radar of a given speed and aspect.

    python -m benchmarks.conditions [--runs DIR] [--data DIR] [--picture FILE] [NAME]...

NAME is super-resolution (Fashion-MNIST, four times), modality (FLAIR of gliomas from the two T1 sequences, patients
apart) or continuous (simulated radar); without one, all are done. The first two stand beside the simplest estimate and
a regression network: the same architecture, trained for as many steps to predict the image at once, by least squares.
In the third, networks that were trained on real simulations measure speed and aspect in samples; what they measure in
other real simulations is the bound. Writes benchmarks/results/conditions.json.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.backbones import DATA, fashion
from benchmarks.measure import RESULTS, write_results
from benchmarks.runs import seconds_of, to_the_end
from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.data.conditions import to_maps
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_data
from heterodiff.evaluation.held_out import images_of
from heterodiff.evaluation.translation import baseline, baseline_name, conditioned_images, pictured
from heterodiff.metrics.classifiers import ConvClassifier
from heterodiff.metrics.distances import frechet_distance
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.models.variants import create_model
from heterodiff.pictures import image_grid
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_generation
from heterodiff.run_folder import RunFolder
from heterodiff.training.recipes.arguments import model_arguments

NAME = "conditions"
SHARED = (
    "model.variant=unet-conv",
    "model.model_channels=32",
    "model.layers_per_block=2",
    "diffusion.prediction=v",
    "diffusion.schedule=cosine",
    "training.batch_size=16",
    "training.learning_rate=1e-3",
    "training.preview_every=1000000",
    "training.checkpoint_every=500",
    "training.tensorboard=false",
)
TRANSLATIONS: dict[str, tuple[str, ...]] = {
    "super-resolution": (
        "data.source=images",
        "data.path=FASHION",
        "data.condition={downscale: 4}",
        "data.labels=none",
        "sampling.guidance_scale=1",
        "model.patch_size=2",
        "model.channel_mult=[2,2]",
        "training.steps=3000",
    ),
    "modality": (
        "data.source=volumes",
        "data.path=DATA/lgg_slices/lgg_slices.npz",
        "data.image_size=64",
        "data.condition={channels: [0, 2]}",
        "data.labels=none",
        "data.val_fraction=0.2",
        "sampling.guidance_scale=1",
        "model.patch_size=4",
        "model.channel_mult=[2,2,4]",
        "training.steps=2500",
    ),
}
IMAGES, DRAWS, SHOWN = 200, 4, 8
STEPS_OF_SAMPLER = (2, 5, 20)
"""Network calls of an image; fewer give an image nearer to the mean of all that would fit."""
RADAR = (
    "data.source=microdoppler",
    "data.image_size=64",
    "data.microdoppler.images_per_class=600",
    "data.microdoppler.receding=0",
    "data.microdoppler.aspect_deg=[0,75]",
    "data.microdoppler.snr_db=[20,25]",
    "data.train_classes=[running,walking]",
    "data.conditions={speed_m_s: number, aspect_deg: number}",
    "data.val_fraction=0.3",
    "model.patch_size=4",
    "model.channel_mult=[2,3]",
    "training.steps=2000",
    "sampling.guidance_scale=1.5",
)
ASKED = 500


def configure(overrides: tuple[str, ...], output: Path, places: dict[str, Any]) -> RunConfig:
    """The run of an experiment in folder ``output``."""
    changes = [
        change.replace("DATA", str(places["data"])).replace("FASHION", str(places["fashion"])) for change in overrides
    ]
    return load_config(shipped_configs() / "digits.yaml", [*SHARED, *changes, f"output={output}"])


def regression(config: RunConfig, train: ImageDataset, seed: int = 0) -> nn.Module:
    """The denoiser's architecture, trained for as many steps to predict the image from its condition."""
    torch.manual_seed(seed)
    arguments = model_arguments(config, train.spec)
    channels = train.spec.condition_channels()
    network = create_model(config.model.variant, **arguments | {"in_channels": channels, "num_classes": None})
    steps, batch = config.training.steps, config.training.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=config.training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(train), (batch,), generator=generator).tolist()
        images, conditions = conditioned_images(train, rows)
        loss = (estimate(network, conditions) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.training.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"regression step {step} loss {float(loss.detach()):.4f}", flush=True)
    return network.eval()


def estimate(network: nn.Module, conditions: Tensor) -> Tensor:
    """Images (B, C, H, W) of condition images (B, C', H, W)."""
    return network(to_maps(conditions, 1), torch.zeros(len(conditions))).sample / 2 + 0.5


def translation(name: str, runs: Path, places: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """Train both networks and compare what they make of held-out conditions."""
    config = configure(TRANSLATIONS[name], runs / name, places)
    to_the_end(config)
    folder = RunFolder(runs / name)
    data = load_data(config.data, folder.split(), folder.spec())
    weights = runs / f"{name}-regression.pt"
    if not weights.is_file():
        torch.save(regression(config, data.train).state_dict(), weights)
    arguments = model_arguments(config, data.spec) | {
        "in_channels": data.spec.condition_channels(),
        "num_classes": None,
    }
    network = create_model(config.model.variant, **arguments).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    rows = np.linspace(0, len(data.val) - 1, min(IMAGES, len(data.val))).round().astype(int).tolist()
    images, conditions = conditioned_images(data.val, rows)
    train = images_of(data.train)[0]
    sets = {
        baseline_name(data.spec): baseline(data.spec, conditions, train),
        "regression": torch.cat([estimate(network, part).detach().clamp(0, 1) for part in conditions.split(25)]),
    }
    pipeline = load_generation(runs / name)
    for steps in STEPS_OF_SAMPLER:
        drawn = torch.cat(
            [
                pipeline.translate(
                    part,
                    num_images=DRAWS,
                    num_inference_steps=steps,
                    generator=seeded_generators(0, DRAWS * len(part), 100 * DRAWS * k),
                )
                for k, part in enumerate(conditions.split(25))
            ]
        )
        sets[f"drawn, {steps} calls"] = drawn[:, 0]
        sets[f"mean of {DRAWS}, {steps} calls"] = drawn.mean(dim=1)
    reader = ConvClassifier(0).fit(train, images_of(data.train)[1])
    reference = reader.features(train)
    patients = [data.val.names[row].rpartition("/")[0] or data.val.names[row] for row in rows]
    found: dict[str, Any] = {"n": len(rows), "steps": config.training.steps, "seconds": seconds_of(runs / name)}
    base = psnr(images, sets[baseline_name(data.spec)])
    for title, others in {**sets, "true": images}.items():
        numbers: dict[str, Any] = {"frechet": frechet_distance(reader.features(others), reference)}
        if title != "true":
            each = psnr(images, others)
            numbers |= {
                "psnr": float(each.mean()),
                "gain": interval(each - base, patients),
                "ssim": float(ssim(images, others).mean()),
            }
        found[title] = numbers
        print(f"{name} {title:24} " + "  ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
    if picture is not None:
        shown = {"condition": pictured(conditions, images.shape[1]), **sets, "true": images}
        keep = ["condition", baseline_name(data.spec), "regression", f"drawn, {STEPS_OF_SAMPLER[-1]} calls", "true"]
        lines = [shown[key][:SHOWN] for key in dict.fromkeys(keep)]
        titles = [key for key in dict.fromkeys(keep) for _ in range(SHOWN)]
        image_grid(torch.cat(lines), titles, columns=SHOWN).save(picture)
    return found


def interval(values: Tensor, groups: list[str]) -> dict[str, float]:
    """Mean of values (N,), and its 95 % interval by bootstrap over groups."""
    by_group: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        by_group.setdefault(group, []).append(value)
    sums = np.array([(sum(each), len(each)) for each in by_group.values()])
    chosen = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    means = sums[chosen, 0].sum(axis=1) / sums[chosen, 1].sum(axis=1)
    return {
        "mean": float(values.mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
    }


class Meter(nn.Module):
    """A small network that measures numbers in images (B, 1, H, W)."""

    def __init__(self, outputs: int):
        super().__init__()
        widths = (1, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, outputs))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


def meter(images: Tensor, targets: Tensor, steps: int = 1500) -> Meter:
    """Train a :class:`Meter` on images and standardised numbers (N, A)."""
    torch.manual_seed(1)
    network = Meter(targets.shape[1])
    network(images[:2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=generator)
        loss = (network(images[rows]) - targets[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def continuous(runs: Path, places: dict[str, Any]) -> dict[str, Any]:
    """Correlation of the speed and aspect that were asked for with those measured in samples."""
    config = configure(RADAR, runs / "continuous", places)
    to_the_end(config)
    folder = RunFolder(runs / "continuous")
    data = load_data(config.data, folder.split(), folder.spec())
    names = [attribute.name for attribute in data.spec.attributes]
    radar = config.data.model_copy(
        update={"microdoppler": config.data.microdoppler.model_copy(update={"seed": 1000}), "val_fraction": 0.0}
    )
    other = load_data(radar, spec=data.spec).train
    rows = list(range(len(other)))
    seen, held = [rows[k::2] for k in (0, 1)]
    images, encoded = other.batch(rows)[0], other.conditions_of(rows)
    measuring = meter(images[seen], encoded[seen, 1:])
    pipeline = load_generation(runs / "continuous")
    generator = torch.Generator().manual_seed(7)
    chosen = [held[k] for k in torch.randperm(len(held), generator=generator)[:ASKED].tolist()]
    asked = encoded[chosen, 1:]
    labels = encoded[chosen, 0].long()
    drawn = pipeline(labels, conditions=asked, generator=seeded_generators(0, len(labels))).images
    found: dict[str, Any] = {
        "n": len(chosen),
        "steps": config.training.steps,
        "seconds": seconds_of(runs / "continuous"),
    }
    with torch.no_grad():
        for title, pictures in (("samples", drawn), ("real", images[chosen])):
            measured = torch.cat([measuring(part) for part in pictures.split(100)])
            found[title] = {}
            for k, name in enumerate(names):
                of_class = {
                    data.spec.class_names[label]: correlation(asked[labels == label, k], measured[labels == label, k])
                    for label in labels.unique().tolist()
                }
                found[title][name] = {"all": correlation(asked[:, k], measured[:, k]), **of_class}
                print(f"continuous {title:8} {name:12} {json.dumps(found[title][name])}", flush=True)
    return found


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two series (N,)."""
    return statistics.correlation(first.tolist(), second.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = [*TRANSLATIONS, "continuous"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/conditions"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--picture", type=Path, help="where to write a picture of super-resolution")
    options = parser.parse_args()
    places = {"data": options.data, "fashion": fashion(options.runs, options.data, "train")}
    for name in options.names or every:
        if name == "continuous":
            found = continuous(options.runs, places)
        else:
            picture = options.picture if name == "super-resolution" else None
            found = translation(name, options.runs, places, picture)
        path = RESULTS / f"{NAME}.json"
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        write_results(NAME, {**before, name: found})


if __name__ == "__main__":
    main()
