"""A run on simulated heads is calibrated and evaluated from its folder; what is missing is said."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from heterodiff.cli import main
from heterodiff.config import RunConfig, SegmentationConfig
from heterodiff.config.file import load_config, parse_config
from heterodiff.data import heights as heights_of
from heterodiff.data.sources import load_data, load_test, open_source
from heterodiff.diffusion.anomaly import AnomalyMaps
from heterodiff.errors import ConfigError, DataError, RunError
from heterodiff.evaluation import calibration as calibration_of
from heterodiff.evaluation.anomalies import evaluate_anomalies, finds_anomalies
from heterodiff.evaluation.calibration import calibrate_run
from heterodiff.evaluation.runs import image_config, run_data
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.anomalies.calibrated import calibrated_precision, load_calibration, save_calibration
from heterodiff.pipelines.anomalies.label_weights import planes_of
from heterodiff.pipelines.anomalies.masks import Calibration, drop_small, half_peak_mask, peak_score
from heterodiff.pipelines.anomalies.segment import Segmenter
from heterodiff.pipelines.load import load_generation
from heterodiff.report.writing import summary_lines, write_report
from heterodiff.run_folder import RunFolder
from heterodiff.training.start import train


def settings(output: Path, **more: object) -> RunConfig:
    phantom = {"patients": 10, "slices_per_patient": 4, "contrast": 3, "lesion_radius": [0.25, 0.35]}
    content = {
        "output": str(output),
        "data": {
            "source": "brain-phantom",
            "image_size": 32,
            "brain_phantom": phantom,
            "val_fraction": 0.3,
            "test_fraction": 0.3,
        },
        "model": {"variant": "unet", "model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1},
        "diffusion": {"prediction": "epsilon", "schedule": "linear"},
        "sampling": {"num_inference_steps": 2},
        "segmentation": {"method": "forward-process", "depth": 300, "num_inference_steps": 6, "network_steps": 0},
        "training": {"steps": 2, "batch_size": 8, "warmup_steps": 1, "tensorboard": False},
    }
    for key, value in more.items():
        section, name = key.split("__")
        content[section][name] = value  # type: ignore[index]
    return parse_config(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "run"
    train(settings(folder), quiet=True)
    return folder


CALIBRATION = Calibration((0.5, 0.5, 0.5, 0.5), -0.9, 10, 5, 1)


def test_a_calibrated_run_is_evaluated_on_its_test_images(run: Path) -> None:
    config = settings(run)
    assert finds_anomalies(run)
    save_calibration(run, CALIBRATION, config.segmentation)
    assert load_calibration(run, config.segmentation) == CALIBRATION
    found = evaluate_anomalies(run)
    spec = RunFolder(run).spec()
    assert spec is not None
    test = load_test(config.data, spec)
    assert test.mask is not None
    ill = sum(test.mask(row).any() for row in range(len(test.images)))
    assert found.metrics["n"] == len(test.images) == 12
    assert found.metrics["unhealthy"]["dice"]["n"] == ill
    assert found.metrics["calls_per_image"] == 12
    assert json.loads((run / "evaluation.json").read_text()) == found.metrics
    with Image.open(found.picture) as picture:
        assert picture.width > 300
    report = write_report(run).read_text("utf-8")
    dice = found.metrics["unhealthy"]["dice"]
    for words in ("Anomalies found in test images", f"{100 * dice['mean']:.1f} %", "segment", "data:image/png"):
        assert words in report
    for row in found.metrics["patients"]:
        assert f"<td>{row['patient']}</td>" in report
    text = "\n".join(summary_lines(found.metrics))
    for word in ("Dice", "AUROC", "best threshold", "network calls an image: 12"):
        assert word in text


def test_maps_of_a_run_do_not_depend_on_how_many_images_come_together(run: Path) -> None:
    for method in ("forward-process", "ddib", "partial-noising"):
        config = settings(run, segmentation__method=method, segmentation__channels=[3, 0])
        segmenter = Segmenter(load_generation(run), config.segmentation)
        spec = RunFolder(run).spec()
        assert spec is not None
        images = load_test(config.data, spec).images.batch(range(3))[0]
        together = segmenter.maps(images)
        assert together.maps.shape == (3, 2, 32, 32)
        for k in range(3):
            alone = segmenter.maps(images[k : k + 1], first=k)
            np.testing.assert_allclose(alone.maps[0], together.maps[k], atol=1e-5)
            np.testing.assert_allclose(alone.score[0], together.score[k], atol=1e-5)


def test_settings_of_segmentation_may_change_after_training(run: Path) -> None:
    before = load_config(run / "config.yaml")
    try:
        assert train(settings(run, segmentation__guidance_scale=9), quiet=True).step == 2
        assert load_config(run / "config.yaml").segmentation.guidance_scale == 9
    finally:
        train(before, quiet=True)
    assert load_config(run / "config.yaml") == before


def test_images_may_be_judged_by_the_peak_of_their_map_or_by_how_far_predictions_part(run: Path) -> None:
    config = settings(run, segmentation__channels=[1, 2])
    spec = RunFolder(run).spec()
    assert spec is not None
    images = load_test(config.data, spec).images.batch(range(3))[0]
    pipeline = load_generation(run)
    own = Segmenter(pipeline, config.segmentation).maps(images)
    peak = Segmenter(pipeline, config.segmentation.model_copy(update={"score": "peak"})).maps(images)
    np.testing.assert_array_equal(own.maps, peak.maps)
    np.testing.assert_allclose(peak.score, [peak_score(one) for one in own.maps.numpy()], rtol=1e-5)
    assert not np.allclose(own.score, peak.score)
    parting = Segmenter(pipeline, config.segmentation.model_copy(update={"score": "divergence"})).maps(images)
    np.testing.assert_allclose(parting.score, own.divergence.numpy().mean(axis=1), rtol=1e-6)


def test_masks_may_reach_to_half_the_peak(run: Path) -> None:
    config = settings(run)
    spec = RunFolder(run).spec()
    assert spec is not None
    images = load_test(config.data, spec).images.batch(range(3))[0]
    half = Segmenter(load_generation(run), config.segmentation.model_copy(update={"threshold": "half-peak"}))
    maps = half.maps(images)
    found = half.masks(maps, CALIBRATION)
    np.testing.assert_array_equal(found.masks, [drop_small(half_peak_mask(one)) for one in maps.maps.numpy()])
    quantile = Segmenter(load_generation(run), config.segmentation).masks(maps, CALIBRATION)
    assert (quantile.masks != found.masks).any()


def test_small_anomalies_need_less_smoothing(run: Path) -> None:
    """A single pixel of one image is marked by neither rule, unless it is asked for."""
    maps = torch.full((1, 1, 32, 32), 0.1)
    maps[0, 0, 9, 20] = 5
    found = AnomalyMaps(maps, torch.ones(1, 1), torch.zeros(1), torch.zeros(1))
    pixel = np.argwhere(maps[0, 0].numpy() > 1)
    calibration = Calibration((1.0,), 0.0, 1, 1, 0)
    pipeline = load_generation(run)
    for threshold in ("quantile", "half-peak"):
        usual = {"threshold": threshold, "channels": [0]}
        fine = usual | {"smoothing": 1, "drop_small": 0}
        masks = [
            Segmenter(pipeline, SegmentationConfig.model_validate(way)).masks(found, calibration).masks[0]
            for way in (usual, fine)
        ]
        assert masks[0].sum() != 1
        if threshold == "half-peak":
            np.testing.assert_array_equal(np.argwhere(masks[1]), pixel)
        assert masks[1][9, 20]


def test_an_untrained_model_is_not_calibrated_in_silence(run: Path) -> None:
    """Two steps teach nothing: either it is told, or the limits are kept with the settings they hold for."""
    config = settings(run)
    try:
        lines = calibrate_run(run)
    except DataError as error:
        assert "train it longer" in str(error)  # noqa: PT017
    else:
        assert "validation images" in lines[0]
        assert load_calibration(run, config.segmentation).healthy > 0


def test_masks_are_found_in_the_precision_of_the_calibration(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(calibration_of, "calibrate", lambda *_: CALIBRATION)
    seen = []
    forward = HAEUNet.forward

    def spy(network: HAEUNet, sample: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(sample.dtype)
        return forward(network, sample, *rest, **more)

    monkeypatch.setattr(HAEUNet, "forward", spy)
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(SystemExit) as ended:
            main(["segment", str(run), "--calibrate", "--dtype", dtype, "--device", "cpu"])
        assert ended.value.code == 0
        assert json.loads((run / "calibration.json").read_text())["precision"] == dtype
        evaluate_anomalies(run, device="cpu")
        assert set(seen) == {getattr(torch, dtype)}
        seen.clear()
    stored = json.loads((run / "calibration.json").read_text())
    del stored["precision"], stored["checksum"]  # as written by earlier versions
    (run / "calibration.json").write_text(json.dumps(stored))
    assert calibrated_precision(run) == "float32"
    (run / "calibration.json").write_text(json.dumps({**stored, "precision": "float7"}))
    with pytest.raises(RunError, match="float7"):
        evaluate_anomalies(run)
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(run), str(run), "--dtype", "bfloat16"])
    assert ended.value.code == 1
    assert "add --calibrate" in capsys.readouterr().err


def test_limits_hold_for_the_settings_they_were_learned_with(run: Path) -> None:
    save_calibration(run, CALIBRATION, settings(run).segmentation)
    other = settings(run, segmentation__guidance_scale=2.0).segmentation
    with pytest.raises(RunError, match=r"calibrated with another segmentation\.guidance_scale; run .*--calibrate"):
        load_calibration(run, other)
    (run / "calibration.json").unlink()
    with pytest.raises(RunError, match=r"not calibrated yet.*heterodiff segment .* --calibrate"):
        evaluate_anomalies(run)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("segmentation__depth", 2000, r"segmentation\.depth=2000: the run was trained on 1000 timesteps"),
        ("segmentation__channels", [0, 4], r"segmentation\.channels: 4 is not one of the run's 4 channels, 0\.\.3"),
        ("segmentation__healthy", "well", r"segmentation\.healthy='well': the run's classes are healthy, unhealthy"),
    ],
)
def test_settings_that_do_not_fit_the_run(run: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Segmenter(load_generation(run), settings(run, **{key: value}).segmentation)


def test_limits_are_learned_from_healthy_images_and_others(run: Path) -> None:
    """A model without labels finds anomalies, but its limits need some."""
    before = load_config(run / "config.yaml")
    train(settings(run, segmentation__method="partial-noising", segmentation__healthy="well"), quiet=True)
    try:
        with pytest.raises(RunError, match=r"of class 'well' and others, found classes healthy, unhealthy; label them"):
            calibrate_run(run)
    finally:
        train(before, quiet=True)


def test_healthy_images_alone_are_learned_from_and_judged_by(tmp_path: Path) -> None:
    """Without any label, and with labels of which the unhealthy ones serve limits and measurement alone."""
    method = {"segmentation__method": "partial-noising"}
    way = method | {"diffusion__p_uncond": 1.0}
    labelled = settings(tmp_path / "labelled", data__train_classes=["healthy"], **way)
    train(labelled, quiet=True)
    facts = json.loads((tmp_path / "labelled" / "run.json").read_text())
    counts = load_data(labelled.data)
    assert set(counts.train.labels.tolist()) == {0}
    assert facts["images"] == {"train": len(counts.train), "val": len(counts.val)}
    phantom = labelled.data.brain_phantom.model_copy(update={"unhealthy": 0.0})
    unlabelled = settings(tmp_path / "unlabelled", data__labels="none", data__brain_phantom=phantom, **method)
    train(unlabelled, quiet=True)
    lines = "\n".join(calibrate_run(tmp_path / "unlabelled"))
    assert "validation images, taken for healthy" in lines
    assert "one of twenty of these is judged unhealthy" in lines
    found = evaluate_anomalies(tmp_path / "unlabelled").metrics
    assert found["unhealthy"]["dice"]["n"] == 0
    assert found["calls_per_image"] == 6


def test_other_patients_with_masks_are_measured_in_place_of_the_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated heads of another seed, drawn for the run or read from a file, and heads that it was trained on."""
    config = settings(run)
    save_calibration(run, CALIBRATION, config.segmentation)
    phantom = config.data.brain_phantom.model_copy(update={"seed": 1, "patients": 3})
    others = config.data.model_copy(update={"brain_phantom": phantom})
    collection = open_source(others)
    assert collection.mask is not None
    path = tmp_path / "others.npz"
    images = np.stack([collection.read(row) for row in range(12)])
    masks = np.stack([collection.mask(row) for row in range(12)])
    np.savez(path, image=images, mask=masks, patient=np.array(collection.groups))
    drawn = evaluate_anomalies(run, others).metrics
    assert drawn["n"] == 12
    assert {row["patient"] for row in drawn["patients"]} <= set(collection.groups or ())
    assert drawn["data"] == {"path": "brain-phantom", "part": "all", "notes": []}
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--data", str(path), "--json"])
    assert ended.value.code == 0
    read = json.loads(capsys.readouterr().out)
    assert read["unhealthy"]["dice"]["n"] == drawn["unhealthy"]["dice"]["n"] == masks.any(axis=(1, 2)).sum()
    assert read["data"]["path"] == str(path)
    assert str(path) in (run / "report.html").read_text("utf-8")

    note = "note     28 of these 40 images are training images too: they are not held out"
    known = evaluate_anomalies(run, config.data).metrics
    trained_on = json.loads((run / "run.json").read_text())["images"]["train"]
    assert note.replace("28", str(trained_on)) in summary_lines(known)


