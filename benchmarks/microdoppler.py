"""The simulator of the source ``microdoppler``: how fast it is and what its pictures look like.

    python -m benchmarks.microdoppler

Prints pictures a second of each class, writes benchmarks/results/microdoppler.json and the labelled sheet
docs/images/microdoppler.png.
"""

import json
import os
import platform
import time
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from heterodiff.config import MicrodopplerConfig
from heterodiff.data.builtin.microdoppler import CLASSES, axes, random_state, simulate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "microdoppler.json"
SHEET = ROOT / "docs" / "images" / "microdoppler.png"
SIZE = 64
PICTURES = 100
EXAMPLES = 4


def pictures_per_second(index: int, config: MicrodopplerConfig) -> float:
    """Simulate ``PICTURES`` of class ``index`` one after the other, after one that warms up."""
    simulate(CLASSES[index], random_state(0, index, 0), config, SIZE, SIZE)
    start = time.perf_counter()
    for picture in range(PICTURES):
        simulate(CLASSES[index], random_state(0, index, picture), config, SIZE, SIZE)
    return PICTURES / (time.perf_counter() - start)


def draw_sheet(config: MicrodopplerConfig) -> None:
    """Save ``EXAMPLES`` pictures of each class, a row a class, Doppler and time written at the first column."""
    figure, grid = plt.subplots(len(CLASSES), EXAMPLES, figsize=(8, 11.5), layout="constrained")
    for index, (name, row) in enumerate(zip(CLASSES, grid, strict=True)):
        doppler, _ = axes(name, config, SIZE, SIZE)
        step = doppler[0] - doppler[1]
        for picture, plot in enumerate(row):
            image, facts = simulate(name, random_state(config.seed, index, picture), config, SIZE, SIZE)
            shown = plot.imshow(
                image,
                cmap="viridis",
                vmin=-config.dynamic_range_db,
                vmax=0,
                aspect="auto",
                interpolation="nearest",
                extent=(0, facts.duration_s, doppler[-1] - step / 2, doppler[0] + step / 2),
            )
            plot.set_title(f"{facts.speed_m_s:.1f} m/s, aspect {facts.aspect_deg:.0f}°", fontsize=7)
            plot.tick_params(labelsize=6, labelleft=picture == 0, labelbottom=picture == 0)
        row[0].set_ylabel(f"{name}\nDoppler (Hz)", fontsize=8)
        row[0].set_xlabel("time (s)", fontsize=7)
    bar = figure.colorbar(shown, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.01)
    bar.set_label("power below the maximum (dB)", fontsize=8)
    bar.ax.tick_params(labelsize=6)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=85)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(48).save(SHEET, optimize=True)  # a third of the bytes


def main() -> None:
    config = MicrodopplerConfig()
    speed = {name: pictures_per_second(index, config) for index, name in enumerate(CLASSES)}
    overall = 1 / float(np.mean([1 / value for value in speed.values()]))
    for name, value in (*speed.items(), ("overall", overall)):
        print(f"{name:12} {value:7.0f} pictures/s")
    draw_sheet(config)
    content = {
        "machine": {
            "processor": platform.machine(),
            "numpy": np.__version__,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "size": [SIZE, SIZE],
        "pictures_per_second": speed,
        "overall": overall,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"wrote {RESULTS} and {SHEET}")


if __name__ == "__main__":
    main()
