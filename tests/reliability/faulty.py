"""Run the command line with a fault at an exact place, and a record of what was trained on.

    python -m tests.reliability.faulty FAULT RECORD train CONFIG ...

FAULT is ``none``, or PLACE:SIGNAL:COUNT: this process gets the signal when it reaches PLACE for the COUNT-th time. Each
step appends its number and the positions of its images to the file RECORD.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from heterodiff.cli import main
from heterodiff.training import loop
from heterodiff.training.batches import StepBatches
from heterodiff.training.checkpoints import checkpoint
from heterodiff.training.recipes.diffusion import DiffusionRecipe

PLACES: dict[str, tuple[Any, str]] = {
    "step": (DiffusionRecipe, "losses"),
    "save": (checkpoint, "save_file"),
    "preview": (DiffusionRecipe, "preview"),
    "validation": (DiffusionRecipe, "validate"),
    "loader": (StepBatches, "batch"),
}


def send_at(place: str, number: signal.Signals, count: int) -> None:
    """Send the signal to the process of the command, also from one of its loader workers."""
    owner, name = PLACES[place]
    original, process, calls = getattr(owner, name), os.getpid(), 0

    def sending(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(process, number)
        return original(*arguments, **options)

    setattr(owner, name, sending)


def record_to(path: Path) -> None:
    original = loop.Trainer.train_step

    def recording(self: loop.Trainer, batch: Any, share: slice) -> Any:
        found = original(self, batch, share)
        with path.open("a") as file:
            file.write(json.dumps({"step": self.step, "images": batch.indices}) + "\n")
        return found

    loop.Trainer.train_step = recording  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, record, *arguments = sys.argv[1:]
    if fault != "none":
        where, name, times = fault.split(":")
        send_at(where, signal.Signals[name], int(times))
    record_to(Path(record))
    main(arguments)
