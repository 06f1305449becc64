"""Networks side by side in our loop: equal minutes on a CPU thread each, several seeds, paired differences.

    python -m benchmarks.backbones [--runs DIR] [--data DIR] [--workers 2] [NAME]...

NAME is speed, A, B, C-latents, C-pixels, D-fashion or D-phantom; without one, all are done.

First each network's training step is timed, in turns, which gives its number of steps in the minutes of the experiment.
Its learning rate is the one with the least validation loss on a seed of its own, in a quarter of the time. Then three
other seeds are trained and measured on data that no choice has seen. Rates are constant after the warm-up and the EMA
weights are measured, so that validation losses of different networks can also be compared after equal steps. What is
measured already stands in benchmarks/results/backbones.json and is not measured again.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS, interleaved, write_results
from benchmarks.peers import PEER, register_peers
from benchmarks.runs import ROOT, seconds_of, to_the_end
from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.memory import keep_freed_memory
from heterodiff.models.variants import create_model
from heterodiff.training.codec_stage import codec_run

DATA = Path(os.environ.get("HETERODIFF_DATA") or ROOT.parent / "shared" / "data")
NAME = "backbones"
ARMS: dict[str, tuple[str, ...]] = {
    "unet-conv": ("model.variant=unet-conv",),
    "hae-v3": ("model.variant=hae-v3",),
    "unet": ("model.variant=unet",),
    "hae-v2": ("model.variant=hae-v2",),
    "unet-lean": ("model.variant=unet-lean",),
    PEER: (f"model.variant={PEER}",),
    f"{PEER}-pixels": (f"model.variant={PEER}", "model.patch_size=1", "model.channel_mult=[1,2,2]"),
}
"""Networks; all but the last, which stands for what one gets without patches, differ in nothing but their blocks."""
BLOCKS = tuple(ARMS)[:-1]
CHOICE_SEED, SEEDS = 100, range(3)
RATES = (5e-4, 1e-3, 2e-3)
TIMED_STEPS = 12


@dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        config: name of a shipped configuration.
        minutes: of training for each network and seed, on one thread.
        measure: (run folder, folder of data) -> numbers, on data that no choice has seen.
        overrides: changes to the configuration; ``{data}`` is the folder of data.
        arms: networks that are compared.
        higher_is_better: of each number that is compared.
        rates_of: experiment whose learning rates are taken, which saves choosing them again; its own without one.
    """

    config: str
    minutes: float
    measure: Callable[[Path, Path], dict[str, float]]
    higher_is_better: dict[str, bool]
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] = BLOCKS
    rates: tuple[float, ...] = field(default=RATES)
    rates_of: str | None = None


def anomalies(run: Path, data: Path) -> dict[str, float]:
    """Dice and more on heads of another seed."""
    from heterodiff.evaluation.anomalies import evaluate_anomalies
    from heterodiff.evaluation.calibration import calibrate_run
    from heterodiff.run_folder import RunFolder

    calibrate_run(run)
    config = RunFolder(run).config().data
    drawn = config.brain_phantom.model_copy(update={"seed": config.brain_phantom.seed + 1, "patients": 24})
    metrics = evaluate_anomalies(run, config.model_copy(update={"brain_phantom": drawn})).metrics
    return {
        "dice": metrics["unhealthy"]["dice"]["mean"],
        "threshold_dice": metrics["threshold"]["dice"],
        "auroc": metrics["image"]["auroc"],
    }


def images(run: Path, unseen: Path, per_class: int) -> dict[str, float]:
    """Frechet distance and class accuracy against unseen real images."""
    from heterodiff.evaluation.class_images import evaluate_run

    metrics = evaluate_run(run, per_class, data_path=unseen).metrics
    return {
        "frechet": metrics["frechet_distance"]["generated"],
        "frechet_real": metrics["frechet_distance"]["real"],
        **{
            f"{name}_accuracy{suffix}": metrics["fidelity"][name][which]["share"]
            for name in ("svm", "cnn")
            for which, suffix in (("generated", ""), ("real", "_real"))
        },
    }


