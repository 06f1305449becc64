"""An earlier checkpoint becomes a run: sampled, segmented, evaluated and trained on with its own weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.compat.import_run import import_run
from heterodiff.config.file import load_config
from heterodiff.errors import CheckpointError, ConfigError, HeterodiffError, RunError
from heterodiff.models.unet import HAEUNet
from heterodiff.run_folder import RunFolder
from heterodiff.training.build import build_recipe, load_run_data
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.start import train

NETWORK: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "layers_per_block": 1,
    "channel_mult": (1, 1),
    "attention_resolutions": (2,),
    "num_classes": 2,
    "num_heads": 2,
}
CONFIG: dict[str, Any] = {
    "data": {
        "source": "brain-phantom",
        "image_size": 32,
        "brain_phantom": {"patients": 16, "slices_per_patient": 4, "contrast": 3, "lesion_radius": [0.25, 0.35]},
        "val_fraction": 0.3,
        "test_fraction": 0.3,
    },
    "sampling": {"num_inference_steps": 2},
    # the lesions are bright, so that this method finds them with any network
    "segmentation": {"method": "label-difference", "num_inference_steps": 2, "network_steps": 0},
    "training": {"steps": 2, "batch_size": 4, "warmup_steps": 0, "tensorboard": False},
}


def random_network(variant: str = "unet", **changes: Any) -> HAEUNet:
    torch.manual_seed(0)
    model = hd.create_model(variant, **{**NETWORK, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    return model.eval()  # type: ignore[return-value]


def write(folder: Path, model: HAEUNet, content: dict[str, Any] = CONFIG) -> tuple[Path, Path]:
    checkpoint, config = folder / "model.pt", folder / "mine.yaml"
    torch.save(model.state_dict(), checkpoint)
    config.write_text(yaml.safe_dump(content))
    return checkpoint, config


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def predictions(model: Any, labels: Tensor | None) -> Tensor:
    x = torch.randn(2, model.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor([7, 900]), labels).sample


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnoFPDM's network, whose norms ignore their activation."""
    folder = tmp_path_factory.mktemp("imported")
    checkpoint, config = write(folder, random_network(activation="identity"))
    own = ("--format", "anofpdm", "--config", config, "num_heads=2")
    assert call("import", checkpoint, "--out", folder / "run", *own) == 0
    return folder / "run"


def test_the_run_holds_the_network_and_all_that_a_run_has(run: Path) -> None:
    model, pipeline = random_network(activation="identity"), hd.load(run, device="cpu")
    labels = torch.tensor([1, -1])
    torch.testing.assert_close(predictions(pipeline.unet, labels), predictions(model, labels), rtol=0, atol=0)
    config = load_config(run / "config.yaml")
    assert (config.model.variant, config.model.num_heads, config.model.activation) == ("unet", 2, "identity")
    assert config.model.channel_mult == (1, 1)
    diffusion = config.diffusion
    assert (diffusion.prediction, diffusion.schedule, diffusion.learn_variance) == ("epsilon", "linear", False)
    assert pipeline.class_names == ("healthy", "unhealthy")
    assert RunFolder(run).weights_step() == 0


def last_step(run: Path) -> tuple[int, dict[str, Tensor]]:
    checkpoint = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return checkpoint.step, dict(checkpoint.tensors["model"])


def test_the_run_is_sampled_segmented_evaluated_and_trained_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = (copy / "config.yaml").read_text().replace(f"output: {run}", f"output: {copy}")
    (copy / "config.yaml").write_text(config)
    assert call("sample", copy, "-n", 1, "--device", "cpu", "--out", tmp_path / "drawn") == 0
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 3  # one of each class, and the grid
    assert call("segment", copy, "--calibrate", "--device", "cpu") == 0
    assert call("evaluate", copy, "--device", "cpu") == 0
    assert json.loads((copy / "evaluation.json").read_text())["n"] == 20
    step, before = last_step(copy)
    assert step == 0
    assert call("train", copy / "config.yaml", "--stop-after", 1, "--quiet") == 0
    step, after = last_step(copy)
    assert step == 1
    changes = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(changes) < 0.01  # a step of AdamW from the imported weights, not from fresh ones
    assert call("train", copy / "config.yaml", "--quiet") == 0
    assert "done     step 2 of 2" in capsys.readouterr().out


