"""Commands that draw images with a run: sample, edit, text2image."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from heterodiff.cli import options
from heterodiff.errors import ConfigError, compile_error


def sample(
    run: options.RunArgument,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME|INDEX", help="Repeatable; default: all classes.")
    ] = None,
    set_: options.Set = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Guide by this condition alone; repeatable. Default: by all together."),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, max=options.MOST_IMAGES, help="Images of each class.")] = 8,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    compile_: options.Compile = False,
    graphs: options.Graphs = False,
    device: options.Device = None,
    dtype: options.DType = None,
    batch_size: options.BatchSize = None,
    out: options.ImagesFolder = None,
) -> None:
    """Draw images from a trained model: separate files, a labelled grid, and the settings in settings.json."""
    from heterodiff.pipelines.image_files import all_classes, class_title, draw_classes, write_images
    from heterodiff.pipelines.load import load_generation
    from heterodiff.pipelines.output_folder import call_settings, make_output
    from heterodiff.pipelines.sharing import join

    join()
    pipeline = load_generation(run, device, "graphs" if graphs else compile_, dtype)
    chosen = [pipeline.class_index(name) for name in classes] if classes else all_classes(pipeline)
    titles = [class_title(pipeline, label) for label in chosen]
    asked: dict[str, Any] = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance}
    values = options.settings(set_)
    given: dict[str, Any] = ({"set": values} if values else {}) | ({"guide": guide} if guide else {})
    settings = call_settings("sample", run, pipeline, classes=titles, number=number, **given, **asked)
    drawn: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
    drawn |= {"conditions": values, "guide": guide} if given else {}
    with _drawing(pipeline, len(chosen) * number, out, settings) as report:
        images, labels = draw_classes(pipeline, chosen, number, seed, batch_size or 100, **drawn)
    folder = make_output(run, out, settings)
    report(write_images(images, labels, pipeline, folder, columns=min(number, 10)))


def translate(
    run: options.RunArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Condition images, as in training.", show_default=False)
    ],
    whole: Annotated[
        bool, typer.Option("--whole", help="The files are whole images; make conditions of them as in training.")
    ] = False,
    class_: Annotated[
        str | None, typer.Option("--class", metavar="NAME|INDEX", help="Class of the results; default: none.")
    ] = None,
    set_: options.Set = None,
    number: Annotated[int, typer.Option("-n", min=1, max=options.MOST_IMAGES, help="Results of each image.")] = 1,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.DType = None,
    batch_size: options.BatchSize = None,
    out: options.ImagesFolder = None,
) -> None:
    """Draw images of condition images (low resolution, mask, edges, other modality) with a run of data.condition."""
    from heterodiff.data.conditions import condition_image
    from heterodiff.data.reading import read_condition
    from heterodiff.pipelines.drawing import explaining_memory
    from heterodiff.pipelines.generate import seeded_generators
    from heterodiff.pipelines.image_files import save_translated
    from heterodiff.pipelines.load import load_generation
    from heterodiff.pipelines.output_folder import call_settings, make_output

    pipeline = load_generation(run, device, dtype=dtype)
    spec, data = _images_of(run, pipeline)
    if spec.condition is None:
        raise ConfigError(
            f"{run}: trained without images as conditions (data.condition); `heterodiff edit` changes an image with it"
        )
    given = [read_condition(image, spec, whole, data.resize, data.background) for image in images]
    conditions = [condition_image(image, spec, not whole)[0] for image in given]
    label = None if class_ is None else pipeline.class_index(class_)
    values = options.settings(set_)
    others: dict[str, Any] = {
        "images": [str(image) for image in images],
        "whole": whole,
        "class": class_,
        "set": values,
    }
    asked: dict[str, Any] = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance}
    settings = call_settings("translate", run, pipeline, number=number, **others, **asked)
    drawn = []
    with _drawing(pipeline, number * len(images), out, settings) as report:
        for place, image in enumerate(given):
            with explaining_memory(min(number, batch_size or 100), pipeline.device):
                drawn.append(
                    pipeline.translate(
                        image,
                        label,
                        number,
                        ready=not whole,
                        conditions=values,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        sampler=sampler,
                        batch_size=batch_size or 100,
                        generator=seeded_generators(seed, number, place * number),
                    )[0]
                )
    names = [image.stem for image in images]
    report(save_translated(conditions, drawn, names, make_output(run, out, settings), pipeline.spec))


def edit(
    run: options.RunArgument,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.", show_default=False)],
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture of two values and the image's size: where it is white, draw anew.", show_default=False
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Without --mask: how much to change, above 0 to 1. Default: 0.6.", show_default=False),
    ] = None,
    class_: Annotated[
        str | None, typer.Option("--class", metavar="NAME|INDEX", help="Class of the results; default: none.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text of the results, of runs with texts; default: none.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, max=options.MOST_IMAGES, help="Results.")] = 4,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.DType = None,
    out: options.ImagesFolder = None,
) -> None:
    """Change an image: draw its masked part anew, or vary the whole of it."""
    from heterodiff.data.reading import read_images, read_mask
    from heterodiff.pipelines.generate import seeded_generators
    from heterodiff.pipelines.image_files import save_edited
    from heterodiff.pipelines.load import load_editing
    from heterodiff.pipelines.output_folder import call_settings, make_output

    pipeline = load_editing(run, device, dtype)
    conditions, own_condition = {"class": class_, "prompt": prompt}, pipeline.condition_name
    for name, value in conditions.items():
        if value is not None and name != own_condition:
            raise ConfigError(
                f"--{name} is not for {run}, which draws images of a {own_condition}; use --{own_condition}"
            )
    spec, data = _images_of(run, pipeline)
    own = read_images([image], spec, data.resize, data.background)
    hole = None if mask is None else read_mask(mask, image, spec, data.resize)
    condition = conditions[own_condition]
    others: dict[str, Any] = {"image": str(image), "mask": mask and str(mask), own_condition: condition}
    others["strength"] = strength
    asked: dict[str, Any] = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance}
    settings = call_settings("edit", run, pipeline, number=number, **others, **asked)
    with _drawing(pipeline, number, out, settings) as report, _notes_on_texts():
        images = pipeline.edit(
            own.expand(number, -1, -1, -1),
            hole,
            condition,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            generator=seeded_generators(seed, number),
        )
    report(save_edited(own, hole, images, image.stem, make_output(run, out, settings), pipeline.spec))


def text2image(
    run: options.RunArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.", show_default=False)],
    number: Annotated[int, typer.Option("-n", min=1, max=options.MOST_IMAGES, help="Images of each prompt.")] = 4,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Decode the prompt's embedding instead: one pass, blurrier.")
    ] = False,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MOST_CANDIDATES,
            help="Images drawn for each one kept, the one that the captioner finds truest; default: the run's.",
        ),
    ] = None,
    seed: options.Seed = 0,
    compile_: options.Compile = False,
    graphs: options.Graphs = False,
    device: options.Device = None,
    dtype: options.DType = None,
    batch_size: options.BatchSize = None,
    out: options.ImagesFolder = None,
) -> None:
    """Draw images of prompts with a run of recipe text-image."""
    from heterodiff.pipelines.drawing import explaining_memory
    from heterodiff.pipelines.image_files import write_pictures
    from heterodiff.pipelines.load import load_text_image
    from heterodiff.pipelines.output_folder import call_settings, make_output

    if direct and (negative, steps, guidance, sampler, candidates) != (None,) * 5:
        raise ConfigError(
            "--direct is one pass, without --negative, --steps, --guidance, --sampler and --candidates; leave them out"
        )
    pipeline = load_text_image(run, device, "graphs" if graphs else compile_, dtype)
    each = 1 if direct else number  # decoding directly always gives the same
    count, at_once = len(prompts) * each, batch_size or 64
    asked: dict[str, Any] = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance}
    own: dict[str, Any] = {
        "negative": negative,
        "direct": direct,
        "candidates": candidates or pipeline.defaults.candidates,
    }
    settings = call_settings("text2image", run, pipeline, prompts=prompts, number=each, **own, **asked)
    memory = explaining_memory(min(at_once, count), pipeline.device)
    with _drawing(pipeline, count, out, settings) as report, _notes_on_texts(), memory:
        images = pipeline.generate_from_text(
            prompts,
            each,
            not direct,
            steps,
            guidance,
            seed,
            negative_prompts=negative,
            sampler=sampler,
            candidates=candidates,
            batch_size=at_once,
        ).images
    report(write_pictures(images, prompts, make_output(run, out, settings), pipeline.spec))


def _images_of(run: Path, pipeline: Any) -> tuple[Any, Any]:
    """Return the specification of the run's images, and the settings that they are read with."""
    from heterodiff.errors import RunError
    from heterodiff.run_folder import RunFolder

    if pipeline.spec is None or not RunFolder(run).has_config:
        raise RunError(
            f"{run}: no config.yaml and data.json, which describe how to read images; use a run trained here"
        )
    return pipeline.spec, RunFolder(run).config().data