IMAGE_NUMBERS = {"frechet": False, "cnn_accuracy": True, "svm_accuracy": True, "val_loss": False}
COSINE = ("diffusion.prediction=v", "diffusion.schedule=cosine")
PHANTOM = (
    "data.test_fraction=0.1",
    "model.norm_groups=32",
    "model.channel_mult=[1,2,3]",
    "segmentation.num_inference_steps=13",
)
RADAR = ("data.path={data}/radar_gestures/png/train", "model.model_channels=32")
FASHION = (
    "data.source=images",
    "data.path={fashion}",
    "data.val_fraction=0.02",
    "model.layers_per_block=2",
    "model.patch_size=2",
    "model.channel_mult=[2,2]",
    "training.batch_size=16",
    "sampling.guidance_scale=1.5",
    *COSINE,
)
EXPERIMENTS = {
    "A": Experiment(
        "phantom",
        10,
        anomalies,
        {"dice": True, "auroc": True, "val_loss": False},
        ("data.image_size=32", "model.patch_size=1", *PHANTOM),
    ),
    "B": Experiment(
        "digits",
        20,
        lambda run, data: images(run, fashion(run.parents[1], data, "t10k"), 100),
        IMAGE_NUMBERS,
        FASHION,
        (*BLOCKS, f"{PEER}-pixels"),
    ),
    "C-latents": Experiment(
        "radar_gestures_latent",
        5,
        lambda run, data: images(run, data / "radar_gestures" / "png" / "test", 50),
        IMAGE_NUMBERS,
        (*RADAR, *COSINE, "codec.path={runs}/radar_vae"),
    ),
    "C-pixels": Experiment(
        "digits",
        10,
        lambda run, data: images(run, data / "radar_gestures" / "png" / "test", 50),
        IMAGE_NUMBERS,
        (
            "data.source=images",
            *RADAR,
            *COSINE,
            "data.image_size=64",
            "data.channels=1",
            "data.val_fraction=0.1",
            "model.patch_size=4",
            "model.channel_mult=[2,2,4]",
            "training.batch_size=16",
        ),
    ),
    "D-fashion": Experiment(
        "digits",
        60,
        lambda run, data: images(run, fashion(run.parents[1], data, "t10k"), 100),
        IMAGE_NUMBERS,
        FASHION,
        ("unet-conv", "hae-v3"),
        rates_of="B",
    ),
    "D-phantom": Experiment(
        "phantom",
        60,
        anomalies,
        {"dice": True, "auroc": True, "val_loss": False},
        PHANTOM,
        ("unet-conv", "hae-v3"),
        rates_of="A",
    ),
}


def fashion(runs: Path, data: Path, part: str) -> Path:
    """Fashion-MNIST (``train`` or ``t10k``) as an npz file in ``runs``."""
    path = runs / f"fashion_{part}.npz"
    if not path.is_file():
        folder = data / "fashion_mnist"
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{os.getpid()}.npz")
        np.savez(unfinished, images=pixels, labels=labels.astype(np.int64))
        os.replace(unfinished, path)
    return path


def configure(name: str, arm: str, runs: Path, data: Path, *changes: str) -> RunConfig:
    """The run of a network in an experiment."""
    experiment = EXPERIMENTS[name]
    places = {"data": data, "runs": runs}
    if any("{fashion}" in change for change in experiment.overrides):
        places["fashion"] = fashion(runs, data, "train")
    shared = (
        "training.lr_schedule=constant",
        "training.warmup_steps=100",
        "training.ema_decay=0.998",
        "training.preview_every=1000000",
        "training.checkpoint_every=100000",
        "training.tensorboard=false",
    )
    overrides = [change.format(**places) for change in experiment.overrides]
    return load_config(shipped_configs() / f"{experiment.config}.yaml", [*shared, *overrides, *ARMS[arm], *changes])


