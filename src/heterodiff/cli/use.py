"""Commands that use a run: caption, segment, evaluate."""

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from heterodiff.cli import options
from heterodiff.errors import ConfigError


def caption(
    run: options.RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    number: Annotated[int, typer.Option("-n", min=1, max=options.MOST_IMAGES, help="Captions of each image.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 takes the likeliest words. Default: 0 for one caption, else 0.9."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this probability in all.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid words that occurred.")] = 1.0,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: file_name, text.")] = False,
) -> None:
    """Write captions of image files with a run of recipe text-image."""
    from heterodiff.data.findings import printable
    from heterodiff.pipelines.image_files import read_usable
    from heterodiff.pipelines.load import load_text_image

    pipeline = load_text_image(run, device)
    sampling: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed}
    if temperature is None:
        temperature = 0.0 if number == 1 else 0.9
    problems: list[str] = []
    for usable, read, unusable in read_usable(pipeline, images):
        problems += unusable
        found = pipeline.generate_text_from_image(read, number, temperature=temperature, **sampling) if usable else []
        for path, texts in zip(usable, found, strict=True):
            for text in texts:
                name = str(path)
                line = json.dumps({"file_name": name, "text": text}, ensure_ascii=not name.isprintable())
                typer.echo(line if as_json else f"{printable(name)}: {text}")
    _fail_for(problems)


def segment(
    run: options.RunArgument,
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA", help="Folder of patients with NIfTI volumes.", show_default=False),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First find the thresholds of masks on the run's validation images.")
    ] = False,
    device: options.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="With --calibrate: precision of the network from then on, float32, bfloat16 or float16; default: "
            "float32.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for masks and maps; default: RUN/segmented.")] = None,
) -> None:
    """Find anomalies with a run of healthy and unhealthy images: masks, anomaly maps, scores. Not a medical device."""
    from heterodiff.devices import find_device
    from heterodiff.evaluation.calibration import calibrate_run
    from heterodiff.pipelines.anomalies.files import prepare_folders, segment_folder
    from heterodiff.pipelines.sharing import join
    from heterodiff.training.interrupt import Interrupted, StopRequest

    if data is None and not calibrate:
        raise ConfigError(f"name a folder of patients, or prepare the run: heterodiff segment {run} --calibrate")
    if dtype is not None and not calibrate:
        raise ConfigError("--dtype: a run segments in the precision that it was calibrated in; add --calibrate")
    processes = join()
    find_device(device)
    folder = out or run / "segmented"
    if calibrate:
        if data is not None:
            prepare_folders(run, data, folder)  # their problems are reported before calibrating, which takes long
        if processes.rank == 0:
            for line in calibrate_run(run, device, dtype):
                typer.echo(line)
        processes.wait()
    if data is None:
        processes.first_alone()
        typer.echo(f"next     heterodiff evaluate {run}")
        return
    request = StopRequest()
    try:
        with request.listening():
            rows, problems = segment_folder(
                run,
                data,
                folder,
                lambda line: typer.echo(f"patient  {line}"),
                lambda *_: request.raise_if_asked(),
                device,
            )
    except (Interrupted, KeyboardInterrupt):
        stopped_by = signal.Signals(request.signal or signal.SIGINT)
        typer.echo(f"stopped by {stopped_by.name}; finished patients are kept, the same command goes on", err=True)
        raise typer.Exit(128 + stopped_by) from None
    typer.echo(f"wrote    masks and maps of {len(rows)} patients in {folder}")
    _fail_for(problems)


def _fail_for(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def evaluate(
    run: options.RunArgument,
    number: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=2,
            max=options.MOST_IMAGES,
            help="Images of each class to draw; default: 50, or with --augmentation as many as it has training images "
            "(at most 500). For a run on texts, prompts to draw and images to caption; default: 200.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Real images unseen in training (folder or npz; for a run on texts a folder with captions, for "
            "one on volumes patients with masks); default: the run's validation split, or its test images.",
        ),
    ] = None,
    augmentation: Annotated[
        bool,
        typer.Option(
            "--augmentation",
            help="Measure instead what the images are worth as training data: a classifier trained on real images, "
            "on generated ones, and on both.",
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Classifiers of each kind that --augmentation trains.")] = 3,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    batch_size: options.BatchSize = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a trained model against real images; writes its numbers, pictures and report.html into the run."""
    from heterodiff.devices import find_device
    from heterodiff.pipelines.sharing import join

    join()
    find_device(device)
    from heterodiff.evaluation.runs import Request, evaluate_task
    from heterodiff.report.writing import summary_lines, write_report

    request = Request(number, data, seed, device, batch_size, steps, guidance, sampler)
    if augmentation:
        from heterodiff.evaluation.augmentation import augmentation_summary, evaluate_augmentation
        from heterodiff.run_folder import RunFolder

        metrics = evaluate_augmentation(run, data, number, seed, range(seed, seed + seeds), **request.options())
        lines, folder = augmentation_summary(metrics), RunFolder(run)
        files = f"numbers    {folder.augmentation_file}\npicture    {folder.augmentation_picture}\nreport     "
    else:
        result = evaluate_task(run, request)
        metrics, lines = result.metrics, summary_lines(result.metrics)
        files = f"picture  {result.picture}\nreport   "
    files += str(write_report(run))
    typer.echo(json.dumps(metrics, indent=1) if as_json else "\n".join([*lines, files]))
