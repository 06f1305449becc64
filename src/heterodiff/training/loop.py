"""The training loop: one for all recipes. It owns devices, precision, EMA, checkpoints, resume and logging."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heterodiff.config import RunConfig, TrainingConfig
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import LoadedData
from heterodiff.devices import default_device, has_bfloat16, process_state, use_tf32
from heterodiff.errors import CheckpointError, ConfigError, HeterodiffError
from heterodiff.memory import keep_freed_memory
from heterodiff.training.batches import Batch, StepBatches, Stream, derive_seed, share_of
from heterodiff.training.checkpoint import Checkpoint, write_checkpoint
from heterodiff.training.interrupt import Interrupted, StopRequest
from heterodiff.training.journal import Journal, StepClock
from heterodiff.training.recipes.base import VALIDATION_IMAGES, Recipe
from heterodiff.training.run_folder import fingerprint, save_pipeline
from heterodiff.training.state import Part, capture, restore

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"

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


def precision_of(config: TrainingConfig) -> str:
    """accelerate's name of the precision to train in.

    Raises:
        ConfigError: float16 without a GPU.
    """
    wanted, device = config.precision, default_device()
    if wanted == "float16" and device.type == "cpu":
        raise ConfigError("training.precision=float16 needs a GPU, found none; use float32 or bfloat16")
    if wanted == "auto":
        wanted = "bfloat16" if device.type != "cpu" and has_bfloat16(device) else "float32"
    return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[wanted]


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
        AcceleratorState._reset_state()  # a notebook may train twice, in different precisions
        process_state()  # chooses the device
        self.accelerator = Accelerator(mixed_precision=precision_of(training))
        self.device = self.accelerator.device
        use_tf32(self.device)
        check_batch(training, self.accelerator.num_processes)
        recipe.to(self.device)
        self.main = self._part("model", recipe.model)
        self.network: Any = self.main.network  # as called in training
        self.adversary = None if recipe.adversary is None else self._part("adversary", recipe.adversary)
        if training.compile:
            self.network = torch.compile(self.network, dynamic=False)  # every batch has one shape
        self.ema = EMAModel(recipe.model.parameters(), decay=training.ema_decay)
        self.ema.to(self.device)
        self.step = 0
        self._nonfinite_in_a_row = 0
        self._window: dict[str, list[float]] = {}  # sum and count of each number since the last row

    def _part(self, name: str, module: nn.Module) -> Part:
        training = self.config.training
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        return Part(name, module, *self.accelerator.prepare(module, optimizer))

    @property
    def parts(self) -> list[Part]:
        """The networks that are trained, each with its optimiser."""
        return [self.main] if self.adversary is None else [self.main, self.adversary]

    # ---- one step -------------------------------------------------------------------------------------------

    def _inputs(self, images: Tensor) -> Tensor:
        """What the recipe computes losses of: cached latents as they are, images prepared."""
        images = images.to(self.device)
        return images if self.data.latents is not None else self.recipe.prepare(images)

    def _train_step(self, batch: Batch, share: slice) -> tuple[dict[str, float], float]:
        """One optimiser step; the means of the loss and its parts, and the gradient norm, over all processes."""
        training, accelerator = self.config.training, self.accelerator
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(training.seed, Stream.NOISE, self.step))
        whole = self.recipe.draw(self.step, training.batch_size, generator, self.device)
        draws = whole.rows(share)
        images, labels = batch.images, batch.labels.to(self.device)
        rank = accelerator.process_index
        size = len(labels) // training.accumulation_steps
        self.network.train()
        found, adversary = [], self.adversary if self.recipe.judges(whole) else None
        for k in range(training.accumulation_steps):
            rows = slice(k * size, (k + 1) * size)
            torch.manual_seed(derive_seed(training.seed, Stream.DROPOUT, self.step, rank, k))
            inputs = self._inputs(images[rows])
            last = k == training.accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(self.network):
                losses = self.recipe.losses(self.network, inputs, labels[rows], draws.rows(rows))
                accelerator.backward(losses.each.mean() / training.accumulation_steps)
            values = {"loss": losses.each.detach(), **losses.parts}
            if adversary is not None and losses.outputs is not None:
                with nullcontext() if last else accelerator.no_sync(adversary.network):
                    verdicts = self.recipe.adversary_losses(adversary.network, inputs, losses.outputs)
                    accelerator.backward(verdicts.mean() / training.accumulation_steps)
                values["adversary"] = verdicts.detach()
            found.append(values)
        trained = [self.main] if adversary is None else [self.main, adversary]
        norms = [float(accelerator.clip_grad_norm_(p.network.parameters(), training.max_grad_norm)) for p in trained]
        every = accelerator.gather({name: torch.cat([values[name] for values in found]) for name in found[0]})
        norm = norms[0] if all(map(math.isfinite, norms)) else math.nan
        if math.isfinite(norm):
            for part in trained:
                for group in part.optimizer.param_groups:
                    group["lr"] = learning_rate_at(self.step, training)
                part.optimizer.step()
            self.ema.step(self.recipe.model.parameters())
            self.recipe.observe(whole, every["loss"])
        for part in self.parts:
            part.optimizer.zero_grad()
        return {name: float(value.mean()) for name, value in every.items()}, norm

    def _check_finite(self, loss: float, norm: float, batch: Batch, journal: Journal) -> None:
        """Report a step that was left out because its gradient was not finite; stop after a run of them."""
        if math.isfinite(norm):
            self._nonfinite_in_a_row = 0
            return
        self._nonfinite_in_a_row += 1
        names = ", ".join(self.data.train.names[i] for i in batch.indices[:8])
        report = f"step {self.step + 1}: loss {loss}, gradient norm {norm}: step left out; images: {names}, ..."
        journal.say(report)
        if self._nonfinite_in_a_row >= self.config.training.max_nonfinite_steps:
            raise HeterodiffError(
                f"{self._nonfinite_in_a_row} steps in a row without a finite gradient; the last one: {report}. "
                "The weights are those before them. Try a lower training.learning_rate or precision float32"
            )

    def step_once(self) -> float:
        """One training step outside of a run, for trying out; returns the loss."""
        batches = StepBatches(
            self.data.train, self.config.data, self.config.training.batch_size, self.config.training.seed
        )
        values, _ = self._train_step(batches[self.step], slice(None))
        self.step += 1
        return values["loss"]

    # ---- evaluation while training --------------------------------------------------------------------------

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """The EMA weights in place of the trained ones."""
        parameters = list(self.recipe.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.recipe.model.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to 256 held-out images, the same at every call, prepared for the recipe, and their labels."""
        data: ImageDataset = self.data.val
        count = min(len(data), VALIDATION_IMAGES)
        chosen = np.random.default_rng(0).permutation(len(data))[:count].tolist()
        size = max(1, self.config.training.batch_size // self.config.training.accumulation_steps)
        for start in range(0, count, size):
            images, labels = data.batch(chosen[start : start + size])
            yield self._inputs(images), labels.to(self.device)

    def _evaluate(self, journal: Journal, request: StopRequest) -> None:
        """Validation loss and preview picture, from the EMA weights; given up when asked to stop."""
        if not self.accelerator.is_main_process:
            return
        journal.note("validation and preview")
        watch = self.recipe.model.register_forward_pre_hook(lambda *_: request.raise_if_asked())
        try:
            with self._ema_weights(), torch.no_grad():
                seed = derive_seed(self.config.training.seed, Stream.VALIDATION)
                measured = self.recipe.validate(self._validation_batches(), seed)
                picture = self.recipe.preview(derive_seed(self.config.training.seed, Stream.PREVIEW))
        except Interrupted:
            return
        finally:
            watch.remove()
        folder = self.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step_{self.step:06d}.png")
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
            restore(checkpoint, self.recipe, self.parts, self.ema, self.accelerator.scaler)
            self._window = dict(checkpoint.state["window"])
            self._nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step} does not fit this run: {error}") from None
        self.step = checkpoint.step

    def save_weights(self) -> None:
        """Write the EMA weights, the ones to use, as a pipeline."""
        if self.accelerator.is_main_process:
            with self._ema_weights():
                save_pipeline(self.folder, self.step, self.recipe.save)

    def _save(self) -> None:
        """Write a checkpoint, and the EMA weights for pipelines."""
        if self.accelerator.is_main_process:
            checkpoint = capture(self.step, self.recipe, self.parts, self.ema, self.accelerator.scaler)
            checkpoint.state |= {
                "recipe": self.config.recipe,
                "run": fingerprint(self.config),
                "window": self._window,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
            }
            write_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.training.keep_checkpoints)
            self.save_weights()
        self.accelerator.wait_for_everyone()

    def _loader(self, stop: int) -> DataLoader[Batch]:
        training = self.config.training
        batches = StepBatches(
            self.data.train,
            self.config.data,
            training.batch_size,
            training.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.step, stop),
            num_workers=training.num_workers,
            persistent_workers=training.num_workers > 0,
        )

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
            self._save()
            if self.step == stop and request.signal is None:
                self._evaluate(journal, request)
            return TrainingResult(self.step, request.signal, journal.seconds)

    def _steps(self, stop: int, request: StopRequest, journal: Journal, on_step: OnStep | None) -> None:
        training = self.config.training
        batches = iter(self._loader(stop))
        share = share_of(training.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        clock = StepClock()
        while self.step < stop and not self._asked_to_stop(request):
            with clock.waiting():
                batch = next(batches)
            values, norm = self._train_step(batch, share)
            self._check_finite(values["loss"], norm, batch, journal)
            self.step += 1
            clock.steps += 1
            if math.isfinite(norm):
                for name, value in {**values, "grad_norm": norm}.items():
                    total, count = self._window.get(name, [0.0, 0])
                    self._window[name] = [total + value, count + 1]
            journal.advance(self.step)
            if on_step is not None:
                on_step(self.step, values["loss"])
            if self.step % training.log_every == 0 or self.step == training.steps:
                journal.row(self.step, self._row(clock))
                clock = StepClock()
            with clock.paused():
                if self.step % training.checkpoint_every == 0 and self.step < stop:
                    self._save()
                if self.step % training.preview_every == 0 and self.step < stop:
                    self._evaluate(journal, request)

    def _asked_to_stop(self, request: StopRequest) -> bool:
        """Whether any process was asked to stop; all must leave the loop after the same step."""
        if self.accelerator.num_processes > 1:
            number = torch.tensor(request.signal or 0, device=self.device)
            request.signal = int(self.accelerator.gather(number).max()) or None
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
