"""The backbone against its own naive version, the networks one would pick instead, and the hardware.

    python -m benchmarks.backbone [--no-compile] [--rounds 7]

Prints tables, writes benchmarks/results/backbone.json and docs/images/backbone.png, and exits with 1 if a number that
the project promises is missed by more than a tenth. Configuration B (99 million parameters, 128x128, 4 channels), one
image at a time, float32, on the CPU; times that are compared were taken in turns.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.measure import MATRIX_GFLOP, interleaved, matrix_product, peak_memory_mb, ratio, write_results
from benchmarks.networks import CONFIG, NETWORKS, SIZE, build, forward, inputs, train
from benchmarks.promises import Promise, report
from heterodiff.models.attention.patterns import Grid, make_pattern
from heterodiff.models.hybrid import REGIONAL_PATCHES, HybridBlock, MultiScaleTransformer, PatternSpec
from heterodiff.models.profile import count_flops, count_saved_bytes, profile
from heterodiff.models.variants import VARIANTS, HybridSpec
from tests.oracles.naive_backbone import make_naive

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "backbone.png"
PATTERN = PatternSpec("multiscale", 0.9, 512, 0)
SPEC = VARIANTS["hae-v2"].hybrid
BUDGETS_GB = (4, 8, 16, 24)


def networks(rounds: int) -> dict[str, dict[str, float]]:
    """A row a network: size, work, memory and time."""
    peaks = {name: peak_memory_mb("benchmarks.networks", name) for name in NETWORKS}
    built = {name: build(name) for name in NETWORKS}
    arguments = inputs()
    rows: dict[str, dict[str, float]] = {}
    for name, network in built.items():
        network.eval()
        rows[name] = {
            "parameters_m": sum(p.numel() for p in network.parameters()) / 1e6,
            "gflop": count_flops(network, *arguments) / 1e9,
            "saved_mb": count_saved_bytes(network.train(), *arguments) / 1e6,
            "peak_mb": peaks[name],
        }
    times = {}
    for kind, call in (("forward", forward), ("train", train)):
        for network in built.values():
            network.train(kind == "train")
        # Each twice in a row: the first call brings its weights into the caches.
        calls = {}
        for name, network in built.items():
            calls[f"{name} (unmeasured)"] = calls[name] = lambda n=network, c=call: c(n, *arguments)
        calls["matrix product"] = matrix_product  # in turns with them: the machine's speed varies over minutes
        if kind == "train":
            calls = {name: call for name, call in calls.items() if not name.endswith("(unmeasured)")}
        times[kind] = interleaved(calls, rounds)
    rate = MATRIX_GFLOP / statistics.median(times["forward"]["matrix product"] + times["train"]["matrix product"])
    print(f"matrix product {rate:.0f} GFLOP/s on {torch.get_num_threads()} threads; the floor is GFLOP over that")
    for name, row in rows.items():
        row["forward_s"] = statistics.median(times["forward"][name])
        row["train_s"] = statistics.median(times["train"][name])
        row["matrix_product_gflop_per_s"] = rate
        row["forward_to_floor"] = row["forward_s"] / (row["gflop"] / rate)
        row["train_to_floor"] = row["train_s"] / (3 * row["gflop"] / rate)
        for base in ("unet", "diffusers", "MONAI", "hae-v2"):
            row[f"forward_to_{base}"] = ratio(times["forward"], name, base)
            row[f"train_to_{base}"] = ratio(times["train"], name, base)
    return rows


def print_networks(rows: dict[str, dict[str, float]]) -> None:
    print(
        f"{'network':20} {'params M':>8} {'GFLOP':>6} {'saved MB':>8} {'peak MB':>8} "
        f"{'forward s':>9} {'/unet':>5} {'/floor':>6} {'train s':>8} {'/unet':>5} {'/floor':>6}"
    )
    for name, r in rows.items():
        print(
            f"{name:20} {r['parameters_m']:8.1f} {r['gflop']:6.1f} {r['saved_mb']:8.0f} {r['peak_mb']:8.0f} "
            f"{r['forward_s']:9.3f} {r['forward_to_unet']:5.2f} {r['forward_to_floor']:6.2f} "
            f"{r['train_s']:8.3f} {r['train_to_unet']:5.2f} {r['train_to_floor']:6.2f}"
        )


def dropout_memory() -> dict[str, float]:
    """Saved bytes with dropout 0.1, relative to without."""
    found = {}
    for name in VARIANTS:
        without, with_ = (profile(name, SIZE, SIZE, dropout=p, **CONFIG).saved_mb for p in (0.0, 0.1))
        found[name] = with_ / without
    return found


def compiled(names: list[str], training: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Times of the compiled networks; compiling takes a minute or two each."""
    arguments, rows = inputs(), {}
    calls: dict[str, dict[str, Any]] = {"forward": {}, "train": {}}
    for name in names:
        network = build(name)
        fast = torch.compile(network, dynamic=False)
        rows[name] = {"gflop": count_flops(network.eval(), *arguments) / 1e9}
        for kind, call in (("forward", forward), ("train", train)):
            if kind == "forward" or name in training:
                start = time.perf_counter()
                fast.train(kind == "train")
                call(fast, *arguments)
                rows[name][f"compile_{kind}_s"] = time.perf_counter() - start
                calls[kind][name] = lambda f=fast, c=call, t=kind == "train": c(f.train(t), *arguments)
    calls["forward"]["matrix product"] = matrix_product  # in turns with them: the machine's speed varies over minutes
    times = {kind: interleaved(made, rounds) for kind, made in calls.items()}
    rate = MATRIX_GFLOP / statistics.median(times["forward"]["matrix product"])
    for name, row in rows.items():
        row["forward_s"] = statistics.median(times["forward"][name])
        row["forward_to_floor"] = row["forward_s"] / (row["gflop"] / rate)
        for base in names:
            row[f"forward_to_{base}"] = ratio(times["forward"], name, base)
        if name in training:
            row["train_s"] = statistics.median(times["train"][name])
            for base in training:
                row[f"train_to_{base}"] = ratio(times["train"], name, base)
    return rows