def test_test_images_stay_those_of_the_training(run: Path) -> None:
    """Whatever the settings say since, or which patients came or went."""
    path, split = run / "split.json", json.loads((run / "split.json").read_text())
    config, spec = load_config(run / "config.yaml").data, RunFolder(run).spec()
    assert spec is not None
    every = open_source(config).names
    assert sorted([*split["train"], *split["val"], *split["test"]]) == sorted(every)
    more = config.model_copy(
        update={"brain_phantom": config.brain_phantom.model_copy(update={"patients": 20}), "test_fraction": 0.5}
    )
    assert set(load_test(more, spec).images.names) != set(split["test"])
    assert set(load_test(more, spec, split=split).images.names) == set(split["test"])
    fewer = config.model_copy(update={"brain_phantom": config.brain_phantom.model_copy(update={"patients": 2})})
    with pytest.raises(DataError, match=r"of the 12 images that the saved split keeps for testing are missing"):
        load_test(fewer, spec, split=split)
    leaking = split | {"test": [*split["test"][1:], split["train"][0]], "checksum": None}
    try:
        path.write_text(json.dumps(leaking))
        save_calibration(run, CALIBRATION, load_config(run / "config.yaml").segmentation)
        with pytest.raises(DataError, match="are both in 'test' and in 'train' or 'val'"):
            evaluate_anomalies(run)
    finally:
        path.write_text(json.dumps(split))


