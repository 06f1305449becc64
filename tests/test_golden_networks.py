"""Each network against golden files: weights by name, outputs and gradients that the oracle computed in float64."""

import pytest
import torch

import heterodiff as hd
from heterodiff.models.variants import list_models
from tests.data.make_networks import NETWORKS, inputs
from tests.golden_files import DATA, read_golden, summary, weight

FILES = sorted((DATA / "networks").glob("*.safetensors"))
GROUPS = {"norm_groups": 32}
EARLIER_DEFAULTS = {"film-unet": {"channel_mult": (1, 2, 4), **GROUPS}}
"""Arguments that the files leave out, as they were the defaults; other networks have 32 groups."""
TOLERANCE = 1e-4
"""Relative to the largest value: networks compute in float32, where a sum of hundreds of terms errs by 1e-6 or so."""


def test_every_network_has_a_file():
    assert {path.stem for path in FILES} == set(NETWORKS)
    assert {variant for variant, _ in NETWORKS.values()} == set(list_models())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_network_computes_what_the_oracle_computed(path):
    golden, facts = read_golden(path)
    model = hd.create_model(facts["variant"], **EARLIER_DEFAULTS.get(facts["variant"], GROUPS), **facts["arguments"])
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == facts["shapes"]
    model.load_state_dict({name: weight(name, shape) for name, shape in facts["shapes"].items()})
    condition = golden["in.condition"]
    by = {"class_labels": condition} if condition.ndim == 1 else {"condition": condition}
    out = model(golden["in.x"], golden["in.t"], **by).sample
    assert (out - golden["out"]).abs().max() <= TOLERANCE * golden["out"].abs().max()
    out.square().mean().backward()
    assert [name for name, _ in model.named_parameters()] == facts["trained"]
    floor = 1e-6 * golden["gradients"][:, 0].max()  # below which gradients are rounding noise of those that are zero
    for (name, parameter), expected in zip(model.named_parameters(), golden["gradients"], strict=True):
        found = torch.zeros(2) if parameter.grad is None else summary(name, parameter.grad)
        assert (found - expected).abs().max() <= 1e-3 * expected[0] + floor, name


def test_inputs_are_those_of_the_files():
    """Values made from names are alike on all machines, to the last bit."""
    for path in FILES:
        golden, facts = read_golden(path)
        classes = facts["arguments"].get("num_classes") is not None
        for name, value in inputs(path.stem, classes).items():
            assert torch.equal(value, golden[name]), (path.stem, name)
