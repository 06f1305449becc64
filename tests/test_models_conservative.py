"""hae-v2-conservative is hae-v2 with less memory: the same weights, outputs and gradients."""

import pytest
import torch

from heterodiff.models.profile import count_saved_bytes
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import create_model

CONFIG = {
    "in_channels": 2,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "layers_per_block": 1,
    "attention_resolutions": (2,),
    "num_classes": 3,
}
LABELS = {"conditional": [0, 2], "unconditional": [-1, -1], "mixed": [1, -1], "absent": None}


def pair(**config) -> tuple[HAEUNet, HAEUNet]:
    torch.manual_seed(0)
    full = create_model("hae-v2", **CONFIG | config)
    for parameter in full.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    conservative = create_model("hae-v2-conservative", **CONFIG | config)
    conservative.load_state_dict(full.state_dict())
    full.load_state_dict(conservative.state_dict())
    return full, conservative


def outputs_and_gradients(model: HAEUNet, labels: list[int] | None, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 48, 40, generator=generator, requires_grad=True)
    torch.manual_seed(seed)  # of dropout
    out = model(x, torch.tensor([3, 700]), None if labels is None else torch.tensor(labels)).sample
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(e.abs().max() for e in expected[1:])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f - e).abs().max() <= 1e-5 * (e.abs().max() if i == 0 else scale)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("labels", LABELS)
def test_same_outputs_and_gradients(labels, checkpointing):
    full, conservative = pair()
    if checkpointing:
        conservative.enable_gradient_checkpointing()
        assert conservative.is_gradient_checkpointing
    assert_same(outputs_and_gradients(conservative, LABELS[labels]), outputs_and_gradients(full, LABELS[labels]))
    with torch.no_grad():
        x, y = torch.randn(2, 2, 8, 8), None if LABELS[labels] is None else torch.tensor(LABELS[labels])
        expected = full(x, 5, y).sample
        assert (conservative(x, 5, y).sample - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_recomputation_repeats_dropout():
    full, conservative = pair(dropout=0.3)
    full.train()
    conservative.train()
    assert_same(outputs_and_gradients(conservative, [0, -1]), outputs_and_gradients(full, [0, -1]))


def test_it_saves_memory():
    full, conservative = pair()
    inputs = (torch.randn(1, 2, 64, 64), torch.tensor([3]), torch.tensor([1]))
    saved = count_saved_bytes(full, *inputs)
    assert count_saved_bytes(conservative, *inputs) < 0.8 * saved
    full.enable_gradient_checkpointing()
    assert count_saved_bytes(full, *inputs) < 0.5 * saved


def test_memory_optimization_can_be_chosen():
    assert create_model("hae-v2-conservative", **CONFIG).memory_optimization
    assert not create_model("hae-v2", **CONFIG).memory_optimization
    assert create_model("hae-v2", memory_optimization=True, **CONFIG).memory_optimization
    assert not create_model("hae-v2-conservative", memory_optimization=False, **CONFIG).memory_optimization


def test_zero_threshold_is_per_row_and_by_the_largest_value():
    full, conservative = pair(class_embedding="direct", zero_threshold=0.5)
    with torch.no_grad():
        for model in (full, conservative):
            model.label_emb.weight.fill_(0.01)
            model.label_emb.weight[0, 7] = 0.5  # at most the threshold: no condition
            model.label_emb.weight[1, 7] = -0.501  # one value beyond it is enough
    labels = torch.tensor([0, 1, -1, 2])
    c = conservative.class_condition(labels, 4)
    assert c[[0, 2, 3]].eq(0).all()
    assert torch.equal(c[1], full.class_condition(labels, 4)[1])
    assert full.class_condition(labels, 4)[0].abs().max() == 0.5, "only with the memory optimization"


def test_zero_threshold_does_not_hide_nan():
    _, conservative = pair(class_embedding="direct")
    with torch.no_grad():
        conservative.label_emb.weight[0, 0] = float("nan")
    assert conservative.class_condition(torch.tensor([0]), 1).isnan().any()