def transformer_block(rounds: int) -> dict[str, float]:
    """One MSTB with 256 channels at 64x64, ours against dense attention under the same mask."""
    assert isinstance(SPEC, HybridSpec)
    torch.manual_seed(0)
    ours, naive = (MultiScaleTransformer(256, SPEC, 0.25, 0.0, PATTERN) for _ in range(2))
    naive.load_state_dict(ours.state_dict())
    make_naive(naive)
    x = torch.randn(1, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours(x), naive(x), atol=1e-4)
    found = {}
    for kind, call in (("forward", block_forward), ("train", block_train)):
        times = interleaved({"ours": lambda c=call: c(ours, x), "naive": lambda c=call: c(naive, x)}, rounds)
        found[f"{kind}_s"] = statistics.median(times["ours"])
        found[f"naive_{kind}_s"] = statistics.median(times["naive"])
        found[f"{kind}_faster"] = ratio(times, "naive", "ours")
    grid = Grid(64, 64, REGIONAL_PATCHES)
    pattern = make_pattern(PATTERN.kind, grid, PATTERN.sparsity, PATTERN.max_keys, PATTERN.seed)
    found["attention_flop_share"] = pattern.queries.size * pattern.keys.shape[1] / (grid.local * grid.length)
    return found


def block_forward(block: nn.Module, *arguments: Tensor) -> None:
    with torch.no_grad():
        block(*arguments)


def block_train(block: nn.Module, *arguments: Tensor) -> None:
    block(*arguments).square().mean().backward()
    block.zero_grad(set_to_none=True)


