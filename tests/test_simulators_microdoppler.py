"""The simulated radar against what physics says, by formulas of their own; and the source built on it."""

import pickle

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.interpolate import PchipInterpolator
from sklearn.svm import SVC

from heterodiff.config import DataConfig, MicrodopplerConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import list_sources, load_data
from heterodiff.errors import ConfigError, DataError
from heterodiff.simulators.microdoppler import CLASSES, axes, open_microdoppler, random_state, simulate
from heterodiff.simulators.microdoppler.gait import Gait, periodic_curve, running_gait, walking_gait
from heterodiff.simulators.microdoppler.human import segments
from heterodiff.simulators.microdoppler.radar import Observation, add_noise, baseband, spectrogram_db
from heterodiff.simulators.microdoppler.recording import TARGETS, highest_doppler, observe
from heterodiff.simulators.microdoppler.rotors import Rotor, helicopter
from heterodiff.simulators.microdoppler.targets import View, swing, wing

DEFAULT = MicrodopplerConfig()
CLEAR = MicrodopplerConfig(snr_db=(60, 60), elevation_deg=(0, 0), aspect_deg=(0, 0), receding=0)
WAVELENGTH = 0.03


def ahead(speed_m_s: float = 0.0, aspect_deg: float = 0.0, elevation_deg: float = 0.0) -> View:
    turn, tilt = np.deg2rad([aspect_deg, elevation_deg])
    sight = np.array([np.cos(turn) * np.cos(tilt), np.sin(turn) * np.cos(tilt), -np.sin(tilt)])
    return View(speed_m_s, sight, WAVELENGTH)


def draw(name: str, picture: int, config: MicrodopplerConfig = DEFAULT, size: tuple[int, int] = (64, 64)):
    return simulate(name, random_state(config.seed, CLASSES.index(name), picture), config, *size)


# --- the radar -----------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [3.0, 0.0, -4.5])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 20), (128, 48)])
def test_a_constant_speed_gives_one_line_at_twice_speed_over_wavelength(speed, height, width):
    observation = Observation.plan(1000.0, 1.0, 0.03, height, width)
    ranges = 50.0 - speed * observation.times[None]  # approaching at positive speed
    picture = spectrogram_db(baseband(ranges, np.ones((1, 1)), WAVELENGTH), observation, 40.0)
    peaks = observation.doppler_hz[picture.argmax(axis=0)]
    assert np.abs(peaks - 2 * speed / WAVELENGTH).max() <= 0.51 * 1000.0 / height


def test_the_baseband_is_the_sum_over_scatterers():
    rng = np.random.default_rng(0)
    ranges, amplitudes = rng.uniform(0, 5, (3, 40)), rng.uniform(-1, 1, (3, 40))
    expected = [
        sum(amplitudes[k, n] * np.exp(-4j * np.pi * ranges[k, n] / WAVELENGTH) for k in range(3)) for n in range(40)
    ]
    np.testing.assert_allclose(baseband(ranges, amplitudes, WAVELENGTH), expected, atol=1e-9)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 13.0])
def test_noise_has_the_power_asked_for_and_is_circular(snr_db):
    signal = 3 * np.exp(1j * np.linspace(0, 900, 200_000))
    noise = add_noise(signal, snr_db, np.random.RandomState(0)) - signal
    assert 10 * np.log10(np.mean(np.abs(signal) ** 2) / np.mean(np.abs(noise) ** 2)) == pytest.approx(snr_db, abs=0.05)
    assert abs(np.mean(noise**2)) < 0.02 * np.mean(np.abs(noise) ** 2)


