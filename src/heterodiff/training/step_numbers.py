"""Numbers of training steps, which stay on the device until several are read together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heterodiff.errors import HeterodiffError

GRAD_NORM = "grad_norm"


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of one step.

    Attributes:
        step: 1-based.
        indices: of the first images of the batch.
        names: of ``values``, the gradient norm last; that is NaN where the step was left out.
        values: (len(names),) float32, on the device.
    """

    step: int
    indices: list[int]
    names: list[str]
    values: Tensor


class StepRecord:
    """Steps since the last reading, and means of their numbers since the last row of the log.

    Args:
        most_nonfinite: steps in a row that may be left out because a gradient was not finite.
        scaler: that of float16; while it lowers its scale, steps are left out as a matter of course.

    Attributes:
        window: sum and count of each number since the last row.
        nonfinite_in_a_row: steps left out since the last one that counted.
    """

    def __init__(self, most_nonfinite: int, scaler: torch.amp.GradScaler):
        self.most_nonfinite, self.scaler = most_nonfinite, scaler
        self.window: dict[str, list[float]] = {}
        self.nonfinite_in_a_row = 0
        self._unread: list[StepNumbers] = []

    def add(self, numbers: StepNumbers) -> None:
        self._unread.append(numbers)

    def read(self, image_names: Sequence[str], say: Callable[[str], None] = lambda text: None) -> float:
        """Read the numbers of the steps since the last reading, the one wait for the device; return the newest loss.

        Args:
            image_names: of the training images.
            say: called with a report of each step that was left out because its gradient was not finite.

        Raises:
            HeterodiffError: ``most_nonfinite`` steps in a row were left out.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return math.nan
        flat = iter(torch.cat([step.values for step in steps]).tolist())
        for step in steps:
            values = {name: next(flat) for name in step.names}
            if math.isfinite(values[GRAD_NORM]):
                self._count(values)
                continue
            names = ", ".join(image_names[index] for index in step.indices)
            problem = f"loss {values['loss']}: gradient not finite, step left out"
            report = f"step {step.step}: {problem}; images: {names}, ..."
            say(report)
            self._leave_out(report)
        return values["loss"]

    def _count(self, values: dict[str, float]) -> None:
        self.nonfinite_in_a_row = 0
        for name, value in values.items():
            total, count = self.window.get(name, [0.0, 0])
            self.window[name] = [total + value, count + 1]

    def _leave_out(self, report: str) -> None:
        self.nonfinite_in_a_row += 1
        scale_falls = self.scaler.is_enabled() and self.scaler.get_scale() > 1  # each such step halves it
        if self.nonfinite_in_a_row >= self.most_nonfinite and not scale_falls:
            raise HeterodiffError(
                f"{self.nonfinite_in_a_row} steps in a row without a finite gradient; the last one: {report}. "
                "The weights are those before them. Try a lower training.learning_rate or precision float32"
            )

    def take_means(self) -> dict[str, float]:
        """Return the mean of each number since the last call, over the steps that counted."""
        window, self.window = self.window, {}
        return {name: total / count for name, (total, count) in window.items()}
