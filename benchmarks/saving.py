"""Time of a checkpoint with and without its checksums, in turns.

    python -m benchmarks.saving [--parameters 112] [--folder DIR]

A checkpoint of millions of parameters holds them four times: weights, EMA and the two moments of the optimiser.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.measure import interleaved, ratio, write_results
from heterodiff.training.checkpoints import checkpoint as saving
from heterodiff.training.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

TENSORS = 200


def made(parameters: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    size = parameters // TENSORS
    weights = {f"layer{k}.weight": torch.randn(size, generator=generator) for k in range(TENSORS)}
    moments = {f"{name}/{slot}": value.clone() for name, value in weights.items() for slot in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(1, {"model": weights, "ema": dict(weights), "optimizer": moments}, {"recipe": "diffusion"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=112.0, help="millions")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkpoint = made(int(options.parameters * 1e6))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder)

        def with_sums() -> None:
            write_checkpoint(path / "with", checkpoint, keep=1)

        def without() -> None:
            with patch.object(saving, "fingerprint", lambda file: {"bytes": file.stat().st_size, "xxh3_128": ""}):
                write_checkpoint(path / "without", checkpoint, keep=1)

        def read() -> None:
            read_checkpoint(path / "with" / "step_00000001")

        with_sums(), without()
        seconds = interleaved({"with": with_sums, "without": without, "read": read}, options.rounds)
    size = sum(t.nbytes for group in checkpoint.tensors.values() for t in group.values())
    cost = ratio(seconds, "with", "without") - 1
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.parameters:g} M parameters, {size / 1e9:.2f} GB")
    print(f"saved in {medians['with']:.2f} s, {medians['without']:.2f} s without checksums: {100 * cost:+.1f} %")
    print(f"read and compared in {medians['read']:.2f} s")
    write_results("saving", {"parameters_m": options.parameters, "seconds": medians, "cost": cost})


if __name__ == "__main__":
    main()
