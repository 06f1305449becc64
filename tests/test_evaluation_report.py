"""The report: well-formed, self-contained, escaped, and unbroken by damaged files."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from heterodiff.config import RunConfig
from heterodiff.config.file import dump_config
from heterodiff.errors import RunError
from heterodiff.pictures import image_grid
from heterodiff.report.curves import _draw_loss, curves_svg, running_mean, series
from heterodiff.report.writing import summary_lines, write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "br"}


def share(value, n=50):
    return {"n": n, "share": value, "low": value / 2, "high": 1.0}


EVALUATION = {
    "sizes": {"generated": 50, "train": 200, "val": 40, "image": [1, 8, 8]},
    "features": "trained convolution",
    "fidelity": {
        "chance": 0.5,
        "svm": {"generated": share(0.9), "real": share(0.95, 40)},
        "cnn": {"generated": share(0.8), "real": share(0.96, 40)},
    },
    "per_class": [
        {"label": 0, "name": EVIL, "train_images": 100, "svm_generated": share(0.75), "cnn_real": share(0.5)},
        {"label": 1, "name": "walk & run", "train_images": 100, "svm_real": {"n": 0, "share": None}},
    ],
    "frechet_distance": {"generated": 3.25, "real": 1.125, "n": 40, "n_reference": 200, "note": "rough"},
    "kid": {"subsets": 50, "subset_size": 20, "generated": {"mean": 0.5, "std": 0.1}, "real": None},
    "nearest": {
        "generated_median": 0.2,
        "real_median": 0.21,
        "threshold": 0.05,
        "copy_share": 0.02,
        "verdict": "none",
        "explanation": "No sign of memorising.",
        "pairs": [{"generated": 1, "train": 2, "distance": 0.04}],
    },
    "diversity": {
        "generated": 0.1,
        "real": 0.3,
        "ratio": 1 / 3,
        "verdict": "collapsed",
        "collapsed": [EVIL],
        "per_class": [{"name": EVIL, "ratio": 0.2}],
    },
    "skipped": {"other": EVIL},
}
RUN = {
    "versions": {"torch": "2.13.0", "evil": EVIL},
    "parameters": 1_234_567,
    "model_summary": f"hae-v2 {EVIL}",
    "device": "cpu",
    "class_names": [EVIL, "walk & run"],
    "command": f"heterodiff train {EVIL}",
    "seconds": 94.2,
}


class Checker(HTMLParser):
    """Collects texts and addresses, and insists that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.headings, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "data", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def read(path):
    text = path.read_text("utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(source.startswith("data:image/") for source in checker.sources)
    without_data = re.sub(r"data:image/[^\"]+", "", text)
    assert not re.search(r"https?://|url\(|@import|//[a-z]", without_data)
    return checker, without_data


def metrics_rows(count=60):
    return [
        {"step": 20 * i, "loss": 1 / i, "lr": 1e-4, "grad_norm": 0.5, "images_per_second": 100.0 + i, "seconds": i}
        | ({"val_loss": 1.1 / i} if i % 10 == 0 else {})
        for i in range(1, count + 1)
    ]


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "digits & co"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(RunConfig()) + f"# {EVIL}\n", "utf-8")
    (run / "run.json").write_text(json.dumps(RUN), "utf-8")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION), "utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows()), "utf-8")
    grid = image_grid(torch.rand(4, 1, 8, 8))
    for step in (0, 5, 10, 100, 200, 300, 400, 1000):
        grid.save(run / "samples" / f"step_{step}.png")
    grid.save(run / "samples.png")
    grid.save(run / "nearest.png")
    return run


