"""The command line: parse, call, print. Heavy libraries are imported by the command that needs them."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from heterodiff import __version__
from heterodiff.errors import ConfigError, HeterodiffError, is_out_of_memory, unknown_name
from heterodiff.memory import keep_freed_memory

app = typer.Typer(
    name="heterodiff",
    help="Train and use conditional diffusion models with HAE U-Nets on your own images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

START, DATA, TRAIN, USE = "Start", "Data", "Train", "Use a run"
"""Groups of commands in `heterodiff --help`."""
MOST_PICTURES = MOST_STEPS = 1_000_000
MOST_CANDIDATES = 10_000

Graphs = Annotated[bool, typer.Option("--graphs", help="Compile the network into CUDA graphs; needs CUDA.")]
Seed = Annotated[int, typer.Option(help="Seed; the same seed gives the same result.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped one (digits).", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, mps, ...; default: a GPU if there is one.", show_default=False
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        help="Precision of the denoiser: float32, bfloat16 or float16; default: bfloat16 on CUDA, else float32.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images drawn at once; fewer take less memory.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value]...", help="Changes to the configuration.")
]


def shipped_configs() -> Path:
    """The folder of the configurations that come with heterodiff."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(name: str) -> Path:
    """The YAML file that ``name`` means: a path, or the name of a shipped configuration."""
    path, shipped = Path(name), shipped_configs() / f"{name}.yaml"
    if not path.exists() and not path.suffix and not shipped.is_file():
        raise ConfigError(unknown_name("configuration", name, sorted(p.stem for p in shipped_configs().glob("*.yaml"))))
    return path if path.exists() or path.suffix else shipped


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heterodiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["HETERODIFF_DEBUG"] = "1"


@app.command(rich_help_panel=START)
def demo(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[digits|radar|text|brain]",
            help="Real digits, simulated radar, pictures with captions, or simulated heads with lesions.",
        ),
    ] = "digits",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/ and the name, as runs/digits.")] = None,
    seed: Seed = 0,
) -> None:
    """Train on built-in images, draw samples, evaluate, write a report: the main job in minutes."""
    from heterodiff.demo import DEMOS, run_demo

    if what not in DEMOS:
        raise ConfigError(unknown_name("demo", what, DEMOS))
    run_demo(shipped_configs() / f"{DEMOS[what]}.yaml", out or Path("runs") / what, seed, overrides or [])


@app.command(rich_help_panel=START)
def models(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the networks with parameters, FLOPs and activation memory for a configuration.

    key=value sets an argument of the network, for example sample_size=128 model_channels=128 channel_mult=1,1,2,3,4
    """
    from heterodiff.compat.importing import parse_overrides
    from heterodiff.compat.names import read_arguments
    from heterodiff.models.comparison import model_table, print_table

    rows = model_table(read_arguments(parse_overrides(overrides or []), {"variant": str}))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_table(rows)


@app.command(rich_help_panel=START)
def init(
    task: Annotated[
        str,
        typer.Argument(
            metavar="[digits|images|captions|mri|radar]",
            help="Built-in digits, your images of classes, pictures with captions, MRI volumes, or simulated radar.",
        ),
    ] = "images",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file; default: my_TASK.yaml.", show_default=False)
    ] = None,
) -> None:
    """Write a commented configuration to start from."""
    from heterodiff.config.starter import next_command, write_starter

    path = out or Path(f"my_{task}.yaml")
    write_starter(task, path)
    typer.echo(f"wrote    {path}\nnext     {next_command(task, path)}")


@app.command(rich_help_panel=START)
def keys(
    name: Annotated[
        str | None, typer.Argument(metavar="[SECTION|KEY]", help="Such as training, data.volumes or ema_decay.")
    ] = None,
) -> None:
    """List the keys of a configuration file with their defaults, types and meanings."""
    from heterodiff.config.reference import find_keys, to_text

    for line in to_text(find_keys(name)):
        typer.echo(line)


@app.command(rich_help_panel=DATA)
def check(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|DATA|RUN", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Verify data, shapes, value ranges, the network, its loss and memory before training."""
    from heterodiff.training.preflight.check import check_target

    shipped = shipped_configs() / f"{target}.yaml"
    found = shipped if not target.exists() and shipped.is_file() else target
    raise typer.Exit(0 if check_target(found, overrides or []) else 1)


@app.command(rich_help_panel=TRAIN)
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on with the run in the output folder.")
    ] = "auto",
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop, with a checkpoint, after so many steps in all.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print shapes, parameters, memory and one step's time; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the screen.")] = False,
) -> None:
    """Train a model; start the same command again to go on after an interruption."""
    from heterodiff.config.file import load_config

    run_config = load_config(find_config(config), overrides or [])  # before anything slow is imported
    from heterodiff.training import start
    from heterodiff.training.preflight import trial

    if dry_run:
        trial.print_dry_run(trial.dry_run(run_config))
        return
    result = start.train(run_config, resume, stop_after, quiet=quiet)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        typer.echo(f"stopped by {name} at step {result.step}; the same command goes on from there", err=True)
        raise typer.Exit(128 + result.stopped_by)
    if result.step < run_config.training.steps:
        typer.echo(f"stopped  at step {result.step} of {run_config.training.steps}; the same command goes on")
    elif start.is_main_process():
        from heterodiff.report.writing import write_report

        assert run_config.output is not None
        report = write_report(run_config.output)
        typer.echo(f"done     step {result.step} of {run_config.training.steps}\nreport   {report}")
        for line in start.next_steps(run_config):
            typer.echo(line)


