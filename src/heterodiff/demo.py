"""The demo: the whole way from real images to a report, in minutes on a laptop."""

import time
from pathlib import Path

from heterodiff.config import load_config
from heterodiff.evaluation.run import evaluate_run, summary_lines
from heterodiff.training.start import train

IMAGES_PER_CLASS = 20


def run_demo(config_file: Path, out: Path, seed: int) -> None:
    """Train the run of ``config_file`` in ``out`` (or go on with it), draw 20 images a class, evaluate, report.

    Raises:
        HeterodiffError: ``out`` holds something else.
    """
    start = time.perf_counter()
    config = load_config(config_file, [f"output={out}", f"training.seed={seed}"])
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    print(f"trained  {result.step} steps; drawing and evaluating {IMAGES_PER_CLASS} images a class", flush=True)
    evaluation = evaluate_run(out, IMAGES_PER_CLASS, seed)
    for line in summary_lines(evaluation.metrics):
        print(line)
    print(f"samples  {evaluation.picture}\nreport   {evaluation.report}")
    print(f"time     {time.perf_counter() - start:.0f} s\nnext     heterodiff sample {out} --class 3 -n 8 --seed 0")
