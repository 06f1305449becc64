"""Sections ``diffusion`` and ``training``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from heterodiff.config.base import BatchSize, NonNegativeInt, PositiveInt, Section, Seed, Share


class DiffusionConfig(Section):
    """Forward process and objective."""

    schedule: Literal["linear", "cosine"] = Field(
        "cosine", description="noise schedule (betas), not of prediction: flow; linear in earlier runs"
    )
    num_train_timesteps: Annotated[int, Field(ge=10, le=1_000_000)] = Field(1000, description="number of noise levels")
    prediction: Literal["epsilon", "v", "sample", "flow"] = Field(
        "v",
        description="target of the network: noise, v, clean image, or velocity of a rectified flow; epsilon in earlier "
        "runs",
    )
    noise: Literal["gaussian", "simplex"] = Field(
        "gaussian",
        description="noise added to images; simplex: octaves of simplex noise, not Gaussian, which hide shapes rather "
        "than pixels (AnoDDPM, Wyatt et al. 2022), for `segmentation.method: partial-noising`",
    )
    learn_variance: bool = Field(False, description="learn the variance of reverse steps, too (Nichol & Dhariwal 2021)")
    weighting: Literal["none", "min-snr"] = Field(
        "none", description="loss weights of noise levels; min-snr: Hang et al. 2023"
    )
    snr_gamma: PositiveFloat = Field(5.0, description="largest signal-to-noise ratio of weighting: min-snr")
    timestep_sampler: Literal["uniform", "loss-second-moment"] = Field(
        "uniform",
        description="sampling of timesteps in training; loss-second-moment: more often where the loss is large",
    )
    p_uncond: Share = Field(0.1, description="probability of dropping the condition in training")

    @model_validator(mode="after")
    def _flow_has_no_variance(self) -> "DiffusionConfig":
        if self.learn_variance and self.prediction == "flow":
            raise ValueError("learn_variance needs prediction epsilon, v or sample; flow has no variance")
        return self


class TrainingConfig(Section):
    """Training loop: optimiser, precision, and intervals of logs, previews and checkpoints."""

    steps: PositiveInt = Field(20_000, description="optimiser steps")
    minutes: PositiveFloat | None = Field(
        None,
        description="train for about this long, in place of training.steps: the number of steps is measured before "
        "the first one, and fixed from then on",
    )
    batch_size: BatchSize = Field(64, description="images per optimiser step, summed over all processes")
    accumulation_steps: BatchSize = Field(
        1, description="gradient accumulation: parts of a batch per process; more take less memory"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="learning rate of AdamW after warm-up; default: by the number of parameters, 1e-3 for 2 million",
    )
    warmup_steps: NonNegativeInt | None = Field(
        None,
        description="steps over which the learning rate rises linearly; default: a twentieth of the steps, at most 500",
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="learning rate after the warm-up; cosine: half a cosine, to zero at the last step"
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="weight decay of AdamW")
    max_grad_norm: PositiveFloat = Field(1.0, description="norm to which gradients are clipped")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="decay of the EMA weights, the ones that are used; at step n at most n / (n + 9); default: "
        "averages over a tenth of the steps, at most 0.9999",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on GPUs with it, else float32"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the network: minutes at the start, then faster steps; needs a C++ compiler on a "
        "CPU. auto: where it pays for this number of steps, by a measurement on such a device",
    )
    fsdp: bool = Field(
        False,
        description="split weights, EMA and optimiser over the processes (FSDP2), for networks that one GPU cannot "
        "hold; false: each process has all of them (DDP)",
    )
    deterministic: bool = Field(
        False,
        description="deterministic GPU kernels: slower, but resumed runs equal others bit by bit (always so on CPUs)",
    )
    num_workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="worker processes that load images; 0: none"
    )
    seed: Seed = Field(0, description="random seed of initial weights, image order, noise, dropout and augmentation")
    log_every: PositiveInt = Field(20, description="steps between rows of metrics.jsonl")
    preview_every: PositiveInt = Field(1000, description="steps between validations, each with a preview in samples/")
    checkpoint_every: PositiveInt = Field(1000, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="number of newest checkpoints to keep")
    max_nonfinite_steps: PositiveInt = Field(10, description="stop after this many consecutive non-finite gradients")
    tensorboard: bool = Field(True, description="also write event files for TensorBoard")