def test_full_report_is_well_formed_self_contained_and_escaped(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    checker, text = read(path)
    assert checker.headings == [
        "digits & co",
        "Final samples",
        "Quality, beside real held-out images",
        "By class",
        "Does it memorise?",
        "Training curves",
        "Samples during training",
        "Timing and machine",
        "Configuration",
        "How to reproduce",
    ]
    for expected in ("90.0 %", "95.0 %", "3.25", "1.12", "1,200", "1 min 34 s", "1.23 M", "variant: unet-conv"):
        assert expected in text
    assert "&lt;script&gt;" in text
    assert "heterodiff train &lt;script&gt;alert(&#39;x" in text
    assert "Mode collapse" in text
    steps = re.findall(r"<figcaption>step ([\d,]+)</figcaption>", text)
    assert len(steps) == 6
    assert steps[0] == "0"
    assert steps[-1] == "1,000"
    assert not list(run_dir.glob(".*"))


def test_terminal_and_report_show_the_same_rows(run_dir):
    lines = summary_lines(EVALUATION | {"held_out": {"notes": ["too few"]}})
    shares = ("90.0 % [45.0–100.0 %] of 50", "95.0 % [47.5–100.0 %] of 40"), ("80.0 % [40.0", "96.0 % [48.0")
    for line, name, (generated, real) in zip(lines, ("SVM", "CNN"), shares, strict=False):
        assert line.startswith(f"{name:8} class accuracy: generated {generated}")
        assert f" images, real {real}" in line
    assert lines[2:] == [
        "Fréchet  distance: generated 3.25, real 1.12 (40 images each, trained convolution features)",
        "copies   distance to training images: generated 0.200, real 0.210 (copies: none)",
        "note     too few",
        f"skipped  other: {EVIL}",
    ]
    _, text = read(write_report(run_dir))
    for line in lines[:4]:
        for number in re.findall(r"\d+\.\d+", line):
            assert number in text


def test_a_model_that_draws_noise_is_not_praised(tmp_path):
    kid = {"mean": 9375482073941.74, "std": 2320072781370.86}
    evaluation = EVALUATION | {
        "frechet_distance": {"generated": 12345.6, "real": 0.01234},
        "kid": {"generated": kid, "real": {"mean": -0.00012, "std": 0.5}},
        "diversity": {"generated": 0.5, "real": 0.1, "ratio": 5.2, "verdict": "noisy"},
        "nearest": EVALUATION["nearest"] | {"verdict": "unlike", "explanation": "Unlike the data."},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    _, text = read(write_report(tmp_path))
    for expected in ("9.38e+12", "± 2.32e+12", "−0.00012", "12,346", "0.0123"):
        assert expected in text
    assert "far more varied than real: noise?" in text
    assert "unlike the data: not meaningful yet" in text
    assert 'class="notice good"' not in text


@pytest.mark.parametrize(
    ("device", "shown"), [("1 CPU threads", "1 CPU thread<"), ("11 CPU threads", "11 CPU threads<")]
)
def test_one_thread_is_singular(tmp_path, device, shown):
    (tmp_path / "run.json").write_text(json.dumps({"device": device}))
    assert read(write_report(tmp_path))[1].count(shown) == 2


def test_writing_twice_gives_the_same_file(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_empty_folder_still_gives_a_page(tmp_path):
    checker, _ = read(write_report(tmp_path))
    assert checker.headings[1:] == ["How to reproduce"]


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_damaged_files_are_named_and_do_not_break_it(run_dir):
    rows = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(rows + '[1]\n{"step": 1300, "lo')
    (run_dir / "evaluation.json").write_text('{"sizes": ')
    (run_dir / "run.json").write_bytes(b"\xff\xfe[]")
    (run_dir / "samples.png").write_bytes((run_dir / "samples.png").read_bytes()[:200])
    (run_dir / "samples" / "step_0.png").write_bytes(b"")
    checker, text = read(write_report(run_dir))
    assert "Training curves" in checker.headings
    assert "Final samples" not in checker.headings
    for expected in (
        "metrics.jsonl: 2 damaged lines",
        "evaluation.json is not a JSON object",
        "run.json is not a JSON object",
        "samples.png is damaged",
        "step_0.png is damaged",
    ):
        assert expected in text


def leaves(content, path=()):
    if path:
        yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("value", [None, EVIL, -1, math.nan, 1e400, [], {}, [[]], True, "removed"])
def test_any_value_anywhere_in_the_json_files(tmp_path, value):
    for name, content in (("evaluation.json", EVALUATION), ("run.json", RUN)):
        for path in leaves(content):
            changed = copy.deepcopy(content)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            if value == "removed":
                del place[path[-1]]
            (tmp_path / name).write_text(json.dumps(changed))
            read(write_report(tmp_path))
            assert all(isinstance(line, str) for line in summary_lines(changed))
        (tmp_path / name).unlink()


def test_series_keeps_finite_numbers_sorted_and_the_last_of_repeated_steps():
    rows = [
        {"step": 10, "loss": 1.0},
        {"step": 30, "loss": math.nan},
        {"step": 20, "loss": 3.0},
        {"step": 10, "loss": 2.0},
        {"step": 40, "loss": "x"},
        {"loss": 5.0},
        {"step": 50, "loss": None},
    ]
    assert series(rows, "loss") == ([10, 20], [2.0, 3.0])


def test_running_mean_against_numpy():
    values = np.random.default_rng(0).random(30)
    found = running_mean(values.tolist(), 7)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(30)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_curves_are_left_out_without_data_and_drawn_from_partial_rows():
    assert curves_svg([]) is None
    assert curves_svg([{"step": 1, "loss": 2.0}]) is None
    for rows in (
        [{"step": i, "loss": 0.0} for i in range(5)],
        [{"step": i, "lr": 1.0} for i in range(5)],
        [{"step": i, "loss": -1.0, "val_loss": 10.0 ** (i - 2)} for i in range(300)],
        metrics_rows(4000),
    ):
        svg = curves_svg(rows)
        assert svg.startswith(b"<?xml")
        assert len(svg) < 1_000_000


def test_a_single_held_out_loss_can_be_seen():
    rows = [{"step": i, "loss": 1.0} for i in range(1, 20)] + [{"step": 19, "loss": 1.0, "val_loss": 1.5}]
    axes = Figure().add_subplot()
    _draw_loss(axes, rows)
    point = axes.lines[-1]
    assert (list(point.get_xdata()), point.get_marker()) == ([19], "o")
    assert point.get_markersize() >= 6
    assert not point.get_clip_on()


def test_headline_is_that_of_the_stricter_classifier_with_the_worst_class(tmp_path):
    """A run with one class of pure noise is not praised for its mean."""

    def read_right(share):
        return {"n": 20, "share": share, "low": share, "high": share}

    names = ("cat", "noise")
    evaluation = EVALUATION | {
        "fidelity": {
            "svm": {"generated": read_right(0.97), "real": read_right(0.99)},
            "cnn": {"generated": read_right(0.53), "real": read_right(0.96)},
        },
        "per_class": [
            {"name": name, "label": k, "svm_generated": read_right(0.97), "cnn_generated": read_right(share)}
            for k, (name, share) in enumerate(zip(names, (0.98, 0.08), strict=True))
        ],
        "diversity": {
            "ratio": 1.02,
            "verdict": "ok",
            "per_class": [{"name": "cat", "ratio": 0.9}, {"name": "noise", "ratio": 2.4}],
        },
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    _, text = read(write_report(tmp_path))
    assert "Class accuracy (CNN)" in text
    assert "real held-out images: 96.0 %; worst class, noise: 8.0 %" in text.replace("\xa0", " ")
    assert "class noise: 240.0 %" in text.replace("\xa0", " ")