def test_another_run_begins_with_its_weights(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml", [f"output={tmp_path / 'tuned'}", f"model.init_from={run}"])
    rates = {"steps": 1, "learning_rate": 1e-12}
    train(config.model_copy(update={"training": config.training.model_copy(update=rates)}), quiet=True)
    before, after = last_step(run)[1], last_step(tmp_path / "tuned")[1]
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    for key, value in {"activation": "silu", "num_heads": 4}.items():
        other = config.model_copy(update={"model": config.model.model_copy(update={key: value})})
        with pytest.raises(ConfigError, match=f"init_from=.*{key} .*set model.{key}="):
            train(other.model_copy(update={"output": tmp_path / key}), quiet=True)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("hae", {"activation": "identity"}, {}),
    ("hae-lite", {"num_heads": 4, "num_heads_upsample": 2}, {"num_heads": 4, "num_heads_upsample": 2}),
    ("hae-v2", {"bottleneck_ratio": 0.5, "dropout": 0.1}, {"dropout": 0.1}),
    ("hae-v2-conservative-public", {"channel_mult": (1, 1, 2)}, {}),
    ("unet", {"class_embedding": "direct", "condition_tokens": "none", "conv_resample": False}, {"activation": "silu"}),
    ("unet", {"activation": "identity", "out_channels": 8, "use_scale_shift_norm": True, "resblock_updown": True}, {}),
]


