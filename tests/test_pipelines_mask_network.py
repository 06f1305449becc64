"""The segmentation network that learns from found masks: its parts literally, and that it improves on its teacher."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from heterodiff.config.file import parse_config
from heterodiff.data.dataset import ImageDataset, MemoryStore
from heterodiff.evaluation.anomalies import evaluate_anomalies, other_patients
from heterodiff.evaluation.calibration import calibrate_run
from heterodiff.evaluation.teaching import teach
from heterodiff.image_spec import ImageSpec
from heterodiff.pipelines.anomalies.calibrated import open_finder
from heterodiff.pipelines.anomalies.mask_network import (
    MaskNetwork,
    augmented,
    new_network,
    overlap_loss,
    train_mask_network,
    unsure_pixels,
)
from heterodiff.pipelines.anomalies.segment import Segmentation
from heterodiff.report.writing import summary_lines
from heterodiff.run_folder import RunFolder
from heterodiff.training.start import train
from tests.test_data_volumes import lesion
from tests.test_pipelines_segment_files import command, settings, write_heads

CPU = torch.device("cpu")


def test_unsure_pixels_are_those_nearly_as_high_as_the_mask() -> None:
    maps = np.array([[[1.0, 0.5, 0.31], [0.29, 0.1, 0.0]], [[1.0, 1, 1], [1, 1, 1]]])
    masks = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], bool)
    np.testing.assert_array_equal(unsure_pixels(masks, maps)[0], [[0, 0, 1], [0, 0, 0]])
    assert not unsure_pixels(masks, maps)[1].any()


def test_the_loss_is_cross_entropy_and_dice() -> None:
    rng = np.random.default_rng(0)
    odds, target, counts = rng.normal(size=(3, 4, 5)), rng.integers(0, 2, (3, 4, 5)), rng.integers(0, 2, (3, 4, 5))
    unhealthy = np.array([True, False, True])
    p = 1 / (1 + np.exp(-odds))
    entropy = -(target * np.log(p) + (1 - target) * np.log(1 - p))[counts == 1].mean()
    dice = []
    for one in np.flatnonzero(unhealthy):
        inside, true = p[one][counts[one] == 1], target[one][counts[one] == 1]
        dice.append((2 * (inside * true).sum() + 1) / (inside.sum() + true.sum() + 1))
    tensors = [torch.from_numpy(part).double() for part in (odds, target, counts)]
    found = overlap_loss(*tensors, torch.from_numpy(unhealthy))
    assert found.item() == pytest.approx(entropy + 1 - np.mean(dice))


def test_images_and_masks_move_together() -> None:
    rng = np.random.default_rng(0)
    masks = torch.zeros(8, 32, 32, dtype=torch.bool)
    masks[:, 8:14, 18:26] = True
    unsure = torch.zeros_like(masks)
    unsure[:, 14:18, 18:26] = True
    images = torch.stack([masks.float(), unsure.float()], dim=1)
    moved, found, counts = augmented(images, masks, unsure, rng)
    assert moved.shape == images.shape
    assert ((moved[:, 0] > 0.5).float() - found).abs().mean() < 0.02
    assert ((moved[:, 1] > 0.5).float() + counts - 1).abs().mean() < 0.02
    assert len({tuple(one.flatten().tolist()) for one in found}) == 8  # each image moves in its own way
    assert 0 < found.mean() < 0.2


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (33, 47), (64, 64), (128, 128), (130, 126), (256, 192), (5, 5)])
def test_a_network_for_every_size(size: tuple[int, int]) -> None:
    found = MaskNetwork(new_network(2, *size).eval()).segment(torch.rand(2, 2, *size), None, 0)
    assert found.masks.shape == found.maps.shape == (2, *size)
    assert found.calls.tolist() == [2, 2]


def test_sizes_cost_alike() -> None:
    """Patches keep the widest maps small."""
    sides = {side: side // new_network(1, side, side).patch_size for side in (28, 48, 64, 128)}
    assert sides == {28: 28, 48: 24, 64: 32, 128: 32}


def bright_squares(count: int) -> tuple[ImageDataset, np.ndarray, np.ndarray]:
    """Noisy images, every second with a bright square; their true masks and labels."""
    rng = np.random.default_rng(0)
    images, truth = rng.uniform(0.2, 0.5, (count, 1, 16, 16)), np.zeros((count, 16, 16), bool)
    for k in range(0, count, 2):
        y, x = rng.integers(1, 10, 2)
        truth[k, y : y + 5, x : x + 5] = True
    images[:, 0] += 0.3 * truth
    labels, names = truth.any(axis=(1, 2)), [str(k) for k in range(count)]
    spec = ImageSpec(16, 16, 1, ("healthy", "unhealthy"), (0.0, 1.0), "float32")
    store = MemoryStore(images.astype(np.float32))
    return ImageDataset(spec, store, np.arange(count), names, labels.astype(np.int64)), truth, labels


def dice(masks: np.ndarray, truth: np.ndarray) -> float:
    rows = truth.any(axis=(1, 2))
    overlap = 2 * (masks & truth)[rows].sum(axis=(1, 2)) / (masks[rows].sum(axis=(1, 2)) + truth[rows].sum(axis=(1, 2)))
    return float(overlap.mean())


def careless(truth: np.ndarray, labels: np.ndarray) -> Segmentation:
    """Masks of which a third is missing, beside it a false spot in every second image, healthy or not."""
    rng = np.random.default_rng(1)
    masks = truth & (rng.uniform(size=truth.shape) > 0.35)
    for k in range(0, len(masks), 4):
        y, x = rng.integers(0, 13, 2)
        masks[k : k + 2, y : y + 3, x : x + 3] = True
    maps = masks.astype(float)
    return Segmentation(masks, labels, maps, maps.max(axis=(1, 2)), maps, np.ones(len(maps)))


def test_a_network_finds_more_than_the_masks_it_learned_from() -> None:
    images, truth, labels = bright_squares(48)
    found = careless(truth, labels)
    calls: list[int] = []

    def segment(part: torch.Tensor, first: int) -> Segmentation:
        calls.append(first)
        rows = slice(first, first + len(part))
        return Segmentation(*(getattr(found, name)[rows] for name in Segmentation.__dataclass_fields__))

    shown: dict[str, int] = {}

    def start(name: str, total: int) -> "object":
        return lambda done: shown.__setitem__(name, done - total)

    options = {"seed": 0, "device": CPU, "start": start}
    learned = teach(images, labels, segment, steps=100, **options)  # type: ignore[arg-type]
    assert learned is not None
    assert calls == [0, 32]
    assert shown == {"training images": 0, "segmentation network": 0}  # both came to their end
    others, true, ill = bright_squares(64)
    result = learned.segment(others.batch(range(64))[0], 3, 0)
    assert dice(result.masks, true) > dice(found.masks, truth) + 0.05
    assert result.score[ill].min() > result.score[~ill].max()
    assert not result.masks[~ill].any()


def test_networks_of_one_seed_are_the_same() -> None:
    images, truth, labels = bright_squares(4)
    seeds = [train_mask_network(images, truth, ~truth, labels, steps=2, seed=k, device=CPU).digest for k in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_channels_that_are_left_out_do_not_matter() -> None:
    spec, rng = ImageSpec(16, 16, 3, ("healthy", "unhealthy"), (0.0, 1.0), "float32"), np.random.default_rng(0)
    _, truth, labels = bright_squares(4)
    store = MemoryStore(rng.uniform(size=(4, 3, 16, 16)).astype(np.float32))
    images = ImageDataset(spec, store, np.arange(4), list("abcd"), labels.astype(np.int64))
    options = {"steps": 2, "seed": 0, "device": CPU, "channels": [2, 0]}
    network = train_mask_network(images, truth, np.zeros_like(truth), labels, **options)  # type: ignore[arg-type]
    shown = images.batch(range(4))[0]
    changed = shown.clone()
    changed[:, 1] = 0
    np.testing.assert_array_equal(network.segment(shown, 3, 0).maps, network.segment(changed, 3, 0).maps)
    changed[:, 2] = 0
    assert not np.allclose(network.segment(shown, 3, 0).maps, network.segment(changed, 3, 0).maps)


def test_where_nothing_is_found_nothing_is_learned() -> None:
    images, _, labels = bright_squares(4)
    none = np.zeros((4, 16, 16))
    nothing = Segmentation(none > 0, labels, none, none[:, 0, 0], none, none[:, 0, 0])
    options = {"steps": 1, "seed": 0, "device": CPU, "start": lambda name, total: lambda done: None}
    assert teach(images, labels, lambda part, first: nothing, **options) is None  # type: ignore[arg-type]


def test_pixels_that_are_unsure_teach_nothing() -> None:
    """Two networks that differ in the masks of unsure pixels alone are the same."""
    images, truth, labels = bright_squares(8)
    sure = truth.copy()
    sure[:, :, 8:] = False
    unsure = np.zeros_like(truth)
    unsure[:, :, 4:] = True  # wide enough for what interpolation blends
    options = {"steps": 2, "seed": 0, "device": CPU}
    with_masks = sure.any(axis=(1, 2)) | ~labels
    chosen = images.take(np.flatnonzero(with_masks).tolist())
    one, other = (
        train_mask_network(chosen, masks[with_masks], unsure[with_masks], labels[with_masks], **options)  # type: ignore[arg-type]
        for masks in (sure, truth)
    )
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- through a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, calibrated with a network that learned from intensities weighed by labels."""
    folder = tmp_path_factory.mktemp("heads")
    config = settings(folder / "run", write_heads(folder / "data", [f"p{k}" for k in range(12)]))
    segmentation = {"method": "label-difference", "depth": None, "num_inference_steps": 2, "network_steps": 30}
    content = config.model_dump(mode="json") | {"segmentation": segmentation}
    content["data"]["val_fraction"] = 0.5
    train(parse_config(content, tolerated=None), quiet=True)
    (folder / "lines.txt").write_text("\n".join(calibrate_run(folder / "run")))
    return folder