@app.command(rich_help_panel=DATA)
def encode(
    config: ConfigArgument,
    vae: Annotated[
        Path, typer.Option(metavar="RUN", help="A run of recipe vae, or a diffusers AutoencoderKL.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the latents.", show_default=False)],
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_PICTURES, help="Images encoded at once.")] = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in each file.")] = 1024,
) -> None:
    """Encode the images of a configuration once, to train on their latents; an interrupted start can be repeated."""
    from heterodiff.config.file import load_config

    run_config = load_config(find_config(config), overrides or [])  # before anything slow is imported
    from heterodiff.latents.encode_run import encode_run

    result = encode_run(run_config.data, vae, out, batch_size, shard_size)
    if result is None:  # another process of torchrun reports
        return
    for note in result.notes:
        typer.echo(f"note     {note}")
    stored = result.data.latents
    assert stored is not None
    shape = "x".join(map(str, stored.shape))
    std = " ".join(f"{value:.3f}" for value in result.std)
    typer.echo(f"latents  {len(result.data.train)} training and {len(result.data.val)} held-out, {shape}, in {out}")
    typer.echo(f"std      {std} {'per channel ' if len(result.std) > 1 else ''}after scaling, expected 1")
    typer.echo(
        f"next     heterodiff train {config} data.source=latents data.path={out} codec.kind=kl-vae codec.path={vae} "
        "output=runs/NEW"
    )


@app.command(rich_help_panel=USE)
def sample(
    run: RunArgument,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME|INDEX", help="Repeatable; default: all classes.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, max=MOST_PICTURES, help="Images of each class.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; default: the run's (20).")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is unguided.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim, dpmpp, unipc, euler, heun or flow-euler.")] = None,
    seed: Seed = 0,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the network first; pays off for many images.")
    ] = False,
    graphs: Graphs = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: BatchSize = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the images; default: a new one in RUN/generated.")
    ] = None,
) -> None:
    """Draw images from a trained model: separate files, a labelled grid, and the settings in settings.json."""
    from heterodiff.errors import compile_error
    from heterodiff.pipelines.image_files import all_classes, class_title, draw_classes, write_images
    from heterodiff.pipelines.load import load_generation
    from heterodiff.pipelines.output_folder import call_settings, check_output, make_output

    pipeline = load_generation(run, device, "graphs" if graphs else compile_, dtype)
    chosen = [pipeline.class_index(name) for name in classes] if classes else all_classes(pipeline)
    settings = call_settings(
        "sample",
        run,
        pipeline,
        classes=[class_title(pipeline, label) for label in chosen],
        number=number,
        seed=seed,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
    )
    check_output(out, settings)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    start = time.perf_counter()
    try:
        images, labels = draw_classes(
            pipeline,
            chosen,
            number,
            seed,
            batch_size or 100,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
        )
    except RuntimeError as error:
        raise compile_error(error, "--compile") or error from error
    seconds = time.perf_counter() - start
    folder = make_output(run, out, settings)
    written = write_images(images, labels, pipeline, folder, columns=min(number, 10))
    typer.echo(f"drawn    {len(labels)} images in {seconds:.1f} s, {len(labels) / seconds:.1f} images/s")
    typer.echo(f"images   {len(written) - 1} in {folder}\ngrid     {written[-1]}")