@pytest.mark.parametrize(("variant", "changes", "given"), CASES)
def test_every_kind_of_network_becomes_a_run(
    variant: str, changes: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    model = random_network(variant, attention_pattern="sequence", **changes)
    checkpoint, config = write(tmp_path, model)
    import_run(checkpoint, "anofpdm", tmp_path / "run", config, {"num_heads": 2, **given})
    unet = hd.load(tmp_path / "run", device="cpu").unet
    labels = torch.tensor([1, -1])
    torch.testing.assert_close(predictions(unet, labels), predictions(model, labels), rtol=0, atol=0)
    again = build_recipe(load_config(tmp_path / "run" / "config.yaml"), load_run_data_of(tmp_path / "run"))
    again.model.load_state_dict(unet.state_dict())
    torch.testing.assert_close(predictions(again.model.eval(), labels), predictions(model, labels), rtol=0, atol=0)


def load_run_data_of(run: Path) -> Any:
    return load_run_data(load_config(run / "config.yaml"))


def test_facts_that_the_weights_do_not_tell_come_from_the_configuration(tmp_path: Path) -> None:
    content = CONFIG | {
        "model": {"variant": "hae-v2-conservative", "num_heads": 4, "dropout": 0.1},
        "diffusion": {"schedule": "cosine", "num_train_timesteps": 500},
    }
    checkpoint, config = write(tmp_path, random_network("hae-v2", num_heads=4), content)
    import_run(checkpoint, "anofpdm", tmp_path / "run", config, {"predict_xstart": True})
    found = load_config(tmp_path / "run" / "config.yaml")
    assert (found.model.variant, found.model.num_heads, found.model.dropout) == ("hae-v2-conservative", 4, 0.1)
    diffusion = found.diffusion
    assert (diffusion.prediction, diffusion.schedule, diffusion.num_train_timesteps) == ("sample", "cosine", 500)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"model": {"channel_mult": [1, 2]}}, {}, r"model\.channel_mult: 1,2 in .*mine\.yaml, 1,1 in the checkpoint"),
        ({"model": {"variant": "hae"}}, {}, "no hybrid blocks, so its variant is unet, not hae"),
        ({"model": {"variant": "unet-conv"}}, {}, "belong to unet.*given unet-conv"),
        ({"model": {"num_heads": 4}}, {"num_heads": 2}, r"model\.num_heads: 4 in .*, 2 in the checkpoint"),
        ({"model": {"activation": "silu"}}, {}, r"model\.activation: silu in .*, identity in the checkpoint"),
        ({"model": {"init_from": "runs/x"}}, {}, r"init_from=runs/x, but the weights are the checkpoint's"),
        ({"model": {"norm_grups": 8}}, {}, "did you mean 'norm_groups'"),
        ({"diffusion": {"prediction": "v"}}, {}, r"diffusion\.prediction: v in .*, epsilon .*predict_xstart=true"),
        ({"diffusion": {"learn_variance": True}}, {}, r"learn_variance: True in .*, False in the checkpoint"),
        ({"diffusion": {"schedule": "cosine"}}, {"noise_schedule": "linear"}, "schedule: cosine in .*, linear in the"),
        ({"recipe": "text-image"}, {}, "set recipe=diffusion"),
        ({"data": {**CONFIG["data"], "labels": "none"}}, {}, "knows 2 classes, the data have none"),
        ({"data": {**CONFIG["data"], "image_size": 40}}, {"image_size": 32}, "image_size is 32, .* would see 40x40"),
        ({"data": {"source": "digits", "image_size": 32}}, {}, "takes 4 channels, data and codec bring 1"),
        ({"codec": {"kind": "kl-vae", "path": "no/vae"}}, {}, "no/vae"),
        ({}, {"pattern_seed": 3}, "pattern_seed 3, here 0; import it without --config"),
        ({"data": {"source": "images", "path": "nowhere"}}, {}, "nowhere"),
    ],
)
def test_contradictions_are_named_and_nothing_is_left(
    content: dict[str, Any], overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint, config = write(tmp_path, random_network(), CONFIG | content)
    if content.get("recipe"):
        config.write_text("recipe: text-image\ndata: {source: shapes}\n")
    with pytest.raises(HeterodiffError, match=f"(?s){message}"):
        import_run(
            checkpoint,
            "anofpdm",
            tmp_path / "run",
            config,
            {"num_heads": 2, **overrides} if overrides or "num_heads" not in content.get("model", {}) else {},
        )
    assert not (tmp_path / "run").exists()


def test_a_failure_while_the_folder_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunError("no room")

    monkeypatch.setattr(RunFolder, "save_pipeline", full)
    checkpoint, config = write(tmp_path, random_network())
    with pytest.raises(RunError, match="no room"):
        import_run(checkpoint, "anofpdm", tmp_path / "run", config, {"num_heads": 2})
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        import_run(checkpoint, "anofpdm", tmp_path / "run", config, {"num_heads": 2})


def test_a_denoiser_of_latents_comes_with_its_vae(digits_vae: Path, tmp_path: Path) -> None:
    """The images are encoded at the import, and training goes on with the same scale."""
    content = {
        "data": {"source": "digits", "image_size": 16},
        "codec": {"kind": "kl-vae", "path": str(digits_vae)},
        "sampling": {"num_inference_steps": 2},
        "training": {"minutes": 0.02, "batch_size": 4, "warmup_steps": 0, "tensorboard": False},
    }
    model = random_network(sample_size=4, num_classes=10)
    checkpoint, config = write(tmp_path, model, content)
    run = tmp_path / "run"
    import_run(checkpoint, "anofpdm", run, config, {"num_heads": 2, "activation": "silu"})
    pipeline = hd.load(run, device="cpu")
    assert pipeline(["3"], num_inference_steps=2).images.shape == (1, 1, 16, 16)
    step, before = last_step(run)
    assert step == 0
    assert torch.equal(before["out.2.weight"], model.state_dict()["out.2.weight"])
    assert call("train", run / "config.yaml", "--stop-after", 1, "--quiet") == 0
    assert last_step(run)[0] == 1
    content["codec"] = {**content["codec"], "path": str(tmp_path / "vae"), "training": {"steps": 5}}  # type: ignore[dict-item]
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"codec\.training would train a new VAE"):
        import_run(checkpoint, "anofpdm", tmp_path / "other", config, {"num_heads": 2})