def step_seconds(name: str, runs: Path, data: Path) -> dict[str, float]:
    """Median seconds of a training step of each network on one thread, one of each in turn."""
    from heterodiff.training.preflight.trial import trial

    torch.set_num_threads(1)
    trainers = {arm: trial(configure(name, arm, runs, data)).trainer for arm in EXPERIMENTS[name].arms}
    feeds = {arm: iter(trainer.feed.loader(0, TIMED_STEPS + 1)) for arm, trainer in trainers.items()}
    calls = {arm: lambda t=trainer, f=feeds[arm]: t.step_once(next(f)) for arm, trainer in trainers.items()}
    return {arm: statistics.median(times) for arm, times in interleaved(calls, TIMED_STEPS).items()}


def job(name: str, arm: str, runs: Path, data: Path, rate: float, seed: int, steps: int, measured: bool) -> None:
    """Train a run to its end, measure it, and print the numbers as the last line."""
    folder = runs / name / f"{arm}_{rate:g}_{seed}_{steps}"
    changes = (f"training.learning_rate={rate}", f"training.seed={seed}", f"training.steps={steps}", f"output={folder}")
    to_the_end(configure(name, arm, runs, data, *changes))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    found = {"val_loss": losses[-1], "seconds": seconds_of(folder)}
    if measured:
        found |= EXPERIMENTS[name].measure(folder, data)
    print(json.dumps(found))


