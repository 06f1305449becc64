"""The simulator of the source ``microdoppler``: how fast it is, what its pictures look like, whether they obey physics.

    python -m benchmarks.microdoppler

Prints pictures a second of each class and, for 20 targets of each, what physics predicts beside what is read from the
spectrogram. Writes benchmarks/results/microdoppler.json and the labelled sheet docs/images/microdoppler.png.
"""

import os
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from benchmarks.measure import write_results
from heterodiff.config import MicrodopplerConfig
from heterodiff.simulators.microdoppler import CLASSES, Facts, axes, random_state, simulate

SHEET = Path(__file__).parents[1] / "docs" / "images" / "microdoppler.png"
SIZE = 64
PICTURES = 100
EXAMPLES = 4
TARGETS = 20
CLEAR_SNR_DB = 40.0  # for reading faint tips; signal to noise ratios are read at the default ones

Readings = dict[str, tuple[float, float]]  # quantity -> predicted, measured


def pictures_per_second(index: int, config: MicrodopplerConfig) -> float:
    """Simulate ``PICTURES`` of class ``index`` one after the other, after one that warms up."""
    simulate(CLASSES[index], random_state(0, index, 0), config, SIZE, SIZE)
    start = time.perf_counter()
    for picture in range(PICTURES):
        simulate(CLASSES[index], random_state(0, index, picture), config, SIZE, SIZE)
    return PICTURES / (time.perf_counter() - start)


# --- physics: predictions from the facts of a target, measurements from its picture -------------------------------


@dataclass(frozen=True)
class Recording:
    """One picture: ``power`` (H, W) in linear units, its axes ``doppler`` (H,) in Hz and ``times`` (W,) in s."""

    power: np.ndarray
    doppler: np.ndarray
    times: np.ndarray
    facts: Facts

    def noise(self) -> float:
        """Mean power of the outermost rows, where the pulse rate leaves no room for targets."""
        return float(self.power[np.abs(self.doppler) > 0.9 * np.abs(self.doppler).max()].mean())

    def body_doppler(self) -> float:
        """2 v cos(aspect) cos(elevation) / lambda, what the mean motion must give."""
        facts = self.facts
        aspect, elevation = np.deg2rad([facts.aspect_deg, facts.elevation_deg])
        return float(2 * facts.speed_m_s * np.cos(aspect) * np.cos(elevation) / facts.wavelength_m)


def record(
    name: str, picture: int, duration_s: float | None, window_s: float | None, size: tuple[int, int]
) -> Recording:
    """Simulate target ``picture`` of the default configuration; with little noise where ``duration_s`` is given."""
    settings: dict[str, Any] = {"snr_db": (CLEAR_SNR_DB, CLEAR_SNR_DB)} if duration_s else {}
    config = MicrodopplerConfig(dynamic_range_db=150, duration_s=duration_s, window_s=window_s, **settings)
    image, facts = simulate(name, random_state(config.seed, CLASSES.index(name), picture), config, *size)
    return Recording(10 ** (image.astype(np.float64) / 10), *axes(name, config, *size), facts)


def outermost_ridges(recording: Recording, below_db: float = 28) -> np.ndarray:
    """Doppler furthest from zero of a maximum along Doppler in each column (W,), in Hz, 0 where there is none.

    Maxima count down to ``below_db`` under the strongest of their column: sidelobes of the Hann window are 31 dB down.
    """
    power = recording.power
    inner = power[1:-1]
    ridge = (inner >= power[:-2]) & (inner > power[2:]) & (inner > 30 * recording.noise())
    ridge &= inner > power.max(axis=0) * 10 ** (-below_db / 10)
    found = np.where(ridge, recording.doppler[1:-1, None], 0.0)
    return found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])]