def test_a_run_is_calibrated_with_a_network(heads: Path, tmp_path: Path) -> None:
    run = heads / "run"
    assert "network  AUROC of validation images: no network " in (heads / "lines.txt").read_text()
    assert ", taught by intensities alone " in (heads / "lines.txt").read_text()
    assert json.loads((run / "calibration.json").read_text())["network"]
    others = write_heads(tmp_path / "others", ["a", "b"])
    assert command(run, others, "--out", tmp_path / "out") == 0
    healthy, ill = (np.asarray(nibabel.load(tmp_path / "out" / name / "mask.nii.gz").dataobj) > 0 for name in "ab")
    true = lesion() > 0
    assert 2 * (ill & true).sum() / (ill.sum() + true.sum()) > 0.6
    assert healthy.sum() < 0.2 * true.sum()
    maps = nibabel.load(tmp_path / "out" / "b" / "anomaly.nii.gz").get_fdata()
    assert 0 <= maps.min() <= maps.max() <= 1


def test_the_network_is_measured_as_the_finder(heads: Path, tmp_path: Path) -> None:
    others = other_patients(heads / "run", write_heads(tmp_path / "others", ["a", "b", "c", "d"]))
    found = evaluate_anomalies(heads / "run", others).metrics
    assert (found["found_by"], found["calls_per_image"]) == ("segmentation network", 2)
    assert found["unhealthy"]["dice"]["mean"] > 0.6
    assert any("segmentation network calls an image: 2" in line for line in summary_lines(found))
    assert found["intensity"]["gain"]["low"] <= found["intensity"]["gain"]["high"]


@pytest.mark.parametrize("damage", ["missing", "other weights", "no weights"])
def test_a_network_that_is_not_the_runs_own(heads: Path, damage: str) -> None:
    run = heads / "run"
    folder, settings = RunFolder(run).mask_network, RunFolder(run).config().segmentation
    weights = folder / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert open_finder(run, settings).calibration.network
    try:
        if damage == "other weights":
            changed = bytearray(before)
            changed[-1] ^= 1
            weights.write_bytes(changed)
        else:
            weights.unlink() if damage == "missing" else weights.write_bytes(b"")
        with pytest.raises(Exception, match=r"segmentation_network.*--calibrate` again") as error:
            open_finder(run, settings)
        assert "RunError" in str(error.type) or "CheckpointError" in str(error.type)
    finally:
        weights.write_bytes(before)