class Jobs:
    """Runs in processes of their own, each on a core of its own."""

    def __init__(self, name: str, runs: Path, data: Path, workers: int, results: dict[str, Any]) -> None:
        self.name, self.runs, self.data, self.results = name, runs, data, results
        self.cores: Queue[int] = Queue()
        for core in sorted(os.sched_getaffinity(0))[:workers]:
            self.cores.put(core)
        self.workers = workers

    def run(self, jobs: list[tuple[str, float, int, int, bool]]) -> None:
        """Do those of ``jobs`` (arm, rate, seed, steps, measured) whose numbers are not there yet."""
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(lambda one: self._one(*one), jobs))

    def _one(self, arm: str, rate: float, seed: int, steps: int, measured: bool) -> None:
        key = f"{arm} {rate:g} {seed} {steps}"
        runs = self.results.setdefault("runs", {})
        if key in runs:
            return
        core = self.cores.get()
        try:
            command = [sys.executable, "-m", "benchmarks.backbones", "--runs", str(self.runs), "--data", str(self.data)]
            command += ["--job", self.name, arm, repr(rate), str(seed), str(steps), str(int(measured))]
            done = subprocess.run(
                ["taskset", "-c", str(core), *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            runs[key] = json.loads(done.stdout.splitlines()[-1])
            save(self.name, self.results)
            print(f"{self.name} {key}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[key].items()), flush=True)
        finally:
            self.cores.put(core)


def saved() -> dict[str, Any]:
    """Results so far."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def save(name: str, results: dict[str, Any]) -> None:
    """Put the results of an experiment beside the others."""
    write_results(NAME, {**saved(), name: results})


def chosen_rates(name: str, arms: tuple[str, ...], jobs: Jobs, steps: dict[str, int]) -> dict[str, float]:
    """The learning rate of each network: least validation loss on the seed of choices, in a quarter of the time."""
    experiment, results = EXPERIMENTS[name], jobs.results
    if experiment.rates_of:
        earlier = saved().get(experiment.rates_of, {}).get("rates", {})
        if missing := [arm for arm in arms if arm not in earlier]:
            raise SystemExit(
                f"{name} takes the learning rates of {experiment.rates_of}: measure {missing[0]} there first"
            )
        return {arm: earlier[arm] for arm in arms}
    jobs.run([(arm, rate, CHOICE_SEED, steps[arm] // 4, False) for arm in arms for rate in experiment.rates])
    losses = {
        arm: {r: results["runs"][f"{arm} {r:g} {CHOICE_SEED} {steps[arm] // 4}"]["val_loss"] for r in experiment.rates}
        for arm in arms
    }
    return {arm: min(found, key=found.__getitem__) for arm, found in losses.items()}


def compare(name: str, runs: Path, data: Path, workers: int, only: tuple[str, ...] = ()) -> None:
    """Do an experiment, or the rest of it, of all its networks or ``only`` some, and print its table."""
    experiment, results = EXPERIMENTS[name], saved().get(name, {})
    arms = tuple(arm for arm in experiment.arms if not only or arm in only)
    if (codec := codec_run(configure(name, experiment.arms[0], runs, data))) is not None:
        to_the_end(codec)
    if "step_seconds" not in results:
        results["step_seconds"] = step_seconds(name, runs, data)
        results["minutes"] = experiment.minutes
        save(name, results)
    steps = {arm: round(60 * experiment.minutes / seconds) for arm, seconds in results["step_seconds"].items()}
    jobs = Jobs(name, runs, data, workers, results)
    rates = chosen_rates(name, arms, jobs, steps)
    results["rates"] = {**results.get("rates", {}), **rates}
    jobs.run([(arm, rates[arm], seed, steps[arm], True) for seed in SEEDS for arm in arms])
    table = {arm: [results["runs"][f"{arm} {rates[arm]:g} {seed} {steps[arm]}"] for seed in SEEDS] for arm in arms}
    for arm, rows in table.items():
        cells = [
            f"{key} {statistics.mean(row[key] for row in rows):.4g} ({min(row[key] for row in rows):.4g} to "
            f"{max(row[key] for row in rows):.4g})"
            for key in experiment.higher_is_better
        ]
        print(f"{name} {arm:10} {steps[arm]:6} steps of {results['step_seconds'][arm]:.3f} s  {'  '.join(cells)}")
    results["differences"] = {
        **results.get("differences", {}),
        **{
            f"{arm} - {base}": {key: difference(table[arm], table[base], key) for key in experiment.higher_is_better}
            for arm in arms
            for base in ("unet", "unet-conv", PEER)
            if base in arms and arm != base
        },
    }
    for pair, found in results["differences"].items():
        print(f"{name} {pair}: " + "  ".join(f"{k} {v['mean']:+.4g} ± {v['interval']:.2g}" for k, v in found.items()))
    save(name, results)


def difference(rows: list[dict[str, float]], base: list[dict[str, float]], key: str) -> dict[str, float]:
    """Paired difference over the seeds: mean, and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    found = [one[key] - other[key] for one, other in zip(rows, base, strict=True)]
    half = float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / len(found) ** 0.5
    return {"mean": statistics.mean(found), "interval": half, "least": min(found), "most": max(found)}


SPEEDS = {"32x32, 32 channels": (32, 32, 16), "64x64, 64 channels": (64, 64, 4)}


def speed() -> None:
    """Time of a training step and a forward pass beside diffusers' UNet2DModel of equal widths, in turns."""
    results: dict[str, Any] = {}
    for title, (size, channels, batch) in SPEEDS.items():
        size_of = {"sample_size": size, "in_channels": 3, "model_channels": channels, "num_classes": 10}
        networks = {arm: create_model(arm, **size_of) for arm in BLOCKS}
        x, t = torch.randn(batch, 3, size, size), torch.full((batch,), 500)
        y = torch.ones(batch, dtype=torch.long)

        def train(network: Any, x: Any = x, t: Any = t, y: Any = y) -> None:
            network(x, t, y).sample.square().mean().backward()
            network.zero_grad(set_to_none=True)

        times = interleaved({arm: lambda n=network, f=train: f(n) for arm, network in networks.items()}, 9)
        results[title] = {
            arm: statistics.median(a / b for a, b in zip(times[arm], times[PEER], strict=True)) for arm in BLOCKS
        }
        print(f"{title}: training step, {PEER} = 1: " + ", ".join(f"{k} {v:.2f}" for k, v in results[title].items()))
    save("speed", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    every = ["speed", *EXPERIMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(every)}; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/backbones"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=[], choices=ARMS, help="only these networks; default: all")
    parser.add_argument("--job", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in every]:
        parser.error(f"unknown {unknown[0]}; known: {', '.join(every)}")
    keep_freed_memory()
    register_peers()
    if arguments.job:
        name, arm, rate, seed, steps, measured = arguments.job
        job(name, arm, arguments.runs, arguments.data, float(rate), int(seed), int(steps), bool(int(measured)))
        return
    for name in arguments.names or every:
        if name == "speed":
            speed()
        else:
            compare(name, arguments.runs, arguments.data, arguments.workers, tuple(arguments.arms))


if __name__ == "__main__":
    main()
