"""Text to image, image to text and retrieval of a run on captioned images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterodiff.report.content import Block, Card, Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import MISSING, count, is_number, number, part_of, percent, texts
from heterodiff.report.metrics import Metric, MetricTable, Value, value_of

WAYS = {
    "diffusion": "Diffusion",
    "first": "Diffusion, first candidate",
    "direct": "Direct decoding",
    "real": "Real pictures",
}
PROMPT_SETS = {"prompts": ("prompts", ""), "unseen_prompts": ("unseen", ", unseen combination")}
"""Key in the evaluation -> tag of the lines, and what is added to the labels."""
PROMPT_ROWS = {
    "things": ("Colours and shapes right", "All things of the prompt are there, and no other colour or shape."),
    "scene": ("Place right, too", "So is the place or the relation: the picture shows all that the prompt says."),
    "sharpness": (
        "Sharpness",
        "Root mean square gradient over that of real pictures of the same scenes: 1 is as sharp, noise is above.",
    ),
}
CAPTION_SETS = {"captions": "Held-out pictures", "unseen_captions": "Unseen combinations"}
CAPTION_ROWS = {
    "things": ("Colours and shapes right", "The caption names all things, and no others."),
    "true": ("Entirely true", "And nothing that it says of the place is wrong."),
    "scene": ("True and complete", "And it does name the place or the relation."),
    "exact": ("Word for word", "The caption is one of those that people wrote for the picture."),
    "unigram_f1": ("Unigram F1", "Words in common with the nearest of the picture's captions: 1 is all."),
}
RETRIEVAL_ROWS = {"image_to_text": "Text of a picture", "text_to_image": "Picture of a text"}
RETRIEVAL_SETS = {"held_out": "Held out", "train": "Training", "train_more": "Training"}


def prompt_metrics(evaluation: Mapping[str, Any]) -> MetricTable:
    """Measurements of the pictures of prompts, by the way they were made."""
    sets = [(part_of(evaluation, key), *names) for key, names in PROMPT_SETS.items()]
    judged = part_of(evaluation, "generated_recall")
    ways = [way for way in WAYS if any(way in found for found in (judged, *(found for found, _, _ in sets)))]
    rows = [row for found, tag, added in sets if found for row in _prompt_rows(found, tag, added, ways)]
    if is_number(evaluation.get("reader_accuracy")):
        accuracy = value_of(evaluation["reader_accuracy"], "{:.1%}", evaluation.get("reader_renders"))
        values = [accuracy if way == "real" else Value() for way in ways]
        explanation = (
            "The classifier that judges the pictures was trained on real ones alone; share of others that it describes "
            "entirely right. Intervals are at 95 %."
        )
        rows.append(Metric("Accuracy of the classifier", values, explanation, tag="judge"))
    for k in (1, 5) if judged else ():
        recalls = [part_of(judged, way).get(f"generated_recall@{k}") for way in ways]
        shares = [value_of(recall, "{:.1%}", judged.get("n")) for recall in recalls]
        explanation = f"The prompt is among the {k} nearest of all, to the model's own encoders, which flatter it."
        rows.append(Metric(f"Prompt recognised, recall@{k}", shares, explanation, tag="prompts"))
    return MetricTable("Pictures of prompts", [WAYS[way] for way in ways], rows, "pictures")


def _prompt_rows(found: Mapping[str, Any], tag: str, added: str, ways: Sequence[str]) -> Iterable[Metric]:
    for key, (label, explanation) in PROMPT_ROWS.items():
        values = [value_of(part_of(found, way).get(key), "{:.2f}") for way in ways]
        yield Metric(f"{label}{added}", values, "" if added else explanation, tag=tag)


def retrieval_metrics(evaluation: Mapping[str, Any]) -> MetricTable:
    """Retrieval among held-out pictures, as many training pictures, and more of these."""
    sets = {key: part_of(evaluation, "retrieval", key) for key in RETRIEVAL_SETS}
    rows = [
        Metric(
            f"{title}, recall@{k}",
            [value_of(found.get(f"recall@{k}_{way}"), "{:.1%}") for found in sets.values()],
            tag="recall",
        )
        for way, title in RETRIEVAL_ROWS.items()
        for k in (1, 5)
    ]
    columns = [
        f"{RETRIEVAL_SETS[key]}\n{count(found.get('images'))} pictures, {count(found.get('texts'))} texts"
        for key, found in sets.items()
    ]
    return MetricTable("Retrieval", columns, rows)


def caption_metrics(evaluation: Mapping[str, Any]) -> MetricTable:
    """Truth of captions, or their likeness to those that people wrote."""
    sets = {key: found for key in CAPTION_SETS if (found := part_of(evaluation, key))}
    rows = [
        Metric(label, [value_of(found.get(key), "{:.3f}") for found in sets.values()], explanation, tag="captions")
        for key, (label, explanation) in CAPTION_ROWS.items()
        if any(key in found for found in sets.values())
    ]
    return MetricTable("Captions", [CAPTION_SETS[key] for key in sets], rows, "captions")


def metrics(evaluation: Mapping[str, Any]) -> list[MetricTable]:
    """The metrics of text to image, retrieval and image to text."""
    if not part_of(evaluation, "retrieval"):
        return []
    return [retrieval_metrics(evaluation), prompt_metrics(evaluation), caption_metrics(evaluation)]


def cards(evaluation: Mapping[str, Any]) -> Iterable[Card]:
    """Yield the headline numbers."""
    table = prompt_metrics(evaluation)
    drawn, written = ({row.label: row for row in each.rows} for each in (table, caption_metrics(evaluation)))
    if table.columns and (scene := drawn.get("Place right, too")):
        first, *others = (way.lower() for way in table.columns)
        note = ", ".join(f"{way}: {value.text}" for way, value in zip(others, scene.values[1:], strict=True))
        yield scene.card(note, f"Shows all that the prompt says ({first})")
    if true := written.get("Entirely true"):
        complete = written.get("True and complete")
        yield true.card(f"and complete: {complete.values[0].text if complete else MISSING}", "Captions that are true")
    elif f1 := written.get("Unigram F1"):
        yield f1.card("held-out pictures", "Captions: unigram F1")
    if found := part_of(evaluation, "retrieval", "held_out"):
        share = percent(found.get("recall@5_image_to_text"))
        yield Card("Text found among the first 5", share, f"{count(found.get('images'))} held-out pictures")


def sections(files: RunFiles) -> list[Section]:
    """The sections on a run on captioned images."""
    evaluation = files.evaluation
    prompts = files.figure(files.folder.prompts_picture, "Held-out pictures above pictures of their captions")
    captions = files.figure(files.folder.captions_picture, "Held-out pictures with captions written for them")
    written = caption_metrics(evaluation)
    image_to_text: list[Block] = [
        written.table(),
        Text("The likeliest caption of each picture (temperature 0)." if written.rows else "", soft=True),
        captions,
    ]
    text_to_image: list[Block] = [
        prompt_metrics(evaluation).table(),
        Text(_footnote(evaluation), soft=True),
        prompts,
        retrieval_metrics(evaluation).table(),
        Text("Retrieval: every caption is a text; texts of the same wording count as the same.", soft=True),
    ]
    measured = bool(part_of(evaluation, "retrieval"))
    return [Section("Text to image", text_to_image if measured else []), Section("Image to text", image_to_text)]


def _footnote(evaluation: Mapping[str, Any]) -> str:
    parts = []
    if combinations := texts(part_of(evaluation, "unseen_prompts").get("combinations")):
        parts.append(f"In no training picture: {', '.join(combinations)}.")
    if sampling := part_of(evaluation, "sampling"):
        candidates = sampling.get("candidates")
        several = is_number(candidates) and candidates != 1
        chosen = f", the best of {number(candidates)} candidates by the model's own captioner" if several else ""
        parts.append(
            f"Sampler {sampling.get('sampler', MISSING)}, {number(sampling.get('num_inference_steps'))} steps, "
            f"guidance scale {number(sampling.get('guidance_scale'))}{chosen}."
        )
    held_out = part_of(evaluation, "held_out")
    parts.append(f"Held-out pictures: {held_out.get('path', MISSING)} ({held_out.get('part', MISSING)}).")
    return " ".join([*parts, *(f"{note}." for note in texts(held_out.get("notes")))])
