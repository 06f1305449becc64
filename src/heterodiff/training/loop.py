"""The training loop, one for all recipes: batches, steps, checkpoints, validation and logging."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.compiling import compiles
from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import LoadedData
from heterodiff.devices import any_kernels, use_tf32
from heterodiff.errors import CheckpointError, HeterodiffError, RunError, is_out_of_memory
from heterodiff.memory import keep_freed_memory
from heterodiff.run_folder import CHECKPOINTS, GONE, RunFolder
from heterodiff.training.batches import Batch, Stream, derive_seed, share_of
from heterodiff.training.checkpoints.checkpoint import Checkpoint, write_checkpoint
from heterodiff.training.checkpoints.resume import fingerprint, fingerprints
from heterodiff.training.checkpoints.state import capture, restore
from heterodiff.training.feed import Feed
from heterodiff.training.interrupt import Interrupted, StopRequest
from heterodiff.training.journal import Journal, StepClock
from heterodiff.training.optimization import Optimization, check_batch, learning_rate_at, with_rates
from heterodiff.training.processes import HostGroup, make_accelerator
from heterodiff.training.recipes.base import VALIDATION_IMAGES, Recipe
from heterodiff.training.step_numbers import GRAD_NORM, StepNumbers, StepRecord

NAMED_IMAGES = 8
"""Images of a batch that are named where its step is left out."""

OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class TrainingResult:
    """Result of :meth:`Trainer.run`.

    Attributes:
        step: steps done in all.
        steps: of the whole run.
        stopped_by: the signal that stopped it, if any.
        seconds: of training.
    """

    step: int
    steps: int
    stopped_by: int | None
    seconds: float


class Trainer:
    """Trains a recipe's model on ``data`` and keeps the run folder.

    Args:
        config: the run; ``config.output`` is its folder. The attribute has the numbers that it leaves open.
        recipe: what is trained.
        data: images and labels; or latents and labels, for a recipe that takes them.

    Raises:
        ConfigError: the batch does not split evenly over processes and accumulation steps.
    """

    def __init__(self, config: RunConfig, recipe: Recipe, data: LoadedData):
        assert config.output is not None
        training = with_rates(config.training, recipe.learned_weights)
        self.config, self.recipe, self.data = config.model_copy(update={"training": training}), recipe, data
        self.run_folder = RunFolder(config.output)
        keep_freed_memory()
        self.accelerator = make_accelerator()
        self.hosts = HostGroup(self.accelerator)
        self.device = self.accelerator.device
        use_tf32(self.device)
        check_batch(training, self.accelerator.num_processes)
        recipe.to(self.device)
        self.optimization = Optimization(recipe, training, self.accelerator)
        self.network: Any = self.optimization.main.network  # as called in training
        if compiles(training) and recipe.adversary is None and not self.optimization.splits:
            self.network = torch.compile(self.network, dynamic=False)  # every batch has one shape
        self.step = 0
        self._folder: int | None = None  # identity of the run folder, once it is there
        self.record = StepRecord(training.max_nonfinite_steps, self.optimization.scaler)

    @cached_property
    def feed(self) -> Feed:
        """Training images on the device, made when first needed because ``data`` may be replaced before."""
        accelerator = self.accelerator
        return Feed(self.config, self.data.train, self.device, accelerator.process_index, accelerator.num_processes)

    # ---- one step -------------------------------------------------------------------------------------------

    def _inputs(self, images: Tensor) -> Tensor:
        """Return the inputs of the recipe's losses: cached latents as they are, images prepared."""
        return images if self.data.latents is not None else self.recipe.prepare(images)

    def train_step(self, batch: Batch, share: slice) -> StepNumbers:
        """Take one optimiser step, for which nothing waits for the device."""
        training, accelerator, optimization = self.config.training, self.accelerator, self.optimization
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(training.seed, Stream.NOISE, self.step))
        whole = self.recipe.draw(self.step, training.batch_size, generator, self.device)
        draws = whole.rows(share)
        size = len(batch.labels) // training.accumulation_steps
        self.network.train()
        found, adversary = [], optimization.adversary if self.recipe.judges(whole) else None
        for k in range(training.accumulation_steps):
            rows = slice(k * size, (k + 1) * size)
            torch.manual_seed(derive_seed(training.seed, Stream.DROPOUT, self.step, accelerator.process_index, k))
            inputs = self._inputs(self.feed.images(batch, rows))
            last = k == training.accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(optimization.main.network):
                losses = self.recipe.losses(self.network, inputs, batch.labels[rows], draws.rows(rows))
                optimization.backward(losses.each)
            values = {"loss": losses.each.detach(), **losses.parts}
            if adversary is not None and losses.outputs is not None:
                with nullcontext() if last else accelerator.no_sync(adversary.network):
                    verdicts = self.recipe.adversary_losses(adversary.network, inputs, losses.outputs)
                    optimization.backward(verdicts)
                values["adversary"] = verdicts.detach()
            found.append(values)
        norm, left_out = optimization.update(
            self.step, [optimization.main] if adversary is None else optimization.parts
        )
        every = accelerator.gather({name: torch.cat([values[name] for values in found]) for name in found[0]})
        self.recipe.observe(whole, every["loss"], left_out)
        numbers = torch.stack([*(value.mean() for value in every.values()), norm.masked_fill(left_out, torch.nan)])
        return StepNumbers(self.step + 1, batch.indices[:NAMED_IMAGES], [*every, GRAD_NORM], numbers)

    def step_once(self, batch: Batch | None = None) -> float:
        """Take one training step outside of a run, to try it; return the loss."""
        self.record.add(self.train_step(batch or self.feed.batch(self.step), slice(None)))
        self.step += 1
        return self.record.read(self.data.train.names)

    # ---- evaluation while training --------------------------------------------------------------------------

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield up to 256 held-out images, the same at every call, prepared for the recipe, and their labels."""
        data: ImageDataset = self.data.val
        count = min(len(data), VALIDATION_IMAGES)
        chosen = np.random.default_rng(0).permutation(len(data))[:count].tolist()
        size = max(1, self.config.training.batch_size // self.config.training.accumulation_steps)
        for start in range(0, count, size):
            images, labels = data.inputs(chosen[start : start + size])
            yield self._inputs(images.to(self.device)), labels

    def _evaluate(self, journal: Journal, request: StopRequest, if_missing: bool = False) -> None:
        """Validate and draw a preview from the EMA weights, in the first process; a signal to stop ends it early.

        Args:
            if_missing: only if there is no preview of this step.
        """
        if not (if_missing and self._preview_file.is_file()):
            if self.accelerator.is_main_process:
                self._preview(journal, request)
            elif self.optimization.splits:
                with self.optimization.ema_weights(self.recipe):
                    pass
        self.hosts.wait()

    @property
    def _preview_file(self) -> Path:
        return self.run_folder.samples / f"step_{self.step:06d}.png"

    def _preview(self, journal: Journal, request: StopRequest) -> None:
        journal.note("validation and preview")
        try:
            with (
                self.optimization.ema_weights(self.recipe),
                torch.no_grad(),
                any_kernels(),
            ):  # drawing tokens has no deterministic kernel
                watch = self.recipe.model.register_forward_pre_hook(lambda *_: request.raise_if_asked())
                try:
                    seed = derive_seed(self.config.training.seed, Stream.VALIDATION)
                    measured = self.recipe.validate(self._validation_batches(), seed)
                    picture = self.recipe.preview(derive_seed(self.config.training.seed, Stream.PREVIEW))
                finally:
                    watch.remove()
        except Interrupted:
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.optimization.splits:  # other processes, which hold parts of the weights, wait for the preview
                self._write()  # so that no step is lost
            raise RunError(
                f"out of memory in the preview after step {self.step}"
                + ("" if self.optimization.splits else ", whose checkpoint is written")
                + f"; go on with training.preview_every={self.config.training.steps}, which leaves all but the last "
                "one out"
            ) from error
        if measured and self.step not in journal.validated:
            journal.row(self.step, measured)
        journal.picture(self.step, picture)
        self.run_folder.write_picture(self._preview_file, picture)  # last: with it, the step is done

    # ---- the loop -------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``.

        Raises:
            CheckpointError: it belongs to another recipe or network, or parts of it are missing.
        """
        if not checkpoint.weights_only:
            self._refuse_other_run(checkpoint)
        try:
            restore(checkpoint, self.recipe, self.optimization)
            if not checkpoint.weights_only:
                self.record.window = dict(checkpoint.state["window"])
                self.record.nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step} does not fit this run: {error}") from None
        self.step = checkpoint.step

    def _refuse_other_run(self, checkpoint: Checkpoint) -> None:
        kind = checkpoint.state.get("recipe")
        if kind != self.config.recipe:
            raise CheckpointError(f"checkpoint of recipe '{kind}', expected '{self.config.recipe}'")
        if checkpoint.state.get("run") not in fingerprints(self.config):
            raise CheckpointError(f"checkpoint of step {checkpoint.step} belongs to a run of another configuration")

    def save_weights(self) -> None:
        """Write the EMA weights, the ones to use, as a pipeline."""
        if self._writes:
            with self.optimization.ema_weights(self.recipe):
                if self.accelerator.is_main_process:
                    self.run_folder.save_pipeline(self.step, self.recipe.save)

    @property
    def _writes(self) -> bool:
        """True in processes that take part in writing: the first one, and all that hold parts of the weights."""
        return self.accelerator.is_main_process or self.optimization.splits

    def save(self) -> None:
        """Write a checkpoint of the present step, and the EMA weights for pipelines."""
        self._write()
        self.hosts.wait()

    def _write(self) -> None:
        if self._writes:
            if self._folder is not None and self.run_folder.identity() != self._folder:
                raise RunError(f"{self.run_folder}: {GONE}")
            checkpoint = capture(self.step, self.recipe, self.optimization)
            checkpoint.state |= {
                "recipe": self.config.recipe,
                "run": fingerprint(self.config),
                "window": self.record.window,
                "nonfinite_in_a_row": self.record.nonfinite_in_a_row,
            }
            folder, keep = self.run_folder.path / CHECKPOINTS, self.config.training.keep_checkpoints
            write_checkpoint(folder, checkpoint, keep, self.hosts if self.optimization.splits else None)
            self.save_weights()

    def run(self, stop_after: int | None = None, on_step: OnStep | None = None, quiet: bool = False) -> TrainingResult:
        """Train until the configured steps are done, ``stop_after`` is reached, or a signal asks to stop.

        Args:
            stop_after: stop, with a checkpoint, once this number of steps is done in all.
            on_step: called after each step with its number (1-based) and loss.
        """
        training = self.config.training
        stop = min(training.steps, stop_after or training.steps)
        request = StopRequest()
        self._folder = self.run_folder.identity()
        main = self.accelerator.is_main_process
        journal = Journal(self.run_folder, training.steps, self.step, training.tensorboard, quiet, main)
        with request.listening(), journal:
            if 0 < self.step < stop and self.step % training.preview_every == 0:
                self._evaluate(journal, request, if_missing=True)  # a kill or a signal may have ended it
            with closing(self.feed.loader(self.step, stop)) as batches:
                self._steps(batches, stop, request, journal, on_step)
            self.record.read(self.data.train.names, journal.say)
            if self.step == training.steps <= self.record.nonfinite_in_a_row:
                raise HeterodiffError(
                    f"none of the {self.step} steps had a finite gradient, so nothing was learned; try a lower "
                    "training.learning_rate, precision float32 or more steps"
                )
            self.save()
            if self.step == stop and request.signal is None:
                self._evaluate(journal, request)
            return TrainingResult(self.step, training.steps, request.signal, journal.seconds)

    def _steps(
        self, batches: Iterator[Batch], stop: int, request: StopRequest, journal: Journal, on_step: OnStep | None
    ) -> None:
        training = self.config.training
        share = share_of(training.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        clock = StepClock()
        while self.step < stop and not self._asked_to_stop(request):
            with clock.waiting(), self._losing_nothing():
                batch = next(batches)
            self.record.add(self.train_step(batch, share))
            self.step += 1
            clock.steps += 1
            journal.advance(self.step)
            logs = self.step % training.log_every == 0 or self.step == training.steps
            saves = any(self.step % every == 0 for every in (training.checkpoint_every, training.preview_every))
            if logs or saves or on_step is not None or self.device.type == "cpu":
                loss = self.record.read(self.data.train.names, journal.say)
                if on_step is not None:
                    on_step(self.step, loss)
            if logs:
                journal.row(self.step, self._row(clock))
                clock = StepClock()
            with clock.paused():
                if self.step % training.checkpoint_every == 0 and self.step < stop:
                    self.save()
                if self.step % training.preview_every == 0 and self.step < stop:
                    self._evaluate(journal, request)

    @contextmanager
    def _losing_nothing(self) -> Iterator[None]:
        """Write a checkpoint where images can no longer be loaded, so that no step is lost."""
        try:
            yield
        except HeterodiffError as error:
            if (
                self.step == 0 or self.optimization.splits
            ):  # other processes, which hold parts of the weights, do not write now
                raise
            self._write()
            raise type(error)(f"{error}; the checkpoint of step {self.step} is written") from None

    def _asked_to_stop(self, request: StopRequest) -> bool:
        """Return whether any process was asked to stop; all must leave the loop after the same step."""
        request.signal = self.hosts.first_signal(request.signal)
        return request.signal is not None

    def _row(self, clock: StepClock) -> dict[str, float]:
        """Numbers to log: means since the last row, learning rate and speed."""
        return {
            "loss": math.nan,
            **self.record.take_means(),
            "lr": learning_rate_at(self.step - 1, self.config.training),
            "images_per_second": round(self.config.training.batch_size * clock.steps / clock.seconds, 2),
            "waiting_share": round(clock.waited / clock.seconds, 4),
        }
