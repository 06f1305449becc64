"""One simulated recording: draw a target, let it move, listen, transform."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from heterodiff.config import MicrodopplerConfig
from heterodiff.errors import DataError, unknown_name
from heterodiff.simulators.microdoppler.gait import running_gait, walking_gait
from heterodiff.simulators.microdoppler.human import fastest_limb, human
from heterodiff.simulators.microdoppler.radar import Observation, add_noise, baseband, spectrogram_db, wavelength
from heterodiff.simulators.microdoppler.rotors import HELICOPTER_TIP_M_S, QUADROTOR_TIP_M_S, TRIM, helicopter, quadrotor
from heterodiff.simulators.microdoppler.targets import Echo, View, bird, fastest_bird, pendulum

MAX_SAMPLES = 2_000_000
MIN_PRF_HZ = 16.0  # where nothing moves
PRF_MARGIN = 1.2  # room for the width of a line in the spectrum


@dataclass(frozen=True)
class Target:
    """One class of targets.

    Attributes:
        echo: random numbers, view and times (N,) in seconds -> echo.
        fastest_m_s: highest speed and range of elevations (degrees) of the class -> a speed that no part exceeds.
        duration_s, window_s: recording and analysis window that suit the class.
        flies: seen from below, at ``elevation_deg``.
    """

    echo: Callable[[np.random.RandomState, View, np.ndarray], Echo]
    fastest_m_s: Callable[[float, tuple[float, float]], float]
    duration_s: float
    window_s: float
    flies: bool = False


TARGETS = {
    "walking": Target(partial(human, walking_gait), partial(fastest_limb, walking_gait), 3.0, 0.06),
    "running": Target(partial(human, running_gait), partial(fastest_limb, running_gait), 1.2, 0.03),
    "quadrotor": Target(quadrotor, lambda speed, _: speed + QUADROTOR_TIP_M_S[1] * (1 + TRIM), 0.03, 0.002, flies=True),
    "helicopter": Target(helicopter, lambda speed, _: speed + HELICOPTER_TIP_M_S[1], 0.3, 0.0015, flies=True),
    "bird": Target(bird, fastest_bird, 1.0, 0.02, flies=True),
    "pendulum": Target(pendulum, lambda speed, _: speed, 5.0, 0.15),
}
CLASSES = tuple(TARGETS)


@dataclass(frozen=True)
class Facts:
    """Physical parameters of one picture; frequencies in Hz, positive Doppler = approaching.

    Attributes:
        wavelength_m, prf_hz, duration_s, snr_db, aspect_deg, elevation_deg, speed_m_s: as drawn.
        body_doppler_hz: mean Doppler of the body, 0 for the pendulum.
        max_doppler_hz: highest magnitude that any part reaches, at most that in this recording.
        cycle_hz: strides, wing beats, swings or revolutions of the (first) rotor a second.
        flash_rate_hz: flashes a second of the (first) rotor's advancing blades, ``None`` without rotor.
    """

    wavelength_m: float
    prf_hz: float
    duration_s: float
    snr_db: float
    aspect_deg: float
    elevation_deg: float
    speed_m_s: float
    body_doppler_hz: float
    max_doppler_hz: float
    cycle_hz: float
    flash_rate_hz: float | None


def _target(class_name: str) -> Target:
    if class_name not in TARGETS:
        raise DataError(f"microdoppler: {unknown_name('class', class_name, TARGETS)}")
    return TARGETS[class_name]


@lru_cache(maxsize=256)
def highest_doppler(class_name: str, config: MicrodopplerConfig) -> float:
    """Return a Doppler frequency in Hz that no part of any target of the class exceeds.

    Raises:
        DataError: unknown class.
    """
    target, (_, speed) = _target(class_name), getattr(config.speeds_m_s, class_name)
    return 2 * target.fastest_m_s(speed, config.elevation_deg) / wavelength(config.carrier_frequency_hz)


@lru_cache(maxsize=256)
def observe(class_name: str, config: MicrodopplerConfig, height: int, width: int) -> Observation:
    """Return the sampling of a class: as configured, or else as suits the class.

    Raises:
        DataError: unknown class, or a recording of more than two million samples.
    """
    target = _target(class_name)
    prf = config.prf_hz or max(MIN_PRF_HZ, 2 * PRF_MARGIN * highest_doppler(class_name, config))
    duration = config.duration_s or target.duration_s
    if prf * duration > MAX_SAMPLES:
        raise DataError(
            f"data.microdoppler: {class_name}: {prf:g} pulses a second for {duration:g} s are {prf * duration:,.0f} "
            f"samples a picture, expected at most {MAX_SAMPLES:,}; lower prf_hz, duration_s or carrier_frequency_hz"
        )
    return Observation.plan(prf, duration, config.window_s or target.window_s, height, width)


def axes(class_name: str, config: MicrodopplerConfig, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the Doppler frequency of each row (H,) in Hz, highest first, and the time of each column (W,) in s.

    They differ between classes where ``prf_hz`` and ``duration_s`` are left to them.

    Raises:
        DataError: as :func:`observe`.
    """
    observation = observe(class_name, config, height, width)
    return observation.doppler_hz, observation.column_times


