"""Outputs and gradients of the earlier networks, computed with their own implementation from random weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import heterodiff as hd
from heterodiff.compat import guided_diffusion
from heterodiff.compat.importing import import_checkpoint

SHARED = Path(os.environ.get("HETERODIFF_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
GOLDEN = SHARED / "golden"
NETWORKS = {
    "unet": "UNetModel",
    "hae": "HAEUNetModel",
    "hae-lite": "HAEUNetModelLite",
    "hae-v2": "HAEUNetModelV2",
    "hae-v2-conservative-public": "HAEUNetModelV2Conservative",
}

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}; HETERODIFF_SHARED names the folder that has golden/"
)


def read_golden(variant: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN / f"{variant}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_masks(tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    return {int(length): mask.bool() for length, mask in part(tensors, "mask.").items()}


def check_against_golden(model: torch.nn.Module, conditional: Tensor, null: Tensor, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(conditional, golden["out.cond"], rtol=0, atol=1e-4)
    torch.testing.assert_close(null, golden["out.null"], rtol=0, atol=1e-4)
    loss = conditional.square().mean() + null.square().mean()
    torch.testing.assert_close(loss, golden["out.loss"].squeeze(), rtol=1e-4, atol=0)
    loss.backward()
    gradients = part(golden, "grad.")
    # With as many channels as groups and no activation, each group of the norm is one channel of which it removes
    # the mean, and with it the embedding that was added. The true gradient of the embedding's layers is zero then;
    # the file of `unet` holds rounding noise of norm 1e-8 there, which a relative comparison must leave out.
    floor = 1e-6 * max(gradient.norm() for gradient in gradients.values())
    for name, expected in gradients.items():
        found = model.get_parameter(name).grad
        assert found is not None, name
        assert (found - expected).norm() <= 1e-3 * expected.norm() + floor, name


@pytest.mark.parametrize("variant", NETWORKS)
def test_earlier_class_matches(variant):
    golden, config = read_golden(variant)
    model = getattr(guided_diffusion, NETWORKS[variant])(**config)
    model.load_state_dict(part(golden, "weight."))
    model.set_attention_masks(golden_masks(golden))
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    check_against_golden(model, model(x, t, y, clf_free=True), model(x, t, y, null=True, clf_free=True), golden)


@pytest.mark.parametrize("variant", NETWORKS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_imported_checkpoint_matches(variant, suffix, tmp_path):
    golden, config = read_golden(variant)
    path, overrides = GOLDEN / f"{variant}.safetensors", {}
    if suffix == "pt":
        path, overrides = tmp_path / "model.pt", {"image_size": config["image_size"], "num_heads": config["num_heads"]}
        torch.save(part(golden, "weight."), path)
    report = import_checkpoint(path, "anofpdm", tmp_path / "run", overrides)
    assert report.config["variant"] == variant
    assert report.config["activation"] == ("identity" if variant in ("unet", "hae") else "silu")
    assert any(note.startswith("activation: ") for note in report.notes)
    model = hd.HAEUNet.from_pretrained(report.folder / "unet")
    model.set_attention_masks(golden_masks(golden))
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    check_against_golden(model, model(x, t, y).sample, model(x, t).sample, golden)


def test_conservative_class_matches_v2():
    golden, config = read_golden("hae-v2")
    model = guided_diffusion.HAEUNetModelV2Conservative(**config)
    model.load_state_dict(part(golden, "weight."))
    model.set_attention_masks(golden_masks(golden))
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    check_against_golden(model, model(x, t, y, clf_free=True), model(x, t, null=True, clf_free=True), golden)
