"""torch.compile: one graph, the same numbers, and training and sampling through it."""

import warnings

import pytest
import torch

from heterodiff.models.variants import VARIANTS, create_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
CONFIG = {"in_channels": 2, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1, "num_classes": 3}
INPUTS = (torch.randn(2, 2, 64, 48), torch.tensor([5, 700]), torch.tensor([1, -1]))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(variant: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(variant, attention_resolutions=(2,), **CONFIG | config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def run(model: torch.nn.Module, network: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = network(*inputs).sample
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(e.abs().max() for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() <= 1e-5 * scale


EVERY_DAY = "hae-v2"
"""It has all the blocks of ``unet`` and hybrid ones; making graphs takes seconds."""
ALL_VARIANTS = [pytest.param(v, marks=[pytest.mark.slow] * (v != EVERY_DAY)) for v in VARIANTS]


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_one_graph_of_training(variant):
    """Captured in one piece, forwards and backwards; the same outputs and gradients."""
    model = make(variant)
    network = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_same(run(model, network, *INPUTS), run(model, model, *INPUTS))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_one_graph_of_drawing(variant):
    model = make(variant)
    network = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for inputs in (INPUTS, INPUTS[:2], (INPUTS[0][:1, :, :32, :32], 7)):  # no condition; another size
            assert torch.allclose(network(*inputs).sample, model(*inputs).sample, atol=1e-5)


def test_compiled_by_inductor():
    """The real compiler, on a network without hybrid blocks to keep it short."""
    model = make("unet", channel_mult=(1,), model_channels=32)
    network = torch.compile(model, fullgraph=True, dynamic=False)
    inputs = (INPUTS[0][:, :, :8, :8], *INPUTS[1:])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = network(*inputs).sample
    assert torch.allclose(found, model(*inputs).sample, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hae-v2", "hae-v2-conservative"])
def test_trained_by_inductor(variant):
    model = make(variant)
    network = torch.compile(model, fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(model, network, *INPUTS)
    assert_same(found, run(model, model, *INPUTS))
