"""Joint angles of a walking or running human over one stride.

Walking is the model that Boulic, Thalmann and Thalmann fitted to measured gaits ("A global human walking model with
real-time kinematic personification", The Visual Computer 6, 1990): everything follows from the relative velocity
RV = speed / leg length. Its rotation of the pelvis to left and right is left out: it moves the hips up and down,
across the line of sight of a level radar.

Running is no part of that model. It is ours: the same joints and curve shapes with the cadence, knee and elbow angles
usual in runners, and a hip that swings as fast as the ground passes. It looks like running; it was fitted to nothing.
"""

import math
from dataclasses import dataclass

import numpy as np

Points = tuple[tuple[float, float], ...]
THIGH, SHANK = 0.245, 0.246  # in body heights
LEG = THIGH + SHANK
MAX_RELATIVE_VELOCITY = 3.0


@dataclass(frozen=True)
class Gait:
    """One stride: two steps, from right heel strike (phase 0) to the next (phase 1).

    Attributes:
        stride_hz: strides a second.
        support: share of a stride that a foot is on the ground.
        hip, knee, ankle, elbow, thorax: control points (phase, degrees) of the right side; flexion is positive.
        shoulder_deg: mean and amplitude of the flexion of the shoulder, lowest at phase 0.
        pelvis_deg: amplitude of the pelvis' turn about the vertical.
        lean_deg: mean and amplitude of the forward lean of the spine, twice a stride.
        rise_m, sway_m, surge_m: amplitudes of the pelvis up (twice a stride), sideways and forward (twice).
    """

    stride_hz: float
    support: float
    hip: Points
    knee: Points
    ankle: Points
    elbow: Points
    thorax: Points
    shoulder_deg: tuple[float, float]
    pelvis_deg: float
    lean_deg: tuple[float, float]
    rise_m: float
    sway_m: float
    surge_m: float


def _legs(velocity: float, support: float) -> tuple[Points, Points, Points]:
    """Control points of hip, knee and ankle (Boulic et al., appendix C)."""
    v = velocity
    if v < 0.5:
        hip: Points = ((0.5, -30 * v), (0.9, 50 * v))
        return (
            hip,
            ((0.17, 3), (0.4, 3), (0.75, 140 * v), (1.0, 3)),
            ((0.0, -3), (0.08, -30 * v - 3), (0.5, 22 * v - 3), (support, -34 * v - 3), (0.85, -3)),
        )
    s = max(v - 1.3, 0.0) / 1.7
    hip = ((0.5, -15), (0.9, 25 + 6 * s))
    if s > 1e-3:  # below, the third point falls on the second
        hip = (*hip, (0.9 + 0.2 * s, 25 + 5 * s))
    return (
        hip,
        ((0.17 - 0.05 * s, 3 + 22 * s), (0.4, 3), (0.75 - 0.05 * s, 70 - 5 * s), (1 - 0.03 * s, 3 + 3 * s)),
        (
            (0.0, -3 + 5 * s),
            (0.08, -18 + 4 * s),
            (0.5 - 0.1 * s, 8 - 3 * s),
            (support, -20 - 8 * s),
            (0.85, -3 + 5 * s),
        ),
    )


def _elbow(velocity: float) -> Points:
    """Control points of the elbow (Boulic et al., appendix D)."""
    v = velocity
    if v < 0.5:
        return (0.05, 6 * v + 3), (0.5, 34 * v + 3), (0.9, 10 * v + 3)
    if v < 1.3:
        s = (v - 0.5) / 0.8
        return (0.05, 6 + 8 * s), (0.5 + 0.01 * s, 20 + 24 * s), (0.9, 8 + 9 * s)
    s = (v - 1.3) / 1.7
    return (0.05, 14 - 6 * s), (0.51 + 0.04 * s, 44 + 26 * s), (0.9 - 0.1 * s, 17 - 6 * s)


