"""The training loop: one for all recipes. It owns devices, precision, EMA, checkpoints, resume and logging."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heterodiff.compiling import compiles
from heterodiff.config import RunConfig, TrainingConfig
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import LoadedData
from heterodiff.devices import any_kernels, can_fuse_optimizer, use_tf32
from heterodiff.errors import CheckpointError, ConfigError, HeterodiffError, RunError, is_out_of_memory
from heterodiff.memory import keep_freed_memory
from heterodiff.run_folder import CHECKPOINTS, RunFolder
from heterodiff.training.batches import Batch, Stream, derive_seed, share_of
from heterodiff.training.checkpoints.checkpoint import Checkpoint, write_checkpoint
from heterodiff.training.checkpoints.resume import fingerprint
from heterodiff.training.checkpoints.state import Part, capture, restore
from heterodiff.training.ema import EMA
from heterodiff.training.feed import Feed
from heterodiff.training.interrupt import Interrupted, StopRequest
from heterodiff.training.journal import Journal, StepClock
from heterodiff.training.precision import compute_in, loss_scaler, precision_of
from heterodiff.training.processes import HostGroup, make_accelerator
from heterodiff.training.recipes.base import VALIDATION_IMAGES, Recipe

GRAD_NORM = "grad_norm"
NAMED_IMAGES = 8
"""Images that the report of a step names."""

OnStep = Callable[[int, float], None]


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then constant or a half cosine to zero."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_batch(training: TrainingConfig, processes: int) -> None:
    """Check that a batch splits evenly.

    Raises:
        ConfigError: it does not.
    """
    parts = processes * training.accumulation_steps
    if training.batch_size % parts:
        raise ConfigError(
            f"training.batch_size={training.batch_size} does not split into {processes} process(es) x "
            f"{training.accumulation_steps} accumulation_steps; use a multiple of {parts}"
        )


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step, on the device until they are read.

    Attributes:
        step: 1-based.
        indices: of the first images of the batch.
        names: of ``values``, the gradient norm last; that is NaN where the step was left out.
        values: (len(names),) float32.
    """

    step: int
    indices: list[int]
    names: list[str]
    values: Tensor


