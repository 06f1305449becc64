"""Import of earlier checkpoints: what is inferred, permuted, written, and refused."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor

import heterodiff as hd
from heterodiff.compat.importing import import_checkpoint
from heterodiff.compat.inference import infer
from heterodiff.compat.names import parse_overrides
from heterodiff.errors import CheckpointError, ConfigError
from tests.test_codecs_ldm import in_ldm_layout, made

BASE = {
    "sample_size": 16,
    "in_channels": 2,
    "out_channels": 2,
    "model_channels": 32,
    "layers_per_block": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2,),
    "num_classes": 3,
    "num_heads": 2,
}
GIVEN = {"image_size": 16, "num_heads": 2}

# One change each from BASE, and some together; every one leaves its own trace in names and shapes.
CASES = [
    {},
    {"use_scale_shift_norm": True},
    {"resblock_updown": True},
    {"conv_resample": False},
    {"channel_mult": (1,), "attention_resolutions": (1,)},
    {"channel_mult": (1, 1, 2), "attention_resolutions": (1, 4)},
    {"channel_mult": (1, 1, 2), "attention_resolutions": (), "conv_resample": False},
    {"channel_mult": (2, 1), "layers_per_block": 2, "resblock_updown": True, "attention_resolutions": (1, 2)},
    {"channel_mult": (1, 1), "layers_per_block": 2, "conv_resample": False},
    {"channel_mult": (1, 1.5), "model_channels": 64},
    {"channel_mult": (0.5, 1), "model_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True},
    {"out_channels": 4},
    {"in_channels": 1, "out_channels": 1},
    {"class_embedding": "direct"},
    {"class_embedding": "direct", "condition_tokens": False},
    {"condition_tokens": False},
    {"num_classes": None},
]
HYBRID_CASES = [
    {},
    {"channel_mult": (1, 1, 2), "attention_resolutions": (1, 4), "conv_resample": False},
    {"use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": (), "layers_per_block": 2},
    {"out_channels": 4, "class_embedding": "direct"},
]
RATIOS = [0.25, 0.3, 1 / 3, 0.01, 0.7]


def random_network(variant: str = "unet", **config) -> hd.HAEUNet:
    torch.manual_seed(0)
    model = hd.create_model(variant, **{**BASE, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.eval()


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def run(model, channels=2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 16, 16, generator=generator)
    labels = None if model.config.num_classes is None else torch.tensor([2, -1])
    with torch.no_grad():
        return model(x, torch.tensor([7, 900]), labels).sample


def import_state(tmp_path, state, overrides=GIVEN, format="anofpdm", **kwargs):
    path = tmp_path / "model.pt"
    torch.save(state, path)
    return import_checkpoint(path, format, tmp_path / "out", overrides, **kwargs)


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("variant", "changes"),
    [("unet", case) for case in CASES]
    + [(variant, case) for variant in ("hae", "hae-lite", "hae-v2") for case in HYBRID_CASES],
)
def test_round_trip(variant, changes, tmp_path):
    activation = "identity" if variant in ("unet", "hae") else "silu"
    model = random_network(variant, activation=activation, attention_pattern="sequence", **changes)
    report = import_state(tmp_path, model.state_dict())
    loaded = hd.HAEUNet.from_pretrained(report.folder / "unet")
    unknowable = {"attention_pattern"} if variant == "unet" else set()
    for name in dict(model.config).keys() - unknowable:
        if not name.startswith("_"):
            assert plain(loaded.config[name]) == plain(model.config[name]), name
    channels = model.config.in_channels
    assert torch.equal(run(loaded, channels), run(model, channels))


@pytest.mark.parametrize("ratio", RATIOS)
def test_bottleneck_ratio(ratio):
    config = {"channel_mult": (1, 2, 3), "bottleneck_ratio": ratio}
    with torch.device("meta"):
        expected = hd.create_model("hae-v2", **{**BASE, **config})
        inferred = infer(shapes_of(expected)).config["bottleneck_ratio"]
        again = hd.create_model("hae-v2", **{**BASE, **config, "bottleneck_ratio": inferred})
    assert shapes_of(again) == shapes_of(expected)


def test_notes_tell_what_was_set_and_why(tmp_path):
    report = import_state(tmp_path, random_network("hae", activation="identity").state_dict())
    notes = "\n".join(report.notes)
    assert "activation: identity (AnoFPDM and the earlier HAE networks: its norms ignored their activation)" in notes
    assert "num_heads: 2 (given)" in notes
    assert "variant: hae (from the weights)" in notes
    assert "channel_mult: 1,2 (from the weights)" in notes
    assert "attention_pattern: sequence (the earlier pattern" in notes


def test_openai_format_sets_silu(tmp_path):
    model = random_network(class_embedding="direct", condition_tokens=False)
    report = import_state(tmp_path, model.state_dict(), format="guided-diffusion")
    assert report.config["activation"] == "silu"
    assert torch.equal(run(hd.HAEUNet.from_pretrained(report.folder / "unet")), run(model))


class NewOrderAttention(torch.nn.Module):
    """Attention whose qkv rows are all q, all k, all v, written plainly, for comparison."""

    def __init__(self, block, heads: int):
        super().__init__()
        self.norm, self.proj_out, self.encoder_kv = block.norm, block.proj_out, None
        self.qkv = torch.nn.Conv1d(block.qkv.in_channels, block.qkv.out_channels, 1)
        self.qkv.load_state_dict(block.qkv.state_dict())
        self.heads = heads

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2)).split(channels, dim=1)
        d = channels // self.heads
        outputs = []
        for head in range(self.heads):
            rows = slice(head * d, (head + 1) * d)
            scores = torch.einsum("bct,bcs->bts", q[:, rows], k[:, rows]) / math.sqrt(d)
            outputs.append(torch.einsum("bts,bcs->bct", scores.softmax(dim=-1), v[:, rows]))
        a = torch.cat(outputs, dim=1).transpose(1, 2)
        return x + self.proj_out(a).transpose(1, 2).reshape(batch, channels, height, width)


@pytest.mark.parametrize(
    "heads",
    [{"num_heads": 4}, {"num_head_channels": 16}, {"num_heads": 4, "num_heads_upsample": 2}],
)
def test_new_attention_order(heads, tmp_path, monkeypatch):
    config = {"class_embedding": "direct", "condition_tokens": False, "attention_resolutions": (1, 2), **heads}
    model = random_network(**config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    overrides = {"image_size": 16, "use_new_attention_order": True, **heads}
    report = import_state(tmp_path, state, overrides, format="guided-diffusion")
    found = run(hd.HAEUNet.from_pretrained(report.folder / "unet"))
    assert not torch.allclose(found, run(model), atol=1e-3)
    for stages in (model.input_blocks, [model.middle_block], model.output_blocks):
        for stage in stages:
            for i, layer in enumerate(stage):
                if hasattr(layer, "qkv"):
                    stage[i] = NewOrderAttention(layer, layer.num_heads)
    # Stage passes the condition by the class of the layer.
    monkeypatch.setattr("heterodiff.models.unet.AttentionBlock", NewOrderAttention)
    torch.testing.assert_close(found, run(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "weight.", "model.", ""])
def test_prefixes(prefix, tmp_path):
    model = random_network(activation="identity")
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state |= {"optimizer.lr": torch.ones(1)} if prefix else {}
    report = import_state(tmp_path, state)
    assert ("1 tensors outside" in "\n".join(report.notes)) == bool(prefix)
    assert torch.equal(run(hd.HAEUNet.from_pretrained(report.folder / "unet")), run(model))


def test_half_precision_becomes_float32(tmp_path):
    model = random_network(activation="identity").half()
    report = import_state(tmp_path, model.state_dict())
    assert any("float16" in note for note in report.notes)
    assert hd.HAEUNet.from_pretrained(report.folder / "unet").dtype == torch.float32


def test_unused_token_weights_of_unconditional_networks(tmp_path):
    model = random_network(num_classes=None, activation="identity")
    state = {**model.state_dict(), "middle_block.1.encoder_kv.weight": torch.ones(128, 128, 1)}
    report = import_state(tmp_path, state)
    assert any(note.startswith("encoder_kv: 1 tensors dropped") for note in report.notes)
    assert torch.equal(run(hd.HAEUNet.from_pretrained(report.folder / "unet")), run(model))


def test_safetensors_metadata_is_used(tmp_path):
    model = random_network("hae-lite", attention_pattern="sequence")
    config = {"image_size": 16, "num_heads": 2, "num_res_blocks": 1, "dropout": 0.1, "comment": "x"}
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, {"config": json.dumps(config), "variant": "hae-lite"})
    report = import_checkpoint(path, "anofpdm", tmp_path / "out")
    assert report.config["dropout"] == 0.1
    assert "metadata: not used: comment" in report.notes
    assert torch.equal(run(hd.HAEUNet.from_pretrained(report.folder / "unet")), run(model))
    override = import_checkpoint(path, "anofpdm", tmp_path / "other", {"num_heads": 4})
    assert override.config["num_heads"] == 4
    for broken in ("[1]", "{", '{"num_heads": "many"}'):
        save_file(model.state_dict(), path, {"config": broken})
        with pytest.raises(CheckpointError, match="metadata 'config'"):
            import_checkpoint(path, "anofpdm", tmp_path / "third")


def test_folder_is_a_diffusers_pipeline_folder(tmp_path):
    report = import_state(tmp_path, random_network().state_dict())
    assert sorted(p.name for p in report.folder.iterdir()) == ["model_index.json", "scheduler", "unet"]
    assert sorted(p.name for p in (report.folder / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((report.folder / "model_index.json").read_text())
    assert index["_class_name"] == "GenerationPipeline"
    assert index["unet"] == ["heterodiff", "HAEUNet"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    scheduler = DDPMScheduler.from_pretrained(report.folder / "scheduler").config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.num_train_timesteps) == (1e-4, 0.02, 1000)
    assert (scheduler.beta_schedule, scheduler.prediction_type) == ("linear", "epsilon")
    assert (scheduler.variance_type, scheduler.clip_sample) == ("fixed_small", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "out"]


def test_learned_variance_and_schedule(tmp_path):
    state = random_network(out_channels=4).state_dict()
    overrides = {**GIVEN, "learn_sigma": True, "noise_schedule": "cosine", "diffusion_steps": 4000}
    report = import_state(tmp_path, state, overrides)
    scheduler = DDPMScheduler.from_pretrained(report.folder / "scheduler").config
    assert (scheduler.variance_type, scheduler.beta_schedule) == ("learned_range", "squaredcos_cap_v2")
    assert scheduler.num_train_timesteps == 4000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, r"num_heads=N .* image_size=N"),
        ({"image_size": 16}, r"num_heads=N"),
        ({"num_head_channels": 16}, "image_size=N"),
        ({**GIVEN, "num_res_blocks": 2}, "layers_per_block: the weights imply 1, given 2"),
        ({**GIVEN, "channel_mult": "1,2,4"}, "channel_mult: the weights imply 1,2, given 1,2,4"),
        ({**GIVEN, "learn_sigma": True}, "learn_sigma: the weights imply False"),
        ({**GIVEN, "num_classes": 10}, "num_classes: the weights imply 3"),
    ],
)
def test_values_that_weights_cannot_tell_or_contradict(overrides, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        import_state(tmp_path, random_network().state_dict(), overrides)
    assert "model.pt" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({**GIVEN, "num_hads": 2}, "did you mean 'num_heads'"),
        ({**GIVEN, "sample_size": 16}, "same argument"),
        ({"image_size": "big", "num_heads": 2}, "sample_size: expected"),
        ({"image_size": 16, "num_heads": True}, "num_heads: expected int"),
        ({"image_size": 15, "num_heads": 2}, "divisible by 2"),
        ({"image_size": 0, "num_heads": 2}, "at least 1"),
        ({"image_size": 16, "num_heads": 3}, "do not split"),
        ({**GIVEN, "use_fp16": True}, "float32"),
        ({**GIVEN, "use_new_attention_order": True}, "always used the legacy order"),
        ({**GIVEN, "noise_schedule": "sqrt"}, "noise_schedule: expected linear or cosine, found"),
        ({**GIVEN, "diffusion_steps": 0}, "diffusion_steps"),
        ({**GIVEN, "activation": "relu"}, "activation"),
    ],
)
def test_bad_overrides(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        import_state(tmp_path, random_network().state_dict(), overrides)


def test_harmless_overrides(tmp_path):
    overrides = {
        **GIVEN,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "8,2",
        "channel_mult": [1, 2],
        "use_fp16": False,
        "use_new_attention_order": False,
        "activation": "silu",
        "dropout": 0.1,
    }
    report = import_state(tmp_path, random_network().state_dict(), overrides)
    assert (report.config["activation"], report.config["dropout"]) == ("silu", 0.1)
    assert report.config["attention_resolutions"] == (2,)


def test_variant_can_be_chosen_among_those_that_fit(tmp_path):
    state = random_network("hae-v2").state_dict()
    report = import_state(tmp_path, state, variant="hae-v2-conservative")
    assert report.config["variant"] == "hae-v2-conservative"
    with pytest.raises(CheckpointError, match="belong to hae-v2 or hae-v2-conservative, given hae"):
        import_checkpoint(tmp_path / "model.pt", "anofpdm", tmp_path / "x", GIVEN, "hae")
    with pytest.raises(CheckpointError, match="belong to hae-v2 or hae-v2-conservative, given hae-v3"):
        import_checkpoint(tmp_path / "model.pt", "anofpdm", tmp_path / "x", GIVEN, "hae-v3")
    with pytest.raises(ConfigError, match="unknown model variant"):
        import_checkpoint(tmp_path / "model.pt", "anofpdm", tmp_path / "x", GIVEN, "hae-v4")


def test_variant_without_hybrid_blocks(tmp_path):
    model = random_network("hae-lite", use_hae=False)
    report = import_state(tmp_path, model.state_dict(), variant="hae-lite")
    assert (report.config["use_hae"], report.config["activation"]) == (False, "silu")
    assert torch.equal(run(hd.HAEUNet.from_pretrained(report.folder / "unet")), run(model))


def test_wrong_format(tmp_path):
    with pytest.raises(CheckpointError, match="use --format anofpdm"):
        import_state(tmp_path, random_network().state_dict(), format="guided-diffusion")
    with pytest.raises(CheckpointError, match="use --format anofpdm"):
        import_state(tmp_path, random_network("hae", num_classes=None).state_dict(), format="guided-diffusion")
    with pytest.raises(ConfigError, match="unknown checkpoint format"):
        import_state(tmp_path, {}, format="openai")


def test_strictness(tmp_path):
    state = random_network().state_dict()
    first, *_ = [name for name in state if name.startswith("output_blocks.1")]
    missing = {name: tensor for name, tensor in state.items() if name != first}
    cases = [
        (missing, f"1 missing: {first}"),
        ({**state, "output_blocks.1.0.extra": torch.zeros(1)}, "1 unexpected: output_blocks.1.0.extra"),
        ({**state, first: torch.zeros(5)}, rf"1 of another shape: {first} \(expected .* found \(5,\)\)"),
        ({**state, first: state[first] * float("nan")}, "NaN or infinite weights"),
        ({"conv.weight": torch.zeros(1)}, "expected one guided-diffusion U-Net"),
        ({**state, **{f"model.{name}": t.clone() for name, t in state.items()}}, "2 networks"),
        ({name: t for name, t in state.items() if not name.startswith("output_blocks")}, "'output_blocks.*': missing"),
        ({**state, "output_blocks.99999.0.x": torch.zeros(1)}, "out of range"),
        ({**state, "time_embed.0.weight": torch.zeros(1)}, r"its shape is \(1,\)"),
    ]
    for content, message in cases:
        with pytest.raises(CheckpointError, match=message):
            import_state(tmp_path, content)
        assert not (tmp_path / "out").exists()


def test_target_folder_is_respected(tmp_path, monkeypatch):
    state = random_network().state_dict()
    (tmp_path / "out").mkdir()
    import_state(tmp_path, state)
    with pytest.raises(CheckpointError, match="not empty"):
        import_state(tmp_path, state)
    (tmp_path / "file").write_text("x")
    for target in ("file", "file/inside"):
        with pytest.raises(CheckpointError, match="file"):
            import_checkpoint(tmp_path / "model.pt", "anofpdm", tmp_path / target, GIVEN)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DDPMScheduler, "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        import_checkpoint(tmp_path / "model.pt", "anofpdm", tmp_path / "new", GIVEN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model.pt", "out"]


def test_overrides_of_the_command_line():
    items = ["image_size=128", "attention_resolutions=8,16", "use_fp16=false", "activation=silu", "sample_size=[8, 16]"]
    assert parse_overrides(items) == {
        "image_size": 128,
        "attention_resolutions": "8,16",
        "use_fp16": False,
        "activation": "silu",
        "sample_size": [8, 16],
    }
    for items in (["image_size"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="override"):
            parse_overrides(items)


def test_an_unknown_layout_is_compared_with_the_known_ones(tmp_path):
    foreign = {f"transformer.h.{k}.attn.weight": torch.zeros(2) for k in range(6)}
    with pytest.raises(CheckpointError, match=r"nearest layouts.* 0%.*foreign to the first: transformer\.h\.0\.attn"):
        import_state(tmp_path, foreign)
    mixed = {f"model.diffusion_model.{name}": value for name, value in random_network().state_dict().items()} | foreign
    count = len(mixed) - 6
    expected = (
        rf"anofpdm {count / len(mixed):.0%} \(--format anofpdm\).*foreign to the first: transformer\.h\.0.* 2 more"
    )
    with pytest.raises(CheckpointError, match=expected) as caught:
        import_state(tmp_path, mixed)
    assert "\n" not in str(caught.value)
    state = random_network().state_dict()
    renamed = {name.replace("middle_block", "bottleneck"): value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"'middle_block\.0.* missing; nearest.*foreign to the first: bottleneck"):
        import_state(tmp_path, renamed)
    for vae, kind in (
        (in_ldm_layout(made()), r"KL autoencoder of latent diffusion 100% \(codec\.path=FILE\)"),
        (made().state_dict(), r"AutoencoderKL of diffusers 100% \(codec\.path=FOLDER\)"),
    ):
        with pytest.raises(CheckpointError, match=f"nearest layouts, by the share of names: {kind}.*first: none"):
            import_state(tmp_path, vae)
