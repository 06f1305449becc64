"""Rotors, quadrotors and helicopters.

A blade is a line of scatterers from its root to its tip whose echoes add up in closed form (Chen, The Micro-Doppler
Effect in Radar, 2011, ch. 3): with r the distance from the hub, q(t) the cosine between blade and line of sight and k
the wavenumber 2 pi / lambda,

    integral exp(j 2 k r q) dr = (r_2 - r_1) sinc(k (r_2 - r_1) q) exp(j k (r_1 + r_2) q),  sinc(x) = sin(x) / x,

which is one scatterer at the middle of the blade with an amplitude that peaks, the flash, when the blade is square to
the line of sight.
"""

from dataclasses import dataclass

import numpy as np

from heterodiff.simulators.microdoppler.targets import Echo, View

ROOT = 0.15  # share of the radius without blade
QUADROTOR_RADII_M = (0.10, 0.14)
QUADROTOR_TIP_M_S = (45.0, 70.0)
TRIM = 0.06  # relative differences in speed between the rotors of a flying quadrotor
HELICOPTER_RADII_M = (3.8, 7.0)
HELICOPTER_TIP_M_S = (180.0, 220.0)
_BLADES = (2, 3, 4, 5)


@dataclass(frozen=True)
class Rotor:
    """One rotor.

    Attributes:
        blades: evenly spaced.
        radius_m: from hub to tip.
        revolutions_hz: a second, counter-clockwise in the plane of ``axes`` when positive.
        phase: angle of the first blade at time 0, radians.
        amplitude: amplitude of a blade square to the line of sight.
        axes: (2, 3) orthonormal vectors that span the rotor's plane; default: level.
    """

    blades: int
    radius_m: float
    revolutions_hz: float
    phase: float
    amplitude: float = 1.0
    axes: tuple[tuple[float, float, float], tuple[float, float, float]] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))

    def tip_speed(self, view: View) -> float:
        """Return the highest radial speed of a tip, in m/s: 2 pi f r, less by the tilt of the plane."""
        in_plane = float(np.linalg.norm(np.array(self.axes) @ view.sight))
        return float(2 * np.pi * abs(self.revolutions_hz) * self.radius_m * in_plane)

    def echo(self, view: View, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ranges against the hub and amplitudes, both (blades, N)."""
        first = 2 * np.pi * self.revolutions_hz * times + self.phase
        angles = first + 2 * np.pi * np.arange(self.blades)[:, None] / self.blades
        across, along = np.array(self.axes) @ view.sight
        cosine = across * np.cos(angles) + along * np.sin(angles)
        root = ROOT * self.radius_m
        # np.sinc(x) is sin(pi x) / (pi x)
        flash = np.sinc(2 * (self.radius_m - root) / view.wavelength_m * cosine)
        return -(root + self.radius_m) / 2 * cosine, self.amplitude * flash

    @property
    def flash_rate_hz(self) -> float:
        """Flashes a second of advancing blades: each blade once a revolution."""
        return self.blades * abs(self.revolutions_hz)


def aircraft(
    rotors: list[tuple[Rotor, np.ndarray]], hull: np.ndarray, hull_amplitudes: np.ndarray, view: View, times: np.ndarray
) -> Echo:
    """Return the echo of a rigid hull that moves along x, with rotors on it.

    Args:
        rotors: each with the position (3,) of its hub.
        hull: positions (K, 3) of the hull's scatterers, metres.
        hull_amplitudes: (K,).
    """
    moved = view.speed_m_s * view.sight[0] * times
    ranges, amplitudes = [-(hull @ view.sight)[:, None] - moved], [np.tile(hull_amplitudes[:, None], times.size)]
    for rotor, hub in rotors:
        blade_ranges, blade_amplitudes = rotor.echo(view, times)
        ranges.append(blade_ranges - hub @ view.sight - moved)
        amplitudes.append(blade_amplitudes)
    first = rotors[0][0]
    return Echo(
        np.concatenate(ranges),
        np.concatenate(amplitudes),
        max_speed_m_s=max(rotor.tip_speed(view) for rotor, _ in rotors) + abs(view.closing_m_s),
        cycle_hz=abs(first.revolutions_hz),
        flash_rate_hz=first.flash_rate_hz,
    )


def quadrotor(rng: np.random.RandomState, view: View, times: np.ndarray) -> Echo:
    """A quadrotor: four rotors of two blades, neighbours turning against each other, and a small hull."""
    radius = rng.uniform(*QUADROTOR_RADII_M)
    revolutions = rng.uniform(*QUADROTOR_TIP_M_S) / (2 * np.pi * radius)
    rotors = []
    for index in range(4):
        azimuth = np.pi / 4 + index * np.pi / 2
        hub = 1.8 * radius * np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
        turning = revolutions * rng.uniform(1 - TRIM, 1 + TRIM) * (-1) ** index
        rotors.append((Rotor(2, radius, turning, rng.uniform(0, 2 * np.pi), 0.8), hub))
    hull = rng.uniform(-1, 1, (3, 3)) * radius
    return aircraft(rotors, hull, np.array([1.0, 0.5, 0.3]), view, times)


def helicopter(rng: np.random.RandomState, view: View, times: np.ndarray) -> Echo:
    """A helicopter: a main rotor of two to five blades, a tail rotor that turns upright, and a large hull."""
    radius = rng.uniform(*HELICOPTER_RADII_M)
    tip, tail_tip = rng.uniform(*HELICOPTER_TIP_M_S, 2)
    blades = _BLADES[rng.randint(len(_BLADES))]
    main = Rotor(blades, radius, tip / (2 * np.pi * radius), rng.uniform(0, 2 * np.pi), 8.0)
    tail_radius = radius / 6
    upright = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    tail = Rotor(2, tail_radius, tail_tip / (2 * np.pi * tail_radius), rng.uniform(0, 2 * np.pi), 0.7, upright)
    hull = rng.uniform(-1, 1, (4, 3)) * np.array([0.6 * radius, 1.0, 1.0])
    hubs = [(main, np.array([0.0, 0.0, 1.5])), (tail, np.array([-1.2 * radius, 0.0, 1.0]))]
    return aircraft(hubs, hull, np.array([1.0, 0.7, 0.5, 0.3]), view, times)