def repetition_rate(values: np.ndarray, step_s: float) -> float:
    """Repetitions a second of ``values`` (N,): the first high peak of the autocorrelation, refined at its multiples."""
    count = len(values)
    power = np.abs(np.fft.rfft(values - values.mean(), 2 * count)) ** 2
    likeness = (np.fft.irfft(power)[:count] / (count - np.arange(count)))[: 2 * count // 3]
    peaks = np.flatnonzero((likeness[1:-1] >= likeness[:-2]) & (likeness[1:-1] > likeness[2:])) + 1
    peaks = peaks[peaks > np.flatnonzero(likeness < 0)[0]]
    first = lag = int(peaks[likeness[peaks] > 0.6 * likeness[peaks].max()][0])
    periods, margin = 1, max(1, first // 5)
    while periods < 6 and lag * (periods + 1) // periods + margin < len(likeness):
        near = round(lag * (periods + 1) / periods)
        periods, lag = periods + 1, near - margin + int(likeness[near - margin : near + margin + 1].argmax())
    return periods / (lag * step_s)


def edge(recording: Recording) -> float:
    """Outermost Doppler in Hz at which the mean over time is 10 dB above the noise."""
    return float(np.abs(recording.doppler[recording.power.mean(axis=1) > 10 * recording.noise()]).max())


def flashes(recording: Recording) -> np.ndarray:
    """Power (W,) at high positive Doppler, where only advancing blades are."""
    return recording.power[recording.doppler > 0.4 * edge(recording)].sum(axis=0)


def signal_to_noise(name: str, picture: int) -> tuple[float, float]:
    """Predicted and measured dB in a picture of the default configuration, read from power and noise in it."""
    recording = record(name, picture, None, None, (256, 256))
    noise = recording.noise()
    return recording.facts.snr_db, 10 * np.log10(recording.power.mean() / noise - 1)


def read_limbs(recording: Recording) -> tuple[Readings, float]:
    """Body and fastest part; and what repeats itself a second."""
    strongest = recording.doppler[recording.power.argmax(axis=0)]
    ridges = outermost_ridges(recording)
    readings = {
        "Doppler of the body, Hz": (recording.body_doppler(), float(np.median(strongest))),
        "highest Doppler, Hz": (recording.facts.max_doppler_hz, float(np.abs(ridges).max())),
    }
    return readings, repetition_rate(ridges, recording.times[1] - recording.times[0])


def read_walking(picture: int) -> Readings:
    """Steps show as the feet overtake the body; two steps are a stride, the gait cycle."""
    recording = record("walking", picture, 10, 0.06, (512, 1024))
    readings, steps = read_limbs(recording)
    return {**readings, "steps a second": (2 * recording.facts.cycle_hz, steps)}


def read_running(picture: int) -> Readings:
    """As for walking, with the cadence of :func:`gait.running_gait`."""
    recording = record("running", picture, 6, 0.03, (512, 1024))
    readings, steps = read_limbs(recording)
    return {**readings, "steps a second": (2 * (1.2 + 0.06 * recording.facts.speed_m_s), steps)}


def read_bird(picture: int) -> Readings:
    recording = record("bird", picture, 4, 0.06, (512, 1024))
    readings, beats = read_limbs(recording)
    return {**readings, "wing beats a second": (recording.facts.cycle_hz, beats)}


def read_pendulum(picture: int) -> Readings:
    """The bob is the strongest line; it passes its lowest point twice a period."""
    recording = record("pendulum", picture, 20, 0.15, (512, 1024))
    line = recording.doppler[recording.power.argmax(axis=0)]
    step = recording.times[1] - recording.times[0]
    return {
        "highest Doppler, Hz": (abs(recording.body_doppler()), float(np.abs(line).max())),
        "half period, s": (0.5 / recording.facts.cycle_hz, 0.5 / repetition_rate(line, step)),
    }


def read_hull_and_tips(recording: Recording) -> Readings:
    """The hull is the strongest line of the mean spectrum, the fastest tip its edge."""
    strongest = recording.doppler[recording.power.mean(axis=1).argmax()]
    return {
        "Doppler of the hull, Hz": (recording.body_doppler(), float(strongest)),
        "highest Doppler, Hz": (recording.facts.max_doppler_hz, edge(recording)),
    }


def read_helicopter(picture: int) -> Readings:
    recording = record("helicopter", picture, 1, 0.0005, (256, 8192))
    rate = repetition_rate(flashes(recording), recording.times[1] - recording.times[0])
    return {
        **read_hull_and_tips(record("helicopter", picture, 1, 0.02, (2048, 256))),
        "flashes a second": (recording.facts.flash_rate_hz or 0.0, rate),
    }


def read_quadrotor(picture: int) -> Readings:
    """Four rotors flash at four rates; that of the first is the nearest of the eight strongest lines."""
    recording = record("quadrotor", picture, 2, 0.001, (256, 8192))
    train = flashes(recording)
    spectrum = np.abs(np.fft.rfft((train - train.mean()) * np.hanning(train.size), 4 * train.size))
    rates = np.fft.rfftfreq(4 * train.size, recording.times[1] - recording.times[0])
    lines = np.flatnonzero((spectrum[1:-1] > spectrum[:-2]) & (spectrum[1:-1] > spectrum[2:])) + 1
    strongest = rates[lines[np.argsort(spectrum[lines])[-8:]]]
    expected = recording.facts.flash_rate_hz or 0.0
    return {
        **read_hull_and_tips(record("quadrotor", picture, 1, 0.05, (2048, 256))),
        "flashes a second": (expected, float(strongest[np.abs(strongest - expected).argmin()])),
    }


READERS = {
    "walking": read_walking,
    "running": read_running,
    "quadrotor": read_quadrotor,
    "helicopter": read_helicopter,
    "bird": read_bird,
    "pendulum": read_pendulum,
}


def check_physics() -> list[dict[str, Any]]:
    """Read ``TARGETS`` targets of each class; print and return a row a quantity, the first target as the example."""
    rows: list[dict[str, Any]] = []
    print(f"{'class':12}{'quantity':28}{'predicted':>10}{'measured':>10}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name in CLASSES:
        targets = [READERS[name](k) | {"signal to noise ratio, dB": signal_to_noise(name, k)} for k in range(TARGETS)]
        for quantity, (predicted, measured) in targets[0].items():
            pairs = np.array([target[quantity] for target in targets])
            in_db = quantity.endswith("dB")
            off = pairs[:, 1] - pairs[:, 0] if in_db else 100 * (pairs[:, 1] / pairs[:, 0] - 1)
            row = {
                "class": name,
                "quantity": quantity,
                "predicted": predicted,
                "measured": measured,
                "deviation_unit": "dB" if in_db else "%",
                "deviation_median": float(np.median(off)),
                "deviation_lowest": float(off.min()),
                "deviation_highest": float(off.max()),
            }
            rows.append(row)
            print(f"{name:12}{quantity:28}{predicted:10.4g}{measured:10.4g}", end="")
            print(
                *(f"{row[f'deviation_{k}']:+6.1f} {row['deviation_unit']:2}" for k in ("median", "lowest", "highest"))
            )
    return rows


def implied_heights() -> tuple[float, float]:
    """Lowest and highest body height in m of the walkers, by Boulic et al. from speed and measured cadence alone.

    A stride takes 1.346 / sqrt(RV) seconds, RV the speed in leg lengths a second; a leg is 0.491 body heights.
    """
    heights = []
    for picture in range(TARGETS):
        recording = record("walking", picture, 10, 0.06, (512, 1024))
        _, steps = read_limbs(recording)
        heights.append(recording.facts.speed_m_s / (1.346 * steps / 2) ** 2 / 0.491)
    return min(heights), max(heights)


# --- the picture --------------------------------------------------------------------------------------------------


def draw_sheet(config: MicrodopplerConfig) -> None:
    """Save ``EXAMPLES`` pictures of each class, a row a class: Doppler at the left, its radial speed at the right."""
    figure, grid = plt.subplots(len(CLASSES), EXAMPLES, figsize=(8.6, 11.5), layout="constrained")
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
            plot.set_title(f"{facts.speed_m_s:.1f} m/s, aspect {facts.aspect_deg:.0f}°", fontsize=8)
            plot.tick_params(labelsize=7, labelleft=picture == 0)
            plot.locator_params(axis="x", nbins=4)
            plot.set_xlabel("time (s)", fontsize=7, labelpad=1)
        row[0].set_ylabel(f"{name}\nDoppler (Hz)", fontsize=9)
        half = facts.wavelength_m / 2
        speed = row[-1].secondary_yaxis("right", functions=(lambda f, h=half: f * h, lambda v, h=half: v / h))
        speed.set_ylabel("radial speed (m/s)", fontsize=8)
        speed.tick_params(labelsize=7)
    bar = figure.colorbar(shown, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.01)
    bar.set_label("power below the maximum (dB)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(48).save(SHEET, optimize=True)  # a third of the bytes


def main() -> None:
    config = MicrodopplerConfig()
    speed = {name: pictures_per_second(index, config) for index, name in enumerate(CLASSES)}
    overall = 1 / float(np.mean([1 / value for value in speed.values()]))
    for name, value in (*speed.items(), ("overall", overall)):
        print(f"{name:12} {value:7.0f} pictures/s")
    physics = check_physics()
    heights = implied_heights()
    print(
        f"body heights that the walkers' cadence implies: {heights[0]:.2f} to {heights[1]:.2f} m (drawn: 1.60 to 1.95)"
    )
    draw_sheet(config)
    content = {
        "numpy": np.__version__,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "size": [SIZE, SIZE],
        "pictures_per_second": speed,
        "overall": overall,
        "targets": TARGETS,
        "physics": physics,
        "implied_heights_m": heights,
    }
    print(f"wrote {write_results('microdoppler', content)} and {SHEET}")


if __name__ == "__main__":
    main()
