"""Classifier-free guidance: the formula, and how often the network is called."""

import pytest
import torch

from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.guidance import classifier_guided, guided, guided_denoiser, null_labels
from heterodiff.diffusion.prediction import PREDICTIONS
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError
from tests.oracles.gaussian_mixture import ideal_denoiser, three_blobs

LABELS = torch.tensor([0, 2, 1])
Z = torch.randn(3, 2, 4, 5)
TIME = torch.full((3,), 30.0)


class Model:
    """Depends on everything it is given; records the batch sizes of its calls."""

    def __init__(self, variance: bool = False):
        self.batches = []
        self.variance = variance

    def __call__(self, z, time, labels):
        self.batches.append(len(z))
        out = z * (labels + 2).view(-1, 1, 1, 1) + time.view(-1, 1, 1, 1)
        return torch.cat([out, out.sin()], dim=1) if self.variance else out


@pytest.mark.parametrize(("scale", "labels"), [(1.0, LABELS), (0.0, null_labels(LABELS))])
def test_single_branches(scale, labels):
    model = Model()
    out = guided(model, Z, TIME, LABELS, null_labels(LABELS), scale)
    assert torch.equal(out, Model()(Z, TIME, labels))
    assert model.batches == [3]


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("scale", [0.5, 2.0, 7.0])
def test_one_batch_equals_two_calls(scale, variance):
    model = Model(variance)
    out = guided(model, Z, TIME, LABELS, null_labels(LABELS), scale)
    assert model.batches == [6]
    conditional = Model(variance)(Z, TIME, LABELS)
    unconditional = Model(variance)(Z, TIME, null_labels(LABELS))
    mean = unconditional[:, :2] + scale * (conditional[:, :2] - unconditional[:, :2])
    assert torch.equal(out, torch.cat([mean, conditional[:, 2:]], dim=1))


def test_conditions_may_be_nested():
    def model(z, time, condition):
        return z * condition["text"][0].view(-1, 1, 1, 1) + condition["mask"].view(-1, 1, 1, 1)

    condition = {"text": (torch.tensor([1.0, 2, 3]),), "mask": torch.ones(3)}
    null = {"text": (torch.zeros(3),), "mask": torch.zeros(3)}
    out = guided(model, Z, TIME, condition, null, 2.0)
    expected = 2 * (Z * torch.tensor([1.0, 2, 3]).view(-1, 1, 1, 1) + 1)
    torch.testing.assert_close(out, expected)


def test_interval_saves_calls():
    model = Model()
    denoise = guided_denoiser(model, LABELS, null_labels(LABELS), 3.0, 100, interval=(0.2, 0.5))
    outputs = {time: denoise(Z, torch.full((3,), float(time))) for time in (0, 19, 20, 35, 50, 51, 99)}
    assert model.batches == [3, 3, 6, 6, 6, 3, 3]
    torch.testing.assert_close(outputs[99], Model()(Z, torch.full((3,), 99.0), LABELS))


def test_default_interval_guides_all_levels():
    model = Model()
    denoise = guided_denoiser(model, LABELS, null_labels(LABELS), 3.0, 100)
    for time in (0, 99, 100):
        denoise(Z, torch.full((3,), float(time)))
    assert model.batches == [6, 6, 6]


@pytest.mark.parametrize(
    ("scale", "interval"), [(-1.0, (0.0, 1.0)), (2.0, (0.5, 0.2)), (2.0, (-0.1, 1.0)), (2.0, (0.0, 1.5))]
)
def test_mistakes(scale, interval):
    with pytest.raises(ConfigError, match="guidance"):
        guided_denoiser(Model(), LABELS, null_labels(LABELS), scale, 100, interval)


@pytest.mark.parametrize("t", [5, 300, 900])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_guided_by_the_ideal_classifier_a_denoiser_is_that_of_the_class(kind: str, t: int) -> None:
    """Of a Gaussian mixture, all of p(z), p(y | z) and p(z | y) are known, and scale 1 is Bayes' rule."""
    config = {"prediction": kind} if kind == "flow" else {"prediction": kind, "schedule": "linear"}
    schedule, mixture = NoiseSchedule.from_config(DiffusionConfig.model_validate(config)), three_blobs()
    x0, _ = mixture.draw(50, torch.Generator().manual_seed(0))
    z = schedule.alpha[t] * x0 + schedule.sigma[t] * torch.randn(x0.shape, dtype=torch.float64)
    time = torch.full((50,), schedule.time[t].item(), dtype=torch.float64)

    def log_probability(z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = schedule.at(time[0].double())
        return mixture.responsibilities(z, alpha.item(), sigma.item())[:, 2].log()

    denoise = ideal_denoiser(mixture, schedule, kind)
    found = classifier_guided(denoise, schedule, kind, log_probability, 1.0)(z.float(), time.float())
    of_class = ideal_denoiser(mixture, schedule, kind, torch.full((50,), 2))(z, time)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), of_class, atol=2e-3 if t < 10 else 1e-4, rtol=1e-3)
    unguided = classifier_guided(denoise, schedule, kind, log_probability, 0.0)(z.float(), time.float())
    torch.testing.assert_close(unguided.double(), denoise(z, time), atol=2e-3 if t < 10 else 1e-4, rtol=1e-3)


def test_variance_channels_are_not_steered() -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig())
    steered = classifier_guided(
        lambda z, time: torch.cat([z, z.sin()], dim=1), schedule, "v", lambda z, time: z.sum(dim=(1, 2, 3)), 1.0
    )(Z, TIME)
    assert torch.equal(steered[:, 2:], Z.sin())
    assert not torch.allclose(steered[:, :2], Z)
