"""The augmentation study: known answers, intervals against slow and foreign ones, files of a run, clear refusals."""

import io
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from heterodiff.errors import ConfigError, DataError, RunError
from heterodiff.evaluation import augmentation
from heterodiff.evaluation.augmentation import (
    augmentation_picture,
    augmentation_summary,
    evaluate_augmentation,
    outcome_text,
)
from heterodiff.evaluation.class_images import evaluate_run
from heterodiff.evaluation.held_out import held_out_images, images_of
from heterodiff.evaluation.runs import run_data
from heterodiff.metrics import classifiers
from heterodiff.metrics.augmentation import augmentation_study, generated_counts, verdict_of
from heterodiff.metrics.intervals import crossed_bootstrap, percentile_interval
from heterodiff.report.writing import write_report
from heterodiff.training.start import train as train_run
from tests.test_cli import call
from tests.test_evaluation_report import read as read_report
from tests.training_runs import tiny_config

NAMES = ("left & up", "right", "<b>down</b>")
CONDITIONS = ("real", "generated", "both")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(classifiers, "CONV_MAX_STEPS", 60)
    monkeypatch.setattr(classifiers, "CONV_MIN_STEPS", 30)
    yield
    torch.set_num_threads(threads)


def quadrants(counts, seed, noise=0.15):
    """Images (N, 1, 8, 8) whose class is the bright quadrant, ``counts`` of each class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = 0.4 + noise * torch.randn(len(labels), 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.3
    return images.clamp(0, 1), labels


TRAIN, HELD_OUT = quadrants([30, 20, 40], 0), quadrants([40, 30, 30], 1)
BRIEF = TRAIN[0][::4], TRAIN[1][::4]


def shuffled(part, seed=0):
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(seed))
    return part[0], part[1][order]


def study(generated, train=TRAIN, held_out=HELD_OUT, **options):
    return augmentation_study(train, generated, held_out, NAMES, **({"seeds": (0, 1)} | options))


@pytest.fixture(scope="module")
def copies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "CONV_MAX_STEPS", 60)
        return study(TRAIN)


def test_copies_of_real_images_are_worth_as_much(copies):
    assert copies["conditions"]["real"]["accuracy"]["value"] > 0.97
    assert copies["ratio"]["value"] == pytest.approx(1, abs=0.03)
    assert copies["ratio"]["low"] <= 1 <= copies["ratio"]["high"]
    assert copies["verdict"] == "not worse"
    assert "not worse" in outcome_text(copies)
    assert copies["notes"] == []
    assert [copies["conditions"][key]["n_train"] for key in CONDITIONS] == [90, 90, 180]
    assert (copies["steps"], copies["batch_size"], copies["chance"]) == (60, 64, 0.4)


def test_shuffled_labels_are_worth_chance():
    train = quadrants([40, 40, 40], 2)
    found = study(shuffled(train), train=train, seeds=(0,))
    assert found["conditions"]["generated"]["accuracy"]["value"] < 0.6
    assert found["ratio"]["high"] < 0.8
    assert found["difference"]["value"] <= 0
    assert found["verdict"] != "better"
    assert found["svm"]["ratio"]["value"] < 0.8


def test_many_wrong_labels_harm():
    images, labels = quadrants([60, 60, 60], 2)
    found = study((images, (labels + 1) % 3), seeds=(0,), per_class=60)
    assert found["difference"]["high"] < 0
    assert found["verdict"] == "worse"
    assert "worse" in outcome_text(found)


def test_noise_teaches_nothing():
    noise = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0)), TRAIN[1]
    found = study(noise, seeds=(0,))
    assert found["ratio"]["value"] < 0.75
    assert found["verdict"] != "better"


def test_more_images_than_a_poor_training_set_has_are_better():
    poor = quadrants([2, 2, 2], 3, noise=0.45)
    found = study(quadrants([60, 60, 60], 4, 0.45), poor, quadrants([50, 50, 50], 5, 0.45), per_class=60)
    assert found["difference"]["low"] > 0
    assert found["verdict"] == "better"
    assert found["ratio"]["value"] > 1
    assert [found["conditions"][key]["n_train"] for key in CONDITIONS] == [6, 180, 186]
    assert found["batch_size"] == 6  # what the smallest set allows, for all three


def test_a_classifier_at_chance_decides_nothing():
    random = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(1)), TRAIN[1]
    found = study(random, train=random)
    assert found["verdict"] == "cannot tell"
    assert "most frequent class" in outcome_text(found)


def test_numbers_fit_together(copies):
    json.dumps(copies, allow_nan=False)
    assert copies["classes"] == list(NAMES)
    counts = np.bincount(HELD_OUT[1])
    for key in CONDITIONS:
        condition = copies["conditions"][key]
        confusion = np.array(condition["confusion"])
        assert confusion.sum(axis=1).tolist() == (2 * counts).tolist()  # two seeds
        seeds = [row["value"] for row in condition["per_seed"]]
        assert condition["accuracy"]["value"] == pytest.approx(np.mean(seeds))
        assert condition["accuracy"]["value"] == pytest.approx(np.trace(confusion) / confusion.sum())
        recalls = [row["value"] for row in condition["per_class"]]
        np.testing.assert_allclose(recalls, np.diag(confusion) / confusion.sum(axis=1))
        for row in [condition["accuracy"], *condition["per_seed"], *condition["per_class"]]:
            assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
            assert row["low"] < row["high"]
        for row in condition["per_seed"]:
            expected = stats.binomtest(round(row["value"] * row["n"]), row["n"]).proportion_ci(method="wilson")
            assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_same_seeds_same_numbers_and_no_trace_in_the_callers_random_state():
    state = torch.get_rng_state()
    first, again = (study(shuffled(BRIEF), BRIEF, seeds=(3,)) for _ in range(2))
    assert first == again
    assert torch.equal(state, torch.get_rng_state())
    assert any("one seed" in note for note in first["notes"])
    other = study(shuffled(BRIEF), BRIEF, seeds=(4,))
    assert other["conditions"]["generated"]["confusion"] != first["conditions"]["generated"]["confusion"]


def test_a_seed_named_twice_counts_once():
    calls = []
    found = study(BRIEF, BRIEF, seeds=(1, 1), progress=calls.append)
    assert found["seeds"] == [1]
    assert calls == list(range(1, 7))  # three networks, three support vector machines


def slow_bootstrap(hits, resamples, seed):
    """Resample with explicit loops and another random generator."""
    rng = np.random.RandomState(seed)
    conditions, seeds, images = hits.shape
    rows = []
    for _ in range(resamples):
        chosen_seeds = [rng.randint(seeds) for _ in range(seeds)]
        chosen_images = [rng.randint(images) for _ in range(images)]
        rows.append(
            [np.mean([[hits[k][s][i] for i in chosen_images] for s in chosen_seeds]) for k in range(conditions)]
        )
    return np.array(rows)


def example_hits(seeds, images, shares=(0.9, 0.6, 0.95)):
    """Hits (3, seeds, images) that hang on the image, as real ones do: hard images are hard for all."""
    rng = np.random.default_rng(0)
    difficulty = 0.6 * rng.random(images) + 0.4 * rng.random((3, seeds, images))
    return difficulty < np.quantile(difficulty, shares)[:, None, None]


def test_crossed_bootstrap_agrees_with_a_slow_one():
    hits = example_hits(3, 60)
    fast, slow = crossed_bootstrap(hits, 4000), slow_bootstrap(hits, 1500, 1)
    assert fast.shape == (4000, 3)
    np.testing.assert_allclose(fast.mean(axis=0), hits.mean(axis=(1, 2)), atol=0.005)
    for statistic in (lambda m: m[:, 2] - m[:, 0], lambda m: m[:, 1] / m[:, 0], lambda m: m[:, 1]):
        values, expected = statistic(fast), statistic(slow)
        assert values.std() == pytest.approx(expected.std(), rel=0.08)
        np.testing.assert_allclose(percentile_interval(values), np.quantile(expected, [0.025, 0.975]), atol=0.02)


def test_with_one_seed_it_is_scipys_paired_bootstrap():
    hits = example_hits(1, 200)
    values = crossed_bootstrap(hits, 10_000)
    for statistic, column in ((lambda a, b: b.mean(-1) - a.mean(-1), 2), (lambda a, b: b.mean(-1) / a.mean(-1), 1)):

        def axis_statistic(a, b, axis, f=statistic):
            return f(a, b)

        expected = stats.bootstrap(
            (hits[0, 0].astype(float), hits[column, 0].astype(float)), axis_statistic, paired=True, vectorized=True,
            n_resamples=10_000, method="percentile", rng=np.random.default_rng(5),
        ).confidence_interval  # fmt: skip
        found = statistic(values[:, :1], values[:, column : column + 1])
        assert percentile_interval(found) == pytest.approx((expected.low, expected.high), abs=0.008)


def test_pairing_makes_the_difference_narrower_than_its_parts():
    hits = example_hits(3, 200, (0.8, 0.8, 0.8))
    values = crossed_bootstrap(hits, 2000)
    paired = np.ptp(percentile_interval(values[:, 2] - values[:, 0]))
    unpaired = np.ptp(percentile_interval(crossed_bootstrap(hits, 2000, seed=1)[:, 2] - values[:, 0]))
    assert paired < 0.9 * unpaired
    identical = crossed_bootstrap(np.stack([hits[0], hits[0]]), 500)
    assert np.array_equal(identical[:, 0], identical[:, 1])


SURE = {"value": 0.95, "low": 0.9, "high": 1.0}


@pytest.mark.parametrize(
    ("low", "high", "real", "count", "expected"),
    [
        (0.01, 0.05, SURE, 200, "better"),
        (-0.05, -0.01, SURE, 200, "worse"),
        (-0.02, 0.03, SURE, 200, "not worse"),
        (0.0, 0.0, SURE, 200, "not worse"),
        (-0.2, 0.1, SURE, 200, "cannot tell"),
        (-0.02, 0.03, {"value": 0.3, "low": 0.2, "high": 0.4}, 200, "cannot tell"),
        (0.01, 0.05, SURE, 10, "cannot tell"),
    ],
)
def test_verdicts(low, high, real, count, expected):
    assert verdict_of({"value": (low + high) / 2, "low": low, "high": high}, real, 0.25, count) == expected


def test_counts_keep_the_proportions_of_real_images():
    labels = torch.repeat_interleave(torch.tensor([0, 2, 5]), torch.tensor([1000, 500, 100]))
    assert generated_counts(labels) == {0: 1000, 2: 500, 5: 100}
    assert generated_counts(labels, limit=500) == {0: 500, 2: 250, 5: 50}
    assert generated_counts(labels, per_class=7) == {0: 7, 2: 7, 5: 7}
    assert generated_counts(labels.repeat(10)) == {0: 1562, 2: 781, 5: 156}  # 2,500 in all
    assert generated_counts(labels, limit=5) == {0: 5, 2: 2, 5: 1}


def test_what_is_left_out_is_said():
    train, held_out = quadrants([12, 12, 12, 12], 0), quadrants([20, 20, 0, 0], 1)
    train[1][:2] = -1
    held_out[1][0] = -1
    held_out[1][1] = 7
    pool = quadrants([5, 12, 12, 0], 2)
    found = study(pool, train, held_out, seeds=(0,))
    notes = "\n".join(found["notes"])
    for text in (
        "2 of 48 training images without a label",
        "1 of 40 held-out images without a label",
        "1 of 39 held-out images of a class without training images (7)",
        f"no held-out images of {NAMES[2]}, 3",
        "no generated images of 3",
        "29 generated images where 46 were wanted",
    ):
        assert text in notes
    assert found["n_held_out"] == 38
    assert found["conditions"]["real"]["per_class"][3] == {"name": "3", "n": 0, "value": None, "low": 0.0, "high": 1.0}
    json.dumps(found, allow_nan=False)
    assert len(augmentation_summary(found)) == 5 + len(found["notes"])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"held_out": (torch.zeros(0, 1, 8, 8), torch.zeros(0))}, "--data"),
        ({"held_out": (HELD_OUT[0], torch.zeros(100))}, "only class left & up"),
        ({"held_out": (HELD_OUT[0], torch.full((100,), -1))}, "no class of the run"),
        ({"held_out": (HELD_OUT[0][:, :, :4], HELD_OUT[1])}, "(1, 4, 8)"),
        ({"held_out": (HELD_OUT[0] * 255, HELD_OUT[1])}, "[0, 1]"),
        ({"train": (TRAIN[0], torch.zeros(90))}, "fewer than two classes"),
        ({"train": (TRAIN[0] * torch.nan, TRAIN[1])}, "NaN"),
        ({"generated": (TRAIN[0], torch.zeros(90))}, "fewer than two of the training classes"),
        ({"generated": (TRAIN[0][..., :4], TRAIN[1])}, "(1, 8, 4)"),
        ({"generated": (TRAIN[0], TRAIN[1][:5])}, "90 labels"),
        ({"generated": (torch.zeros(0, 1, 8, 8), torch.zeros(0))}, "fewer than two"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_unusable_sets_are_refused(changed, expected):
    parts = {"train": TRAIN, "generated": TRAIN, "held_out": HELD_OUT, "class_names": NAMES}
    with pytest.raises(DataError) as error:
        augmentation_study(**(parts | changed))
    assert expected in str(error.value)


def read_png(data):
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        picture.load()
        return picture


def test_picture_is_a_png_that_grows_with_the_classes(copies):
    few = read_png(augmentation_picture(copies))
    assert min(few.size) > 300
    assert np.asarray(few.convert("L")).std() > 10
    many = copies | {"classes": [f"$class_{k}$ 漢 {'x' * 40}" for k in range(60)]}
    many["conditions"] = {
        key: condition | {"confusion": np.eye(60, dtype=int).tolist()}
        for key, condition in copies["conditions"].items()
    }
    assert read_png(augmentation_picture(many)).size > few.size
    named = many | {"classes": [f"$class_{k}$ 漢" for k in range(3)], "conditions": copies["conditions"]}
    assert read_png(augmentation_picture(named)).size[1] >= few.size[1]


def test_names_in_the_picture_are_short():
    assert augmentation._short("a\nb  c") == "a b c"
    assert len(augmentation._short("x" * 99)) == augmentation.MAX_NAME_LENGTH


def write_images(folder: Path, counts, seed) -> Path:
    images, labels = quadrants(counts, seed)
    for k, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / NAMES[label].replace("/", "")).mkdir(parents=True, exist_ok=True)
        pixels = image[0].mul(255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / NAMES[label].replace("/", "") / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_images(root / "train", [24, 20, 16], 0), write_images(root / "unseen", [14, 12, 14], 1)


def train_tiny(output, **data):
    config = tiny_config(output, training__steps=3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"source": "images"} | data)})
    torch.set_num_threads(1)
    train_run(config, quiet=True)
    return output


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny", path=folders[0], val_fraction=0.25)


@pytest.fixture(scope="module")
def other_runs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("others")
    return {
        "no classes": train_tiny(root / "plain", path=folders[0], labels="none"),
        "no split": train_tiny(root / "whole", path=folders[0], val_fraction=0.0),
    }


def test_study_of_a_run_leaves_numbers_picture_and_report(run):
    found = evaluate_augmentation(run, seeds=(0,))
    assert json.loads((run / "augmentation.json").read_text()) == found
    data = run_data(run)
    real = np.bincount(data.train.labels).tolist()
    assert sum(real) == found["conditions"]["real"]["n_train"] == found["conditions"]["generated"]["n_train"]
    assert found["held_out"]["part"] == "validation split"
    assert found["held_out"]["n"] == found["n_held_out"] == len(data.val)
    assert found["sampling"]["num_inference_steps"] == 2
    read_png((run / "augmentation.png").read_bytes())
    page = write_report(run)
    _, report = read_report(page)  # well-formed, nothing unescaped
    assert "Generated images as training data" in report
    assert found["summary"].split(".")[0] in report
    for name in data.spec.class_names:
        assert escape(name) in report
    assert "<b>down" not in report
    assert page.read_text().count("data:image/png") >= 1


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"conditions": 5}', '{"conditions": {"real": {"per_class": [1, {}]}}}']
)
def test_report_survives_a_damaged_study(run, content):
    kept = (run / "augmentation.json").read_text() if (run / "augmentation.json").is_file() else None
    (run / "augmentation.json").write_text(content)
    assert "</html>" in write_report(run).read_text()
    (run / "augmentation.json").unlink()
    if kept is not None:
        (run / "augmentation.json").write_text(kept)


def test_command_line_reads_unseen_images(run, folders, capsys):
    arguments = ["evaluate", run, "--augmentation", "--data", folders[1], "--seeds", "2", "-n", "6", "--steps", "1"]
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    lines = [line.split()[0] for line in captured.out.splitlines()]
    assert lines[:5] == ["real", "generated", "both", "ratio", "difference"]
    assert lines[-3:] == ["numbers", "picture", "report"]
    assert "on 40 held-out real images" in captured.out
    assert "drawing images: 18 of 18" in captured.err  # no terminal here
    assert call(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((run / "augmentation.json").read_text())
    assert found["held_out"] == {"path": str(folders[1]), "part": "all", "n": 40, "notes": []}
    assert (found["seeds"], found["sampling"]["num_inference_steps"]) == ([0, 1], 1)
    assert found["conditions"]["generated"]["n_train"] == 18


def test_ordinary_evaluation_reads_unseen_images(run, folders, capsys):
    assert call("evaluate", run, "--data", folders[1], "-n", "2", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["sizes"]["val"] == metrics["held_out"]["n"] == 40
    assert metrics["held_out"]["path"] == str(folders[1])
    assert metrics["fidelity"]["svm"]["real"]["share"] > 0.9
    assert str(folders[1]) in (run / "report.html").read_text()
    plain = evaluate_run(run, 2).metrics["held_out"]
    assert plain == {"path": str(folders[0]), "part": "validation split", "n": 15, "notes": []}


def test_held_out_images_take_size_order_and_range_of_the_run(run, folders, tmp_path):
    data = run_data(run)
    for name, k in ((NAMES[1], 0), (NAMES[0], 1)):  # one class fewer; other sizes
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((16, 24), 51 * (k + 1), np.uint8)).save(tmp_path / name / "a.png")
    found = held_out_images(run, data, tmp_path)
    assert found.images.shape == (2, 1, 8, 8)
    assert [data.spec.class_names[k] for k in found.labels.tolist()] == sorted([NAMES[0], NAMES[1]])
    values = {int(k): round(float(v), 3) for k, v in zip(found.labels, found.images.mean(dim=(1, 2, 3)), strict=True)}
    assert values == {data.spec.class_names.index(NAMES[1]): 0.2, data.spec.class_names.index(NAMES[0]): 0.4}
    np.savez(tmp_path / "set.npz", image=np.zeros((3, 8, 8), np.uint8), label=np.array([NAMES[1]] * 3))
    assert (
        held_out_images(run, data, tmp_path / "set.npz").labels.tolist() == [data.spec.class_names.index(NAMES[1])] * 3
    )


def test_training_images_given_as_held_out_are_noticed(run, folders):
    found = held_out_images(run, run_data(run), folders[0])
    assert "45 of 60 images" in found.record["notes"][0]


def test_a_large_set_is_sampled_from_all_classes(monkeypatch, run):
    monkeypatch.setattr("heterodiff.evaluation.held_out.MAX_REAL_IMAGES", 9)
    images, labels = images_of(run_data(run).train)
    assert len(images) == 9
    assert set(labels.tolist()) == {0, 1, 2}


def make_folder(tmp_path, how):
    if how == "missing":
        return tmp_path / "missing"
    folder = write_images(tmp_path / "set", [3, 3, 3] if how != "one class" else [3], 0)
    if how == "unknown class":
        (folder / NAMES[1]).rename(folder / "walking")
    elif how == "empty":
        for path in folder.rglob("*.png"):
            path.unlink()
    elif how == "unlabelled":
        for k, path in enumerate(sorted(folder.rglob("*.png"))):
            path.rename(folder / f"{k}.png")
    elif how == "float":
        for path in folder.rglob("*.png"):
            np.save(path.with_suffix(".npy"), np.zeros((8, 8), np.float32))
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "correct --data"),
        ("empty", "no images found"),
        ("unknown class", "walking"),
        ("one class", "only class"),
        ("unlabelled", "--data"),
        ("float", "number type"),
    ],
)
def test_unusable_held_out_folders_are_one_clear_message(how, expected, run, tmp_path, capsys):
    assert call("evaluate", run, "--augmentation", "--data", make_folder(tmp_path, how)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert "drawing" not in captured.err  # refused before the slow part


def test_unusable_runs_are_refused(other_runs, tmp_path):
    with pytest.raises(ConfigError, match="without classes"):
        evaluate_augmentation(other_runs["no classes"])
    with pytest.raises(DataError, match=r"--data.*val_fraction"):
        evaluate_augmentation(other_runs["no split"])
    with pytest.raises(RunError, match="no such run folder"):
        evaluate_augmentation(tmp_path / "nowhere")
