"""Classifier-free guidance: the formula, and how often the network is called."""

import pytest
import torch

from heterodiff.diffusion.guidance import guided, guided_denoiser, null_labels
from heterodiff.errors import ConfigError

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
