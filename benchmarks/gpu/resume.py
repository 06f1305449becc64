"""Whether a resumed run equals one that was not interrupted.

python -m benchmarks.gpu.resume NAME FOLDER [tiny]    print it of a deterministic run, as JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.recipes import config_of
from benchmarks.gpu.session import Bench


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
    from heterodiff.training.loop import CHECKPOINTS

    groups = read_checkpoint(list_checkpoints(run / CHECKPOINTS)[-1]).tensors
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def compare(bench: Bench, folder: Path, name: str, deterministic: bool) -> dict[str, Any]:
    """Train at once and in two parts; the number of tensors that differ, and by how much at most."""
    from heterodiff.training.start import train

    half, ends = bench.size(2, 1), []
    for stops in ((None,), (half, None)):
        run, sure = folder / f"{len(stops)} parts", str(deterministic).lower()
        config = config_of(bench, name, run, 2 * half, folder / "codec", deterministic=sure)
        for stop in stops:
            train(config, stop_after=stop, quiet=True)
        ends.append(last_tensors(run))
    first, second = ends
    different = [key for key in first if not torch.equal(first[key], second[key])]
    largest = max((float((first[key].double() - second[key].double()).abs().max()) for key in different), default=0.0)
    return {"different": len(different), "of": len(first), "largest_difference": largest}


def main() -> None:
    from heterodiff.devices import default_device

    name, folder, *tiny = sys.argv[1:]
    print(json.dumps(compare(Bench(default_device(), bool(tiny), Path(folder)), Path(folder), name, True)))


if __name__ == "__main__":
    main()