def test_other_patients_that_are_not_there_or_have_no_mask(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("a")
    for name in ("none", "none.npz", "list.txt"):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--data", str(tmp_path / name)])
        assert f"{name}: no such folder or npz file; correct --data" in capsys.readouterr().err
    collection = open_source(settings(run).data)
    images = np.stack([collection.read(row) for row in range(2)])
    np.savez(tmp_path / "bare.npz", image=images, patient=np.array(["a", "b"]))
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--data", str(tmp_path / "bare.npz")])
    assert "bare.npz: no masks to compare with" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["-n", "4"], ["--steps", "3"], ["--guidance", "2"]])
def test_options_that_would_not_count_are_refused(
    run: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), *option])
    assert ended.value.code == 1
    assert f"error: {option[0]}: {run} finds anomalies" in capsys.readouterr().err


def test_only_runs_of_images_with_masks_find_anomalies(run: Path, tmp_path: Path) -> None:
    assert not finds_anomalies(tmp_path)
    assert open_source(settings(run).data).mask is not None


# ---- label-difference -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned nothing, on lesions that are bright: intensities alone find them."""
    folder = tmp_path_factory.mktemp("weighed") / "run"
    phantom = settings(folder).data.brain_phantom.model_copy(update={"patients": 16})
    method = {"segmentation__method": "label-difference", "segmentation__num_inference_steps": None}
    train(settings(folder, **method, segmentation__depth=None, data__brain_phantom=phantom), quiet=True)
    return folder


