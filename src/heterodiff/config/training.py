"""Sections ``diffusion`` and ``training``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from heterodiff.config.base import BatchSize, Positive, Section, Seed


class DiffusionConfig(Section):
    """The forward process and what the network learns."""

    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="noise schedule (betas); not used by prediction: flow"
    )
    num_train_timesteps: Annotated[int, Field(ge=10, le=1_000_000)] = Field(
        1000, description="noise levels of the schedule"
    )
    prediction: Literal["epsilon", "v", "sample", "flow"] = Field(
        "epsilon",
        description="what the network predicts: the noise, v, the clean image, or the velocity of a rectified flow",
    )
    learn_variance: bool = Field(
        False, description="also learn the variance of the reverse steps (Nichol & Dhariwal 2021)"
    )
    weighting: Literal["none", "min-snr"] = Field(
        "none", description="loss weight of the noise levels; min-snr: Hang et al. 2023"
    )
    snr_gamma: Annotated[float, Field(gt=0)] = Field(
        5.0, description="largest signal-to-noise ratio that weighting: min-snr counts"
    )
    timestep_sampler: Literal["uniform", "loss-second-moment"] = Field(
        "uniform",
        description="how training timesteps are drawn; loss-second-moment: more often where the loss is large",
    )
    p_uncond: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="probability of dropping the condition in training"
    )

    @model_validator(mode="after")
    def _flow_has_no_variance(self) -> "DiffusionConfig":
        if self.learn_variance and self.prediction == "flow":
            raise ValueError("learn_variance needs prediction epsilon, v or sample; flow has no variance")
        return self


class TrainingConfig(Section):
    """The training loop: steps, optimiser, precision, and what is written how often."""

    steps: Positive = Field(20_000, description="optimiser steps")
    batch_size: BatchSize = Field(64, description="images per optimiser step, over all processes")
    accumulation_steps: BatchSize = Field(
        1, description="parts in which a process computes its share of a batch; more take less memory"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        2e-4, description="learning rate of AdamW, after the warm-up"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        500, description="steps over which the learning rate rises linearly"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="after the warm-up; cosine: half a cosine, to zero at the last step"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="weight decay of AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="norm to which larger gradients are clipped")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9999,
        description="decay of the EMA weights, which are the ones to use; at step n at most n / (n + 9), so that short "
        "runs are averaged as well",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the GPU has it, else float32"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the network: minutes at the start, faster steps; needs a C++ compiler on a CPU. "
        "auto: where a committed measurement on such a device says that it pays for so many steps",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: kernels that give the same bits every time, so that a resumed run equals one that was "
        "not interrupted bit by bit; slower. On a CPU it always does",
    )
    num_workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="processes that load images; 0: the training process itself"
    )
    seed: Seed = Field(0, description="seed of initial weights, order of the images, noise, dropout and augmentation")
    log_every: Positive = Field(20, description="steps between rows of metrics.jsonl")
    preview_every: Positive = Field(1000, description="steps between validations, each with a preview in samples/")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="how many of the newest checkpoints are kept")
    max_nonfinite_steps: Positive = Field(
        10, description="stop after this many steps in a row without a finite gradient"
    )
    tensorboard: bool = Field(True, description="also write event files for TensorBoard")
