"""What a training step and a denoising step ask of a device: kernel launches, copies to it, waits for it.

    python -m benchmarks.launches

Counted on the test device (`tests/devices`), which computes on the CPU and counts, in steps between two log lines.
Prints a table and writes benchmarks/results/launches.json; exits with 1 if a promise is missed. Launches are those of
forward and backward pass; clipping, optimiser and EMA, whose fused forms exist for real devices, are a column apart.
"""

import inspect
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import write_results
from benchmarks.promises import Promise, report
from tests.devices import Counts, register, watched

STEP = 3
"""The step that is counted: those before it fill caches."""
TINY_VAE: dict[str, Any] = {"block_out_channels": [16, 32], "structural_weight": 0.1}
TEXT: dict[str, Any] = {
    "data": {"source": "shapes", "image_size": 32, "shapes": {"images": 80}},
    "text": {
        "width": 32, "layers": 1, "max_tokens": 24, "embedding_dim": 32, "captioner_width": 32, "captioner_layers": 1,
    },
    "alignment": {"latent_channels": 8, "block_out_channels": [16, 16], "captions_per_image": 2},
}  # fmt: skip
SHORT = {"steps": STEP, "batch_size": 8, "preview_every": 1000, "tensorboard": False, "precision": "float32"}
MAPS = {"variant": "film-unet", "model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1}


def recipes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and configuration of each recipe; later ones use what earlier ones have trained in ``folder``."""
    digits = {"source": "digits", "image_size": 16}
    vae: dict[str, Any] = {"recipe": "vae", "data": digits, "vae": TINY_VAE, "training": SHORT}
    yield "vae", vae
    adversarial = TINY_VAE | {"adversarial_weight": 0.5, "adversarial_start": 1}
    yield "vae with discriminator", vae | {"vae": adversarial}
    codec = {"kind": "kl-vae", "path": str(folder / "vae"), "statistics": "measured"}
    model = {"variant": "hae-v2", "model_channels": 32, "layers_per_block": 1}
    latent: dict[str, Any] = {"data": digits, "codec": codec, "model": model, "training": SHORT}
    yield "diffusion, latents kept", latent
    yield "diffusion, encoded with every batch", latent | {"codec": codec | {"cache": False}}
    yield "alignment", TEXT | {"recipe": "alignment", "training": SHORT}
    codec = {"kind": "cnn", "path": str(folder / "alignment")}
    yield "text-image", TEXT | {"recipe": "text-image", "model": MAPS, "codec": codec, "training": SHORT}
    joint = TEXT["alignment"] | {"joint": True}
    yield "text-image, jointly", TEXT | {"recipe": "text-image", "model": MAPS, "alignment": joint, "training": SHORT}


def count_training(config: Any, folder: Path) -> dict[str, int]:
    """The counts of one training step; the run goes to its end in ``folder``."""
    from heterodiff.training import loop
    from heterodiff.training.start import train

    counted: list[Counts] = []
    original = loop.Trainer.train_step

    def counting(self: loop.Trainer, *arguments: Any) -> loop.StepNumbers:
        with watched() as counts:
            numbers = original(self, *arguments)
        counted.append(counts)
        return numbers

    loop.Trainer.train_step = counting  # type: ignore[method-assign]
    try:
        train(config.model_copy(update={"output": folder}), quiet=True)
    finally:
        loop.Trainer.train_step = original  # type: ignore[method-assign]
    last = counted[-1]
    update = sum(n for line, n in last.lines("launch").items() if _updates(line))
    found = {name: getattr(last, name) for name in ("copies", "blocking_copies", "waits")}
    return {"launches": last.launches - update, "update": update, **found}


def _updates(line: str) -> bool:
    """Whether a line ``file:number`` clips gradients, steps an optimiser or averages weights."""
    from heterodiff.training import optimization

    file, _, number = line.partition(":")
    functions = (optimization.Optimization.update, optimization.step_unless, optimization.EMA.step)
    ranges: Iterable[tuple[list[str], int]] = map(inspect.getsourcelines, functions)
    inside = any(start <= int(number or 0) < start + len(lines) for lines, start in ranges)
    return file == "training/optimization.py" and inside


def count_sampling(run: Path, sampler: str) -> dict[str, float]:
    """The counts of one denoising step: the difference of two calls with more and with fewer steps."""
    import heterodiff as hd

    pipeline = hd.load(run)
    pipeline([1], num_inference_steps=2, sampler=sampler)  # fills caches
    found = []
    for steps in (4, 8):
        with watched() as counts:
            pipeline([1, 2], num_inference_steps=steps, sampler=sampler, guidance_scale=2.0)
        found.append(counts)
    few, many = found
    return {
        name: (getattr(many, name) - getattr(few, name)) / 4
        for name in ("launches", "copies", "blocking_copies", "waits")
    }  # fmt: skip


def main() -> int:
    register()
    from heterodiff.config.file import load_config, parse_config
    from heterodiff.diffusion.samplers import list_samplers

    training: dict[str, dict[str, int]] = {}
    sampling: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = Path(__file__).parents[1] / "configs" / "digits.yaml"
        digits = load_config(file, [f"training.{key}={str(value).lower()}" for key, value in SHORT.items()])
        training["diffusion, digits"] = count_training(digits, folder / "digits")
        for recipe, config in recipes(folder):
            training[recipe] = count_training(parse_config(config), folder / recipe)
        for sampler in list_samplers():
            sampling[sampler] = count_sampling(folder / "digits", sampler)
    print(f"{'a training step':38} launches  update  copies  waits")
    for recipe, row in training.items():
        print(f"{recipe:38} {row['launches']:8d}  {row['update']:6d}  {row['copies']:6d}  {row['waits']:5d}")
    print(f"\n{'a denoising step (digits, guided)':38} launches          copies  waits")
    for sampler, step in sampling.items():
        print(f"{sampler:38} {step['launches']:8.0f}  {'':6}  {step['copies']:6.1f}  {step['waits']:5.1f}")
    print()
    path = write_results("launches", {"training": training, "sampling": sampling})
    print(f"written  {path}")
    promises = [Promise(f"waits, {name}", row["waits"], at_most=0) for name, row in training.items()]
    return report(
        [
            Promise("launches, digits", training["diffusion, digits"]["launches"], at_most=1000),
            Promise("copies, digits", training["diffusion, digits"]["copies"], at_most=2),
            Promise("copies, alignment", training["alignment"]["copies"], at_most=3),
        ]
    ) or max(int(p.value) for p in promises)


if __name__ == "__main__":
    sys.exit(main())
