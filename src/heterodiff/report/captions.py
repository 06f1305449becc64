"""The parts of the report that show an evaluated run of recipe ``text-image`` or ``alignment``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterodiff.report import page
from heterodiff.report.curves import is_number
from heterodiff.report.formatting import MISSING, number, part_of, percent, share_of
from heterodiff.report.writing import CAPTIONS_PICTURE, PROMPTS_PICTURE, RunFiles

WAYS = {
    "diffusion": "Diffusion",
    "first": "Diffusion, first candidate",
    "direct": "Direct decoding",
    "real": "Real pictures",
}
PROMPT_ROWS = {
    "things": ("Colours and shapes right", "All things of the prompt are there, and no other colour or shape."),
    "scene": ("Place right, too", "And the place or the relation is the one asked for: everything the prompt says."),
    "sharpness": (
        "Sharpness",
        "Root mean square gradient over that of real pictures of the same scenes: 1 is as sharp, noise is above.",
    ),
}
CAPTION_ROWS = {
    "things": ("Colours and shapes right", "The caption names all things, and no others."),
    "true": ("Entirely true", "And nothing that it says of the place is wrong."),
    "scene": ("True and complete", "And it does say the place or the relation."),
    "exact": ("Word for word", "The caption is one of those that people wrote for the picture."),
    "unigram_f1": ("Unigram F1", "Words in common with the nearest of the picture's captions: 1 is all."),
}
RETRIEVAL_ROWS = {"image_to_text": "Finding a picture's text", "text_to_image": "Finding a text's picture"}


def text_cards(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield (label, value, note) of the numbers to read first."""
    prompts = part_of(evaluation, "prompts")
    shares = {way: percent(part_of(prompts, way, "scene").get("share")) for way in WAYS if way in prompts}
    if shares:
        first, *others = shares
        notes = [f"{WAYS[way].lower()}: {shares[way]}" for way in others]
        yield f"Shows all that the prompt says ({WAYS[first].lower()})", shares[first], ", ".join(notes)
    captions = part_of(evaluation, "captions")
    if "true" in captions:
        complete = percent(part_of(captions, "scene").get("share"))
        yield "Captions that are true", percent(part_of(captions, "true").get("share")), f"and complete: {complete}"
    elif captions:
        yield "Captions: unigram F1", number(captions.get("unigram_f1"), "{:.3f}"), "held-out pictures"
    found = part_of(evaluation, "retrieval", "held_out")
    if found:
        count = number(found.get("images"), "{:,}")
        yield "Text found among the first 5", percent(found.get("recall@5_image_to_text")), f"{count} held-out pictures"


def text_to_image_section(evaluation: Mapping[str, Any], picture: str) -> str:
    """Return whether pictures show what prompts say, and retrieval; ``picture`` is HTML or empty."""
    if not part_of(evaluation, "retrieval"):
        return ""
    groups = [(part_of(evaluation, name), added) for name, added in _GROUPS.items()]
    judged = part_of(evaluation, "generated_recall")
    ways = [way for way in WAYS if any(way in group for group in (judged, *(found for found, _ in groups)))]
    rows = [row for found, added in groups if found for row in _prompt_rows(found, added, ways)]
    for key in ("generated_recall@1", "generated_recall@5") if judged else ():
        shares = (percent(part_of(judged, way).get(key)) for way in ways)
        count = number(judged.get("n"), "{:,}")
        means = f"The prompt is among the {key[-1]} nearest of {count}, to the model's own encoders, which flatter it."
        rows.append((f"Prompt recognised, recall@{key[-1]}", *shares, means))
    header = ("Pictures of prompts", *(WAYS[way] for way in ways), "What it says")
    return page.section(
        "Text to image",
        page.table(header, rows, numbers=range(1, 1 + len(ways)), style="explained"),
        page.paragraph(_footnote(evaluation), "soft"),
        picture,
        _retrieval_table(part_of(evaluation, "retrieval")),
        page.paragraph("Retrieval: every caption is a text; texts of the same wording count as the same.", "soft"),
    )


_GROUPS = {"prompts": "", "unseen_prompts": ", unseen combination"}


