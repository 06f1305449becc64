"""Anomaly maps agree with a literal implementation, and find what a known healthy distribution does not hold."""

import gc
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import heterodiff as hd
from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.anomaly import (
    AnomalyMaps,
    classifier_guidance,
    ddib,
    forward_process,
    noising_timesteps,
    partial_noising,
)
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError
from tests.oracles.anomaly import literal_classifier_guidance, literal_forward_process

SCHEDULE = NoiseSchedule.from_config(DiffusionConfig(schedule="linear"))
COUNT, CHANNELS, SIDE = 3, 2, 8
HEALTHY, NONE = torch.zeros(COUNT, dtype=torch.long), torch.full((COUNT,), -1)


@pytest.fixture(scope="module")
def network() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A network of random weights; its last layer, zero at the start, too."""
    torch.manual_seed(0)
    unet = hd.create_model("unet", sample_size=SIDE, in_channels=CHANNELS, num_classes=2, model_channels=32).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3 / math.sqrt(max(1, parameter[0].numel())))
    return lambda z, time, labels: unet(z, time, class_labels=labels).sample


def pictures() -> Tensor:
    x = torch.rand(COUNT, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[1] *= 0.2
    return x


@pytest.mark.parametrize(("depth", "channels"), [(1, None), (7, None), (30, None), (7, [1]), (7, [1, 0])])
def test_every_step_agrees_with_the_literal_method(
    network: Callable[..., Tensor], depth: int, channels: list[int] | None
) -> None:
    x = pictures()
    with torch.no_grad():
        common = (network, SCHEDULE, "epsilon", x, HEALTHY, NONE, range(depth)[::-1])
        found = forward_process(*common, guidance_scale=3.0, channels=channels)

        def noise_of(z: np.ndarray, t: int, label: int) -> np.ndarray:
            sent = torch.from_numpy(z).float()[None]
            return network(sent, torch.tensor([float(t)]), torch.tensor([label]))[0].double().numpy()

        for k in range(COUNT):
            expected = literal_forward_process(noise_of, x[k].double().numpy(), depth, w=2.0, count=channels)
            np.testing.assert_allclose(found.maps[k], expected["map"], atol=1e-4)
            np.testing.assert_allclose(found.divergence[k], expected["divergence"], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(-found.score[k], expected["cosine"], atol=1e-4)
    assert found.calls.tolist() == [2 * depth] * COUNT


@pytest.mark.parametrize(
    ("depth", "scale", "channels"), [(1, 5.0, None), (20, 0.0, None), (20, 5.0, [1]), (20, 40.0, None)]
)
def test_classifier_guidance_agrees_with_the_literal_method(
    network: Callable[..., Tensor], depth: int, scale: float, channels: list[int] | None
) -> None:
    """The classifier is linear in the image, log p = log sigmoid(w.z + b t), so that its gradient is known."""
    x, weight = pictures(), torch.randn(CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) / 20

    def log_healthy(z: Tensor, time: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid((weight * z).sum(dim=(1, 2, 3)) + 0.01 * time)

    def noise_of(z: np.ndarray, t: int) -> np.ndarray:
        return network(torch.from_numpy(z).float()[None], torch.tensor([float(t)]), NONE[:1])[0].double().numpy()

    def gradient(z: np.ndarray, t: int) -> np.ndarray:
        w = weight.double().numpy()
        return w / (1 + np.exp((w * z).sum() + 0.01 * t))

    common = (network, SCHEDULE, "epsilon", x, NONE, range(depth)[::-1])
    with torch.no_grad():
        found = classifier_guidance(*common, log_healthy=log_healthy, scale=scale, channels=channels)
        for k in range(COUNT):
            expected = literal_classifier_guidance(noise_of, gradient, x[k].double().numpy(), depth, scale)
            np.testing.assert_allclose(found.maps[k], expected if channels is None else expected[channels], atol=2e-3)
    assert found.calls.tolist() == [3 * depth] * COUNT
    with pytest.raises(ConfigError, match="classifier_scale -1: expected 0 or more"):
        classifier_guidance(*common, log_healthy=log_healthy, scale=-1)


# --- a healthy distribution that is known ------------------------------------------------------------

MEAN = torch.linspace(-0.5, 0.5, SIDE).expand(CHANNELS, SIDE, SIDE)
STD = {0: 0.05, 1: 0.05}


def gaussian(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """Ideal noise prediction: healthy pixels are N(MEAN, 0.05); others, and without label, the left half is wider."""
    sigma = SCHEDULE.sigma[time.long()].float().view(-1, 1, 1, 1)
    alpha = SCHEDULE.alpha[time.long()].float().view(-1, 1, 1, 1)
    spread = torch.full((len(z), 1, SIDE, SIDE), 0.05)
    spread[labels != 0, :, :, : SIDE // 2] = 0.7
    variance = (alpha * spread).square() + sigma.square()
    return sigma * (z - alpha * MEAN) / variance


def log_healthy(z: Tensor, time: Tensor) -> Tensor:
    """Log odds of healthy against wide: its gradient is the difference of their scores."""
    sigma, alpha = (table[time.long()].float().view(-1, 1, 1, 1) for table in (SCHEDULE.sigma, SCHEDULE.alpha))
    wide = torch.full((len(z), 1, SIDE, SIDE), 0.05)
    wide[..., : SIDE // 2] = 0.7
    distances = [(z - alpha * MEAN).square() / ((alpha * std).square() + sigma.square()) for std in (wide, 0.05)]
    return 0.5 * (distances[0] - distances[1]).sum(dim=(1, 2, 3))


def with_lesion(strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Healthy images, of which the first and the last have a lesion in one channel, and where."""
    generator = torch.Generator().manual_seed(2)
    x = (MEAN + 0.05 * torch.randn(COUNT, CHANNELS, SIDE, SIDE, generator=generator)).clamp(-1, 1)
    where = torch.zeros(COUNT, SIDE, SIDE, dtype=torch.bool)
    where[::2, 2:5, 1:3] = True
    x[:, 0] = torch.where(where, (x[:, 0] + strength).clamp(-1, 1), x[:, 0])
    return x, where


