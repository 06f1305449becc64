"""Echoes of targets, and the two targets of few parts: a pendulum and a bird."""

from dataclasses import dataclass

import numpy as np

GRAVITY_M_S2 = 9.81


@dataclass(frozen=True)
class View:
    """Motion of one target and the direction it is seen from.

    Attributes:
        speed_m_s: along the x axis, the heading (a pendulum: of the bob at its lowest point).
        sight: unit vector (3,) from the target to the radar; x forward, y left, z up.
        wavelength_m: wavelength of the carrier.
    """

    speed_m_s: float
    sight: np.ndarray
    wavelength_m: float

    @property
    def closing_m_s(self) -> float:
        """Part of the speed that is directed at the radar."""
        return self.speed_m_s * float(self.sight[0])

    def ranges(self, positions: np.ndarray) -> np.ndarray:
        """Return the ranges (..., N) of points at ``positions`` (..., 3, N), metres from the target's."""
        return -np.einsum("i,...in->...n", self.sight, positions)


@dataclass(frozen=True)
class Echo:
    """The scatterers of one target over time.

    Attributes:
        ranges_m: (K, N).
        amplitudes: (K, N) or (K, 1), square roots of radar cross-sections in arbitrary units.
        max_speed_m_s: highest radial speed of any part.
        cycle_hz: strides, wing beats, swings or rotor revolutions a second.
        flash_rate_hz: flashes a second of the (first) rotor's advancing blades; ``None`` without rotor.
    """

    ranges_m: np.ndarray
    amplitudes: np.ndarray
    max_speed_m_s: float
    cycle_hz: float
    flash_rate_hz: float | None = None


def radial_speed(ranges_m: np.ndarray, times: np.ndarray) -> float:
    """Return the highest |dR/dt| in m/s of ranges (K, N) sampled at ``times`` (N,)."""
    return float(np.abs(np.diff(ranges_m)).max() / (times[1] - times[0]))


PENDULUM_LENGTHS_M = (0.5, 2.0)


def swing(times: np.ndarray, length_m: float, speed_m_s: float, phase: float, view: View) -> np.ndarray:
    """Return the ranges (N,) of a point that swings ``length_m`` below its pivot in the x-z plane.

    The solution for small angles, theta = theta_m sin(omega t + phase) with omega = sqrt(g / length) and
    theta_m = speed / (length omega); at 39 degrees, the largest angle of the default speeds, a real pendulum would
    swing 3 % slower.
    """
    omega = np.sqrt(GRAVITY_M_S2 / length_m)
    theta = speed_m_s / (length_m * omega) * np.sin(omega * times + phase)
    return view.ranges(length_m * np.stack([np.sin(theta), np.zeros_like(theta), -np.cos(theta)]))


def pendulum(rng: np.random.RandomState, view: View, times: np.ndarray) -> Echo:
    """A bob on a rod: one strong scatterer, three weak ones along the rod and the pivot at rest."""
    length = rng.uniform(*PENDULUM_LENGTHS_M)
    phase = rng.uniform(0, 2 * np.pi)
    bob = swing(times, length, view.speed_m_s, phase, view)
    along = np.array([[0.0], [0.25], [0.5], [0.75], [1.0]])  # rod and bob turn together: ranges are proportional
    ranges = along * bob
    amplitudes = np.array([[0.05], [0.05], [0.05], [0.05], [1.0]])
    return Echo(ranges, amplitudes, abs(view.closing_m_s), float(np.sqrt(GRAVITY_M_S2 / length)) / (2 * np.pi))


HALF_SPANS_M = (0.3, 0.6)
BEAT_SPEED_M_S = 1.8
HEAVE = 0.03  # of the body, in half spans
_UPPER_DEG, _LOWER_DEG, _TWIST_DEG = (15.0, 40.0), (40.0, 30.0), 20.0
_POINTS_A_SEGMENT = 3


def wing(flap: np.ndarray, half_span_m: float) -> np.ndarray:
    """Return points (6, 3, N) along the left wing at angles ``flap`` (N,) of the wing beat, in radians.

    Two equal segments after Chen, The Micro-Doppler Effect in Radar (2011), ch. 4, with his angles: the inner one
    flaps by 15 +- 40 degrees, the outer one bends down by 40 +- 30 degrees against it and twists by +- 20 degrees.
    His twist is in step with the beat; here it is strongest in mid-stroke, a quarter of a beat apart.
    """
    inner, bend = (np.deg2rad(mean + amplitude * np.cos(flap)) for mean, amplitude in (_UPPER_DEG, _LOWER_DEG))
    twist = np.deg2rad(_TWIST_DEG) * np.sin(flap)
    length = half_span_m / 2
    upper = length * np.stack([np.zeros_like(flap), np.cos(inner), np.sin(inner)])
    outer = inner - bend
    lower = length * np.stack([-np.cos(outer) * np.sin(twist), np.cos(outer) * np.cos(twist), np.sin(outer)])
    share = (np.arange(_POINTS_A_SEGMENT)[:, None, None] + 1) / _POINTS_A_SEGMENT
    return np.concatenate([share * upper, upper + share * lower])


def bird(rng: np.random.RandomState, view: View, times: np.ndarray) -> Echo:
    """A bird in level flight: a body of two points, and two wings.

    Larger birds beat slower, with the same half span times frequency within 15 %, about that of a pigeon (0.3 m,
    6 Hz) and of a large gull (0.6 m, 3 Hz).
    """
    half_span = rng.uniform(*HALF_SPANS_M)
    frequency = BEAT_SPEED_M_S / half_span * rng.uniform(0.85, 1.15)
    flap = 2 * np.pi * (frequency * times + rng.uniform())
    left = wing(flap, half_span)
    right = left * np.array([1.0, -1.0, 1.0])[:, None]
    parts = np.concatenate([left, right])
    # The body answers each beat: it rises while the wings go down.
    heave = -HEAVE * half_span * np.cos(flap)
    body = np.zeros((2, 3, times.size))
    body[1, 0] = 0.5 * half_span
    parts = np.concatenate([body, parts])
    parts[:, 2] += heave
    parts[:, 0] += view.speed_m_s * times
    ranges = view.ranges(parts)
    amplitudes = np.array([1.0, 0.5, *[0.25] * (4 * _POINTS_A_SEGMENT)])[:, None]
    return Echo(ranges, amplitudes, radial_speed(ranges, times), float(frequency))


def fastest_bird(speed_m_s: float, elevation_deg: tuple[float, float]) -> float:
    """Return the highest radial speed of a wing in m/s, found on one beat of the fastest wing, seen from all sides."""
    flap = np.linspace(0, 2 * np.pi, 181)
    rate = 2 * np.pi * BEAT_SPEED_M_S * 1.15  # half span times angular frequency
    velocity = rate * np.gradient(wing(flap, 1.0), flap, axis=-1)
    velocity[:, 2] += rate * HEAVE * np.sin(flap)
    turn = np.linspace(0, 2 * np.pi, 73)[:, None]
    tilt = np.deg2rad(np.linspace(*elevation_deg, 9))
    sights = np.stack([np.cos(turn) * np.cos(tilt), np.sin(turn) * np.cos(tilt), np.sin(-tilt) + 0 * turn])
    own = speed_m_s * np.abs(sights[0])
    radial = np.abs(np.einsum("iab,pin->abpn", sights, velocity)).max(axis=(2, 3))
    return 1.02 * float((own + radial).max())  # what angles in between may add
