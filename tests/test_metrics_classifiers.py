"""Readers: accuracy on digits, any shape, determinism, no trace in the caller's random state."""

import pytest
import torch
from sklearn.datasets import load_digits

from heterodiff.errors import DataError
from heterodiff.metrics import classifiers
from heterodiff.metrics.classifiers import ConvClassifier, SvmClassifier


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(classifiers, "CONV_MAX_STEPS", 20)
    monkeypatch.setattr(classifiers, "CONV_MIN_STEPS", 5)


@pytest.fixture(scope="module")
def digits():
    content = load_digits()
    images = torch.from_numpy(content.images).float()[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(content.target).long()[order]


@pytest.mark.parametrize("kind", [SvmClassifier, ConvClassifier])
def test_digits_are_read_well(digits, kind):
    images, labels = digits
    reader = kind().fit(images[:1400], labels[:1400])
    accuracy = reader.accuracy(images[1400:], labels[1400:])
    assert accuracy > 0.96
    predicted = reader.predict(images[1400:])
    assert predicted.dtype == torch.long
    assert accuracy == pytest.approx((predicted == labels[1400:]).double().mean().item())


def test_svm_matches_scikit_learn_on_the_published_digits_example(digits):
    from sklearn.svm import SVC

    images, labels = digits
    published = SVC(gamma=0.001).fit(images[:900].flatten(1).numpy() * 16, labels[:900].numpy())
    theirs = published.score(images[900:].flatten(1).numpy() * 16, labels[900:].numpy())
    ours = SvmClassifier().fit(images[:900], labels[:900]).accuracy(images[900:], labels[900:])
    assert ours == pytest.approx(theirs, abs=0.015)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 5, 9), (3, 4, 40), (16, 7, 6), (1, 64, 64), (4, 100, 30)])
@pytest.mark.usefixtures("few_steps")
def test_any_shape_and_labels_that_are_not_consecutive(shape):
    labels = torch.tensor([3, 7, 40]).repeat(6)
    images = torch.rand(18, *shape)
    for reader in (SvmClassifier().fit(images, labels), ConvClassifier().fit(images, labels)):
        assert set(reader.predict(images).tolist()) <= {3, 7, 40}
        assert len(reader.predict(images[:0])) == 0
    features = reader.features(images)
    assert features.shape == (18, 64)
    assert torch.isfinite(features).all()
    assert reader.features(images[:0]).shape == (0, 64)


@pytest.mark.usefixtures("few_steps")
def test_same_seed_same_reader_whatever_the_callers_state():
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ConvClassifier(3).fit(images, labels).features(images)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    with torch.inference_mode():
        second = ConvClassifier(3).fit(images.clone(), labels).features(images)
    assert torch.equal(first, second)
    assert not torch.equal(first, ConvClassifier(4).fit(images, labels).features(images))


@pytest.mark.usefixtures("few_steps")
def test_features_are_those_of_single_images_and_standardised():
    images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    reader = ConvClassifier().fit(images, labels)
    features = reader.features(images)
    torch.testing.assert_close(features[4:5], reader.features(images[4:5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(64), rtol=0, atol=1e-4)


def test_unlabelled_rows_are_left_out():
    images = torch.rand(30, 1, 8, 8)
    labels = torch.arange(30) % 3 - 1
    known = labels >= 0
    expected = SvmClassifier().fit(images[known], labels[known]).predict(images)
    assert torch.equal(SvmClassifier().fit(images, labels).predict(images), expected)


def test_without_labels_features_are_random_and_prediction_is_refused():
    images = torch.rand(30, 2, 8, 8)
    reader = ConvClassifier().fit(images, torch.full((30,), -1))
    assert not reader.trained
    assert reader.features(images).std() > 0.5
    with pytest.raises(DataError, match="cannot predict"):
        reader.predict(images)
    with pytest.raises(DataError, match="two classes"):
        SvmClassifier().fit(images, torch.zeros(30, dtype=torch.long))


def test_constant_images_do_not_divide_by_zero():
    images = torch.full((20, 1, 8, 8), 0.3)
    assert torch.isfinite(ConvClassifier().fit(images, torch.full((20,), -1)).features(images)).all()
