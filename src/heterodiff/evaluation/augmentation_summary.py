"""An augmentation study in plain words."""

from collections.abc import Iterable, Mapping
from typing import Any

MIN_HELD_OUT = 30  # fewer images decide nothing
MARGIN = 0.05  # an interval of the difference that reaches further below 0 does not rule out harm


def verdict_of(difference: Mapping[str, float], real: Mapping[str, float], chance: float, held_out: int) -> str:
    """Return what adding generated images does: better, worse, not worse, or cannot tell.

    Args:
        difference: interval of the accuracy on real and generated images minus that on real ones.
        real: interval of the accuracy on real images alone.
        chance: share of the commonest class.
        held_out: how many images were read.
    """
    if held_out < MIN_HELD_OUT:
        return "cannot tell"
    if difference["low"] > 0:
        return "better"
    if difference["high"] < 0:
        return "worse"
    # A classifier that learns nothing from real images is not harmed by anything.
    return "cannot tell" if real["low"] <= chance or difference["low"] < -MARGIN else "not worse"


def percent(value: float, signed: bool = False) -> str:
    """A share as "97.1 %", or a difference as "+0.4" percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−") if signed else f"{100 * value:.1f} %"


def interval_text(interval: Mapping[str, float], signed: bool = False) -> str:
    """An interval as "97.1 % (95.0–98.4 %)", or a difference as "+0.4 points (−0.9 to +1.8)"."""
    if signed:
        value, low, high = (percent(interval[key], signed) for key in ("value", "low", "high"))
        return f"{value} points ({low} to {high})"
    return f"{percent(interval['value'])} ({100 * interval['low']:.1f}–{percent(interval['high'])})"


def summary_of(result: Mapping[str, Any]) -> str:
    """Return the outcome of a study in two or three sentences."""
    sentences = []
    if result["ratio"] is not None:
        sentences.append(
            f"Trained on generated images alone, the classifier reaches {interval_text(result['ratio'])} of the "
            "accuracy that it reaches when trained on real ones."
        )
    real = result["conditions"]["real"]["accuracy"]
    if real["low"] <= result["chance"]:
        sentences.append(
            f"Trained on real images it reads {percent(real['value'])} right, and naming the commonest class "
            f"always would {percent(result['chance'])}: it learns too little here to compare anything."
        )
    change = interval_text(result["difference"], signed=True)
    sentences.append(
        {
            "better": f"Real and generated images together are better than real ones alone: {change}.",
            "worse": f"Real and generated images together are worse than real ones alone: {change}.",
            "not worse": f"Real and generated images together are not worse than real ones alone: {change}.",
            "cannot tell": "Whether adding generated images to real ones helps or harms cannot be told from "
            f"{result['n_held_out']:,} held-out images: {change}.",
        }[result["verdict"]]
    )
    return " ".join(sentences)


def summary_lines(study: Mapping[str, Any]) -> Iterable[str]:
    """Yield the main numbers of a study, a line each."""
    for key, title in (("real", "real"), ("generated", "generated"), ("both", "both")):
        condition = study["conditions"][key]
        yield (
            f"{title:10} {interval_text(condition['accuracy'])} of {study['n_held_out']:,} held-out real images read "
            f"right, trained on {condition['n_train']:,} {_TRAINED_ON[key]} (95 % interval, {_seeds(study)})"
        )
    if study["ratio"] is not None:
        yield f"{'ratio':10} {interval_text(study['ratio'])}: accuracy by generated images alone over that by real ones"
    yield f"{'difference':10} {interval_text(study['difference'], signed=True)}: both minus real; {study['verdict']}"
    for note in study["notes"]:
        yield f"{'note':10} {note}"


_TRAINED_ON = {"real": "real images", "generated": "generated images", "both": "real and generated images"}


def _seeds(study: Mapping[str, Any]) -> str:
    count = len(study["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds"
