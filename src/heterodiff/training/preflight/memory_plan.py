"""Memory that training needs, and settings that lower it."""

from collections.abc import Iterator
from dataclasses import dataclass

from heterodiff.config import RunConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.devices import default_device, free_memory, process_count
from heterodiff.errors import ConfigError
from heterodiff.lazy import loaded
from heterodiff.tasks import task_of
from heterodiff.training.checkpoints.resume import parts_are_alike
from heterodiff.training.preflight.memory_costs import BYTES_PER_PARAMETER, Cost, MemoryTerms

UNCERTAINTY = 1.6
"""Largest ratio of the estimate to what a process takes."""
USABLE_SHARE = 0.9
"""Share of the free memory to plan with; the rest is for fragments, libraries and other programs."""
RECOMPUTATION = ({"memory_optimization": True, "gradient_checkpointing": False}, {"gradient_checkpointing": True})
"""Keys of ``model`` that recompute activations in the backward pass: cheap ones only, then all."""


@dataclass(frozen=True)
class MemoryPlan:
    """A way to run a training step, and the memory it needs.

    Attributes:
        changes: ``key=value`` overrides of the configuration; () for the configuration as it is.
        peak_bytes: estimated peak of one process, beside what Python and its libraries take.
    """

    changes: tuple[str, ...]
    peak_bytes: float


def training_memory_bytes(config: RunConfig, spec: ImageSpec) -> float:
    """Estimate the peak memory of a training step in one process, in bytes, beside what Python and its libraries take.

    The parameters five times (weights, gradients, two moments of AdamW, EMA), the activations saved for the backward
    pass of one part of the batch, transient memory, and scratch space. In bfloat16 and float16 autocast adds a copy of
    the weights and halves most activations.

    Raises:
        ConfigError: no network can be built for these images.
    """
    return _terms(config).cost(config, spec).peak(images_at_once(config))


def _terms(config: RunConfig) -> MemoryTerms:
    terms: MemoryTerms = loaded(task_of(config).memory)
    return terms


def images_at_once(config: RunConfig) -> int:
    """Number of images that one process has in the network at the same time."""
    return max(1, config.training.batch_size // (config.training.accumulation_steps * process_count()))


def check_fits(config: RunConfig, spec: ImageSpec) -> None:
    """Refuse training that cannot fit into the memory of this machine, before anything large is built.

    Small networks on small images are not estimated, which takes seconds.

    Raises:
        ConfigError: it needs far more memory than is free; what would fit is named.
    """
    free, where = free_memory(default_device())
    pixels = spec.height * spec.width
    batch = 2 * 4 * spec.channels * pixels * config.training.batch_size  # images and noise, in float32
    if batch > free:
        fits = int(free / (batch / config.training.batch_size))
        raise ConfigError(
            f"training.batch_size={config.training.batch_size}: its images alone take {batch / 1e9:,.1f} GB, "
            f"{free / 1e9:.1f} GB are free {where}; up to {fits} would fit beside nothing else: choose far fewer"
        )
    if _at_most(config, spec) < free or training_memory_bytes(config, spec) < UNCERTAINTY * free:
        return
    raise ConfigError(memory_check(config, spec)[1])


def memory_check(config: RunConfig, spec: ImageSpec) -> tuple[bool, str]:
    """Return whether training fits into the free memory, and a line with its needs and what would help."""
    free, where = free_memory(default_device())
    fits, text = advice(config, spec, free)
    return fits, f"{free / 1e9:.1f} GB free {where}; training needs {text}"


def _at_most(config: RunConfig, spec: ImageSpec) -> float:
    """Rough upper bound of the bytes that training takes with any network of these widths."""
    widths, depth = _terms(config).sizes(config)
    kept = 500 * depth * widths[0] * spec.height * spec.width * images_at_once(config)
    return kept + 10 * depth * BYTES_PER_PARAMETER * 9 * max(widths) ** 2


def suggest_plan(config: RunConfig, spec: ImageSpec, budget_bytes: float) -> MemoryPlan | None:
    """Return the fastest way to take the same training step within ``budget_bytes``; None if there is none.

    Recomputing cheap activations costs about a tenth more time, splitting a batch next to none; so parts of at least
    eight images come before recomputation, and that before smaller parts. Neither changes what is learned.
    """
    best: tuple[tuple[float, ...], MemoryPlan] | None = None
    for order, (changes, cost) in enumerate(_recomputations(config, spec)):
        now = config.training.accumulation_steps
        for parts in _divisors(config.training.batch_size, now) if parts_are_alike(config) else [now]:
            images = config.training.batch_size // parts
            peak = cost.peak(images)
            if peak > budget_bytes:
                continue
            split = () if parts == now else (f"training.accumulation_steps={parts}",)
            rank = (images < min(8, config.training.batch_size), order, parts)
            if best is None or rank < best[0]:
                best = rank, MemoryPlan((*split, *changes), peak)
            break
    return None if best is None else best[1]


def largest_batch(config: RunConfig, spec: ImageSpec, budget_bytes: float) -> int:
    """Number of images that fit into ``budget_bytes`` at once with this configuration's recomputation."""
    cost = _terms(config).cost(config, spec)
    rest = budget_bytes - cost.peak(0)
    return max(0, int(rest / (cost.peak(1) - cost.peak(0))))


def _recomputations(config: RunConfig, spec: ImageSpec) -> Iterator[tuple[tuple[str, ...], Cost]]:
    """Yield overrides that recompute more and more, and their costs; first the configuration as it is."""
    terms = _terms(config)
    least = terms.cost(config, spec)
    yield (), least
    if not terms.recomputes:
        return
    for keys in RECOMPUTATION:
        model = config.model.model_copy(update=keys)
        cost = terms.cost(config.model_copy(update={"model": model}), spec)
        if cost.kept < least.kept:
            least = cost
            yield tuple(f"model.{key}={str(value).lower()}" for key, value in keys.items() if value), cost


def _divisors(batch_size: int, least: int) -> list[int]:
    return [n for n in range(least, batch_size + 1) if batch_size % n == 0 and n % least == 0]


def advice(config: RunConfig, spec: ImageSpec, free_bytes: float) -> tuple[bool, str]:
    """Return whether training fits into ``free_bytes``, and a line with its needs and what would help."""
    needed = training_memory_bytes(config, spec)
    budget = USABLE_SHARE * free_bytes
    text = f"about {needed / 1e9:.2f} GB for {images_at_once(config)} images at once"
    if needed <= budget:
        return True, f"{text}; up to {largest_batch(config, spec, budget)} would fit"
    plan = suggest_plan(config, spec, budget)
    if plan is None:
        return False, f"{text}; even one image at a time is too much: choose a smaller {_terms(config).smaller}"
    return False, f"{text}; the same training in {plan.peak_bytes / 1e9:.2f} GB: {' '.join(plan.changes)}"
