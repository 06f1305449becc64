"""The augmentation study of a run: draw images, train classifiers on them, write numbers and a picture."""

import io
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.devices import Device
from heterodiff.errors import ConfigError
from heterodiff.evaluation.held_out import held_out_images, images_of
from heterodiff.evaluation.runs import run_data
from heterodiff.files import write_bytes
from heterodiff.metrics.augmentation import CONDITIONS, augmentation_study, generated_counts, study_sets
from heterodiff.pipelines.image_files import draw_classes, pictures_at_once
from heterodiff.pipelines.load import load_generation
from heterodiff.progress import progress_tasks
from heterodiff.run_folder import RunFolder

MAX_PER_CLASS = 500
COLOURS = {"real": "#5b6577", "generated": "#c4622d", "both": "#2458a6"}
INK, SOFT = "#1d2433", "#5b6577"
MAX_NAMED_CLASSES = 40
MAX_NUMBERED_CLASSES = 12
MAX_NAME_LENGTH = 18


def evaluate_augmentation(
    run: Path,
    data_path: Path | None = None,
    per_class: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    device: Device | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure the value of images drawn from the run as training data for a classifier.

    Writes ``augmentation.json`` and ``augmentation.png`` into the run folder.

    Args:
        data_path: real images unseen in training to classify (folder or npz file); default: the validation split.
        per_class: number of images of each class to draw; default: as many as there are real training images of the
            class, scaled down together where one has more than 500.
        seed, seeds: seed of the images, and those of the classifiers.
        device: see :func:`heterodiff.load`.
        batch_size: images drawn at once; default: by device.
        **options: of :class:`heterodiff.pipelines.generate.GenerationPipeline`, such as guidance_scale.

    Returns:
        The study (see :func:`heterodiff.metrics.augmentation.augmentation_study`), with ``summary`` (the outcome in
        plain words), ``held_out`` (the images that were classified), ``sampling`` (the options that images were drawn
        with) and ``images`` (``seed``, ``seconds``) added.

    Raises:
        ConfigError: the run has no classes.
        HeterodiffError: no usable run, missing data, or held-out images that cannot be used.
    """
    folder = RunFolder(run)
    spec = folder.spec()
    if spec is not None and len(spec.class_names) < 2:
        raise ConfigError(
            f"{run}: trained without classes, so a classifier has nothing to learn from its images; --augmentation "
            "needs a run with at least two classes"
        )
    data = run_data(run)
    held_out = held_out_images(run, data, data_path)
    train, real, names = images_of(data.train), (held_out.images, held_out.labels), data.spec.class_names
    (_, labels), _, _ = study_sets(train, real, names)  # refuses unusable sets before anything is drawn
    pipeline = load_generation(run, device)
    counts = generated_counts(labels, per_class, MAX_PER_CLASS if per_class is None else None)
    at_once = batch_size or pictures_at_once(pipeline.device)
    with progress_tasks() as task:
        start = time.perf_counter()
        drawn = task("drawing images", sum(counts.values()))
        generated = draw_classes(pipeline, list(counts), list(counts.values()), seed, at_once, drawn, **options)
        seconds = time.perf_counter() - start
        trained = task("training classifiers", len(CONDITIONS) * (len(set(seeds)) + 1))
        study = augmentation_study(train, generated, real, names, seeds, per_class, trained)
    defaults = pipeline.defaults.model_dump(mode="json")
    study["summary"] = outcome_text(study)
    study["held_out"] = held_out.record
    study["notes"] += held_out.record["notes"]
    study["sampling"] = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    study["images"] = {"seed": seed, "seconds": seconds}
    folder.write_json(folder.augmentation_file, study)
    with folder.writing(folder.augmentation_picture):
        write_bytes(folder.augmentation_picture, augmentation_picture(study))
    return study


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share_text(interval: Mapping[str, float]) -> str:
    """An interval as "97.1 % (95.0–98.4 %)"."""
    return f"{_percent(interval['value'])} ({100 * interval['low']:.1f}–{_percent(interval['high'])})"


def _points_text(interval: Mapping[str, float]) -> str:
    """An interval of a difference as "+0.4 points (−0.9 to +1.8)"."""
    value, low, high = (f"{100 * interval[key]:+.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} points ({low} to {high})"


def outcome_text(study: Mapping[str, Any]) -> str:
    """Return the outcome of a study in two or three sentences."""
    sentences = []
    if study["ratio"] is not None:
        sentences.append(
            f"Trained on generated images alone, the classifier reaches {_share_text(study['ratio'])} of the accuracy "
            "that it reaches when trained on real ones."
        )
    real = study["conditions"]["real"]["accuracy"]
    if real["low"] <= study["chance"]:
        sentences.append(
            f"Trained on real images it reaches an accuracy of {_percent(real['value'])}, and always predicting the "
            f"most frequent class would reach {_percent(study['chance'])}: it learns too little for a comparison."
        )
    change = _points_text(study["difference"])
    if study["verdict"] == "cannot tell":
        count = f"{study['n_held_out']:,} held-out images"
        sentences.append(f"{count} cannot tell whether adding generated images to real ones helps or harms: {change}.")
    else:
        sentences.append(f"Real and generated images together are {study['verdict']} than real ones alone: {change}.")
    return " ".join(sentences)


def augmentation_summary(study: Mapping[str, Any]) -> list[str]:
    """The main numbers of a study, a line each."""
    trained_on = {"real": "real images", "generated": "generated images", "both": "real and generated images"}
    seeds = _seeds(study)
    lines = [
        f"{key:10} accuracy {_share_text(condition['accuracy'])} on {study['n_held_out']:,} held-out real images, "
        f"trained on {condition['n_train']:,} {trained_on[key]} (95 % interval, {seeds})"
        for key, condition in study["conditions"].items()
    ]
    if study["ratio"] is not None:
        lines.append(
            f"{'ratio':10} {_share_text(study['ratio'])}: accuracy by generated images alone over that by real ones"
        )
    lines.append(f"{'difference':10} {_points_text(study['difference'])}: both minus real; {study['verdict']}")
    return [*lines, *(f"{'note':10} {note}" for note in study["notes"])]


def _seeds(study: Mapping[str, Any]) -> str:
    count = len(study["seeds"])
    return f"{count} seed{'s' * (count > 1)}"


def augmentation_picture(study: Mapping[str, Any]) -> bytes:
    """Draw a study (see :func:`evaluate_augmentation`) and return a PNG.

    Left, the accuracy of each condition: mean over seeds with its 95 % interval, a dot per seed, the share of the
    most frequent class dashed. Right, the confusion matrices: percent of the row with the count, summed over seeds,
    below; with more than 12 classes colours alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [_short(name) for name in study["classes"]]
    side = min(8.0, max(2.6, 0.5 * len(names) + 0.4))
    figure = Figure(figsize=(4.4 + 3 * side, side + 1.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, width_ratios=[3.4, side, side, side])
    _draw_accuracies(panels[0], study)
    for panel, key in zip(panels[1:], CONDITIONS, strict=True):
        _draw_confusion(panel, study["conditions"][key]["confusion"], names, key, first=key == "real")
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the font lacks shows boxes
        figure.savefig(target, format="png")
    return target.getvalue()


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def _draw_accuracies(axes: Any, study: Mapping[str, Any]) -> None:
    chance, lowest = 100 * study["chance"], 100.0
    for position, (key, colour) in enumerate(COLOURS.items()):
        condition = study["conditions"][key]
        value, low, high = (100 * condition["accuracy"][name] for name in ("value", "low", "high"))
        axes.plot([position, position], [low, high], color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
        axes.plot([position - 0.16, position + 0.16], [value, value], color=colour, linewidth=3)
        shares = [100 * row["value"] for row in condition["per_seed"]]
        offsets = [position + 0.28 + 0.07 * (k % 3) for k in range(len(shares))]
        axes.scatter(offsets, shares, s=16, color=colour, edgecolors="white", linewidths=0.6, zorder=3)
        axes.annotate(f"{value:.1f} %", (position, high), (0, 4), textcoords="offset points", ha="center", color=INK)
        lowest = min(lowest, low, *shares)
    axes.axhline(chance, color=SOFT, linewidth=1, linestyle="--")
    # Differences of a few points must be seen; where chance is near it belongs into the picture.
    bottom = 0 if lowest < chance + 30 else max(0, 10 * int((lowest - 5) // 10))
    axes.set_ylim(bottom, 100 + (100 - bottom) * 0.08)
    if bottom == 0:
        text = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": SOFT}
        axes.annotate("most frequent class", (2.5, chance), (0, 3), **text)
    axes.set_xlim(-0.5, 2.6)
    axes.set_xticks(range(3), ["\n".join(title.rsplit(" ", 1)) for title in CONDITIONS.values()])
    title = f"accuracy on {study['n_held_out']:,} real images, %\nmean, 95 % interval, {_seeds(study)}"
    axes.set_title(title, fontsize=10, color=INK)
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=9)


def _draw_confusion(axes: Any, counts: Sequence[Sequence[int]], names: Sequence[str], key: str, first: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shares = [[100 * cell / max(1, sum(row)) for cell in row] for row in counts]
    colours = LinearSegmentedColormap.from_list("heterodiff", ["#ffffff", COLOURS[key]])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100)
    if len(names) <= MAX_NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                ink = "white" if share > 55 else INK
                text = f"{share:.0f}\n({counts[row][column]:,})"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    shown = list(names) if len(names) <= MAX_NAMED_CLASSES else []
    axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(shown)), shown if first else [""] * len(shown))
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a dollar sign in a name is one
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.spines[:].set_color("#aab2bf")
    axes.set_title(f"trained on {CONDITIONS[key]}", fontsize=10, color=INK)
    axes.set_xlabel("predicted class", fontsize=9, color=SOFT)
    if first:
        axes.set_ylabel("true class, % of its images (count)", fontsize=9, color=SOFT)
