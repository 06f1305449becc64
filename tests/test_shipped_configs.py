"""Every shipped configuration trains and draws, shortened to a step."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff as hd
from heterodiff.config import DataConfig, RunConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.data.decoding.nifti import Layout
from heterodiff.data.sources.volumes import layout_of
from heterodiff.training.preflight.trial import dry_run
from heterodiff.training.start import train

SHIPPED = sorted(shipped_configs().glob("*.yaml"))
LARGE = {
    "coco_224": (3, 224, "256x7x7"),
    "flickr30k_224": (3, 224, "256x7x7"),
    "brats128_hae_v2_conservative": (4, 128, "hae-v2-conservative"),
    "atlas128": (1, 128, "hae-v2-conservative"),
}
"""Channels, side, and what the dry run says of the network."""
FEWER = {
    "microdoppler": ["data.microdoppler.images_per_class=3"],
    "shapes": ["data.shapes.images=12"],
    "brain-phantom": ["data.brain_phantom.patients=6", "data.brain_phantom.slices_per_patient=4"],
}


def _pictures(folder: Path, side: int) -> None:
    """Three grey pictures in each of two class folders."""
    rng = np.random.default_rng(0)
    for k in range(6):
        path = folder / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(path)


def _captioned(folder: Path, name: str, data: DataConfig) -> None:
    """Six colour pictures with captions in the layout that the configuration ``name`` is about."""
    pictures = {"coco_224": "train2017", "flickr30k_224": "flickr30k_images"}.get(name, "png")
    rng = np.random.default_rng(0)
    (folder / pictures).mkdir(parents=True)
    names = [f"{k}.png" for k in range(6)]
    for file in names:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / pictures / file)
    if name == "coco_224":
        (folder / "annotations").mkdir()
        content = {
            "images": [{"id": k, "file_name": file} for k, file in enumerate(names)],
            "annotations": [{"image_id": k, "caption": f"noise number {k}"} for k in range(6)],
        }
        (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    elif name == "flickr30k_224":
        rows = [f"{file}| 0| noise number {k}" for k, file in enumerate(names)]
        (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]) + "\n")
    else:
        assert data.captions_file is not None
        lines = [
            {data.file_column: f"png/{file}", data.text_column: f"noise number {k}"} for k, file in enumerate(names)
        ]
        (folder / data.captions_file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _patients(folder: Path, layout: Layout) -> None:
    """Five patients in the layout, of three slices each, every second with a lesion."""
    rng = np.random.default_rng(0)
    for number in range(5):
        (folder / f"p{number}").mkdir(parents=True)
        mask = np.zeros((20, 24, 3), np.uint8)
        mask[8:12, 8:12, number % 2] = number % 2
        volumes = {kind: rng.uniform(1, 9, mask.shape).astype(np.float32) for kind in layout.modalities.values()}
        for pattern, content in [*volumes.items(), (layout.mask, mask)]:
            name = pattern.replace("*[_-]", "x_").replace("*", "x")
            nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), folder / f"p{number}" / f"{name}.nii.gz")


def _slices(path: Path, channels: int = 4) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((9, 30, 24), bool)
    mask[::2, 10:14, 8:12] = True
    image = rng.integers(0, 256, (9, channels, 30, 24), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, image=image, mask=mask, patient=np.repeat([7, 19, 26], 3))


def _shortened(path: Path, folder: Path) -> RunConfig:
    shipped = load_config(path)
    overrides = [f"output={folder / 'run'}", "training.steps=1", "training.batch_size=2", "training.warmup_steps=1"]
    overrides += ["sampling.num_inference_steps=2", "training.num_workers=0", "training.accumulation_steps=1"]
    overrides += FEWER.get(shipped.data.source, [])
    if shipped.codec.training is not None:
        overrides += [f"codec.path={folder / 'codec'}", "codec.training.steps=1", "codec.training.batch_size=2"]
        overrides += ["codec.training.num_workers=0"]
    if shipped.data.path is not None:
        overrides += [f"data.path={(folder / 'data').with_suffix(shipped.data.path.suffix)}"]
    if shipped.data.source == "images":
        assert shipped.data.image_size is not None
        _pictures(folder / "data", shipped.data.image_size[0])
    elif shipped.data.source == "captions":
        _captioned(folder / "data", path.stem, shipped.data)
    elif shipped.data.source == "volumes" and shipped.data.path is not None and shipped.data.path.suffix == ".npz":
        _slices(folder / "data.npz")
    elif shipped.data.source == "volumes":
        _patients(folder / "data", layout_of(shipped.data.volumes))
    return load_config(path, overrides)


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem not in LARGE], ids=lambda path: path.stem)
def test_trains_and_draws(path: Path, tmp_path: Path) -> None:
    config = _shortened(path, tmp_path)
    assert train(config, quiet=True).step == 1
    pipeline = hd.load(tmp_path / "run")
    if config.recipe == "text-image":
        assert isinstance(pipeline, hd.TextImagePipeline)
        prompt = "noise number" if config.data.source == "captions" else "a circle"
        images = pipeline.generate_from_text(prompt, num_inference_steps=2).images
    else:
        assert isinstance(pipeline, hd.GenerationPipeline)
        images = pipeline(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    of_source = {"brain-phantom": 4, "volumes": 4, "shapes": 3, "captions": 3}
    channels = of_source.get(config.data.source, 1)
    size = config.data.image_size or (8, 8)
    assert tuple(images.shape) == (1, channels, *size)
    assert bool(((images >= 0) & (images <= 1)).all())


ALIKE = {"atlas128": "brats128_hae_v2_conservative", "flickr30k_224": "coco_224"}
"""Of the same networks: one of them is enough."""
MINUTES = "brats128_hae_v2_conservative"
"""Takes as long as a hundred other tests."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in (*ALIKE, MINUTES))) for p in SHIPPED if p.stem in LARGE],
    ids=lambda path: path.stem,
)
def test_large_ones_take_a_step(path: Path, tmp_path: Path) -> None:
    config = _shortened(path, tmp_path)
    result = dry_run(config)
    channels, side, shown = LARGE[path.stem]
    assert (result.spec.channels, result.spec.height, result.spec.width) == (channels, side, side)
    assert shown in result.parts[0].network
    assert all(np.isfinite(part.loss) for part in result.parts)
    assert not (tmp_path / "run").exists()
