"""The demo: the whole way from real images to a report, in minutes on a laptop."""

import time
from pathlib import Path

from heterodiff.config_file import load_config
from heterodiff.evaluation.run import evaluate_run, summary_lines
from heterodiff.evaluation.vae_run import evaluate_vae, vae_summary
from heterodiff.pipelines.load import load_generation
from heterodiff.training.start import train

IMAGES_PER_CLASS = 20
DEMOS = {"digits": "digits", "radar": "microdoppler_small"}
"""Names of the shipped configurations."""


def run_demo(config_file: Path, out: Path, seed: int) -> None:
    """Train the run of ``config_file`` in ``out`` (or go on with it), draw 20 images a class, evaluate, report.

    A run on latents trains its VAE in the folder ``<out>_vae`` first, and evaluates that too.

    Raises:
        HeterodiffError: ``out`` holds something else.
    """
    start = time.perf_counter()
    config = load_config(config_file, [f"output={out}", f"training.seed={seed}"])
    vae = None
    if config.codec.training is not None:
        vae = out.with_name(f"{out.name}_vae")
        first = [f"codec.path={vae}", f"codec.training.seed={seed}"]
        config = load_config(config_file, [f"output={out}", f"training.seed={seed}", *first])
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    print(f"trained  {result.step} steps; drawing and evaluating {IMAGES_PER_CLASS} images a class", flush=True)
    if vae is not None:
        for line in vae_summary(evaluate_vae(vae, seed).metrics):
            print(f"vae      {line}")
    evaluation = evaluate_run(out, IMAGES_PER_CLASS, seed)
    for line in summary_lines(evaluation.metrics):
        print(line)
    print(f"samples  {evaluation.picture}\nreport   {evaluation.report}")
    label = load_generation(out).class_names[-1]
    print(
        f"time     {time.perf_counter() - start:.0f} s\nnext     heterodiff sample {out} --class {label} -n 8 --seed 0"
    )