@app.command(rich_help_panel=USE)
def text2image(
    run: RunArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.", show_default=False)],
    number: Annotated[int, typer.Option("-n", min=1, max=MOST_PICTURES, help="Pictures of each prompt.")] = 4,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Decode the prompt's embedding instead: one pass, blurrier.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; default: the run's.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is unguided.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; default: the run's.")] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_CANDIDATES,
            help="Draw so many for each picture and keep the one that the captioner finds truest.",
        ),
    ] = None,
    seed: Seed = 0,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the denoiser first.")] = False,
    graphs: Graphs = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: BatchSize = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; default: a new one in RUN/generated.")
    ] = None,
) -> None:
    """Draw pictures of prompts with a run of recipe text-image."""
    from heterodiff.errors import compile_error
    from heterodiff.pipelines.drawing import explaining_memory
    from heterodiff.pipelines.load import load_text_image
    from heterodiff.pipelines.output_folder import call_settings, check_output, make_output
    from heterodiff.pipelines.text_files import write_pictures
    from heterodiff.pipelines.text_to_image import text_notes

    if direct and (negative, steps, guidance, sampler, candidates) != (None,) * 5:
        raise ConfigError(
            "--direct is one pass, without --negative, --steps, --guidance, --sampler and --candidates; leave them out"
        )
    pipeline = load_text_image(run, device, "graphs" if graphs else compile_, dtype)
    each = 1 if direct else number  # decoding directly always gives the same
    at_once = batch_size or 64
    settings = call_settings(
        "text2image",
        run,
        pipeline,
        prompts=prompts,
        negative=negative,
        direct=direct,
        candidates=candidates or pipeline.defaults.candidates,
        number=each,
        seed=seed,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
    )
    check_output(out, settings)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    start = time.perf_counter()
    notes: list[str] = []
    try:
        with explaining_memory(min(at_once, len(prompts) * each), pipeline.device), text_notes() as notes:
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
    except RuntimeError as error:
        raise compile_error(error, "--compile") or error from error
    finally:
        for note in notes:
            typer.echo(f"note     {note}", err=True)
    seconds = time.perf_counter() - start
    written = write_pictures(images, prompts, make_output(run, out, settings), pipeline.spec)
    typer.echo(f"drawn    {len(images)} pictures in {seconds:.1f} s, {len(images) / seconds:.1f} pictures/s")
    typer.echo(f"pictures {len(written) - 1} in {written[-1].parent}\ngrid     {written[-1]}")


