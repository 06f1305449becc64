"""The diffusion process under the method names of guided-diffusion: losses and sampling for any of its networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.noise import gaussian_noise
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.diffusion.sampling import sample
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError

Model = Callable[..., Tensor]
"""(z (B, C, H, W), timesteps (B,), **model_kwargs) -> (B, C or 2C, H, W), a plain tensor."""


class GaussianDiffusion:
    """Noising, training losses and sampling of a noise schedule, on our objective and samplers.

    Args:
        steps: number T of training timesteps.
        noise_schedule: ``linear`` or ``cosine``.
        learn_sigma: the network also predicts the variance of reverse steps.
        predict_xstart: it predicts clean images instead of the noise.
        timestep_respacing: steps of sampling, ``""`` for all, ``"250"``, or ``"ddim50"``.

    Attributes:
        num_timesteps: T, below which timesteps for :meth:`training_losses` are drawn.

    Raises:
        ConfigError: an unknown schedule, or a respacing that is no number of steps.
    """

    def __init__(
        self,
        steps: int = 1000,
        noise_schedule: str = "linear",
        learn_sigma: bool = False,
        predict_xstart: bool = False,
        timestep_respacing: str | int = "",
    ):
        if noise_schedule not in ("linear", "cosine"):
            raise ConfigError(f"noise_schedule: expected linear or cosine, found {noise_schedule!r}")
        self.config = DiffusionConfig(
            schedule=noise_schedule,
            num_train_timesteps=steps,
            prediction="sample" if predict_xstart else "epsilon",
            learn_variance=learn_sigma,
        )
        self.schedule = NoiseSchedule.from_config(self.config)
        self.objective = DiffusionObjective(self.config, self.schedule)
        self.num_timesteps = steps
        self.sampling_steps = _number_of_steps(timestep_respacing, steps)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return z_t of clean ``x_start`` (B, C, H, W) at timesteps ``t`` (B,)."""
        return self.schedule.add_noise(x_start, torch.randn_like(x_start) if noise is None else noise, t)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss`` (B,), with gradient, and its parts; see :class:`DiffusionObjective`.

        Args:
            x_start: clean images in [-1, 1] or latents of unit std.
            t: (B,) int64, from 0 to ``num_timesteps - 1``.
            noise: standard normal; default: drawn from torch's global generator.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        losses, parts = self.objective.losses(lambda z, time: model(z, time, **(model_kwargs or {})), x_start, t, noise)
        return {"loss": losses, **parts}

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw (B, C, H, W) by ancestral sampling (Ho et al. 2020).

        Args:
            clip_denoised: clip predicted images to [-1, 1]; not for latents.
            device: default: that of ``noise``, else of the model.
        """
        return self._sample("ddpm", model, shape, noise, clip_denoised, model_kwargs, device, generator)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw (B, C, H, W) by DDIM (Song et al. 2021); arguments as of :meth:`p_sample_loop`."""
        return self._sample("ddim", model, shape, noise, clip_denoised, model_kwargs, device, generator)

    def _sample(
        self,
        sampler: str,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        clip_denoised: bool,
        model_kwargs: Mapping[str, Any] | None,
        device: torch.device | str | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        if noise is None:
            parameters = getattr(model, "parameters", None)
            device = device or (next(parameters()).device if parameters is not None else "cpu")
            noise = gaussian_noise(shape, generator, device)
        return sample(
            lambda z, time: model(z, time.to(z.device), **(model_kwargs or {})),
            self.schedule,
            self.config.prediction,
            noise=noise,
            sampler=sampler,
            num_inference_steps=self.sampling_steps,
            generator=generator,
            learned_variance=self.config.learn_variance,
            clip_sample=clip_denoised,
        )


def _number_of_steps(respacing: str | int, steps: int) -> int:
    text = str(respacing).removeprefix("ddim")
    if text == "":
        return steps
    if not text.isdecimal() or not 1 <= int(text) <= steps:
        raise ConfigError(
            f"timestep_respacing={respacing!r}: expected a number of steps from 1 to {steps}, such as '250' or 'ddim50'"
        )
    return int(text)