def growth(rounds: int) -> list[dict[str, float]]:
    """One hybrid block with 64 channels at growing sizes: time and saved bytes, and those of the dense one."""
    assert isinstance(SPEC, HybridSpec)
    rows = []
    for side in (32, 64, 96, 128, 192, 256):
        torch.manual_seed(0)
        block = HybridBlock(64, 256, SPEC, 0.25, 0.0, PATTERN)
        x = torch.randn(1, 64, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        e = torch.randn(1, 256)
        times = interleaved({"ours": lambda b=block, x=x, e=e: block_train(b, x, e)}, rounds)["ours"]
        row = {"side": side, "train_s": statistics.median(times), "saved_mb": count_saved_bytes(block, x, e) / 1e6}
        if side <= 96:  # beyond, the dense weights take gigabytes
            make_naive(block)
            times = interleaved({"naive": lambda b=block, x=x, e=e: block_train(b, x, e)}, 2)["naive"]
            row |= {"naive_train_s": min(times), "naive_saved_mb": count_saved_bytes(block, x, e) / 1e6}
        rows.append(row)
    return rows


def batches(rows: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """The largest batch whose saved activations fit a budget."""
    names = ["hae-v2 naive", "hae-v2", "hae-v2-conservative"]
    return [{"budget_gb": b, **{n: int(b * 1e3 // rows[n]["saved_mb"]) for n in names}} for b in BUDGETS_GB]


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of time and memory a network, and the cost of a hybrid block by size beside the dense one."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    rows = found["networks"]
    names = [name for name in rows if name != "hae-v2 naive"]
    colours = ["tab:blue" if name in VARIANTS else "tab:grey" for name in names]
    for axis, key, title in (
        (axes[0], "train_to_unet", "forward and backward, relative to unet"),
        (axes[1], "saved_mb", "kept for the backward pass, MB an image"),
    ):
        bars = axis.barh(names, [rows[name][key] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.2f" if key == "train_to_unet" else "%.0f", padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
    for prefix, label, colour in (("", "hybrid block", "tab:blue"), ("naive_", "the same, dense", "tab:red")):
        drawn = [row for row in found["growth"] if f"{prefix}train_s" in row]
        positions, seconds = [r["side"] ** 2 for r in drawn], [r[f"{prefix}train_s"] for r in drawn]
        axes[2].loglog(positions, seconds, "o-", label=label, color=colour)
    axes[2].set_xlabel("positions (height x width)")
    axes[2].set_ylabel("seconds")
    axes[2].set_title("one hybrid block, forward and backward", fontsize=10)
    axes[2].legend()
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def promises(found: dict[str, Any]) -> list[Promise]:
    """What the project says of its backbone, against what was measured."""
    n, block, rows = found["networks"], found["transformer_block"], {r["side"]: r for r in found["growth"]}
    least_gain = min(b["hae-v2"] / b["hae-v2 naive"] for b in found["batches"])
    made = [
        Promise("MSTB forward, times faster than dense", block["forward_faster"], at_least=15),
        Promise("MSTB forward and backward, times faster than dense", block["train_faster"], at_least=8),
        Promise("MSTB attention FLOPs, share of dense", block["attention_flop_share"], at_most=0.15),
        Promise("hae-v2 forward / unet", n["hae-v2"]["forward_to_unet"], at_most=1.20),
        Promise("hae-v2 train / unet", n["hae-v2"]["train_to_unet"], at_most=1.25),
        Promise("hae forward / unet", n["hae"]["forward_to_unet"], at_most=1.35),
        Promise("hae train / unet", n["hae"]["train_to_unet"], at_most=1.35),
        Promise("unet saved MB", n["unet"]["saved_mb"], at_most=640),
        Promise("hae-v2 saved MB", n["hae-v2"]["saved_mb"], at_most=780),
        Promise("hae-v2-conservative saved MB", n["hae-v2-conservative"]["saved_mb"], at_most=400),
        Promise("hae-v2-conservative train / hae-v2", n["hae-v2-conservative"]["train_to_hae-v2"], at_most=1.35),
        Promise("saved with dropout 0.1 / without, most of all", max(found["dropout"].values()), at_most=1.12),
        Promise("batch in a budget, hae-v2 / naive, least", least_gain, at_least=2),
        Promise("diffusers forward / unet", 1 / n["unet"]["forward_to_diffusers"], at_least=1.10),
        Promise("diffusers train / unet", 1 / n["unet"]["train_to_diffusers"], at_least=1.05),
        Promise("MONAI forward / unet", 1 / n["unet"]["forward_to_MONAI"], at_least=1.10),
        Promise("MONAI train / unet", 1 / n["unet"]["train_to_MONAI"], at_least=1.05),
        Promise("hybrid block 256x256 / 64x64, time", rows[256]["train_s"] / rows[64]["train_s"], at_most=20),
        Promise("hybrid block 256x256 / 64x64, saved", rows[256]["saved_mb"] / rows[64]["saved_mb"], at_most=18),
    ]
    if "compiled" in found:
        c = found["compiled"]["unet"]
        made += [Promise("compiled forward / floor", c["forward_to_floor"], at_most=1.4)]
        made += [
            Promise(f"compiled {key.replace('_to_', ' unet / ')}", value, at_most=1.0)
            for key, value in c.items()
            if key.endswith(("_to_diffusers", "_to_MONAI"))
        ]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled (most of the time)")
    options = parser.parse_args()
    start = time.perf_counter()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    found: dict[str, Any] = {}
    found["networks"] = networks(options.rounds)
    print_networks(found["networks"])
    found["transformer_block"] = transformer_block(options.rounds)
    print("\nMSTB, 256 channels, 64x64: " + ", ".join(f"{k} {v:.3g}" for k, v in found["transformer_block"].items()))
    found["growth"] = growth(options.rounds)
    draw(found, PICTURE)
    print("\nhybrid block, 64 channels, forward and backward:")
    for row in found["growth"]:
        print("  " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    found["dropout"] = dropout_memory()
    found["batches"] = batches(found["networks"])
    print("\nlargest batch by activation budget:")
    for row in found["batches"]:
        print("  " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if not options.no_compile:
        found["compiled"] = compiled(["unet", "diffusers", "MONAI"], ["unet", "diffusers"], options.rounds)
        print("\ncompiled:")
        for name, row in found["compiled"].items():
            print(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    kept = promises(found)
    found["promises"] = [p.to_dict() for p in kept]
    found["seconds"] = time.perf_counter() - start
    print(f"\nwrote {write_results('backbone', found)}")
    sys.exit(report(kept))


if __name__ == "__main__":
    main()