@app.command(rich_help_panel=USE)
def caption(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    number: Annotated[int, typer.Option("-n", min=1, max=MOST_PICTURES, help="Captions of each image.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the sampling; 0 takes the likeliest words. Default: 0 for one caption, else 0.9."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(help="And among the likeliest that make up this probability.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid words that occurred.")] = 1.0,
    seed: Seed = 0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: file_name, text.")] = False,
) -> None:
    """Write captions of image files with a run of recipe text-image."""
    from heterodiff.data.findings import printable
    from heterodiff.pipelines.load import load_text_image
    from heterodiff.pipelines.text_files import read_usable

    pipeline = load_text_image(run, device)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed}
    if temperature is None:
        temperature = 0.0 if number == 1 else 0.9
    problems: list[str] = []
    for usable, read, unusable in read_usable(pipeline, images):
        problems += unusable
        found = pipeline.generate_text_from_image(read, number, temperature=temperature, **options) if usable else []
        for path, texts in zip(usable, found, strict=True):
            for text in texts:
                name = str(path)
                line = json.dumps({"file_name": name, "text": text}, ensure_ascii=not name.isprintable())
                typer.echo(line if as_json else f"{printable(name)}: {text}")
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def segment(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA", help="Folder of patients with NIfTI volumes.", show_default=False),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First learn the limits of masks from the run's validation images.")
    ] = False,
    device: Device = None,
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
    from heterodiff.evaluation.anomalies import calibrate_run
    from heterodiff.pipelines.segment_files import prepare_folders, segment_folder
    from heterodiff.training.interrupt import Interrupted, StopRequest

    if data is None and not calibrate:
        raise ConfigError(f"name a folder of patients, or prepare the run: heterodiff segment {run} --calibrate")
    if dtype is not None and not calibrate:
        raise ConfigError("--dtype: a run segments in the precision that it was calibrated in; add --calibrate")
    find_device(device)
    folder = out or run / "segmented"
    if calibrate:
        if data is not None:
            prepare_folders(run, data, folder)  # what is wrong with them is said before calibrating, which takes long
        for line in calibrate_run(run, device, dtype):
            typer.echo(line)
    if data is None:
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
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def evaluate(
    run: RunArgument,
    number: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=2,
            max=MOST_PICTURES,
            help="Images of each class to draw; default: 50, or with --augmentation as many as it has training images "
            "(at most 500). For a run on texts, prompts to draw and pictures to caption; default: 200.",
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
            help="Instead, measure the images as training data: a classifier trained on real, on generated, on both.",
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Classifiers of each kind that --augmentation trains.")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; default: the run's (20).")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is unguided.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; default: the run's.")] = None,
    seed: Seed = 0,
    device: Device = None,
    batch_size: BatchSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Measure a trained model against real images; writes its numbers, pictures and report.html into the run."""
    from heterodiff.devices import find_device

    find_device(device)
    from heterodiff.evaluation.class_images import Request, evaluate_task

    request = Request(number, data, seed, device, batch_size, steps, guidance, sampler)
    if augmentation:
        from heterodiff.evaluation.augmentation import augmentation_summary, evaluate_augmentation
        from heterodiff.report.writing import write_report
        from heterodiff.run_folder import RunFolder

        study = evaluate_augmentation(run, data, number, seed, range(seed, seed + seeds), **request.options())
        numbers, picture = RunFolder(run).augmentation_file, RunFolder(run).augmentation_picture
        files = f"numbers    {numbers}\npicture    {picture}\nreport     {write_report(run)}"
        _print_metrics(study, augmentation_summary(study), files, as_json)
        return
    result, lines = evaluate_task(run, request)
    files = f"picture  {result.picture}\nreport   {result.report}"
    _print_metrics(result.metrics, lines, files, as_json)


def _print_metrics(metrics: dict[str, Any], lines: Iterable[str], files: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(metrics, indent=1))
        return
    for line in lines:
        typer.echo(line)
    typer.echo(files)


@app.command(name="import", rich_help_panel=TRAIN)
def import_(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the imported model.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="What weights cannot tell: num_heads=4 sample_size=128"),
    ] = None,
    format_: Annotated[str, typer.Option("--format", metavar="guided-diffusion|anofpdm")] = "guided-diffusion",
    variant: Annotated[str | None, typer.Option(help="Variant, where the weights fit more than one.")] = None,
) -> None:
    """Turn an earlier checkpoint into a model folder of this toolkit."""
    from heterodiff.compat.importing import import_checkpoint, parse_overrides

    report = import_checkpoint(checkpoint, format_, out, parse_overrides(overrides or []), variant)
    for note in report.notes:
        typer.echo(f"note     {note}")
    typer.echo(f"model    {report.folder}\nnext     heterodiff sample {report.folder}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit code 0 on success, 1 on a user's error, 128 + n after signal n."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damaged files are reported by name already
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    keep_freed_memory()
    try:
        code = app(arguments or sys.argv[1:] or ["--help"], prog_name="heterodiff", standalone_mode=False)
    except HeterodiffError as error:
        if os.environ.get("HETERODIFF_DEBUG"):
            raise
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; nothing after the last checkpoint is kept", file=sys.stderr)
        code = 130
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("HETERODIFF_DEBUG") or not is_out_of_memory(error):
            raise
        code = _fail("out of memory; free some, or compute on another --device")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: no complaint at exit
        code = 1
    except Exception as error:
        message = getattr(error, "format_message", None)  # wrong usage, found by typer
        if message is None:
            raise
        context = getattr(error, "ctx", None)
        command = f" {context.info_name}" if context is not None and context.parent is not None else ""
        code = _fail(f"{message()} (see heterodiff{command} --help)")
    sys.exit(code if isinstance(code, int) else 0)