def run(method: str, x: Tensor, timesteps: list[int]) -> AnomalyMaps:
    count = len(x)
    healthy, none = torch.zeros(count, dtype=torch.long), torch.full((count,), -1)
    if method == "partial-noising":
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

        def only_healthy(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return gaussian(z, time, torch.zeros_like(labels))

        return partial_noising(only_healthy, SCHEDULE, "epsilon", x, none, timesteps, noise=noise)
    if method == "classifier-guidance":
        return classifier_guidance(
            gaussian, SCHEDULE, "epsilon", x, none, timesteps, log_healthy=log_healthy, scale=2.0
        )
    call = {"forward-process": forward_process, "ddib": ddib}[method]
    return call(gaussian, SCHEDULE, "epsilon", x, healthy, none, timesteps, guidance_scale=2.0)


def test_an_image_is_left_once_nothing_grew_for_so_many_steps() -> None:
    """Patience gives what the steps taken give, and they end where the definition says, for each image alone."""
    timesteps = noising_timesteps(600, 30)
    x = torch.stack([torch.full((CHANNELS, SIDE, SIDE), value) for value in (-0.5, 0.0, 0.5)])

    def parting(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Predictions part most at a step that depends on how bright the image is."""
        centre = 250 + 150 * z.mean(dim=(1, 2, 3)).sign()
        height = torch.where(labels == 0, torch.exp(-((time - centre) / 60).square()), 0)
        return height[:, None, None, None].expand_as(z) * 0.1

    common = (parting, SCHEDULE, "epsilon", x, HEALTHY, NONE)
    divergences = torch.stack(
        [forward_process(*common, timesteps[-k:], guidance_scale=2.0).divergence for k in range(1, 31)]
    )  # the greatest of the first k steps
    for patience in (1, 3, 10):
        found = forward_process(*common, timesteps, guidance_scale=2.0, patience=patience)
        taken = []
        for k in range(COUNT):
            greatest = divergences[:, k]
            ends = [
                last + 1
                for last in range(patience, 30)
                if (greatest[last] == greatest[last - patience]).all()  # none has grown in these steps
            ]
            taken.append(ends[0] if ends else 30)
            alone = forward_process(*common, timesteps[-taken[-1] :], guidance_scale=2.0)
            for name in ("maps", "divergence", "score"):
                np.testing.assert_allclose(getattr(found, name)[k], getattr(alone, name)[k], atol=1e-5)
        assert found.calls.tolist() == [2 * steps for steps in taken]
        assert len(set(taken)) == COUNT
    assert forward_process(*common, timesteps, patience=30).calls.tolist() == [60] * COUNT


def test_patience_asks_the_channels_that_count() -> None:
    """A channel that does not count parts until the last step; the one that counts, never."""

    def parting(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        grown = torch.where(labels == 0, time / 1000, 0)[:, None, None, None]
        return torch.cat([grown.expand_as(z[:, :1]) * 0.1, torch.zeros_like(z[:, 1:])], dim=1)

    common = (parting, SCHEDULE, "epsilon", pictures() * 0.5, HEALTHY, NONE, noising_timesteps(600, 30))
    assert forward_process(*common, patience=3).calls.tolist() == [60] * COUNT
    assert forward_process(*common, patience=3, channels=[1]).calls.tolist() == [8] * COUNT


METHODS = ("forward-process", "ddib", "partial-noising", "classifier-guidance")


def test_the_right_classifier_guides_as_labels_do() -> None:
    """By Bayes' rule, the gradient of log p(healthy | z) is what classifier-free guidance adds (Ho & Salimans 2022)."""
    x, _ = with_lesion()
    by_labels, by_classifier = (run(name, x, noising_timesteps(400, 40)) for name in ("ddib", "classifier-guidance"))
    torch.testing.assert_close(by_classifier.maps, by_labels.maps, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_bright_where_the_lesion_is(method: str) -> None:
    x, where = with_lesion()
    found = run(method, x, noising_timesteps(400, 40))
    assert found.maps.shape == x.shape
    assert found.divergence.shape == (COUNT, CHANNELS)
    for k in (0, 2):
        inside, outside = found.maps[k, 0][where[k]], found.maps[k, 0][~where[k]]
        assert inside.min() > 3 * outside.max()
        assert found.divergence[k, 0] > 5 * found.divergence[k, 1]
        assert found.divergence[k, 0] > 5 * found.divergence[1, 0]
        # The whole lesion, of height 1, is taken away; what guidance adds to that is at most as much again.
        assert 0.8 < inside.sqrt().mean() < 1.5


def test_a_few_steps_say_what_all_do() -> None:
    x, _ = with_lesion()
    all_, few = (run("forward-process", x, noising_timesteps(600, count)) for count in (600, 60))
    assert (few.maps - all_.maps).abs().max() < 0.15 * all_.maps.max()
    np.testing.assert_allclose(few.divergence, all_.divergence, rtol=0.05, atol=1e-3)
    np.testing.assert_allclose(few.score, all_.score, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_anomalous_images_score_higher(method: str) -> None:
    x, _ = with_lesion()
    score = run(method, x, noising_timesteps(600, 60)).score
    assert score[[0, 2]].min() > score[1] + 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images_one_by_one(method: str) -> None:
    x, _ = with_lesion()
    together = run(method, x, noising_timesteps(200, 10))
    if method == "partial-noising":  # their noise is drawn for all at once
        x, together = (
            x[:1],
            AnomalyMaps(together.maps[:1], together.divergence[:1], together.score[:1], together.calls[:1]),
        )
        noise = torch.randn((COUNT, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(3))[:1]
        alone = [
            partial_noising(
                lambda z, time, labels: gaussian(z, time, torch.zeros_like(labels)),
                SCHEDULE,
                "epsilon",
                x,
                NONE[:1],
                noising_timesteps(200, 10),
                noise=noise,
            )
        ]
    else:
        alone = [run(method, x[k : k + 1], noising_timesteps(200, 10)) for k in range(COUNT)]
    np.testing.assert_allclose(torch.cat([one.maps for one in alone]), together.maps, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "calls"),
    [("forward-process", 120), ("ddib", 180), ("partial-noising", 60), ("classifier-guidance", 180)],
)
def test_calls_are_counted(method: str, calls: int) -> None:
    """Rows that the network really sees, for each image."""
    x, _ = with_lesion()
    seen = 0
    timesteps = noising_timesteps(600, 60)

    def counting(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        nonlocal seen
        seen += len(z)
        return gaussian(z, time, labels)

    def classifier(z: Tensor, time: Tensor) -> Tensor:
        nonlocal seen
        seen += len(z)
        return log_healthy(z, time)

    if method == "classifier-guidance":
        found = classifier_guidance(counting, SCHEDULE, "epsilon", x, NONE, timesteps, log_healthy=classifier)
    elif method == "partial-noising":
        found = partial_noising(counting, SCHEDULE, "epsilon", x, NONE, timesteps, noise=torch.zeros_like(x))
    else:
        call = {"forward-process": forward_process, "ddib": ddib}[method]
        found = call(counting, SCHEDULE, "epsilon", x, HEALTHY, NONE, timesteps)
    assert found.calls.tolist() == [calls] * COUNT
    assert seen == calls * COUNT


def bytes_of_tensors() -> int:
    gc.collect()
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in gc.get_objects() if type(t) is Tensor}.values())


def test_memory_does_not_grow_with_the_steps() -> None:
    x = pictures().repeat(1, 1, 8, 8)
    held: dict[int, int] = {}

    def look(step: int, total: int) -> None:
        if step in (3, total):
            held[step] = bytes_of_tensors()

    def noise_of(z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * z + labels.view(-1, 1, 1, 1) * 0.01

    forward_process(
        noise_of,
        SCHEDULE,
        "epsilon",
        x,
        HEALTHY,
        NONE,
        noising_timesteps(600, 60),
        progress=look,
    )
    a_map = x.numel() * x.element_size()
    assert held[60] - held[3] < 0.2 * a_map  # two numbers an image and step


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [(600, 60, list(range(590, -1, -10))), (10, 20, list(range(9, -1, -1))), (7, 3, [6, 3, 0]), (1, 1, [0])],
)
def test_timesteps_are_spread_evenly(depth: int, count: int, expected: list[int]) -> None:
    assert noising_timesteps(depth, count) == expected


@pytest.mark.parametrize(("depth", "count"), [(0, 5), (5, 0)])
def test_no_timesteps_is_an_error(depth: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        noising_timesteps(depth, count)


@pytest.mark.parametrize("timesteps", [[0, 10], [1200, 0]])
def test_timesteps_must_fit(timesteps: list[int]) -> None:
    with pytest.raises(ConfigError):
        forward_process(gaussian, SCHEDULE, "epsilon", pictures(), HEALTHY, NONE, timesteps)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    x, _ = with_lesion()
    forward_process(
        gaussian, SCHEDULE, "epsilon", x, HEALTHY, NONE, [20, 10, 0], progress=lambda *step: told.append(step)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