def test_the_spectrogram_is_a_windowed_fourier_transform():
    observation = Observation.plan(100.0, 0.99, 0.2, 32, 9)  # no middle falls half-way between samples
    rng = np.random.RandomState(1)
    count = observation.times.size
    signal = rng.standard_normal(count) + 1j * rng.standard_normal(count)
    power = np.zeros((32, 9))
    taper = np.sin(np.pi * np.arange(1, 21) / 21) ** 2
    frame_time = 0.99 / (9 * observation.looks)
    for frame in range(9 * observation.looks):
        middle = (frame + 0.5) * frame_time
        first = round((middle - observation.times[0]) * 100 - 10)
        for row, frequency in enumerate(observation.doppler_hz):
            wave = np.exp(-2j * np.pi * frequency * np.arange(20) / 100)
            power[row, frame // observation.looks] += abs(np.sum(signal[first : first + 20] * taper * wave)) ** 2
    expected = np.maximum(10 * np.log10(power / power.max()), -25)
    np.testing.assert_allclose(spectrogram_db(signal, observation, 25.0), expected, atol=1e-4)


def test_no_sample_is_overlooked():
    for prf, duration, height, width in [(40_000.0, 0.3, 64, 64), (900.0, 2.0, 16, 100), (500.0, 0.05, 64, 128)]:
        observation = Observation.plan(prf, duration, 0.01, height, width)
        starts, times = observation.starts(), observation.times
        assert starts[0] >= 0
        assert starts[-1] + observation.window <= times.size
        assert np.diff(starts).max() <= observation.window / 3 + 1
        middles = times[starts] + observation.window / 2 / prf
        frames = observation.width * observation.looks
        np.testing.assert_allclose(middles, (np.arange(frames) + 0.5) * duration / frames, atol=0.51 / prf)


def test_zero_doppler_is_in_the_middle_and_the_axes_fit_the_picture():
    for height, width in [(16, 16), (33, 64), (128, 20)]:
        doppler, times = axes("bird", DEFAULT, height, width)
        assert doppler.shape == (height,)
        assert times.shape == (width,)
        assert doppler[(height - 1) // 2] == 0
        assert (np.diff(doppler) < 0).all()
        assert doppler[0] - doppler[-1] == pytest.approx(
            observe("bird", DEFAULT, height, width).prf_hz * (1 - 1 / height)
        )
        assert times[0] + times[-1] == pytest.approx(1.0)  # its default duration


# --- pendulum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", [0.0, 50.0, 110.0])
def test_the_pendulum_reaches_length_times_omega_times_angle(aspect):
    length, angle = 1.3, 0.2
    omega = np.sqrt(9.81 / length)
    times = np.linspace(0, 3 * 2 * np.pi / omega, 20_001)
    ranges = swing(times, length, length * omega * angle, 0.7, ahead(aspect_deg=aspect))
    speed = -np.gradient(ranges, times)
    expected = 2 * length * omega * angle * abs(np.cos(np.deg2rad(aspect))) / WAVELENGTH
    assert 2 * speed.max() / WAVELENGTH == pytest.approx(expected, rel=1e-3)
    assert 2 * speed.min() / WAVELENGTH == pytest.approx(-expected, rel=1e-3)
    same = np.interp(times[:10_000] + 2 * np.pi / omega, times, ranges)
    np.testing.assert_allclose(same, ranges[:10_000], atol=1e-6)


def test_the_pendulum_in_a_picture():
    picture, facts = draw("pendulum", 4, CLEAR, (128, 128))
    doppler, times = axes("pendulum", CLEAR, 128, 128)
    line = doppler[picture.argmax(axis=0)]
    expected = 2 * facts.speed_m_s / facts.wavelength_m
    assert facts.max_doppler_hz == pytest.approx(expected)
    assert np.abs(line).max() == pytest.approx(expected, rel=0.1)
    omega = 2 * np.pi * facts.cycle_hz
    basis = np.stack([np.cos(omega * times), np.sin(omega * times)], axis=1)
    fit, *_ = np.linalg.lstsq(basis, line, rcond=None)
    assert np.std(line - basis @ fit) < 0.1 * expected


# --- rotors --------------------------------------------------------------------------------------


def test_a_blade_is_the_sum_of_its_points():
    rotor = Rotor(3, 0.5, 7.0, 0.4)
    view, times = ahead(aspect_deg=20, elevation_deg=30), np.linspace(0, 0.2, 300)
    whole = baseband(*rotor.echo(view, times), WAVELENGTH)
    expected = np.zeros(times.size, complex)
    edges = np.linspace(0.15 * 0.5, 0.5, 4001)
    radii = (edges[:-1] + edges[1:]) / 2
    for blade in range(3):
        angle = 2 * np.pi * 7.0 * times + 0.4 + 2 * np.pi * blade / 3
        toward = np.cos(angle - np.deg2rad(20)) * np.cos(np.deg2rad(30))
        expected += np.exp(4j * np.pi * np.outer(toward, radii) / WAVELENGTH).mean(axis=1)
    np.testing.assert_allclose(whole, expected, atol=1e-4)


@pytest.mark.parametrize("elevation", [0.0, 60.0])
def test_a_blade_tip_reaches_twice_omega_r_over_wavelength(elevation):
    rotor = Rotor(2, 4.0, 5.0, 0.0)
    prf = 24_000.0
    view, times = ahead(elevation_deg=elevation), np.arange(24_000) / prf
    spectrum = np.abs(np.fft.fft(baseband(*rotor.echo(view, times), WAVELENGTH) * np.hanning(times.size))) ** 2
    frequency = np.abs(np.fft.fftfreq(times.size, 1 / prf))
    tip = 2 * (2 * np.pi * 5.0) * 4.0 * np.cos(np.deg2rad(elevation)) / WAVELENGTH
    assert 2 * rotor.tip_speed(view) / WAVELENGTH == pytest.approx(tip)
    inside, outside = spectrum[(frequency > 0.9 * tip) & (frequency < tip)], spectrum[frequency > 1.03 * tip]
    assert outside.mean() < 1e-3 * inside.mean()


@pytest.mark.parametrize(("blades", "revolutions"), [(2, 6.0), (3, 5.0), (4, 4.0), (5, 4.0)])
def test_flashes_come_at_blades_times_revolutions(blades, revolutions):
    view, seconds = ahead(), 2.0
    observation = Observation.plan(24_000.0, seconds, 0.0025, 64, 800)
    rotor = Rotor(blades, 4.0, revolutions, 0.3)
    picture = spectrogram_db(baseband(*rotor.echo(view, observation.times), WAVELENGTH), observation, 60.0)
    tip = 4 * np.pi * revolutions * 4.0 / WAVELENGTH
    rows = (observation.doppler_hz > 0.3 * tip) & (observation.doppler_hz < 0.9 * tip)
    high = (10 ** (picture / 10))[rows].sum(axis=0)
    spectrum = np.abs(np.fft.rfft(high - high.mean()))
    strong = np.flatnonzero(spectrum > 0.5 * spectrum.max())[0]  # the fundamental: a train of pulses has overtones
    assert strong / seconds == pytest.approx(blades * revolutions, abs=0.6)
    assert rotor.flash_rate_hz == blades * revolutions


def test_helicopter_facts_describe_its_main_rotor():
    config = MicrodopplerConfig(duration_s=1.0, snr_db=(60, 60))
    for picture in range(4):
        image, facts = draw("helicopter", picture, config, (64, 512))
        doppler, _ = axes("helicopter", config, 64, 512)
        high = (10 ** (image / 10))[doppler > 0.4 * facts.max_doppler_hz].sum(axis=0)
        spectrum = np.abs(np.fft.rfft(high - high.mean()))
        near = round(facts.flash_rate_hz)
        assert spectrum[near - 1 : near + 2].max() > 0.5 * spectrum.max()
        assert facts.flash_rate_hz / facts.cycle_hz == pytest.approx(round(facts.flash_rate_hz / facts.cycle_hz))


# --- animals and humans --------------------------------------------------------------------------


def test_wings_keep_their_lengths():
    points = wing(np.linspace(0, 7, 200), 0.5)
    np.testing.assert_allclose(np.linalg.norm(points[2], axis=0), 0.25)
    np.testing.assert_allclose(np.linalg.norm(points[5] - points[2], axis=0), 0.25)


def test_the_joint_curves_are_monotone_cubics():
    for gait in (walking_gait(0.3, 1.8), walking_gait(1.3, 1.8), walking_gait(2.2, 1.6), running_gait(4, 1.8)):
        for points in (gait.hip, gait.knee, gait.ankle, gait.elbow, gait.thorax):
            x, y = np.array(points).T
            assert (np.diff(x) > 0).all()
            assert x[-1] < x[0] + 1
            oracle = PchipInterpolator(np.concatenate([x + shift for shift in range(-3, 4)]), np.concatenate([y] * 7))
            phase = np.linspace(-2, 2, 1001)
            np.testing.assert_allclose(periodic_curve(points, phase), oracle(phase), atol=1e-9)


@pytest.mark.parametrize(("speed", "height"), [(0.4, 1.7), (1.4, 1.8), (2.0, 1.6)])
def test_walking_has_the_cadence_of_boulic(speed, height):
    leg = (0.245 + 0.246) * height
    gait = walking_gait(speed, height)
    assert gait.stride_hz == pytest.approx(np.sqrt(speed / leg) / 1.346)
    assert gait.support == pytest.approx(0.752 - 0.143 * gait.stride_hz)
    stride_m = speed / gait.stride_hz
    assert stride_m == pytest.approx(1.346 * np.sqrt(speed / leg) * leg)


def limb_speed(gait: Gait, name: str, speed: float, height: float) -> np.ndarray:
    phase = np.linspace(0, 1, 2001)
    start, _ = segments(gait, height, phase)[name]
    return speed + np.gradient(start[0], phase) * gait.stride_hz


def test_a_walking_foot_rests_on_the_ground_and_then_overtakes_the_body():
    ankle = limb_speed(walking_gait(1.4, 1.8), "right foot", 1.4, 1.8)
    assert np.abs(ankle[300:900]).mean() < 0.35 * 1.4  # in mid-stance
    assert 2 * 1.4 < ankle.max() < 4.5 * 1.4
    assert ankle.mean() == pytest.approx(1.4, rel=0.01)


def test_a_running_foot_does_so_too():
    ankle = limb_speed(running_gait(3.5, 1.8), "right foot", 3.5, 1.8)
    assert np.abs(ankle).min() < 0.3
    assert 1.8 * 3.5 < ankle.max() < 4.5 * 3.5
    assert 2.5 < 2 * running_gait(3.5, 1.8).stride_hz < 3.2  # steps a second of runners


def test_left_and_right_are_half_a_stride_apart():
    gait = walking_gait(1.4, 1.8)
    phase = np.linspace(0, 1, 50)
    now, later = segments(gait, 1.8, phase), segments(gait, 1.8, phase + 0.5)
    for part in ("thigh", "foot", "forearm"):
        for point, mirrored in zip(now[f"left {part}"], later[f"right {part}"], strict=True):
            np.testing.assert_allclose(point, mirrored * np.array([1, -1, 1])[:, None], atol=1e-9)


@pytest.mark.parametrize("name", ["walking", "running"])
def test_the_body_moves_at_the_speed_asked_for(name):
    times = np.linspace(0, 10, 20_001)
    echo = TARGETS[name].echo(np.random.RandomState(3), ahead(2.1, aspect_deg=30), times)
    stride = round(2000 / echo.cycle_hz)  # samples
    travelled = (echo.ranges_m[:, stride] - echo.ranges_m[:, 0]) / (times[stride] - times[0])
    np.testing.assert_allclose(travelled, -2.1 * np.cos(np.deg2rad(30)), atol=0.02)
    picture, facts = draw(name, 1, CLEAR, (128, 64))
    power = 10 ** (picture / 10)
    doppler, _ = axes(name, CLEAR, 128, 64)
    mean = (power * doppler[:, None]).sum() / power.sum()
    assert facts.body_doppler_hz == pytest.approx(2 * facts.speed_m_s / facts.wavelength_m)
    assert mean == pytest.approx(facts.body_doppler_hz, rel=0.15)


# --- all classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (128, 128), (16, 17)])
@pytest.mark.parametrize("name", CLASSES)
def test_pictures_are_decibels_below_their_maximum_and_repeat(name, size):
    picture, facts = draw(name, 7, DEFAULT, size)
    assert picture.shape == size
    assert picture.dtype == np.float32
    assert picture.max() == 0
    assert picture.min() >= -DEFAULT.dynamic_range_db
    assert np.std(picture) > 2
    again, same = draw(name, 7, DEFAULT, size)
    np.testing.assert_array_equal(picture, again)
    assert facts == same
    assert draw(name, 7, DEFAULT, (20, 20))[1] == facts  # the target does not depend on the size
    assert not np.array_equal(picture, draw(name, 8, DEFAULT, size)[0])
    assert not np.array_equal(picture, draw(name, 7, MicrodopplerConfig(seed=2**40), size)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_faster_than_the_bound_that_sets_the_prf(name):
    config = MicrodopplerConfig(
        aspect_deg=(0, 180),
        speeds_m_s={"walking": (2.2, 2.2), "running": (4.5, 4.5), "bird": (9, 9), "quadrotor": (8, 8)},
    )
    bound = highest_doppler(name, config)
    reached = [draw(name, picture, config, (16, 16))[1].max_doppler_hz for picture in range(40)]
    assert 0.5 * bound < max(reached) <= bound
    assert observe(name, config, 64, 64).prf_hz > 2.1 * bound


def test_receding_turns_the_target_around():
    for receding, sign in ((0.0, 1), (1.0, -1)):
        config = MicrodopplerConfig(receding=receding)
        assert all(sign * draw("bird", picture, config)[1].body_doppler_hz > 0 for picture in range(5))


def test_a_pendulum_at_rest_is_one_line_in_the_middle():
    config = MicrodopplerConfig(speeds_m_s={"pendulum": (0, 0)}, snr_db=(40, 40))
    picture, facts = draw("pendulum", 0, config, (32, 32))
    assert facts.max_doppler_hz == 0
    assert (picture.argmax(axis=0) == 15).all()


def test_the_aircraft_carries_its_rotors_along():
    times = np.linspace(0, 1, 1001)
    still = helicopter(np.random.RandomState(5), ahead(0.0), times)
    moving = helicopter(np.random.RandomState(5), ahead(12.0), times)
    np.testing.assert_allclose(moving.ranges_m - still.ranges_m, np.tile(-12 * times, (len(still.ranges_m), 1)))
    assert moving.max_speed_m_s == pytest.approx(still.max_speed_m_s + 12)


def test_classes_can_be_told_apart():
    def pictures(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        images = [draw(name, first + k)[0].ravel() for name in CLASSES for k in range(count)]
        return np.stack(images) / DEFAULT.dynamic_range_db + 1, np.repeat(np.arange(len(CLASSES)), count)

    accuracy = SVC(C=10, gamma="scale").fit(*pictures(0, 40)).score(*pictures(1000, 20))
    assert accuracy >= 0.95


# --- the source ----------------------------------------------------------------------------------


def test_loading_gives_labelled_pictures():
    assert "microdoppler" in list_sources()
    config = DataConfig(source="microdoppler", microdoppler={"images_per_class": 10}, val_fraction=0.2)
    data = load_data(config)
    assert set(data.spec.class_names) == set(CLASSES)
    assert (data.spec.channels, data.spec.height, data.spec.width) == (1, 64, 64)
    assert data.spec.value_range == (-45.0, 0.0)
    assert data.warnings == ()
    assert (len(data.train), len(data.val)) == (48, 12)
    images, labels = data.train.batch(range(48))
    assert images.min() >= 0
    assert images.max() == 1
    name = data.train.names[20]
    expected = draw(name.split("/")[0], int(name.split("/")[1]))[0] / 45 + 1
    np.testing.assert_allclose(images[20, 0], expected, atol=1e-6)
    assert data.spec.class_names[labels[20]] == name.split("/")[0]


def test_pictures_are_simulated_when_read_and_the_reader_can_be_pickled():
    config = DataConfig(
        source="microdoppler",
        image_size=(32, 48),
        memory_limit_gb=0,
        labels="none",
        path="unused",
        microdoppler={"images_per_class": 3},
    )
    data = load_data(config)
    assert (data.spec.height, data.spec.width) == (32, 48)
    assert any("decoded at every access" in warning for warning in data.warnings)
    assert any("data.path is not used" in warning for warning in data.warnings)
    assert set(data.train.labels) == {-1}
    collection = open_microdoppler(config)
    copy = pickle.loads(pickle.dumps(collection.read))
    np.testing.assert_array_equal(copy(17), collection.read(17))


def test_aliasing_is_announced():
    config = DataConfig(source="microdoppler", microdoppler={"prf_hz": 2000.0})
    (warning,) = open_microdoppler(config).warnings
    assert "prf_hz 2,000 is too low" in warning
    assert "helicopter up to" in warning
    assert "pendulum" not in warning
    assert draw("helicopter", 0, config.microdoppler)[1].prf_hz == 2000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_size": 8}, r"at least 16, found \[8, 8\]; set it to \[16, 16\]"),
        ({"image_size": (64, 15)}, r"set it to \[64, 16\]"),
        ({"channels": 3}, "data.channels: 'microdoppler' has 1, found 3"),
        ({"microdoppler": {"prf_hz": 1e6, "duration_s": 60}}, "60,000,000 samples a picture, expected at most"),
    ],
)
def test_unusable_settings_are_explained(settings, expected):
    with pytest.raises(DataError, match=expected):
        open_microdoppler(DataConfig(source="microdoppler", **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"snr_db": [20, 10]}, "data.microdoppler.snr_db: expected .lowest, highest., the lower number first, found"),
        ({"speeds_m_s": {"bird": [9, 4]}}, "data.microdoppler.speeds_m_s.bird: expected"),
        ({"speeds_m_s": {"walking": [1, 5]}}, "data.microdoppler.speeds_m_s.walking"),
        ({"speed_m_s": {}}, "unknown key 'data.microdoppler.speed_m_s' .did you mean 'speeds_m_s'"),
        ({"prf_hz": 0}, "data.microdoppler.prf_hz"),
        ({"images_per_class": 0}, "data.microdoppler.images_per_class"),
    ],
)
def test_wrong_configurations_are_explained(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config({"data": {"source": "microdoppler", "microdoppler": settings}})


def test_unknown_classes_and_inverted_ranges_in_code():
    with pytest.raises(DataError, match="did you mean 'bird'"):
        simulate("birb", np.random.RandomState(0), DEFAULT, 64, 64)
    with pytest.raises(ValidationError, match="the lower number first"):
        MicrodopplerConfig(aspect_deg=(90, 0))