def read_numbers(steps: list[StepNumbers]) -> list[dict[str, float]]:
    """Return the numbers of several steps by name, in one copy from the device."""
    if not steps:
        return []
    flat = iter(torch.cat([step.values for step in steps]).tolist())
    return [{name: next(flat) for name in step.names} for step in steps]


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Step ``optimizer`` unless ``left_out`` (bool scalar on the device); only optimisers that cannot fuse wait."""
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = None, left_out.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(left_out):
        optimizer.step()


@dataclass(frozen=True)
class TrainingResult:
    """How a call of :meth:`Trainer.run` ended: steps done in all, and the signal that stopped it, if any."""

    step: int
    stopped_by: int | None
    seconds: float


class Trainer:
    """Trains a recipe's model on ``data`` and keeps the run folder.

    Args:
        config: the run; ``config.output`` is its folder.
        recipe: what is trained.
        data: images and labels; or latents and labels, for a recipe that takes them.

    Raises:
        ConfigError: the batch does not split evenly over processes and accumulation steps.
    """

    def __init__(self, config: RunConfig, recipe: Recipe, data: LoadedData):
        assert config.output is not None
        self.config, self.recipe, self.data = config, recipe, data
        self.folder: Path = config.output
        training = config.training
        keep_freed_memory()
        self.dtype = precision_of(training)
        self.accelerator = make_accelerator()
        self.hosts = HostGroup(self.accelerator)
        self.device = self.accelerator.device
        self.scaler = loss_scaler(self.device, self.dtype)
        use_tf32(self.device)
        check_batch(training, self.accelerator.num_processes)
        recipe.to(self.device)
        self.main = self._part("model", recipe.model)
        self.network: Any = self.main.network  # as called in training
        self.adversary = None if recipe.adversary is None else self._part("adversary", recipe.adversary)
        if compiles(training) and recipe.adversary is None:
            self.network = torch.compile(self.network, dynamic=False)  # every batch has one shape
        self.ema = EMA(recipe.model.parameters(), decay=training.ema_decay)
        self.step = 0
        self._nonfinite_in_a_row = 0
        self._unread: list[StepNumbers] = []  # on the device still
        self._window: dict[str, list[float]] = {}  # sum and count of each number since the last row

    def _part(self, name: str, module: nn.Module) -> Part:
        training = self.config.training
        compute_in(module, self.device, self.dtype)
        network = self.accelerator.prepare_model(module)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=can_fuse_optimizer(self.device),
        )
        return Part(name, module, network, optimizer)

    @cached_property
    def feed(self) -> Feed:
        """The training images on the device; made when first needed, for ``data`` may be replaced before."""
        accelerator = self.accelerator
        return Feed(self.config, self.data.train, self.device, accelerator.process_index, accelerator.num_processes)

    @property
    def parts(self) -> list[Part]:
        """The networks that are trained, each with its optimiser."""
        return [self.main] if self.adversary is None else [self.main, self.adversary]

    # ---- one step -------------------------------------------------------------------------------------------

    def _inputs(self, images: Tensor) -> Tensor:
        """What the recipe computes losses of: cached latents as they are, images prepared."""
        return images if self.data.latents is not None else self.recipe.prepare(images)

    def train_step(self, batch: Batch, share: slice) -> "StepNumbers":
        """One optimiser step, for which nothing waits for the device."""
        training, accelerator = self.config.training, self.accelerator
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(training.seed, Stream.NOISE, self.step))
        whole = self.recipe.draw(self.step, training.batch_size, generator, self.device)
        draws = whole.rows(share)
        size = len(batch.labels) // training.accumulation_steps
        self.network.train()
        found, adversary = [], self.adversary if self.recipe.judges(whole) else None
        for k in range(training.accumulation_steps):
            rows = slice(k * size, (k + 1) * size)
            torch.manual_seed(derive_seed(training.seed, Stream.DROPOUT, self.step, accelerator.process_index, k))
            inputs = self._inputs(self.feed.images(batch, rows))
            last = k == training.accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(self.main.network):
                losses = self.recipe.losses(self.network, inputs, batch.labels[rows], draws.rows(rows))
                self.scaler.scale(losses.each.mean() / training.accumulation_steps).backward()
            values = {"loss": losses.each.detach(), **losses.parts}
            if adversary is not None and losses.outputs is not None:
                with nullcontext() if last else accelerator.no_sync(adversary.network):
                    verdicts = self.recipe.adversary_losses(adversary.network, inputs, losses.outputs)
                    self.scaler.scale(verdicts.mean() / training.accumulation_steps).backward()
                values["adversary"] = verdicts.detach()
            found.append(values)
        norms, left_out = self._update([self.main] if adversary is None else [self.main, adversary])
        every = accelerator.gather({name: torch.cat([values[name] for values in found]) for name in found[0]})
        self.recipe.observe(whole, every["loss"], left_out)
        numbers = torch.stack([*(value.mean() for value in every.values()), norms[0].masked_fill(left_out, torch.nan)])
        return StepNumbers(self.step + 1, batch.indices[:NAMED_IMAGES], [*every, GRAD_NORM], numbers)

    def _update(self, trained: list[Part]) -> tuple[list[Tensor], Tensor]:
        """Clip the gradients and step the optimisers and the EMA, unless a gradient is not finite.

        Whether one is stays on the device, where fused optimisers read it: their weights and moments then stay as
        they are.

        Returns:
            norm of each part's gradient, and whether the step was left out (bool scalar).
        """
        training = self.config.training
        for part in trained:
            if self.scaler.is_enabled():
                self.scaler.unscale_(part.optimizer)
        norms = [nn.utils.clip_grad_norm_(part.module.parameters(), training.max_grad_norm) for part in trained]
        left_out = ~torch.isfinite(torch.stack(norms)).all()
        for part in trained:
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, training)
            step_unless(part.optimizer, left_out)
        for part in self.parts:
            part.optimizer.zero_grad()
        self.ema.step(self.recipe.model.parameters(), left_out.float())
        if self.scaler.is_enabled():
            self.scaler.update()
        return norms, left_out

    def _read(self, journal: Journal | None = None) -> float:
        """Read the numbers of the steps since the last reading, the one wait for the device; the newest loss.

        Steps that were left out because their gradient was not finite are reported. A run of them ends training.

        Raises:
            HeterodiffError: ``max_nonfinite_steps`` steps in a row were left out.
        """
        unread, self._unread = self._unread, []
        rows = read_numbers(unread)
        for taken, values in zip(unread, rows, strict=True):
            if math.isfinite(values[GRAD_NORM]):
                self._nonfinite_in_a_row = 0
                for name, value in values.items():
                    total, count = self._window.get(name, [0.0, 0])
                    self._window[name] = [total + value, count + 1]
                continue
            self._nonfinite_in_a_row += 1
            names = ", ".join(self.data.train.names[i] for i in taken.indices)
            report = (
                f"step {taken.step}: loss {values['loss']}: gradient not finite, step left out; images: {names}, ..."
            )
            if journal is not None:
                journal.say(report)
            if self._nonfinite_in_a_row >= self.config.training.max_nonfinite_steps and not self._scale_falls():
                raise HeterodiffError(
                    f"{self._nonfinite_in_a_row} steps in a row without a finite gradient; the last one: {report}. "
                    "The weights are those before them. Try a lower training.learning_rate or precision float32"
                )
        return rows[-1]["loss"] if rows else math.nan

    def _scale_falls(self) -> bool:
        """Whether float16 still looks for a loss scale: steps that overflow are left out, each halves the scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def step_once(self, batch: Batch | None = None) -> float:
        """Take one training step outside of a run, to try it; return the loss."""
        self._unread.append(self.train_step(batch or self.feed.batch(self.step), slice(None)))
        self.step += 1
        return self._read()

    # ---- evaluation while training --------------------------------------------------------------------------

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """The EMA weights in place of the trained ones."""
        with self.ema.applied_to(self.recipe.model.parameters()):
            self.recipe.model.eval()
            yield

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to 256 held-out images, the same at every call, prepared for the recipe, and their labels."""
        data: ImageDataset = self.data.val
        count = min(len(data), VALIDATION_IMAGES)
        chosen = np.random.default_rng(0).permutation(len(data))[:count].tolist()
        size = max(1, self.config.training.batch_size // self.config.training.accumulation_steps)
        for start in range(0, count, size):
            images, labels = data.batch(chosen[start : start + size])
            yield self._inputs(images.to(self.device)), labels

    def _evaluate(self, journal: Journal, request: StopRequest) -> None:
        """Validate and draw a preview in the first process, from the EMA weights; given up when asked to stop."""
        if self.accelerator.is_main_process:
            self._preview(journal, request)
        self.hosts.wait()

    def _preview(self, journal: Journal, request: StopRequest) -> None:
        journal.note("validation and preview")
        watch = self.recipe.model.register_forward_pre_hook(lambda *_: request.raise_if_asked())
        try:
            with self._ema_weights(), torch.no_grad(), any_kernels():  # sampling words has no deterministic ones
                seed = derive_seed(self.config.training.seed, Stream.VALIDATION)
                measured = self.recipe.validate(self._validation_batches(), seed)
                picture = self.recipe.preview(derive_seed(self.config.training.seed, Stream.PREVIEW))
        except Interrupted:
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._write()  # no step is lost for want of a picture
            raise RunError(
                f"out of memory in the preview after step {self.step}, whose checkpoint is written; go on with "
                f"training.preview_every={self.config.training.steps}, which leaves all but the last one out"
            ) from error
        finally:
            watch.remove()
        run = RunFolder(self.folder)
        run.write_picture(run.samples / f"step_{self.step:06d}.png", picture)
        journal.picture(self.step, picture)
        if measured:
            journal.row(self.step, measured)

    # ---- the loop -------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``.

        Raises:
            CheckpointError: it belongs to another recipe or network, or parts of it are missing.
        """
        kind = checkpoint.state.get("recipe")
        if kind != self.config.recipe:
            raise CheckpointError(f"checkpoint of recipe '{kind}', expected '{self.config.recipe}'")
        if checkpoint.state.get("run") != fingerprint(self.config):
            raise CheckpointError(f"checkpoint of step {checkpoint.step} belongs to a run of another configuration")
        try:
            restore(checkpoint, self.recipe, self.parts, self.ema, self.scaler)
            self._window = dict(checkpoint.state["window"])
            self._nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step} does not fit this run: {error}") from None
        self.step = checkpoint.step

    def save_weights(self) -> None:
        """Write the EMA weights, the ones to use, as a pipeline."""
        if self.accelerator.is_main_process:
            with self._ema_weights():
                RunFolder(self.folder).save_pipeline(self.step, self.recipe.save)

    def _save(self) -> None:
        """Write a checkpoint, and the EMA weights for pipelines."""
        self._write()
        self.hosts.wait()

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint = capture(self.step, self.recipe, self.parts, self.ema, self.scaler)
            checkpoint.state |= {
                "recipe": self.config.recipe,
                "run": fingerprint(self.config),
                "window": self._window,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
            }
            write_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.training.keep_checkpoints)
            self.save_weights()

    def run(self, stop_after: int | None = None, on_step: OnStep | None = None, quiet: bool = False) -> TrainingResult:
        """Train until the configured steps are done, ``stop_after`` is reached, or a signal asks to stop.

        Args:
            stop_after: stop, with a checkpoint, once so many steps are done in all.
            on_step: called after each step with its number (1-based) and loss.
        """
        training = self.config.training
        stop = min(training.steps, stop_after or training.steps)
        request = StopRequest()
        main = self.accelerator.is_main_process
        journal = Journal(self.folder, training.steps, self.step, training.tensorboard, quiet, main)
        with request.listening(), journal:
            self._steps(stop, request, journal, on_step)
            self._read(journal)
            self._save()
            if self.step == stop and request.signal is None:
                self._evaluate(journal, request)
            return TrainingResult(self.step, request.signal, journal.seconds)

    def _steps(self, stop: int, request: StopRequest, journal: Journal, on_step: OnStep | None) -> None:
        training = self.config.training
        batches = iter(self.feed.loader(self.step, stop))
        share = share_of(training.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        clock = StepClock()
        while self.step < stop and not self._asked_to_stop(request):
            with clock.waiting():
                batch = next(batches)
            self._unread.append(self.train_step(batch, share))
            self.step += 1
            clock.steps += 1
            journal.advance(self.step)
            logs = self.step % training.log_every == 0 or self.step == training.steps
            saves = any(self.step % every == 0 for every in (training.checkpoint_every, training.preview_every))
            if logs or saves or on_step is not None or self.device.type == "cpu":
                loss = self._read(journal)
                if on_step is not None:
                    on_step(self.step, loss)
            if logs:
                journal.row(self.step, self._row(clock))
                clock = StepClock()
            with clock.paused():
                if self.step % training.checkpoint_every == 0 and self.step < stop:
                    self._save()
                if self.step % training.preview_every == 0 and self.step < stop:
                    self._evaluate(journal, request)

    def _asked_to_stop(self, request: StopRequest) -> bool:
        """Whether any process was asked to stop; all must leave the loop after the same step."""
        request.signal = self.hosts.first_signal(request.signal)
        return request.signal is not None

    def _row(self, clock: StepClock) -> dict[str, float]:
        """The numbers to log: means since the last row, over the steps that counted."""
        window, self._window = self._window, {}
        return {
            "loss": math.nan,
            **{name: total / count for name, (total, count) in window.items()},
            "lr": learning_rate_at(self.step - 1, self.config.training),
            "images_per_second": round(self.config.training.batch_size * clock.steps / clock.seconds, 2),
            "waiting_share": round(clock.waited / clock.seconds, 4),
        }