def _prompt_rows(found: Mapping[str, Any], added: str, ways: Sequence[str]) -> Iterable[Sequence[str]]:
    for key, (title, means) in PROMPT_ROWS.items():
        parts = [part_of(found, way) for way in ways]
        if key == "sharpness":
            values = [number(part.get(key), "{:.2f}") for part in parts]
        else:
            values = [share_of(part_of(part, key)) for part in parts]
        yield f"{title}{added}", *values, "" if added else means


def _footnote(evaluation: Mapping[str, Any]) -> str:
    parts = []
    if is_number(evaluation.get("reader_accuracy")):
        parts.append(
            "Read by a classifier that was trained on real renders alone and reads "
            f"{percent(evaluation['reader_accuracy'])} of {number(evaluation.get('reader_renders'), '{:,}')} others "
            "entirely right. Intervals are at 95 %."
        )
    combinations = part_of(evaluation, "unseen_prompts").get("combinations")
    if isinstance(combinations, list) and combinations:
        parts.append(f"In no training picture: {', '.join(map(str, combinations))}.")
    sampling = part_of(evaluation, "sampling")
    if sampling:
        parts.append(
            f"Sampler {sampling.get('sampler', MISSING)}, {number(sampling.get('num_inference_steps'))} steps, "
            f"guidance scale {number(sampling.get('guidance_scale'))}{_chosen(sampling)}."
        )
    held_out = part_of(evaluation, "held_out")
    parts.append(f"Held-out pictures: {held_out.get('path', MISSING)} ({held_out.get('part', MISSING)}).")
    notes = held_out.get("notes")
    parts += [f"{note}." for note in notes] if isinstance(notes, list) else []
    return " ".join(parts)


def _chosen(sampling: Mapping[str, Any]) -> str:
    candidates = sampling.get("candidates")
    if not is_number(candidates) or candidates == 1:
        return ""
    return f", the best of {number(candidates)} candidates by the model's own captioner"


def _retrieval_table(retrieval: Mapping[str, Any]) -> str:
    sets = {name: part_of(retrieval, name) for name in ("held_out", "train", "train_more")}
    rows = [
        (f"{title}, recall@{k}", *(percent(found.get(f"recall@{k}_{way}")) for found in sets.values()))
        for way, title in RETRIEVAL_ROWS.items()
        for k in (1, 5)
    ]
    counts = (
        f"{title}\n{number(found.get('images'), '{:,}')} pictures, {number(found.get('texts'), '{:,}')} texts"
        for title, found in zip(("Held out", "Training", "Training"), sets.values(), strict=True)
    )
    return page.table(("Retrieval", *counts), rows, numbers=(1, 2, 3))


def image_to_text_section(evaluation: Mapping[str, Any], picture: str) -> str:
    """Return whether captions are true; ``picture`` is HTML or empty."""
    found = {
        title: part_of(evaluation, key)
        for key, title in (("captions", "Held-out pictures"), ("unseen_captions", "Unseen combinations"))
        if part_of(evaluation, key)
    }
    rows = [
        (title, *(_caption_cell(part.get(key)) for part in found.values()), means)
        for key, (title, means) in CAPTION_ROWS.items()
        if any(key in part for part in found.values())
    ]
    header = ("Captions", *found, "What it says")
    return page.section(
        "Image to text",
        page.table(header, rows, numbers=range(1, 1 + len(found)), style="explained"),
        page.paragraph("The likeliest caption of each picture (temperature 0)." if rows else "", "soft"),
        picture,
    )


def _caption_cell(value: Any) -> str:
    return share_of(value) if isinstance(value, dict) else number(value, "{:.3f}")


def sections(files: RunFiles) -> list[str]:
    """The sections on a run that knows texts."""
    prompts = page.figure(files.picture(PROMPTS_PICTURE), "png", "Held-out pictures above pictures of their captions")
    captions = page.figure(files.picture(CAPTIONS_PICTURE), "png", "Held-out pictures with captions written for them")
    return [text_to_image_section(files.evaluation, prompts), image_to_text_section(files.evaluation, captions)]
