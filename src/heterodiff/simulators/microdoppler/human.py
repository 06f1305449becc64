"""Walking and running humans: a jointed body of ellipsoids, each a point scatterer at its middle."""

from collections.abc import Callable

import numpy as np

from heterodiff.simulators.microdoppler.gait import SHANK, THIGH, Gait, periodic_curve
from heterodiff.simulators.microdoppler.targets import Echo, View, radial_speed

HEIGHTS_M = (1.6, 1.95)

# Lengths in body heights as Boulic et al. use them, from Drillis and Contini (Body Segment Parameters, 1966).
_HEAD, _TORSO, _SHOULDERS, _HIPS = 0.130, 0.288, 0.259, 0.191
_FOOT, _UPPER_ARM, _FOREARM = 0.143, 0.188, 0.152
# Radii in body heights: rough, ours.
_RADIUS = {"thigh": 0.042, "shank": 0.030, "foot": 0.025, "upper arm": 0.026, "forearm": 0.020}
_HEAD_AXES, _TORSO_AXES = (0.055, 0.045, 0.065), (0.065, 0.10, 0.144)


def _hanging(angle: np.ndarray, length: float) -> np.ndarray:
    """A segment (3, N) that hangs from its joint, turned forward by ``angle`` (N,) in radians."""
    return length * np.stack([np.sin(angle), np.zeros_like(angle), -np.cos(angle)])


def _beside(turn: np.ndarray, offset: float) -> np.ndarray:
    """A point (3, N) ``offset`` to the left of the spine, turned by ``turn`` (N,) about it (counter-clockwise)."""
    return offset * np.stack([-np.sin(turn), np.cos(turn), np.zeros_like(turn)])


def segments(gait: Gait, height_m: float, phase: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the ends of each part of the body, without the mean motion.

    Args:
        phase: (N,) strides since right heel strike.

    Returns:
        name -> (start, end), both (3, N) in metres from the mean position of the pelvis: x forward, y left, z up.
    """
    turn = 2 * np.pi * phase
    pelvis = np.stack(
        [
            # Signed so that the body is fastest when it is lowest, around heel strike, as a walking body is.
            gait.surge_m * np.sin(2 * turn + 4 * np.pi * (0.625 - gait.support)),
            -gait.sway_m * np.sin(turn - 0.2 * np.pi),
            gait.rise_m * np.sin(2 * turn - 0.7 * np.pi),
        ]
    )
    mean, amplitude = gait.lean_deg
    lean = np.deg2rad(mean - amplitude * np.sin(2 * turn - 0.2 * np.pi))
    spine = -_hanging(-lean, _TORSO * height_m)
    neck = pelvis + spine
    parts = {"torso": (pelvis, neck), "head": (neck, neck + spine * (_HEAD / _TORSO))}
    hips_turn = np.deg2rad(gait.pelvis_deg * np.cos(turn))  # the hip goes forward with its leg
    chest_turn = -np.deg2rad(periodic_curve(gait.thorax, phase))  # and the shoulder against it
    for side, sign, shift in (("right", -1, 0.0), ("left", 1, 0.5)):
        here = phase + shift
        hip, knee, ankle, elbow = (
            np.deg2rad(periodic_curve(points, here)) for points in (gait.hip, gait.knee, gait.ankle, gait.elbow)
        )
        hip_at = pelvis + _beside(hips_turn, sign * _HIPS / 2 * height_m)
        knee_at = hip_at + _hanging(hip, THIGH * height_m)
        ankle_at = knee_at + _hanging(hip - knee, SHANK * height_m)
        toe_at = ankle_at + _hanging(hip - knee + ankle + np.pi / 2, _FOOT * height_m)
        middle, swing = gait.shoulder_deg
        shoulder = np.deg2rad(middle - swing * np.cos(turn + 2 * np.pi * shift))
        shoulder_at = neck + _beside(chest_turn, sign * _SHOULDERS / 2 * height_m)
        elbow_at = shoulder_at + _hanging(shoulder, _UPPER_ARM * height_m)
        hand_at = elbow_at + _hanging(shoulder + elbow, _FOREARM * height_m)
        parts |= {
            f"{side} thigh": (hip_at, knee_at),
            f"{side} shank": (knee_at, ankle_at),
            f"{side} foot": (ankle_at, toe_at),
            f"{side} upper arm": (shoulder_at, elbow_at),
            f"{side} forearm": (elbow_at, hand_at),
        }
    return parts


def _spheroid(start: np.ndarray, end: np.ndarray, radius: float, sight: np.ndarray) -> np.ndarray:
    """Amplitude (N,) of a spheroid from ``start`` to ``end``: sqrt of sigma = pi a^4 c^2 / (a^2 sin^2 + c^2 cos^2)^2.

    a is the radius, c half the length, the angle that between axis and line of sight (Chen 2011, ch. 2, ellipsoid).
    """
    axis = end - start
    half = np.sqrt(np.sum(axis**2, axis=0)) / 2
    cosine = (sight @ axis) / (2 * half)
    return np.sqrt(np.pi) * radius**2 * half / (radius**2 * (1 - cosine**2) + (half * cosine) ** 2)


def _ellipsoid(axes: tuple[float, float, float], height_m: float, sight: np.ndarray) -> float:
    """Amplitude of an upright ellipsoid of half ``axes`` forward, left and up (body heights); same source."""
    a, b, c = (axis * height_m for axis in axes)
    return float(np.sqrt(np.pi) * a * b * c / np.sum((np.array([a, b, c]) * sight) ** 2))


def human(make_gait: Callable[[float, float], Gait], rng: np.random.RandomState, view: View, times: np.ndarray) -> Echo:
    """A human with the gait that ``make_gait`` gives for a speed (m/s) and a height (m)."""
    height = rng.uniform(*HEIGHTS_M)
    gait = make_gait(view.speed_m_s, height)
    phase = gait.stride_hz * times + rng.uniform()
    ranges, amplitudes = [], []
    for name, (start, end) in segments(gait, height, phase).items():
        ranges.append(view.ranges((start + end) / 2))
        if name in ("torso", "head"):
            axes = _TORSO_AXES if name == "torso" else _HEAD_AXES
            amplitudes.append(np.full(times.size, _ellipsoid(axes, height, view.sight)))
        else:
            radius = _RADIUS[name.split(" ", 1)[1]] * height
            amplitudes.append(_spheroid(start, end, radius, view.sight))
    moving = np.stack(ranges) - view.closing_m_s * times
    return Echo(moving, np.stack(amplitudes), radial_speed(moving, times), gait.stride_hz)


def fastest_limb(
    make_gait: Callable[[float, float], Gait], speed_m_s: float, _elevation_deg: tuple[float, float]
) -> float:
    """Return the highest level speed of any scatterer in m/s, over all heights, at this speed (it grows with it)."""
    phase = np.linspace(0, 1, 1001)
    fastest = 0.0
    for height in np.linspace(*HEIGHTS_M, 8):
        gait = make_gait(speed_m_s, float(height))
        middles = np.stack([(start + end) / 2 for start, end in segments(gait, float(height), phase).values()])
        velocity = np.gradient(middles[:, :2], phase, axis=-1) * gait.stride_hz
        velocity[:, 0] += speed_m_s
        fastest = max(fastest, float(np.linalg.norm(velocity, axis=1).max()))
    return 1.02 * fastest  # what heights and phases in between may add
