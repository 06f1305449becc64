"""Drawing with a diffusers scheduler of the user's choice, in the loop that diffusers' own pipelines run."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers import DDPMParallelScheduler
from torch import Tensor

from heterodiff.diffusion.guidance import Denoise
from heterodiff.diffusion.noise import Generators
from heterodiff.diffusion.sampling import AfterStep
from heterodiff.errors import ConfigError

FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
LEARNED = ("learned", "learned_range")
"""The ``variance_type`` of schedulers that draw with the variance channels of a network."""
MAX_DIFFERENCE = 1e-4
"""Tolerance between the alpha_bar of two schedules that are the same up to rounding."""


def _moves_along_flow(scheduler: Any) -> bool:
    return isinstance(scheduler, FLOW_SCHEDULERS) or bool(scheduler.config.get("use_flow_sigmas"))


def describes_training(scheduler: Any) -> bool:
    """Return True for the kinds of scheduler that runs are saved with, which describe their training."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        config = scheduler.config
        return config.shift == 1.0 and not (config.use_dynamic_shifting or config.invert_sigmas)
    return isinstance(scheduler, DDPMScheduler)


def training_scheduler_of(scheduler: Any) -> Any:
    """Return the scheduler that describes the training of a model saved with ``scheduler``."""
    if describes_training(scheduler):
        return scheduler
    if _moves_along_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps)
    return DDPMScheduler.from_config(scheduler.config)


def check_scheduler(scheduler: Any, trained: Any) -> None:
    """Check that ``scheduler`` can draw from a network whose training ``trained`` describes.

    Raises:
        ConfigError: no step(model_output, timestep, sample); another schedule, kind of prediction, or kind of path
            (noise schedule or flow).
    """
    name, own = type(scheduler).__name__, type(trained).__name__
    way_out = f"take another, made by {name}.from_config(pipe.scheduler.config), or name a sampler="
    if not _has_steps(scheduler):
        raise ConfigError(f"scheduler {name}: has no step(model_output, timestep, sample); {way_out}")
    if _moves_along_flow(scheduler) != _moves_along_flow(trained):
        fitting = "FlowMatchEulerDiscreteScheduler" if _moves_along_flow(trained) else "EulerDiscreteScheduler"
        raise ConfigError(
            f"scheduler {name}: does not fit this model, whose training {own} describes; take one like {fitting}, or "
            "name a sampler="
        )
    expected, found = (_facts(one) for one in (trained, scheduler))
    if wrong := [key for key in expected if expected[key] != found[key]]:
        raise ConfigError(
            f"scheduler {name}: expected {wrong[0]} {expected[wrong[0]]} as in training, found {found[wrong[0]]}; "
            f"{way_out}"
        )
    if not _moves_along_flow(trained) and not _same_noise(scheduler, trained):
        raise ConfigError(f"scheduler {name}: its noise schedule is not that of the training; {way_out}")


def _has_steps(scheduler: Any) -> bool:
    step = getattr(scheduler, "step", None)
    if step is None or not hasattr(scheduler, "set_timesteps"):
        return False
    needed = [p.name for p in inspect.signature(step).parameters.values() if p.default is p.empty]
    return needed == ["model_output", "timestep", "sample"]


def _facts(scheduler: Any) -> dict[str, Any]:
    config = scheduler.config
    prediction = "flow_prediction" if isinstance(scheduler, FLOW_SCHEDULERS) else config.get("prediction_type")
    return {"num_train_timesteps": config.get("num_train_timesteps"), "prediction_type": prediction}


def _same_noise(scheduler: Any, trained: Any) -> bool:
    found = getattr(scheduler, "alphas_cumprod", None)
    return found is not None and torch.allclose(
        found.double(), trained.alphas_cumprod.double(), atol=MAX_DIFFERENCE, rtol=0
    )


@torch.no_grad()
def sample_with_scheduler(
    denoise: Denoise,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    timesteps: Sequence[int] | None = None,
    generator: Generators = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Draw clean images or latents with a scheduler that :func:`check_scheduler` accepts.

    Spacing, clipping and added noise are those of the scheduler's configuration.

    Args:
        denoise, after_step: as for :func:`heterodiff.diffusion.sampling.sample`.
        scheduler: its state is reset.
        noise: (B, C, H, W) standard normal.
        timesteps: of the scheduler, descending, instead of num_inference_steps; not all schedulers take them.

    Returns:
        (B, C, H, W) float32.

    Raises:
        ConfigError: steps or settings that the scheduler does not take.
    """
    channels = noise.shape[1]
    learned = scheduler.config.get("variance_type") in LEARNED
    if learned and not isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler):
        # Others copy this setting but have no use for the channels; some then cut after the third.
        scheduler, learned = type(scheduler).from_config(scheduler.config, variance_type=None), False
    _set_timesteps(scheduler, num_inference_steps, timesteps)
    randomness = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    z = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for number, t in enumerate(scheduler.timesteps, start=1):
        z_network = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        output = denoise(z_network, torch.full((len(z),), float(t))).float()
        with _explained(scheduler):
            z = scheduler.step(output if learned else output[:, :channels], t, z, return_dict=False, **randomness)[0]
        if after_step is not None:
            z, go_on = after_step(number, len(scheduler.timesteps), t, z)
            if not go_on:
                break
    return z.float()


def _set_timesteps(scheduler: Any, count: int, timesteps: Sequence[int] | None) -> None:
    """Set the steps, which stay on the CPU, so that reading them waits for no device."""
    total = scheduler.config.num_train_timesteps
    if not 1 <= count <= total:
        raise ConfigError(f"num_inference_steps {count}: expected 1 to {total}, the timesteps of training")
    with _explained(scheduler):
        if timesteps is None:
            scheduler.set_timesteps(count)
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=list(timesteps))
        else:
            raise ConfigError(
                f"scheduler {type(scheduler).__name__} takes no explicit timesteps; give num_inference_steps"
            )
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ConfigError(
            f"scheduler {type(scheduler).__name__}: its timesteps rise, from an image to noise; take one whose "
            "timesteps fall"
        )


@contextmanager
def _explained(scheduler: Any) -> Iterator[None]:
    """Turn errors of the scheduler into a :class:`ConfigError`."""
    try:
        with warnings.catch_warnings():
            # diffusers passes tensors to numpy functions; numpy 2 warns about that with some versions of torch.
            warnings.filterwarnings("ignore", "__array", DeprecationWarning)
            yield
    except ConfigError:
        raise
    except (ValueError, TypeError, NotImplementedError, IndexError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"scheduler {type(scheduler).__name__}: cannot draw from this model with these settings ({error}); change "
            "the steps or its settings, or name a sampler="
        ) from error
