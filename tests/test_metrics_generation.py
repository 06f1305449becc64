"""What the numbers claim: planted copies, a perfect generator, a collapsed one, wrong labels."""

import json

import pytest
import torch
from sklearn.datasets import load_digits

from heterodiff.errors import DataError
from heterodiff.metrics import classifiers, memorising
from heterodiff.metrics.generation import evaluate_generation, nearest_picture

NAMES = [f"digit {index}" for index in range(10)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(classifiers, "CONV_MAX_STEPS", 80)
    monkeypatch.setattr(classifiers, "CONV_MIN_STEPS", 20)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts():
    """Digits as (training, held out, more that nobody has seen)."""
    content = load_digits()
    images = torch.from_numpy(content.images).float()[:, None] / 16
    labels = torch.from_numpy(content.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = order[:900], order[900:1350], order[1350:]
    return [(images[part], labels[part]) for part in rows]


def test_a_perfect_generator_gets_what_real_images_get(parts):
    train, val, unseen = parts
    metrics = evaluate_generation(*unseen, train, val, NAMES)
    for reader in ("svm", "cnn"):
        generated, real = (metrics["fidelity"][reader][kind] for kind in ("generated", "real"))
        assert real["share"] > 0.9
        assert generated["low"] <= real["high"]
        assert real["low"] <= generated["high"]
    frechet = metrics["frechet_distance"]
    assert frechet["n_reference"] == len(train[0])
    assert 0.7 < frechet["generated"] / frechet["real"] < 1.4
    kid = metrics["kid"]
    assert abs(kid["generated"]["mean"] - kid["real"]["mean"]) < kid["real"]["std"]
    assert metrics["nearest"]["verdict"] == "none"
    assert metrics["diversity"]["ratio"] == pytest.approx(1, abs=0.05)
    assert metrics["diversity"]["verdict"] == "ok"
    assert metrics["skipped"] == {}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_held_out_images_as_generated_ones_give_exactly_the_real_numbers(parts):
    train, val, _ = parts
    metrics = evaluate_generation(*val, train, val, NAMES)
    for reader in ("svm", "cnn"):
        assert metrics["fidelity"][reader]["generated"] == metrics["fidelity"][reader]["real"]
    frechet = metrics["frechet_distance"]
    assert frechet["n"] == len(val[0])
    assert frechet["generated"] == pytest.approx(frechet["real"], rel=1e-6)
    assert metrics["nearest"]["copy_share"] == metrics["nearest"]["real_share"] == pytest.approx(0.01, abs=0.005)
    for row in metrics["per_class"]:
        assert row["name"] == f"digit {row['label']}"
        assert row["cnn_generated"] == row["cnn_real"]
        assert row["train_images"] == int((train[1] == row["label"]).sum())
    assert sum(row["svm_real"]["n"] for row in metrics["per_class"]) == len(val[0])


def test_noise_and_permuted_labels_are_seen(parts):
    train, val, (images, labels) = parts
    generator = torch.Generator().manual_seed(0)
    noisy = (images + 0.25 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    permuted = labels[torch.randperm(len(labels), generator=generator)]
    metrics = evaluate_generation(noisy, permuted, train, val, NAMES)
    frechet, kid = metrics["frechet_distance"], metrics["kid"]
    assert frechet["generated"] > 2 * frechet["real"]
    assert kid["generated"]["mean"] > kid["real"]["mean"] + kid["real"]["std"]
    for reader in ("svm", "cnn"):
        share = metrics["fidelity"][reader]["generated"]
        assert share["low"] < metrics["fidelity"]["chance"] == 0.1
        assert share["share"] < 0.16


def test_noise_is_no_proof_against_memorising(parts):
    train, val, (images, labels) = parts
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).round()
    metrics = evaluate_generation(noise, labels, train, val, NAMES)
    assert metrics["nearest"]["verdict"] == "unlike"
    assert metrics["nearest"]["explanation"].endswith("so this check means nothing yet.")
    assert metrics["diversity"]["verdict"] == "noisy"
    json.dumps(metrics, allow_nan=False)


def test_good_images_of_wrong_classes_are_not_unlike_the_data(parts):
    train, val, (images, _) = parts
    nearest = memorising.memorising(images, train[0], val[0], variety=1.5)
    assert nearest["verdict"] == "none"


def test_planted_training_images_are_found(parts):
    train, val, unseen = parts
    rows = torch.arange(40)
    generated = torch.cat([unseen[0][:200], train[0][rows]])
    labels = torch.cat([unseen[1][:200], train[1][rows]])
    metrics = evaluate_generation(generated, labels, train, val, NAMES)
    nearest = metrics["nearest"]
    assert nearest["exact_copies"] == 40
    assert 40 <= nearest["copies"] <= 48
    assert nearest["verdict"] == "copies"
    assert "equal a training image exactly" in nearest["explanation"]
    assert len(nearest["pairs"]) == 16
    for pair in nearest["pairs"]:
        assert pair["distance"] == 0
        assert torch.equal(generated[pair["generated"]], train[0][pair["train"]])
    picture = nearest_picture(generated, train[0], metrics)
    assert picture.width > 8 * 80


def test_a_collapsed_generator_is_flagged(parts):
    train, val, unseen = parts
    first = [int((unseen[1] == label).nonzero()[0]) for label in range(10)]
    labels = torch.arange(10).repeat_interleave(20)
    noise = 0.02 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generated = (unseen[0][first][labels] + noise).clamp(0, 1)
    metrics = evaluate_generation(generated, labels, train, val, NAMES)
    assert metrics["diversity"]["verdict"] == "collapsed"
    assert metrics["diversity"]["collapsed"] == NAMES
    assert metrics["frechet_distance"]["generated"] > 1.5 * metrics["frechet_distance"]["real"]


def test_same_seed_same_numbers_and_no_trace_in_the_random_state(parts):
    (images, labels), val, unseen = parts
    few = (images[:150], labels[:150])
    before = torch.get_rng_state()
    runs = [evaluate_generation(unseen[0][:80], unseen[1][:80], few, val, NAMES, seed=5) for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(before, torch.get_rng_state())


def test_readers_never_see_held_out_or_generated_images(parts, monkeypatch):
    seen = []
    for kind in (classifiers.SvmClassifier, classifiers.ConvClassifier):

        def fit(self, images, labels, original=kind.fit):
            seen.append(images)
            return original(self, images, labels)

        monkeypatch.setattr(kind, "fit", fit)
    train, val, unseen = parts
    evaluate_generation(unseen[0][:50], unseen[1][:50], train, val, NAMES)
    assert len(seen) == 2
    assert all(torch.equal(images, train[0]) for images in seen)


def test_no_held_out_images(parts):
    train, val, unseen = parts
    empty = (val[0][:0], val[1][:0])
    metrics = evaluate_generation(unseen[0][:60], unseen[1][:60], train, empty, NAMES)
    assert metrics["frechet_distance"]["real"] is None
    assert metrics["kid"]["real"] is None
    assert metrics["fidelity"]["svm"]["real"] == {"n": 0, "share": None, "low": 0.0, "high": 1.0}
    assert metrics["nearest"]["verdict"] == "unknown"
    assert "no held-out images" in metrics["skipped"]["real"]
    json.dumps(metrics, allow_nan=False)


def test_no_labels_compare_random_features(parts):
    train, val, (images, _) = parts
    none = [(part, torch.full((len(part),), -1)) for part in (images, train[0], val[0])]
    metrics = evaluate_generation(*none[0], none[1], none[2], [])
    assert metrics["features"] == "random convolution"
    assert "fidelity" not in metrics
    assert "fidelity" in metrics["skipped"]
    assert 0.6 < metrics["frechet_distance"]["generated"] / metrics["frechet_distance"]["real"] < 1.6
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    worse = evaluate_generation(blurred, none[0][1], none[1], none[2], [])
    assert worse["frechet_distance"]["generated"] > 2 * worse["frechet_distance"]["real"]
    assert [row["name"] for row in metrics["diversity"]["per_class"]] == ["all images"]


def test_class_without_held_out_images_and_class_never_trained(parts):
    train, (val_images, val_labels), unseen = parts
    without = (val_images[val_labels != 3], val_labels[val_labels != 3])
    labels = unseen[1][:100].clone()
    labels[:5] = 11
    metrics = evaluate_generation(unseen[0][:100], labels, train, without, NAMES)
    rows = {row["label"]: row for row in metrics["per_class"]}
    assert rows[3]["svm_real"]["share"] is None
    assert rows[11]["name"] == "11"
    assert rows[11]["train_images"] == 0
    assert rows[11]["cnn_generated"]["share"] == 0
    shared = sum(
        min(int((labels == label).sum()), int((without[1] == label).sum())) for label in range(10) if label != 3
    )
    assert metrics["frechet_distance"]["n"] == shared


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_generated_images(parts, count):
    train, val, unseen = parts
    metrics = evaluate_generation(unseen[0][:count], unseen[1][:count], train, val, NAMES)
    assert metrics["sizes"]["generated"] == count
    assert ("frechet_distance" in metrics) == (count >= 2)
    json.dumps(metrics, allow_nan=False)
    nearest_picture(unseen[0][:count], train[0], metrics)


def test_unusable_input_is_named(parts):
    train, val, (images, labels) = parts
    with pytest.raises(DataError, match="generated images: there are none"):
        evaluate_generation(images[:0], labels[:0], train, val, NAMES)
    with pytest.raises(DataError, match="expected 4 labels"):
        evaluate_generation(images[:4], labels[:3], train, val, NAMES)
    broken = images[:4].clone()
    broken[2, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="1 of 4 contain NaN"):
        evaluate_generation(broken, labels[:4], train, val, NAMES)
    with pytest.raises(DataError, match=r"expected values in \[0, 1\], found -1 to 1"):
        evaluate_generation(images[:4] * 2 - 1, labels[:4], train, val, NAMES)
    with pytest.raises(DataError, match=r"training images are \(1, 8, 8\), generated ones \(1, 8, 7\)"):
        evaluate_generation(images[:4, :, :, :7], labels[:4], train, val, NAMES)


def test_nearest_neighbours_against_a_double_loop_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr(memorising, "CHUNK", 3)
    monkeypatch.setattr(memorising, "CHUNK_VALUES", 4 * 24)
    images, train = torch.rand(10, 2, 3, 4), torch.rand(23, 2, 3, 4)
    train[17] = images[5]
    distances, index = memorising.nearest_neighbours(images, train)
    naive = (images[:, None] - train[None]).square().mean(dim=(2, 3, 4)).sqrt()
    torch.testing.assert_close(distances, naive.min(dim=1).values)
    assert torch.equal(index, naive.argmin(dim=1))
    assert distances[5] == 0
