"""Rows that show that the device computes what it should."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.recipes import PRECISIONS, SHIPPED, config_of
from benchmarks.gpu.resume import compare
from benchmarks.gpu.session import Bench, Row, Unexpected, error_of, own_environment

if TYPE_CHECKING:
    from heterodiff.config import RunConfig

TOLERANCE = 0.02
"""Difference from the CPU, in units of the largest value, that TF32 and other orders of summation may make."""


def some_steps(bench: Bench, name: str, precision: str) -> dict[str, Any]:
    """Five steps (more in float16, which looks for its loss scale first), checkpoint, preview and use of the network.

    Raises:
        Unexpected: losses or anomaly maps that are not finite.
    """
    from heterodiff.training.start import train

    folder = bench.folder / f"{name} {precision}"
    steps = bench.size(16, 8) if precision == "float16" else bench.size(5, 2)
    config = config_of(bench, name, folder, steps, precision=precision)
    train(config, quiet=True)
    found = {"loss": _losses(folder, precision)}
    if name == "phantom_small":
        found["anomalous_pixels"] = _segment(config)
    if config.codec.path is not None:
        found["codec_loss"] = _losses(config.codec.path, precision)
    return found


def _segment(config: "RunConfig") -> int:
    """Pixels that the run's model marks in some validation images, with limits made of these: it knows nothing yet.

    Raises:
        Unexpected: values that are not finite.
    """
    from heterodiff.evaluation.runs import run_data
    from heterodiff.pipelines.anomalies.masks import Calibration
    from heterodiff.pipelines.anomalies.segment import Segmenter
    from heterodiff.pipelines.load import load_generation

    assert config.output is not None
    segmenter = Segmenter(load_generation(config.output), config.segmentation)
    maps = segmenter.maps(run_data(config.output).val.batch(range(4))[0])
    if not all(bool(values.isfinite().all()) for values in (maps.maps, maps.divergence, maps.score)):
        raise Unexpected("maps of anomalies are not finite")
    limits = Calibration(tuple(maps.divergence.amax(0).tolist()), float(maps.score.median()), 1, 1, 0)
    return int(segmenter.masks(maps, limits).masks.sum())


def _losses(folder: Path, precision: str) -> list[float | None]:
    """Loss of each step; None where it was left out, as float16 does while it looks for its scale.

    Raises:
        Unexpected: one is not finite.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    finite = sum(map(math.isfinite, losses))
    if finite < (1 if precision == "float16" else len(losses)):
        raise Unexpected(f"losses {losses} of {folder.name}")
    return [round(loss, 4) if math.isfinite(loss) else None for loss in losses]


def agrees_with_cpu(bench: Bench) -> dict[str, Any]:
    """Outputs and gradients of every variant against the CPU's, float32: their difference by their largest value.

    Raises:
        Unexpected: more than ``TOLERANCE``.
    """
    from heterodiff.models.variants import VARIANTS, create_model

    size, found = bench.size(64, 16), {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = create_model(
            variant, sample_size=size, in_channels=2, model_channels=32, channel_mult=(1, 2), num_classes=2
        )
        for parameter in model.parameters():  # some begin as zeros, and would hide what is before them
            torch.nn.init.normal_(parameter, std=0.05)
        x, labels, times = torch.randn(2, 2, size, size), torch.tensor([0, 1]), torch.tensor([10, 900])
        seen = []
        for device in ("cpu", bench.device):
            model.zero_grad()  # else moving the model moves gradients that are kept
            model.to(device)
            out = model(x.to(device), times.to(device), class_labels=labels.to(device)).sample
            out.square().mean().backward()
            seen.append([out.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)])
        largest = max(float(a.abs().max()) for a in seen[0][1:])
        found[variant] = {
            "output": float((seen[0][0] - seen[1][0]).abs().max() / seen[0][0].abs().max()),
            "gradient": max(float((a - b).abs().max()) for a, b in zip(seen[0][1:], seen[1][1:], strict=True))
            / largest,
        }
    if not all(value <= TOLERANCE for row in found.values() for value in row.values()):
        raise Unexpected(f"differs from the CPU: {found}")
    return found


def resumes(bench: Bench, name: str, deterministic: bool) -> dict[str, Any]:
    """A run that stopped halfway against one that did not: how many tensors of their last checkpoints differ.

    With ``deterministic`` in a process of its own: some of what makes kernels deterministic is read at their first use.

    Raises:
        Unexpected: with ``deterministic``, any.
    """
    folder = bench.folder / f"resume {name} {deterministic}"
    if not deterministic:
        return compare(bench, folder, name, False)
    command = [sys.executable, "-m", "benchmarks.gpu.resume", name, str(folder), *["tiny"] * bench.tiny]
    environment = own_environment()
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise error_of(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["different"]:
        raise Unexpected(f"resumed differs: {found}")
    return found


def leaves_out(bench: Bench, precision: str) -> dict[str, Any]:
    """A step whose gradient overflows is left out, and the run goes on.

    Raises:
        Unexpected: weights changed by that step, or not by the next one.
    """
    from heterodiff.training.preflight.trial import trial

    config = config_of(bench, "digits", bench.folder / "not written", 10, precision=precision)
    trainer, recipe, *_ = trial(config)
    parameter = next(p for p in recipe.model.parameters() if p.requires_grad)

    def moved(steps: int) -> bool:
        before = [p.detach().clone() for p in recipe.model.parameters()]
        for _ in range(steps):
            trainer.step_once()
        return any(not torch.equal(a, b) for a, b in zip(before, recipe.model.parameters(), strict=True))

    first = moved(bench.size(16, 2))  # float16 leaves out some by itself until its scale fits
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    scale = trainer.optimization.scaler.get_scale()
    overflowing = moved(1)
    hook.remove()
    found = {"scale_before": scale, "scale_after": trainer.optimization.scaler.get_scale(), "after": moved(1)}
    if not first or overflowing or not found["after"] or found["scale_after"] > scale:
        raise Unexpected(f"weights moved before {first}, in the overflowing step {overflowing}, then {found}")
    return found


def rows() -> list[Row]:
    made = [Row("agrees with the CPU", 20, agrees_with_cpu)]
    made += [
        Row(f"steps {name} {precision}", 12, partial(some_steps, name=name, precision=precision))
        for precision in PRECISIONS
        for name in SHIPPED
    ]
    made += [
        Row(f"overflow {precision}", 5, partial(leaves_out, precision=precision)) for precision in PRECISIONS[::-1]
    ]
    made += [
        Row(f"resume {name}{' deterministic' * wanted}", 30, partial(resumes, name=name, deterministic=wanted))
        for name in SHIPPED
        for wanted in (True, False)
    ]
    return made
