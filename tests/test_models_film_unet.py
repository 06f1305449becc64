"""film-unet: FiLM in every block, rows without a condition, sizes, saving, and what a user gets wrong."""

import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler

import heterodiff as hd
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.errors import ConfigError
from heterodiff.models.blocks import ResBlock, timestep_embedding
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.profile import count_saved_bytes, profile

SMALL = {"latent_channels": 6, "latent_size": (5, 4), "condition_dim": 12, "model_channels": 64, "layers_per_block": 1}
SIZES = [(5, 4), (7, 7), (1, 1), (1, 6), (16, 9)]
TIMES = torch.tensor([0, 500, 999])


def make(dtype: torch.dtype = torch.float64, **config) -> FiLMUNet:
    """A small network whose zero-initialised layers have left zero."""
    torch.manual_seed(0)
    model = hd.create_model("film-unet", **SMALL | config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def inputs(size: tuple[int, int] = (5, 4), dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (3, 6, H, W) and conditions (3, 12)."""
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(3, 6, *size, generator=generator), torch.randn(3, 12, generator=generator)
    return x.to(dtype), condition.to(dtype)


def res_blocks(model: torch.nn.Module) -> list[ResBlock]:
    return [m for m in model.modules() if isinstance(m, ResBlock)]


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def test_public_names():
    assert hd.list_models()[-1] == "film-unet"
    assert hd.FiLMUNet is FiLMUNet
    model = hd.create_model("film-unet", **SMALL)
    assert type(model) is FiLMUNet
    c = model.config
    assert (c.in_channels, c.sample_size, c.out_channels, c.num_classes) == (6, (5, 4), None, None)
    assert model.factor == 1


def test_default_size():
    sizes = {"latent_channels": 256, "latent_size": 7, "condition_dim": 512}
    assert profile("film-unet", 7, 7, **sizes) == profile("film-unet", 7, 7)
    large = profile("film-unet", 7, 7, **sizes, model_channels=128, channel_mult=(1, 2, 4))
    assert large.parameters == 49_153_024


def slow_block(block: ResBlock, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """A residual block with FiLM, value by value of scale and shift; ``embedding`` after its SiLU."""
    norm, _, conv = block.in_layers
    h = F.conv2d(F.silu(F.group_norm(x, 32, norm.weight, norm.bias)), conv.weight, conv.bias, padding=1)
    norm, _, _, conv = block.out_layers
    linear = block.emb_layers[1]
    h = F.group_norm(h, 32, norm.weight, norm.bias)
    for row in range(len(x)):
        channels = h.shape[1]
        for i in range(channels):
            scale = linear.weight[i] @ embedding[row] + linear.bias[i]
            shift = linear.weight[channels + i] @ embedding[row] + linear.bias[channels + i]
            h[row, i] = h[row, i] * (1 + scale) + shift
    h = F.conv2d(F.silu(h), conv.weight, conv.bias, padding=1)
    return h + block.skip_connection(x)


def test_every_block_is_scaled_and_shifted_by_time_and_text():
    model, (x, condition) = make(), inputs()
    condition[1] = 0
    seen = []
    for block in res_blocks(model):
        block.register_forward_hook(lambda block, given, out: seen.append((block, *given[:2], out.clone())))
    with torch.no_grad():
        model(x, TIMES, condition=condition)
        text = model.condition_emb(condition)
        text[1] = 0
        expected = F.silu(model.time_embed(timestep_embedding(TIMES, 64).double()) + text)
        assert len(seen) == 2 + 2 + 3  # encoder, middle, decoder
        for block, h, embedding, out in seen:
            assert largest(embedding - expected) <= 1e-12 * largest(expected)
            assert largest(slow_block(block, h, embedding) - out) <= 1e-10 * largest(out)


@pytest.mark.parametrize("size", SIZES)
def test_a_prior_beside_the_latents_is_seen_place_by_place(size):
    """What it says at one place changes the prediction around there first, and the output has the latents' channels."""
    model, (x, condition) = make(guess_channels=3), inputs(size)
    assert model.config.in_channels == 9
    prior = torch.zeros(3, 3, *size, dtype=x.dtype)
    seen = []
    model.input_blocks[0].register_forward_hook(lambda stage, given, out: seen.append(out))
    with torch.no_grad():
        plain = model(torch.cat([x, prior], dim=1), TIMES, condition=condition).sample
        prior[:, 1, 0, 0] = 1
        told = model(torch.cat([x, prior], dim=1), TIMES, condition=condition).sample
    assert plain.shape == x.shape
    assert largest(told - plain) > 1e-6
    expected = F.pad(model.input_blocks[0][0].weight[:, 7], (size[1], size[1], size[0], size[0]))
    expected = expected.flip(1, 2)[:, size[0] + 1 :, size[1] + 1 :][:, : size[0], : size[1]]
    torch.testing.assert_close(seen[1][0] - seen[0][0], expected, atol=1e-10, rtol=0)
    with pytest.raises(ConfigError, match="expected 9 channels, found"):
        model(x, TIMES)


@pytest.mark.parametrize("variant", ["film-unet", "hae-v2"])
def test_conditions_vary_alike_in_all_directions_where_they_vary_at_all(variant, tmp_path):
    torch.manual_seed(0)
    config = SMALL if variant == "film-unet" else {"in_channels": 6, "sample_size": 8, "condition_dim": 12}
    model = hd.create_model(variant, **config | {"model_channels": 64, "layers_per_block": 1}).eval()
    axes = torch.linalg.qr(torch.randn(12, 12))[0]
    spread = torch.tensor([3.0, 1.0, 1.0, 0.5, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0])  # a thousandth of the variance
    examples = (torch.randn(4000, 12) * spread + 2 * torch.eye(12)[0]) @ axes.T
    torch.testing.assert_close(model._whitened(examples), examples)  # until it is told how they vary
    model.whiten_conditions(examples)
    seen = model._whitened(examples)
    assert float(seen.square().mean()) == pytest.approx(float(examples.square().mean()), rel=1e-4)
    moments = torch.linalg.eigvalsh(seen.T @ seen / len(seen))
    assert float(moments[4:].min()) > 0.9 * float(moments[4:].max())
    assert float(moments[:4].abs().max()) < 1e-4 * float(moments.max())
    assert not model._whitened(torch.zeros(1, 12)).any()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.condition_whitening, model.condition_whitening)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    size = (5, 4) if variant == "film-unet" else (8, 8)
    z, time = torch.randn(2, 6, *size), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        found = model(z, time, condition=examples[:2]).sample
        model.condition_whitening.copy_(torch.eye(12))
        torch.testing.assert_close(model(z, time, condition=seen[:2]).sample, found, atol=1e-5, rtol=1e-4)


def test_resolution_is_constant_and_widths_grow():
    model, (x, condition) = make(torch.float32), inputs(dtype=torch.float32)
    shapes = []
    for block in res_blocks(model):
        block.register_forward_hook(lambda block, given, out: shapes.append(tuple(out.shape[1:])))
    model(x, TIMES, condition=condition)
    assert shapes == [(width, 5, 4) for width in (64, 128, 128, 128, 128, 64, 64)]


def test_rows_of_zeros_are_no_condition():
    model, (x, condition) = make(), inputs()
    without = make(condition_dim=None)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("condition_")}
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :6]
    without.load_state_dict(state)
    with torch.no_grad():
        expected = model(x, TIMES).sample
        assert largest(without(x, TIMES).sample - expected) <= 1e-12 * largest(expected)
        assert torch.equal(model(x, TIMES, condition=torch.zeros_like(condition)).sample, expected)
        given = model(x, TIMES, condition=condition).sample
        condition[1] = 0
        mixed = model(x, TIMES, condition=condition).sample
    assert largest(mixed[1] - expected[1]) <= 1e-12 * largest(expected)
    assert largest((mixed - given)[[0, 2]]) <= 1e-12 * largest(given)
    assert (given - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-2 * largest(expected)


def test_a_condition_that_is_not_a_number_is_not_hidden():
    model, (x, condition) = make(), inputs()
    condition[1, 3] = float("nan")
    out = model(x, TIMES, condition=condition).sample
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_swapped_conditions_change_the_prediction():
    model, (x, condition) = make(), inputs()
    x, condition = x[:1].repeat(2, 1, 1, 1), condition[:2]
    with torch.no_grad():
        out = model(x, 500, condition=condition).sample
        swapped = model(x, 500, condition=condition.flip(0)).sample
    assert largest(out[0] - out[1]) > 1e-2 * largest(out)
    assert largest(swapped.flip(0) - out) <= 1e-12 * largest(out)


@pytest.mark.parametrize("config", [{}, {"layers_per_block": 2, "channel_mult": (1, 2)}], ids=str)
def test_gradients_reach_the_condition_through_every_block(config):
    """With all other blocks cut off from it."""
    model, (x, condition) = make(**config), inputs()
    condition[2] = 0
    condition.requires_grad_()
    blocks = res_blocks(model)
    for open_block in blocks:
        hooks = [
            block.register_forward_pre_hook(lambda block, given: (given[0], given[1].detach(), *given[2:]))
            for block in blocks
            if block is not open_block
        ]
        (found,) = torch.autograd.grad(model(x, TIMES, condition=condition).sample.square().mean(), condition)
        assert found[:2].abs().amax(dim=1).min() > 1e-9
        assert found[2].eq(0).all(), "no condition, nothing to learn from"
        for hook in hooks:
            hook.remove()


def test_every_parameter_learns():
    model, (x, condition) = make(), inputs()
    out = model(x, TIMES, condition=condition).sample
    (out * torch.randn_like(out)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]


def test_fresh_networks_predict_zero_and_start_as_identity_branches():
    model, (x, condition) = hd.create_model("film-unet", **SMALL), inputs(dtype=torch.float32)
    assert model(x, TIMES, condition=condition).sample.eq(0).all()
    for block in res_blocks(model):
        assert block.out_layers[3].weight.eq(0).all()
        assert block.in_layers[2].weight.any()


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        *((size, torch.float64, 1e-10) for size in SIZES),
        # Not 1x1: the small network's norms have two values a group there, and magnify the rounding of both.
        *((size, torch.float32, 1e-5) for size in SIZES if size != (1, 1)),
    ],
)
def test_batch_equals_single(size, dtype, tolerance):
    model, (x, condition) = make(dtype, out_channels=12), inputs(size, dtype)
    condition[1] = 0
    with torch.no_grad():
        together = model(x, TIMES, condition=condition).sample
        assert together.shape == (3, 12, *size)
        for i in range(3):
            alone = model(x[i : i + 1], TIMES[i], condition=condition[i : i + 1]).sample
            assert largest(alone - together[i : i + 1]) <= tolerance * max(1, largest(together))