@contextmanager
def _notes_on_texts() -> Iterator[None]:
    """Print the warnings about texts, each once, after the pictures are drawn or drawing has failed."""
    from heterodiff.pipelines.embeddings import text_notes

    notes: list[str] = []
    try:
        with text_notes() as notes:
            yield
    finally:
        for note in notes:
            typer.echo(f"note     {note}", err=True)


@contextmanager
def _drawing(pipeline: Any, count: int, out: Path | None, settings: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Time how ``count`` images with ``settings`` are drawn for ``out``; yield the function that reports the files."""
    from heterodiff.pipelines.conditions import ConditionWarning
    from heterodiff.pipelines.output_folder import check_output
    from heterodiff.progress import duration

    def report(files: list[Path]) -> None:
        *images, grid = files
        typer.echo(f"drawn    {count} images in {duration(seconds)}, {count / seconds:.1f} images/s")
        typer.echo(f"images   {len(images)} in {grid.parent}\ngrid     {grid}")

    check_output(out, settings)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("once", ConditionWarning)
        try:
            yield report
        except RuntimeError as error:
            raise compile_error(error, "--compile") or error from error
        finally:
            for doubt in dict.fromkeys(str(found.message) for found in doubts):
                typer.echo(f"note     {doubt}", err=True)
    seconds = time.perf_counter() - start
