"""The earlier class names, arguments and call signature."""

import pytest
import torch

import heterodiff as hd
from heterodiff.compat.guided_diffusion import EarlierNetwork, HAEUNetModelV2, HAEUNetModelV2Conservative, UNetModel
from heterodiff.errors import ConfigError

NETWORKS = EarlierNetwork.__subclasses__()
ARGUMENTS = {
    "image_size": 16,
    "in_channels": 1,
    "model_channels": 32,
    "out_channels": 1,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_classes": 3,
    "num_heads": 2,
}


def awaken(model):
    """Give zero-initialised layers values, so that everything has an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return awaken(HAEUNetModelV2(**ARGUMENTS))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 1, 16, 16, generator=generator)
    return x, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("network_class", NETWORKS)
def test_state_dict_is_that_of_the_variant(network_class):
    model = network_class(**ARGUMENTS)
    config = {k: v for k, v in ARGUMENTS.items() if k not in ("image_size", "num_res_blocks")}
    same = hd.create_model(
        network_class.variant,
        sample_size=16,
        layers_per_block=1,
        activation=network_class.default_activation,
        attention_pattern="sequence",
        **config,
    )
    model.load_state_dict(same.state_dict())
    x, t, y = torch.ones(1, 1, 16, 16), torch.tensor([3]), torch.tensor([2])
    awaken(model), awaken(same)
    assert torch.equal(model(x, t, y, clf_free=True), same(x, t, y).sample)
    assert model.config.activation == network_class.default_activation


def test_activation_defaults_are_those_of_earlier_checkpoints():
    found = {network.__name__: network.default_activation for network in NETWORKS}
    assert found == {
        "UNetModel": "identity",
        "HAEUNetModel": "identity",
        "HAEUNetModelLite": "silu",
        "HAEUNetModelV2": "silu",
        "HAEUNetModelV2Conservative": "silu",
    }
    assert UNetModel(**ARGUMENTS, activation="silu").config.activation == "silu"


def test_positional_arguments_in_the_earlier_order():
    model = UNetModel(16, 1, 32, 2, 1, (2,), 0.1, (1, 2), False, 2, 3, True, False, 2, -1, -1, True)
    c = model.config
    assert (c.sample_size, c.in_channels, c.model_channels, c.out_channels, c.layers_per_block) == (16, 1, 32, 2, 1)
    assert (c.dropout, c.conv_resample, c.num_classes, c.use_checkpoint) == (0.1, False, 3, True)
    assert (c.num_heads, c.num_head_channels, c.num_heads_upsample, c.use_scale_shift_norm) == (2, None, None, True)


def test_conditional_null_and_mixed(network, batch):
    x, t, y = batch
    conditional = network(x, t, y, clf_free=True)
    null = network(x, t, y, null=True, clf_free=True)
    assert conditional.shape == x.shape
    assert isinstance(conditional, torch.Tensor)
    assert (conditional - null).abs().amin(dim=0).max() > 1e-5
    assert torch.equal(network(x, t, None, null=True, clf_free=True), null)
    assert torch.equal(network(x, t, y), conditional)


def test_threshold_drops_labels_as_the_global_generator_says(network, batch):
    x, t, y = batch
    conditional, null = network(x, t, y, clf_free=True), network(x, t, null=True, clf_free=True)
    torch.manual_seed(5)
    dropped = torch.rand(4) < 0.5
    assert 0 < dropped.sum() < 4
    torch.manual_seed(5)
    mixed = network(x, t, y, threshold=0.5)
    torch.testing.assert_close(mixed, torch.where(dropped[:, None, None, None], null, conditional))
    torch.testing.assert_close(network(x, t, y, threshold=1), null)


def test_threshold_is_the_drop_probability(network, monkeypatch):
    seen = []
    monkeypatch.setattr(hd.HAEUNet, "forward", lambda self, x, t, y, return_dict: (seen.append(y), (x,))[1])
    torch.manual_seed(0)
    network(torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000), torch.ones(20_000, dtype=torch.long), threshold=0.1)
    share = (seen[0] == -1).float().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


def test_calls_that_say_too_little_or_too_much(network, batch):
    x, t, y = batch
    with pytest.raises(ConfigError, match="pass the labels y"):
        network(x, t, clf_free=True)
    with pytest.raises(ConfigError, match="probability in"):
        network(x, t, y, threshold=0)
    with pytest.raises(ConfigError, match="null is for sampling"):
        network(x, t, y, threshold=0.1, null=True)


def test_unconditional_network_ignores_unused_token_weights(batch):
    x, t, _ = batch
    model = awaken(UNetModel(**{**ARGUMENTS, "num_classes": None}))
    # Earlier unconditional networks stored encoder_kv weights that they never applied.
    earlier = {**model.state_dict(), "middle_block.1.encoder_kv.weight": torch.ones(128, 128, 1)}
    expected = model(x, t)
    model.load_state_dict(earlier)
    assert "middle_block.1.encoder_kv.weight" in earlier
    assert torch.equal(model(x, t, threshold=0.1), expected)


def test_class_embedding_without_tokens():
    model = UNetModel(**ARGUMENTS, clf_free=False)
    assert model.label_emb.weight.shape == (3, 128)
    assert not [name for name in model.state_dict() if "encoder_kv" in name]


def test_save_and_load(network, batch, tmp_path):
    x, t, y = batch
    network.save_pretrained(tmp_path)
    assert torch.equal(HAEUNetModelV2.from_pretrained(tmp_path)(x, t, y), network(x, t, y))
    assert torch.equal(hd.HAEUNet.from_pretrained(tmp_path)(x, t, y).sample, network(x, t, y))


def test_texts_as_on_the_command_line_of_guided_diffusion():
    """There, attention is named by the sides of maps in pixels."""
    given = {**ARGUMENTS, "channel_mult": "1,2", "attention_resolutions": "8"}
    assert UNetModel(**given).config.channel_mult == UNetModel(**ARGUMENTS).config.channel_mult
    assert list(UNetModel(**given).config.attention_resolutions) == [2]
    with pytest.raises(ConfigError, match="channel_mult='1;2': expected numbers such as '1,2,4'"):
        UNetModel(**{**ARGUMENTS, "channel_mult": "1;2"})


def test_half_precision_is_autocast(network, batch):
    x, t, y = batch
    half = awaken(HAEUNetModelV2(**ARGUMENTS, use_fp16=True))
    half.load_state_dict(network.state_dict())
    found, expected = half(x, t, y), network(x, t, y)
    assert {parameter.dtype for parameter in half.parameters()} == {found.dtype} == {torch.float32}
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_kind(dtype, network, batch):
    x, t, y = batch
    assert torch.equal(network(x, t, y.to(dtype)), network(x, t, y))
    with pytest.raises(ConfigError, match=r"y: expected integers, found torch.float32"):
        network(x, t, y.float())


def test_the_class_of_two_networks_is_read_from_the_weights(batch, tmp_path):
    """The published network of this name, and the one that has the weights of hae-v2."""
    x, t, y = batch
    model = HAEUNetModelV2Conservative(**ARGUMENTS)
    published = {k: v for k, v in ARGUMENTS.items() if k not in ("image_size", "num_res_blocks")}
    published |= {"sample_size": 16, "layers_per_block": 1}
    for name in ("hae-v2-conservative-public", "hae-v2-conservative", "hae-v2-conservative-public"):
        options = {} if name.endswith("public") else {"attention_pattern": "sequence"}
        same = awaken(hd.create_model(name, **published, **options))
        model.load_state_dict(same.state_dict())
        assert model.config.variant == name
        assert torch.equal(model.eval()(x, t, y), same(x, t, y).sample)
    model.save_pretrained(tmp_path)
    assert torch.equal(hd.HAEUNet.from_pretrained(tmp_path)(x, t, y).sample, same(x, t, y).sample)


def test_unsupported_arguments():
    UNetModel(**ARGUMENTS, use_fp16=False, use_new_attention_order=False)
    with pytest.raises(ConfigError, match="heterodiff import"):
        UNetModel(**ARGUMENTS, use_new_attention_order=True)
    with pytest.raises(ConfigError, match="dims"):
        UNetModel(**ARGUMENTS, dims=3)
    with pytest.raises(TypeError, match="use_hea"):
        UNetModel(**ARGUMENTS, use_hea=True)


def test_use_hae_false_is_the_plain_unet():
    plain = HAEUNetModelV2(**ARGUMENTS, use_hae=False)
    assert set(plain.state_dict()) == set(UNetModel(**ARGUMENTS).state_dict())