def walking_gait(speed_m_s: float, height_m: float) -> Gait:
    """Return the gait of a walker of ``height_m`` at ``speed_m_s``; relative velocities up to 3 are covered."""
    leg = LEG * height_m
    v = speed_m_s / leg
    assert 0 < v <= MAX_RELATIVE_VELOCITY
    cycle_s = 1.346 / math.sqrt(v)  # relative stride length 1.346 sqrt(RV) over RV
    support = 0.752 - 0.143 / cycle_s
    hip, knee, ankle = _legs(v, support)
    slow = 4 * v * (1 - v) if v < 0.5 else 1.0  # how the amplitudes below grow up to RV = 0.5
    return Gait(
        stride_hz=1 / cycle_s,
        support=support,
        hip=hip,
        knee=knee,
        ankle=ankle,
        elbow=_elbow(v),
        thorax=((0.1, 4 / 3 * v), (0.4, -1.5 * v), (0.6, -4 / 3 * v), (0.9, 1.5 * v)),
        shoulder_deg=(3 - 9.88 * v / 2, 9.88 * v),
        pelvis_deg=4 * v,
        lean_deg=(2 * slow, 2 * slow),
        rise_m=0.015 * v * leg,
        sway_m=0.032 * slow * leg,
        surge_m=0.021 * slow * leg,
    )


def running_gait(speed_m_s: float, height_m: float) -> Gait:
    """Return the gait of a runner of ``height_m`` at ``speed_m_s``.

    A curve through two extremes half a stride apart is steepest at 6 times its amplitude a stride; the amplitude of
    the hip makes that the speed of the ground under a straight leg, so that the foot stands still in mid-stance.
    """
    stride_hz = 1.2 + 0.06 * speed_m_s  # 2.7 to 3 steps a second
    amplitude = np.rad2deg(speed_m_s / (6 * LEG * height_m * stride_hz))
    return Gait(
        stride_hz=stride_hz,
        support=0.35,
        hip=((0.4, 10 - amplitude), (0.9, 10 + amplitude)),
        knee=((0.15, 40), (0.38, 15), (0.68, 70 + 7 * speed_m_s), (0.95, 12)),
        ankle=((0.0, 0), (0.2, 15), (0.4, -20), (0.7, -5)),
        elbow=((0.0, 75), (0.5, 100)),
        thorax=((0.1, 6), (0.4, -7), (0.6, -6), (0.9, 7)),
        shoulder_deg=(-8, 22 + 2 * speed_m_s),
        pelvis_deg=8,
        lean_deg=(8, 2),
        rise_m=0.045,
        sway_m=0.02,
        surge_m=0.02,
    )


def periodic_curve(points: Points, phase: np.ndarray) -> np.ndarray:
    """Return the curve of period 1 through control ``points`` (x, y) at ``phase`` (N,).

    Cubic between the points with a continuous slope that is zero at each extreme and never overshoots (Fritsch and
    Butland, SIAM J. Sci. Stat. Comput. 5, 1984).

    Args:
        points: in the order of x, over less than one period.
    """
    x, y = np.array(points, dtype=np.float64).T
    step = np.diff(x, append=x[0] + 1)
    rise = np.diff(y, append=y[0]) / step
    before, rise_before = np.roll(step, 1), np.roll(rise, 1)
    near, far = 2 * step + before, step + 2 * before
    turns = rise_before * rise <= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(turns, 0.0, (near + far) / (near / rise_before + far / rise))
    wrapped = (phase - x[0]) % 1.0
    piece = np.clip(np.searchsorted(x - x[0], wrapped, side="right") - 1, 0, len(x) - 1)
    u, h = wrapped - (x - x[0])[piece], step[piece]
    start, end = slope[piece], np.roll(slope, -1)[piece]
    mean = rise[piece]
    c2, c3 = (3 * mean - 2 * start - end) / h, (start + end - 2 * mean) / h**2
    return y[piece] + u * (start + u * (c2 + u * c3))
