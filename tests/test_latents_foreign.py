"""Latents of another program become stored latents: the same numbers, classes and scale, or one clear refusal."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from heterodiff.cli import main
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.config import DataConfig
from heterodiff.errors import DataError
from heterodiff.latents.foreign import open_foreign, store_foreign
from heterodiff.latents.reading import load_latents
from tests.vae_runs import plain_vae

SHAPE = (4, 4, 4)
FLOAT16 = {"rtol": 2**-10, "atol": 2**-20}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latent channels 4, a quarter of the images' sides, scaling factor 0.18215."""
    folder = tmp_path_factory.mktemp("vae")
    plain_vae().save_pretrained(folder)
    return folder


def noise(*shape: int, std: float = 5.5, seed: int = 0) -> np.ndarray:
    """Latents whose std is about one after scaling by 0.18215."""
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def store(root: Path, vae: Path, scale: str | None = None, **data: Any) -> Any:
    config = DataConfig.model_validate({"source": "latents", "path": root, "val_fraction": 0.25, **data})
    out = root.with_name("out")
    store_foreign(root, config, vae, out, scale, batch_size=3, shard_size=5)
    return load_latents(out)


def by_name(found: Any) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        name: (values, int(label))
        for part in (found.train, found.val)
        for name, values, label in zip(part.names, *part.batch(range(len(part))), strict=True)
    }