def test_planes_are_weighed_and_compared_with_intensities_alone(weighed: Path) -> None:
    lines = "\n".join(calibrate_run(weighed))
    calibration = load_calibration(weighed, RunFolder(weighed).config().segmentation, 4)
    assert calibration.evidence is not None
    assert calibration.intensity is not None
    assert (len(calibration.evidence.weights), len(calibration.intensity.weights)) == (8, 4)
    assert "AUROC    of patients held out at equal heights: with the model " in lines
    found = evaluate_anomalies(weighed).metrics
    assert found["calls_per_image"] == 24
    assert found["intensity"]["auroc"] > 0.9
    assert abs(found["unhealthy"]["dice"]["mean"] - found["intensity"]["dice"]) < 0.2
    gain = found["intensity"]["gain"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert gain["mean"] == pytest.approx(found["unhealthy"]["dice"]["mean"] - found["intensity"]["dice"])
    with (weighed / "evaluation" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["n"]
    with_lesion = [float(row["dice"]) for row in rows if row["dice"]]
    assert np.mean(with_lesion) == pytest.approx(found["unhealthy"]["dice"]["mean"], abs=1e-4)
    scores, labels = ([float(row[key]) for row in rows] for key in ("score", "unhealthy"))
    assert roc_auc_score(labels, scores) == pytest.approx(found["image"]["auroc"])
    assert 0 <= found["image"]["auroc_of_height"] <= 1
    assert 0 <= found["image"]["auroc_at_equal_heights"] <= 1
    threshold = found["threshold"]
    assert threshold["gain"]["mean"] == pytest.approx(found["unhealthy"]["dice"]["mean"] - threshold["dice"])
    assert "Intensities alone" in write_report(weighed).read_text("utf-8")
    assert any("intensities alone" in line for line in summary_lines(found))


def test_a_difference_that_the_model_has_learned_is_weighed(weighed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the lesions, and bright spots in all images that intensities cannot tell from them."""
    data = run_data(weighed)
    collection = open_source(image_config(weighed))
    assert collection.mask is not None
    truth = {name: collection.mask(row) for row, name in enumerate(collection.names)}

    def known(segmenter: Segmenter, images: torch.Tensor, first: int = 0, *rest: object) -> AnomalyMaps:
        rng = np.random.default_rng(first)
        lesion = np.stack([truth[name] for name in data.val.names[first : first + len(images)]])[:, None]
        shown = rng.normal(0, 0.1, (len(images), 4, 32, 32)) - lesion * np.array([0, 1, 0, 0])[:, None, None]
        planes = planes_of(shown, rng.uniform(0.2, 1, (len(images), 4, 32, 32)), [0, 1, 2, 3], 5)
        count = torch.zeros(len(images))
        return AnomalyMaps(torch.from_numpy(planes), torch.zeros(len(images), 4), count, count)

    monkeypatch.setattr(Segmenter, "maps", known)
    lines = "\n".join(calibrate_run(weighed))
    assert "adds nothing" not in lines
    calibration = load_calibration(weighed, RunFolder(weighed).config().segmentation, 4)
    assert calibration.evidence is not None
    assert np.argmin(calibration.evidence.weights) == 1
    assert calibration.errors <= 1  # of twelve; a lesion of a few pixels may be missed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evidence": {"weights": [1.0], "bias": 0.0, "area": 3}}, r"calibration\.json: saved calibration cannot be"),
        ({"channel": 9}, r"calibration\.json: .* expected a channel below 4, found 9; calibrate again"),
        ({"evidence": None}, r"calibration\.json: .* calibrate again"),
        ({"intensity": {"weights": [1, 2, 3, 4], "bias": "x", "area": 3}}, r"calibration\.json: saved calibration"),
    ],
)
def test_damaged_weights(weighed: Path, changes: dict[str, Any], message: str) -> None:
    calibrate_run(weighed)
    file = RunFolder(weighed).calibration_file
    file.write_text(json.dumps(json.loads(file.read_text()) | changes | {"checksum": None}))
    with pytest.raises(RunError, match=message):
        evaluate_anomalies(weighed)


def test_one_label_alone_teaches_no_weights(weighed: Path) -> None:
    data = run_data(weighed)
    images = data.val.take(np.flatnonzero(data.val.labels == 0).tolist())
    segmenter = Segmenter(load_generation(weighed), RunFolder(weighed).config().segmentation)
    with pytest.raises(DataError, match="needs healthy and unhealthy validation images"):
        calibration_of.choose_images(images, np.zeros(len(images), bool), segmenter)


def test_patients_and_heights_come_from_names() -> None:
    names = ["a/0001", "b/x/slice7", "a/0003", "a/0002", "b/x/slice9"]
    patients, heights = heights_of.patients_and_heights(names, "volumes")
    assert patients.tolist() == ["a", "b/x", "a", "a", "b/x"]
    assert heights is not None
    assert heights.tolist() == [0, 0, 1, 0.5, 1]
    patients, heights = heights_of.patients_and_heights(["healthy/1.png", "ill/2.png"], "images")  # folders are classes
    assert (patients.tolist(), heights) == (["healthy/1.png", "ill/2.png"], None)


def test_heights_that_tell_the_label_are_noticed() -> None:
    heights = np.tile(np.linspace(0, 1, 20), 6)
    unhealthy, patients = np.abs(heights - 0.5) < 0.2, np.repeat(np.arange(6), 20)
    by_height, equal = heights_of.by_height(heights, unhealthy), np.ones(120)
    assert heights_of.held_out_auroc(by_height, unhealthy, patients, equal) == pytest.approx(1)
    shuffled = np.random.default_rng(0).permutation(unhealthy)
    found = heights_of.held_out_auroc(heights_of.by_height(heights, shuffled), shuffled, patients, equal)
    assert found is not None
    assert 0.3 < found < 0.7
    assert heights_of.held_out_auroc(by_height, unhealthy, np.zeros(120), equal) is None


def test_overlap_weights_give_both_labels_the_same_heights() -> None:
    rng = np.random.default_rng(0)
    heights = rng.uniform(0, 1, 4000)
    unhealthy = rng.uniform(size=4000) < 0.9 * np.exp(-(((heights - 0.6) / 0.25) ** 2))
    weights = heights_of.overlap_weights(heights, unhealthy)
    moments = [
        [np.average(heights[label] ** power, weights=weights[label]) for power in (1, 2)]
        for label in (unhealthy, ~unhealthy)
    ]
    np.testing.assert_allclose(*moments, atol=0.01)
    assert abs(heights[unhealthy].std() - heights[~unhealthy].std()) > 0.1  # they differ without