def test_bfloat16():
    model, (x, condition) = make(torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = model(x, TIMES, condition=condition).sample
        found = model.to(torch.bfloat16)(x, TIMES, condition=condition).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_saving_and_loading_keeps_every_bit(tmp_path, caplog):
    model, (x, condition) = make(torch.float32, out_channels=12), inputs(dtype=torch.float32)
    expected = model.eval()(x, TIMES, condition=condition).sample
    model.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "diffusers"):
        loaded = FiLMUNet.from_pretrained(tmp_path)
        again = FiLMUNet.from_config(model.config)
    assert not caplog.records, "nothing in config.json that it does not know"
    assert torch.equal(loaded(x, TIMES, condition=condition).sample, expected)
    assert torch.equal(loaded(x, TIMES, None, False, condition)[0], expected)
    for other in (loaded, again):
        assert (other.config.in_channels, tuple(other.config.sample_size), other.config.num_classes) == (
            6,
            (5, 4),
            None,
        )
    weights = [p for p in loaded.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert all(value.is_contiguous() for value in loaded.state_dict().values())


def test_gradient_checkpointing_changes_nothing_but_memory():
    found, saved = [], []
    x, condition = inputs()
    for config, enable in (({}, False), ({"use_checkpoint": True}, False), ({}, True)):
        model = make(dropout=0.2, **config).train()
        if enable:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)  # of dropout
        out = model(x, TIMES, condition=condition).sample
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
        saved.append(count_saved_bytes(model, x, TIMES, None, True, condition))
    for other in found[1:]:
        assert all(largest(a - b) <= 1e-12 * max(1, largest(b)) for a, b in zip(other, found[0], strict=True))
    assert max(saved[1:]) < 0.5 * saved[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_it_compiles_into_one_graph():
    model, (x, condition) = make(torch.float32), inputs(dtype=torch.float32)
    torch.compiler.reset()
    network = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for c in (condition, None):
        expected = model(x, TIMES, condition=c).sample
        assert largest(network(x, TIMES, condition=c).sample - expected) <= 1e-5 * largest(expected)
    torch.compiler.reset()


def test_diffusers_pipeline_runs_unchanged():
    pipe = DDIMPipeline(unet=make(torch.float32, latent_channels=1), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 5, 4, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 7}, "unknown model argument 'sample_size'.*latent_size"),
        ({"num_classes": 3}, "unknown model argument 'num_classes'"),
        ({"latent_chanels": 6}, "did you mean 'latent_channels'"),
        ({"model_channels": 50}, r"multiple of 32.*found \[50, 100\].*model_channels=64"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"num_heads": 7}, "128 channels do not split into 7 heads"),
        ({"num_heads": 0}, "0 heads"),
        ({"condition_dim": 0}, "condition_dim: expected at least 1, or None, found 0"),
        ({"guess_channels": -1}, "guess_channels: expected at least 0, found -1"),
        ({"latent_channels": 0}, "latent_channels.*found 0"),
        ({"latent_size": (7, 0)}, r"latent_size.*\(7, 0\)"),
        ({"layers_per_block": 0}, "layers_per_block.*and 0"),
    ],
    ids=str,
)
def test_wrong_arguments(config, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        hd.create_model("film-unet", **SMALL | config)


def test_wrong_inputs():
    model, (x, condition) = make(torch.float32), inputs(dtype=torch.float32)
    for wrong in (condition[:2], condition[:, :5], condition[0], condition[..., None]):
        with pytest.raises(ConfigError, match=r"condition: expected shape \(3, 12\), found"):
            model(x, TIMES, condition=wrong)
    with pytest.raises(ConfigError, match=r"without classes.*takes a condition \(B, 12\)"):
        model(x, TIMES, torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match=r"expected 6 channels, found \(3, 5, 5, 4\)"):
        model(x[:, :5], TIMES, condition=condition)
    with pytest.raises(ConfigError, match=r"built without one \(condition_dim=None\)"):
        make(torch.float32, condition_dim=None)(x, TIMES, condition=condition)


def test_film_unet_has_no_patches():
    with pytest.raises(ConfigError, match=r"model\.patch_size=2 is read only with model\.variant=unet, hae, "):
        load_config(shipped_configs() / "shapes_small.yaml", ["model.patch_size=2"])
