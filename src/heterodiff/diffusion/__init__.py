"""The diffusion process: noise schedules, objectives, timestep samplers, guidance, sampling and inversion."""

from heterodiff.diffusion.guidance import guided_denoiser, null_labels
from heterodiff.diffusion.inversion import invert
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.diffusion.prediction import PREDICTIONS, target_of, to_x0_eps
from heterodiff.diffusion.sampling import draw_noise, list_samplers, make_sampler, sample
from heterodiff.diffusion.schedule import NoiseSchedule, prediction_of, training_scheduler
from heterodiff.diffusion.timesteps import make_timestep_sampler

__all__ = [
    "PREDICTIONS",
    "DiffusionObjective",
    "NoiseSchedule",
    "draw_noise",
    "guided_denoiser",
    "invert",
    "list_samplers",
    "make_sampler",
    "make_timestep_sampler",
    "null_labels",
    "prediction_of",
    "sample",
    "target_of",
    "to_x0_eps",
    "training_scheduler",
]
