"""Condition tokens against the outer product they stand for; class and vector conditions, and rows without one."""

import pytest
import torch

from heterodiff.errors import ConfigError
from heterodiff.models.blocks import AttentionBlock
from heterodiff.models.conditioning import attend_with_condition, drop_condition
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import VARIANTS, create_model
from tests.oracles import outer_product

C, E, HEADS = 64, 48, 4
ROWS = {"conditional": (1, 1, 1), "none": (0, 0, 0), "mixed": (1, 0, 1)}


def make_block(dtype: torch.dtype) -> AttentionBlock:
    torch.manual_seed(0)
    block = AttentionBlock(C, HEADS, E)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        ((5, 7), torch.float64, 1e-10),  # fewer positions than tokens: these become one
        ((1, 1), torch.float64, 1e-10),
        ((8, 9), torch.float64, 1e-10),
        ((5, 7), torch.float32, 1e-5),
        ((8, 9), torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("rows", [*ROWS, "absent"])
def test_attention_block_equals_the_outer_product(rows, size, dtype, tolerance):
    block = make_block(dtype)
    x = torch.randn(3, C, *size, dtype=dtype, requires_grad=True)
    keep = torch.tensor(ROWS.get(rows, ROWS["none"]), dtype=dtype)
    c = (torch.randn(3, E, dtype=dtype) * keep[:, None]).requires_grad_()
    parameters = dict(block.named_parameters())
    ours = block(x, None if rows == "absent" else c)
    expected = outer_product.attention_block(parameters, x, c, HEADS)
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()

    weights = torch.randn_like(expected)
    inputs = [x, *parameters.values()] + ([] if rows == "absent" else [c])
    found = torch.autograd.grad((ours * weights).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for f, w in zip(found, wanted, strict=True):
        f = torch.zeros_like(w) if f is None else f
        assert (f - w).abs().max() <= tolerance * max(1, w.abs().max())


def attend(q, k, v, c, weight, bias, merge_tokens):
    """q, k, v and the answer (B, heads, T, d)."""
    kv = torch.stack([k, v], dim=-2).transpose(1, 2)
    return attend_with_condition(q.transpose(1, 2), kv, c, weight, bias, merge_tokens).transpose(1, 2)


@pytest.mark.parametrize("merge_tokens", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_attention_to_merged_and_separate_tokens(scale, merge_tokens):
    """Also where a single token takes all the weight (scores of hundreds)."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 3, 11, 8), (2, 3, 11, 8), (2, 3, 11, 8), (2, 20), (48, 20), (48,))
    ]
    inputs[3] *= scale
    q, k, v, c, weight, bias = (t.requires_grad_() for t in inputs)
    tokens = (weight @ (c[:, :, None] * c[:, None]) + bias[:, None]).view(2, 3, 2, 8, 20).transpose(3, 4)
    keys, values = torch.cat([tokens[:, :, 0], k], 2), torch.cat([tokens[:, :, 1], v], 2)
    expected = (q @ keys.mT / 8**0.5).softmax(-1) @ values
    found = attend(q, k, v, c, weight, bias, merge_tokens)
    wanted = gradients(expected, inputs)
    largest = max(w.abs().max() for w in wanted)
    for f, w in zip(gradients(found, inputs), wanted, strict=True):
        assert (f - w).abs().max() <= 1e-11 * largest


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, inputs, direction, retain_graph=True)]


@pytest.mark.parametrize("merge_tokens", [True, False])
def test_half_precision_is_near_to_float32(merge_tokens):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 9, 16) for _ in range(3)] + [
        torch.randn(2, 64),
        torch.randn(64, 64) / 8,
        torch.zeros(64),
    ]
    inputs[3][1] = 0
    expected = attend(*inputs, merge_tokens)
    found = attend(*(t.bfloat16() for t in inputs), merge_tokens)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_no_condition_keeps_its_tokens():
    """Leaving the E equal tokens out where c = 0 would be another network."""
    block = make_block(torch.float64)
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    with_tokens = block(x, None)
    block.encoder_kv = None
    assert (block(x, None) - with_tokens).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["hae-v2", "hae-v2-conservative"])
def test_none_and_minus_one_are_the_same_network(variant):
    torch.manual_seed(0)
    model = create_model(
        variant, in_channels=1, model_channels=32, channel_mult=(1, 2), attention_resolutions=(1, 2), num_classes=3
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(3, 1, 6, 10, dtype=torch.float64), torch.tensor([0, 10, 999])
    none = torch.full((3,), -1)
    expected = model(x, t).sample
    with torch.no_grad():
        assert torch.allclose(model(x, t, none).sample, expected, rtol=0, atol=1e-10)
    with torch.enable_grad():
        assert torch.allclose(model(x, t, none).sample, expected, rtol=0, atol=1e-10)
        mixed = model(x, t, torch.tensor([2, -1, 0])).sample
    assert torch.allclose(mixed[1], expected[1], rtol=0, atol=1e-10)
    assert (mixed - expected).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-3
    assert model.class_condition(None, 3) is None


@pytest.mark.parametrize("class_embedding", ["mlp", "direct"])
def test_class_condition_is_exactly_zero_without_a_class(class_embedding):
    model = create_model("unet", model_channels=32, channel_mult=(1,), num_classes=3, class_embedding=class_embedding)
    c = model.class_condition(torch.tensor([-1, 2, -1, 0]), 4)
    assert c.shape == (4, 128)
    assert c[[0, 2]].eq(0).all()
    assert c[[1, 3]].abs().amax(dim=1).gt(0).all()


TEXT = {
    "in_channels": 2,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "layers_per_block": 1,
    "attention_resolutions": (2,),
    "condition_dim": 10,
}
TIMES = torch.tensor([0, 500, 999])


def text_network(variant: str, dtype: torch.dtype = torch.float64, **config) -> HAEUNet:
    """A small network whose zero-initialised layers have left zero."""
    torch.manual_seed(0)
    model = create_model(variant, **TEXT | config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def text_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (3, 2, 12, 8) and conditions (3, 10)."""
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(3, 2, 12, 8, generator=generator), torch.randn(3, 10, generator=generator)
    return x.to(dtype), condition.to(dtype)


ROW_BY_ROW = [name for name, variant in VARIANTS.items() if variant.tokens_of_none]


@pytest.mark.parametrize("recording", [False, True])
def test_the_published_network_shows_no_tokens_where_no_row_has_a_condition(recording):
    """The same whether the condition is left out or all zeros; in a mixed batch the row without one sees tokens."""
    model, (x, condition) = text_network("hae-v2-conservative-public"), text_inputs()
    with torch.no_grad():
        without = model(x, TIMES).sample
        for module in model.modules():
            if isinstance(module, AttentionBlock):
                module.encoder_kv.bias.data += 1
        moved = model(x, TIMES).sample
    zeros = torch.zeros_like(condition)
    with torch.set_grad_enabled(recording):
        assert torch.equal(moved, without)  # no token, so its bias plays no part
        assert torch.allclose(model(x, TIMES, condition=zeros).sample, without, rtol=0, atol=1e-10)
        mixed = model(x, TIMES, condition=torch.stack([condition[0], zeros[1], condition[2]])).sample
    assert (mixed[1] - without[1]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [{}, {"condition_tokens": False, "use_scale_shift_norm": True}], ids=str)
@pytest.mark.parametrize("variant", ROW_BY_ROW)
def test_a_condition_of_zeros_is_none(variant, config):
    model, (x, condition) = text_network(variant, **config), text_inputs()
    assert any(".encoder_kv." in name for name in model.state_dict()) == (model.config.condition_tokens != "none")
    with torch.no_grad():
        expected = model(x, TIMES).sample
    zeros = torch.zeros_like(condition)
    for recording in (False, True):  # without gradients, the conservative variant leaves the condition out
        with torch.set_grad_enabled(recording):
            assert torch.allclose(model(x, TIMES, condition=zeros).sample, expected, rtol=0, atol=1e-10)
            given = model(x, TIMES, condition=condition).sample
            mixed = model(x, TIMES, condition=torch.stack([condition[0], zeros[1], condition[2]])).sample
        assert torch.allclose(mixed[1], expected[1], rtol=0, atol=1e-10)
        assert torch.allclose(mixed[[0, 2]], given[[0, 2]], rtol=0, atol=1e-10)
        assert (given - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    c = model.vector_condition(torch.stack([condition[0], zeros[1], condition[2]]), 3)
    assert c[1].eq(0).all()
    assert c[[0, 2]].abs().amax(dim=1).gt(0).all()
    assert model.vector_condition(None, 3) is None


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_swapped_conditions_change_the_prediction_and_rows_do_not_mix(variant):
    model, (x, condition) = text_network(variant), text_inputs()
    same = x[:1].expand_as(x)
    condition.requires_grad_()
    out = model(same, 500, condition=condition).sample
    swapped = model(same, 500, condition=condition.flip(0)).sample
    assert (out - swapped)[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.allclose(swapped.flip(0), out, rtol=0, atol=1e-10)
    (found,) = torch.autograd.grad(out[0].square().sum(), condition)
    assert found[0].abs().max() > 1e-6
    assert found[1:].eq(0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", ROW_BY_ROW)
def test_a_batch_of_conditions_equals_single_ones(variant, dtype, tolerance):
    model, (x, condition) = text_network(variant, dtype), text_inputs(dtype)
    condition[1] = 0
    with torch.no_grad():
        together = model(x, TIMES, condition=condition).sample
        for i in range(3):
            alone = model(x[i : i + 1], TIMES[i], condition=condition[i : i + 1]).sample
            assert (alone - together[i : i + 1]).abs().max() <= tolerance * max(1, together.abs().max())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_networks_with_a_condition_are_saved_and_loaded(variant, tmp_path):
    model, (x, condition) = text_network(variant, torch.float32).eval(), text_inputs(torch.float32)
    expected = model(x, TIMES, condition=condition).sample
    model.save_pretrained(tmp_path)
    loaded = HAEUNet.from_pretrained(tmp_path)
    assert loaded.config.condition_dim == 10
    assert torch.equal(loaded(x, TIMES, condition=condition).sample, expected)
    assert torch.equal(loaded(x, TIMES, None, False, condition)[0], expected)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_one_kind_of_condition(variant):
    with pytest.raises(ConfigError, match=r"num_classes=3 and condition_dim=10.*leave one of them out"):
        create_model(variant, **TEXT, num_classes=3)
    with pytest.raises(ConfigError, match="condition_dim: expected at least 1, or None, found 0"):
        create_model(variant, **TEXT | {"condition_dim": 0})
    x, condition = text_inputs(torch.float32)
    model = create_model(variant, **TEXT)
    with pytest.raises(ConfigError, match=r"without classes.*takes a condition \(B, 10\)"):
        model(x, TIMES, torch.tensor([0, 1, 2]))
    for wrong in (condition[:2], condition[:, :5], condition[0]):
        with pytest.raises(ConfigError, match=r"condition: expected shape \(3, 10\), found"):
            model(x, TIMES, condition=wrong)
    for num_classes in (None, 3):
        model = create_model(variant, **TEXT | {"condition_dim": None, "num_classes": num_classes})
        assert not any(name.startswith("condition_emb") for name in model.state_dict())
        with pytest.raises(ConfigError, match=r"built without one \(condition_dim=None\)"):
            model(x, TIMES, condition=condition)


def test_zero_threshold_holds_for_vectors_too():
    model, (_, condition) = text_network("hae-v2-conservative", zero_threshold=0.5), text_inputs()
    with torch.no_grad():
        for parameter in model.condition_emb.parameters():
            parameter.zero_()
        model.condition_emb[2].bias[7] = 0.5
    assert model.vector_condition(condition, 3).eq(0).all()
    with torch.no_grad():
        model.condition_emb[2].bias[7] = float("nan")
    assert model.vector_condition(condition, 3)[:, 7].isnan().all()


def test_drop_condition_is_drawn_from_the_generator():
    labels = torch.arange(20000) % 7
    first = drop_condition(labels, 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(first, drop_condition(labels, 0.1, torch.Generator().manual_seed(1)))
    dropped = first == -1
    assert torch.equal(first[~dropped], labels[~dropped])
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(drop_condition(labels, 0.0), labels)
    assert drop_condition(labels, 1.0).eq(-1).all()