def draw_view(class_name: str, rng: np.random.RandomState, config: MicrodopplerConfig) -> tuple[View, float, float]:
    """Draw speed, aspect and elevation; return the view and the two angles in degrees."""
    speed = rng.uniform(*getattr(config.speeds_m_s, class_name))
    aspect = rng.uniform(*config.aspect_deg)
    if rng.uniform() < config.receding:
        aspect = 180 - aspect
    elevation = rng.uniform(*config.elevation_deg)
    if not TARGETS[class_name].flies:
        elevation = 0.0  # drawn all the same, so that every class uses the stream alike
    turn, tilt = np.deg2rad(aspect), np.deg2rad(elevation)
    sight = np.array([np.cos(tilt) * np.cos(turn), np.cos(tilt) * np.sin(turn), -np.sin(tilt)])
    return View(speed, sight, wavelength(config.carrier_frequency_hz)), aspect, elevation


def simulate(
    class_name: str, rng: np.random.RandomState, config: MicrodopplerConfig, height: int, width: int
) -> tuple[np.ndarray, Facts]:
    """Simulate one recording of a target of ``class_name``.

    The target is drawn before the noise: from equal states of ``rng`` it is the same at every picture size.

    Returns:
        float32 (height, width) in decibels, from ``-config.dynamic_range_db`` to 0, the strongest pixel; Doppler
        upwards, zero in the middle, time to the right as :func:`axes` gives them. And the facts.

    Raises:
        DataError: as :func:`observe`.
    """
    target = _target(class_name)
    observation = observe(class_name, config, height, width)
    view, aspect, elevation = draw_view(class_name, rng, config)
    snr = rng.uniform(*config.snr_db)
    echo = target.echo(rng, view, observation.times)
    signal = add_noise(baseband(echo.ranges_m, echo.amplitudes, view.wavelength_m), snr, rng)
    doppler_per_speed = 2 / view.wavelength_m
    facts = Facts(
        wavelength_m=view.wavelength_m,
        prf_hz=observation.prf_hz,
        duration_s=observation.duration_s,
        snr_db=snr,
        aspect_deg=aspect,
        elevation_deg=elevation,
        speed_m_s=view.speed_m_s,
        body_doppler_hz=0.0 if class_name == "pendulum" else view.closing_m_s * doppler_per_speed,
        max_doppler_hz=echo.max_speed_m_s * doppler_per_speed,
        cycle_hz=float(echo.cycle_hz),
        flash_rate_hz=echo.flash_rate_hz,
    )
    return spectrogram_db(signal, observation, config.dynamic_range_db), facts
