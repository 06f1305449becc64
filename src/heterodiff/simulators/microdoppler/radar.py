"""The radar: echoes of moving point scatterers, receiver noise and the spectrogram.

Targets are far away: the wave is plane, and a scatterer at position p (metres, in the frame of the target) has the
range R = R_0 - u p, u being the unit vector from the target to the radar. R_0 turns all phases alike and is left out.
"""

import math
from dataclasses import dataclass

import numpy as np

SPEED_OF_LIGHT_M_S = 299_792_458.0
MIN_WINDOW = 8


def wavelength(carrier_frequency_hz: float) -> float:
    """Return the wavelength in metres."""
    return SPEED_OF_LIGHT_M_S / carrier_frequency_hz


@dataclass(frozen=True)
class Observation:
    """One recording: how it is sampled and cut into pixels.

    Attributes:
        prf_hz: pulses, and so complex samples, a second.
        duration_s: time that the columns of the picture span.
        window: samples of the analysis window, at most ``height``: no Doppler line can fall between two rows.
        looks: windows whose powers are averaged in one column, enough for neighbours to overlap by two thirds or more:
            squared Hann windows then add up to a constant, and a flash is as bright wherever it falls.
        height, width: size of the picture.
    """

    prf_hz: float
    duration_s: float
    window: int
    looks: int
    height: int
    width: int

    @classmethod
    def plan(cls, prf_hz: float, duration_s: float, window_s: float, height: int, width: int) -> "Observation":
        """Choose window and looks for a picture of ``height`` x ``width`` pixels."""
        window = int(np.clip(round(window_s * prf_hz), MIN_WINDOW, height))
        looks = max(1, math.ceil(prf_hz * duration_s / width / (window / 3)))
        return cls(prf_hz, duration_s, window, looks, height, width)

    @property
    def times(self) -> np.ndarray:
        """Sampling times (N,) in seconds; 0 is the left edge of the picture, whose edges need half a window more."""
        count = math.ceil(self.prf_hz * self.duration_s) + 2 * self.window
        return (np.arange(count) - self.window) / self.prf_hz

    @property
    def doppler_hz(self) -> np.ndarray:
        """Doppler of the rows (H,), highest first; zero is in row (H - 1) // 2, the middle."""
        return np.fft.fftshift(np.fft.fftfreq(self.height, 1 / self.prf_hz))[::-1]

    @property
    def column_times(self) -> np.ndarray:
        """Time of the middle of the columns (W,) in seconds."""
        return (np.arange(self.width) + 0.5) * self.duration_s / self.width

    def starts(self) -> np.ndarray:
        """First sample of each window (W * looks,), their middles evenly spaced to half a sample."""
        frames = self.width * self.looks
        middles = (np.arange(frames) + 0.5) * self.duration_s / frames
        return np.rint(middles * self.prf_hz + self.window / 2).astype(np.int64)


def baseband(ranges_m: np.ndarray, amplitudes: np.ndarray, wavelength_m: float) -> np.ndarray:
    """Return s(t) = sum_k a_k(t) exp(-j 4 pi R_k(t) / lambda) (Chen, The Micro-Doppler Effect in Radar, 2011, ch. 2).

    An approaching scatterer has a positive Doppler frequency, f = -(2 / lambda) dR/dt.

    Args:
        ranges_m: (K, N) metres.
        amplitudes: (K, N) or (K, 1), real.

    Returns:
        (N,) complex128.
    """
    phases = (-4 * np.pi / wavelength_m) * ranges_m
    real = np.einsum("kn,kn->n", np.broadcast_to(amplitudes, phases.shape), np.cos(phases))
    imag = np.einsum("kn,kn->n", np.broadcast_to(amplitudes, phases.shape), np.sin(phases))
    return real + 1j * imag


def add_noise(signal: np.ndarray, snr_db: float, rng: np.random.RandomState) -> np.ndarray:
    """Return ``signal`` (N,) with white circular Gaussian noise ``snr_db`` below its mean power."""
    power = np.mean(signal.real**2 + signal.imag**2) / 10 ** (snr_db / 10)
    noise = rng.standard_normal((2, signal.size)) * np.sqrt(power / 2)
    return signal + (noise[0] + 1j * noise[1])


def spectrogram_db(signal: np.ndarray, observation: Observation, dynamic_range_db: float) -> np.ndarray:
    """Return the power in decibels below its maximum, float32 (H, W) in [-dynamic_range_db, 0].

    A short-time Fourier transform with a Hann window, rows as :attr:`Observation.doppler_hz` says, time to the right.

    Args:
        signal: (N,) complex samples at ``observation.times``.
    """
    window = np.hanning(observation.window + 2)[1:-1]  # without the zeros at both ends
    frames = np.lib.stride_tricks.sliding_window_view(signal, observation.window)[observation.starts()]
    spectra = np.fft.fft(frames * window, observation.height)
    power = (spectra.real**2 + spectra.imag**2).reshape(observation.width, observation.looks, observation.height)
    picture = np.fft.fftshift(power.mean(axis=1), axes=1)[:, ::-1].T
    floor = 10 ** (-dynamic_range_db / 10)
    decibels = 10 * np.log10(np.maximum(picture / picture.max(), floor))
    return np.maximum(decibels, -dynamic_range_db).astype(np.float32)