def test_single_latents_in_folders_of_classes(vae: Path, tmp_path: Path) -> None:
    expected = {f"{name}/{k}.npy": noise(*SHAPE, seed=k) for name in ("cat", "dog") for k in range(6)}
    for name, values in expected.items():
        (tmp_path / "z" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "z" / name, values)
    found = store(tmp_path / "z", vae)
    assert found.spec.class_names == ("cat", "dog")
    assert (found.spec.channels, found.spec.height, found.spec.width) == (1, 16, 16)
    assert (len(found.train), len(found.val)) == (8, 4)
    stored = by_name(found)
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        mean, std = stored[name][0].chunk(2)
        np.testing.assert_allclose(mean, values, **FLOAT16)
        assert not std.any()
        assert stored[name][1] == ("cat", "dog").index(name.split("/")[0])


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_batches_and_labels_in_npz_files(kind: str, vae: Path, tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    values = noise(10, *SHAPE)
    if kind == "npy":
        np.save(tmp_path / "z" / "all.npy", np.asfortranarray(values.astype(np.float64)))
    else:
        np.savez_compressed(tmp_path / "z" / "all.npz", latents=values, y=np.array([0, 1, -1, 0, 1, 0, 1, 0, 1, 0]))
    found = store(tmp_path / "z", vae)
    assert found.spec.class_names == (() if kind == "npy" else ("0", "1"))
    for name, (stored, label) in by_name(found).items():
        row = int(name.split(":")[1])
        np.testing.assert_allclose(stored[:4], values[row], **FLOAT16)
        if kind == "npz":
            assert label == [0, 1, -1, 0, 1, 0, 1, 0, 1, 0][row]


def test_a_posterior_is_mean_and_log_variance(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    moments = np.concatenate([noise(6, *SHAPE), noise(6, *SHAPE, std=1, seed=1) - 2], axis=1)
    np.savez(tmp_path / "z" / "a.npz", moments=moments)
    for name, (stored, _) in by_name(store(tmp_path / "z", vae)).items():
        row = int(name.split(":")[1])
        np.testing.assert_allclose(stored[:4], moments[row, :4], **FLOAT16)
        np.testing.assert_allclose(stored[4:], np.exp(moments[row, 4:] / 2), **FLOAT16)


@pytest.mark.parametrize("scale", ["0.18215", "vae"])
def test_scaled_latents_are_unscaled(scale: str, vae: Path, tmp_path: Path) -> None:
    """They reach the network, scaled by the VAE, as they were."""
    (tmp_path / "z").mkdir()
    values = noise(8, *SHAPE, std=1)
    np.save(tmp_path / "z" / "a.npy", values)
    codec = KLVAECodec(load_vae(vae))
    for name, (stored, _) in by_name(store(tmp_path / "z", vae, scale)).items():
        np.testing.assert_allclose(codec.draw(stored[None], None)[0], values[int(name.split(":")[1])], rtol=2e-3)
    with pytest.raises(DataError, match=r"std (0\.9|1\.0)\d, as if scaled already .* add --scale vae"):
        store_foreign(tmp_path / "z", DataConfig(source="latents"), vae, tmp_path / "new", None, 3, 5)
    store_foreign(tmp_path / "z", DataConfig(source="latents"), vae, tmp_path / "new", "1", 3, 5)


BAD: list[tuple[dict[str, Any], dict[str, Any], str | None, str]] = [
    ({"a.npy": noise(2, 3, 4, 4)}, {}, None, r"latents of 3 channels; the VAE .* has 4 \(or 8"),
    ({"a.npy": noise(4)}, {}, None, r"a\.npy: shape \(4,\); expected a latent"),
    ({"a.npy": np.zeros(SHAPE, np.int64)}, {}, None, "type int64; latents are floats"),
    ({"a.npy": noise(*SHAPE), "b.npy": noise(4, 2, 2)}, {}, None, r"different shapes: .* in b\.npy"),
    ({"a.npy": np.full((3, *SHAPE), np.nan)}, {}, None, r"a\.npy:000000: NaN or infinite"),
    ({"a.npy": np.full((3, *SHAPE), 1e5)}, {}, None, "beyond float16"),
    ({"a.npz": {"q": noise(*SHAPE), "r": noise(*SHAPE)}}, {}, None, "expected one named latents"),
    ({"a.npz": {"z": noise(3, *SHAPE), "y": np.arange(2)}}, {}, None, "'y' holds 2 values .* expected 3"),
    ({"a.npz": {"z": noise(3, *SHAPE)}}, {"memory_limit_gb": 1e-9}, None, r"save it as an \.npy file"),
    ({"a.npz": {"z": noise(3, *SHAPE), "y": np.zeros(3, int)}}, {}, None, "only one class"),
    ({"a.npy": noise(3, 8, 4, 4)}, {}, "0.18215", "leave --scale out"),
    ({"a.npy": noise(3, *SHAPE)}, {}, "much", "--scale much: expected a number above 0"),
    ({"a.npy": noise(3, *SHAPE)}, {}, "-1", "--scale -1: expected a number above 0"),
    ({}, {}, None, r"no \.npy or \.npz files"),
]


@pytest.mark.parametrize(("files", "data", "scale", "message"), BAD)
def test_what_cannot_be_used(
    files: dict[str, Any], data: dict[str, Any], scale: str | None, message: str, vae: Path, tmp_path: Path
) -> None:
    (tmp_path / "z").mkdir()
    for name, content in files.items():
        if name.endswith("npz"):
            np.savez(tmp_path / "z" / name, **content)
        else:
            np.save(tmp_path / "z" / name, content)
    with pytest.raises(DataError, match=message) as caught:
        store(tmp_path / "z", vae, scale, **data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_damaged_or_malicious(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    with pytest.raises(DataError, match="no such folder of latents"):
        open_foreign(tmp_path / "nowhere")
    for name, message in {"a.npy": "truncated|not readable", "a.npz": "not readable"}.items():
        path = tmp_path / "z" / name
        with path.open("wb") as file:
            np.save(file, noise(*SHAPE)) if name.endswith("npy") else np.savez(file, z=noise(*SHAPE))
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=message):
            open_foreign(tmp_path / "z")
        path.unlink()
    np.save(tmp_path / "z" / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="type object"):
        open_foreign(tmp_path / "z")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_memory_is_that_of_a_batch_or_an_array(kind: str, tmp_path: Path) -> None:
    """One npy file is mapped; of many npz files, one array at a time is in memory."""
    (tmp_path / "z").mkdir()
    size = 4 * 32 * 32 * 4
    if kind == "npy":
        array = np.lib.format.open_memmap(tmp_path / "z" / "a.npy", "w+", np.float32, (2000, 4, 32, 32))
        array[:] = 5.5 * np.sign(np.arange(32) % 2 - 0.5)
        del array
    else:
        for k in range(20):
            np.savez(tmp_path / "z" / f"{k}.npz", z=noise(100, 4, 32, 32, seed=k))
    tracemalloc.start()  # knows of numpy's arrays, not of mapped files
    try:
        latents = open_foreign(tmp_path / "z")
        for start in range(0, 2000, 40):
            assert latents.read(range(start, start + 40)).shape == (40, 4, 32, 32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2000 * size / 4


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_from_foreign_latents_to_an_evaluation(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "z").mkdir()
    np.savez(tmp_path / "z" / "a.npz", z=noise(24, *SHAPE), y=np.arange(24) % 2)
    out = tmp_path / "latents"
    own = ("--from", tmp_path / "z", "--vae", vae, "--out", out)
    assert call("encode", "data.val_fraction=0.5", *own) == 0
    printed = capsys.readouterr().out
    assert f"12 training and 12 held-out, 4x4x4, in {out}" in printed
    assert "train CONFIG data.source=latents" in printed
    assert call("encode", "data.val_fraction=0.5", *own) == 0
    assert "already complete" in capsys.readouterr().out
    config = {
        "data": {"source": "latents", "path": str(out)},
        "codec": {"kind": "kl-vae", "path": str(vae)},
        "model": {"variant": "unet-conv", "model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1},
        "sampling": {"num_inference_steps": 2},
        "training": {"steps": 1, "batch_size": 4, "warmup_steps": 0, "tensorboard": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert call("train", tmp_path / "mine.yaml", f"output={run}", "--quiet") == 0
    assert call("evaluate", run, "-n", 2, "--device", "cpu") == 0
    assert json.loads((run / "evaluation.json").read_text())["held_out"]["n"] == 12
    capsys.readouterr()
    for wrong, message in (
        (("data.image_size=8", *own), "with --from, expected nothing but data.labels"),
        (("--vae", vae, "--out", out), "name the configuration"),
        (("digits", "--vae", vae, "--out", out, "--scale", "1"), "only with --from"),
        (("data.val_fraction=0.25", *own), "holds other latents (split"),
    ):
        assert call("encode", *wrong) == 1
        assert message in capsys.readouterr().err
