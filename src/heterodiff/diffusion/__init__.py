"""The diffusion process: noise schedules, objectives, timestep samplers, guidance, sampling and inversion."""
