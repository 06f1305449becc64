"""Sections ``diffusion`` and ``training``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from heterodiff.config.base import BatchSize, Positive, Section, Seed


class DiffusionConfig(Section):
    """The forward process and what the network learns."""

    schedule: Literal["linear", "cosine"] = Field("linear", description="betas; not used by prediction: flow")
    num_train_timesteps: Annotated[int, Field(ge=10, le=1_000_000)] = 1000
    prediction: Literal["epsilon", "v", "sample", "flow"] = "epsilon"
    learn_variance: bool = False
    weighting: Literal["none", "min-snr"] = "none"
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    p_uncond: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="probability of dropping the condition in training"
    )

    @model_validator(mode="after")
    def _flow_has_no_variance(self) -> "DiffusionConfig":
        if self.learn_variance and self.prediction == "flow":
            raise ValueError("learn_variance needs prediction epsilon, v or sample; flow has no variance")
        return self


class TrainingConfig(Section):
    """The loop."""

    steps: Positive = 20_000
    batch_size: BatchSize = Field(64, description="images per optimiser step, over all processes")
    accumulation_steps: BatchSize = Field(1, description="parts a process computes its share of a batch in")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
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
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    seed: Seed = 0
    log_every: Positive = 20
    preview_every: Positive = 1000
    checkpoint_every: Positive = 1000
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    max_nonfinite_steps: Positive = Field(10, description="stop after so many non-finite losses in a row")
    tensorboard: bool = True
