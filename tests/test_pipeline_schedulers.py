"""Schedulers of diffusers in place of the run's own: honoured as diffusers' loop draws with them, or refused."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers

import heterodiff as hd
from heterodiff.diffusion.schedule import training_scheduler
from heterodiff.errors import CheckpointError, ConfigError
from heterodiff.models.variants import create_model
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from tests.training_runs import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers, in the loop by hand

STEPS, LABELS = 4, [1, 0]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DRAWS = """
    DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete
    EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep
"""
DRAWS_FLOWS = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete"


def pipeline(prediction: str = "v", **diffusion: Any) -> GenerationPipeline:
    """A pipeline around a network with random weights."""
    torch.manual_seed(0)
    linear = {} if prediction == "flow" else {"diffusion__schedule": "linear"}  # one of diffusers' is NaN on the cosine
    config = tiny_config(Path("unused"), diffusion__prediction=prediction, **linear, **diffusion).diffusion
    scheduler = training_scheduler(config, clip_sample=True)
    channels = 2 if config.learn_variance else 1
    network = create_model(
        "unet",
        sample_size=8,
        in_channels=1,
        out_channels=channels,
        num_classes=2,
        model_channels=32,
        channel_mult=(1,),
        layers_per_block=1,
        attention_resolutions=(),
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipe = GenerationPipeline(network.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: GenerationPipeline, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.5, **options}
    return pipe(LABELS, generator=seeded_generators(0, 2), **options).images


@torch.no_grad()
def by_hand(unet: Any, scheduler: Any) -> torch.Tensor:
    """The loop of a diffusers pipeline with classifier-free guidance, as DiTPipeline has it."""
    generators = seeded_generators(0, 2)
    latents = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scheduler.set_timesteps(STEPS)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        conditional = unet(given, t, class_labels=torch.tensor(LABELS)).sample
        unconditional = unet(given, t, class_labels=torch.tensor([-1, -1])).sample
        mean = unconditional[:, :1] + 1.5 * (conditional[:, :1] - unconditional[:, :1])
        variance = conditional[:, 1:] if isinstance(scheduler, diffusers.DDPMScheduler) else mean[:, :0]
        output = torch.cat([mean, variance], dim=1)
        latents = scheduler.step(output, t, latents, **extra).prev_sample
    return (latents / 2 + 0.5).clamp(0, 1)


def every_scheduler() -> list[str]:
    found = [name for name in dir(schedulers) if name.endswith("Scheduler")]
    assert len(found) > 40
    return [name for name in found if inspect.isclass(getattr(schedulers, name))]


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_every_scheduler_draws_as_by_hand_or_is_refused(prediction: str) -> None:
    pipe = pipeline(prediction)
    own, before = pipe.scheduler, draw(pipe)
    honoured, refused = [], {}
    for name in every_scheduler():
        try:
            scheduler = getattr(schedulers, name).from_config(own.config)
        except (TypeError, ValueError, ImportError):
            continue  # cannot be made for this model at all, as diffusers says itself
        if not hasattr(scheduler, "config"):
            continue
        try:
            pipe.scheduler = scheduler
            found = draw(pipe)
        except ConfigError as error:
            refused[name] = str(error)
            pipe.scheduler = own
            continue
        honoured.append(name)
        expected = by_hand(pipe.unet, getattr(schedulers, name).from_config(own.config))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(found, before)
        pipe.scheduler = own
    fitting = DRAWS if prediction == "v" else DRAWS_FLOWS
    assert set(honoured) == {f"{name}Scheduler" for name in fitting.split()}
    assert all(name in message for name, message in refused.items())
    assert torch.equal(draw(pipe), before)  # the run's own scheduler is back, and with it the run's sampler


def test_schedulers_that_move_along_flows_draw_from_flows() -> None:
    pipe = pipeline("flow")
    own = pipe.scheduler
    for cls in (diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.scheduler = cls.from_config(own.config, **FLOW)
        torch.testing.assert_close(
            draw(pipe), by_hand(pipe.unet, cls.from_config(own.config, **FLOW)), atol=2e-5, rtol=0
        )
    shifted = diffusers.FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=3.0)
    pipe.scheduler = shifted
    torch.testing.assert_close(draw(pipe), by_hand(pipe.unet, type(shifted).from_config(shifted.config)))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_variance_channels_are_used_by_those_that_know_them_and_dropped_for_others(name: str) -> None:
    pipe = pipeline("epsilon", diffusion__learn_variance=True)
    cls = getattr(diffusers, name)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    plain = {} if name == "DDPMScheduler" else {"variance_type": None}
    expected = by_hand(pipe.unet, cls.from_config(pipe.scheduler.config, **plain))
    torch.testing.assert_close(draw(pipe), expected, atol=2e-5, rtol=0)


def test_a_sampler_that_is_named_draws_whatever_the_scheduler() -> None:
    pipe = pipeline()
    expected = draw(pipe, sampler="ddim", dynamic_threshold=0.9)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(draw(pipe, sampler="ddim", dynamic_threshold=0.9), expected)
    with pytest.raises(ConfigError, match="dynamic_threshold"):
        draw(pipe, dynamic_threshold=0.9)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"), "noise"),
        (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "prediction_type v_prediction"),
        (diffusers.DDIMScheduler(500, prediction_type="v_prediction"), "num_train_timesteps 1000"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "DDPMScheduler"),
        (diffusers.RePaintScheduler(), "step"),
        ("DDIMScheduler", "step"),
    ],
)
def test_schedulers_of_other_models_are_refused_when_assigned(scheduler: Any, expected: str) -> None:
    pipe = pipeline()
    own = pipe.scheduler
    with pytest.raises(ConfigError, match=expected):
        pipe.scheduler = scheduler
    assert pipe.scheduler is own


def test_steps_that_a_scheduler_does_not_take_are_refused() -> None:
    pipe = pipeline()
    own = pipe.scheduler
    pipe.scheduler = diffusers.PNDMScheduler.from_config(own.config)
    with pytest.raises(ConfigError, match="explicit timesteps"):
        draw(pipe, timesteps=[900, 100])
    with pytest.raises(ConfigError, match="1000"):
        draw(pipe, num_inference_steps=5000)
    pipe.scheduler = diffusers.DDPMScheduler.from_config(own.config)
    with pytest.raises(ConfigError, match="descending"):
        draw(pipe, timesteps=[100, 900])
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(own.config)
    with pytest.raises(ConfigError, match="rise"):
        draw(pipe)
    pipe = pipeline("sample")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ConfigError, match="PNDMScheduler"):
        draw(pipe)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_saved_pipeline_draws_with_the_scheduler_that_it_was_saved_with(name: str, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "saved")
    for again in (hd.load(tmp_path / "saved", "cpu"), GenerationPipeline.from_pretrained(tmp_path / "saved")):
        again.set_progress_bar_config(disable=True)
        assert type(again.scheduler).__name__ == name
        assert torch.equal(draw(again), draw(pipe))
        assert torch.equal(draw(again, sampler="dpmpp"), draw(pipe, sampler="dpmpp"))


def test_a_saved_flow_keeps_a_shifted_scheduler(tmp_path: Path) -> None:
    pipe = pipeline("flow")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=3.0)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(hd.load(tmp_path, "cpu")), draw(pipe))


def test_a_folder_with_a_scheduler_that_cannot_draw_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    diffusers.RePaintScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="RePaintScheduler"):
        hd.load(tmp_path)
