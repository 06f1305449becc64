"""Lower-grade gliomas of 60 patients, found by networks that saw image labels alone; three folds of patients.

The slices are those of ``lgg_slices`` (TCGA-LGG; Buda et al. 2019), scaled by patient and channel. "Healthy" is a slice
without lesion of a patient who has one, and most of these lie at the top and the bottom of the head: the middle
(:data:`MIDDLE`) is reported apart, and the height of a slice beside the scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

from benchmarks.measure import machine
from benchmarks.runs import seconds_of, to_the_end
from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.heights import by_height, held_out_auroc, overlap_weights, patients_and_heights
from heterodiff.data.sources import load_test
from heterodiff.errors import RunError
from heterodiff.evaluation.anomalies import all_maps, evaluate_anomalies
from heterodiff.evaluation.calibration import calibrate_run
from heterodiff.evaluation.runs import image_config, run_data
from heterodiff.files import replacing
from heterodiff.metrics.segmentation import mean_and_interval, overlap, precision_recall_area, threshold_baseline
from heterodiff.pipelines.anomalies.calibrated import Finder, load_calibration, open_finder
from heterodiff.pipelines.anomalies.label_weights import FOREGROUND, fit_label_weights
from heterodiff.pipelines.anomalies.mask_network import train_mask_network, unsure_pixels
from heterodiff.pipelines.anomalies.masks import calibrate, drop_small, half_peak_mask, small_area
from heterodiff.pipelines.anomalies.segment import Segmentation, Segmenter
from heterodiff.pipelines.anomalies.segment import weighed as weighted_masks
from heterodiff.pipelines.load import load_generation
from heterodiff.run_folder import RunFolder

FOLDS = 3
MIDDLE = (0.35, 0.85)
STEPS = 6500
"""About 25 minutes on one thread."""


def slices_file(runs: Path, data: Path) -> Path:
    """Write the slices as ``source: volumes`` reads them, numbered by their height in thousandths."""
    path = runs / "lgg_slices.npz"
    if not path.is_file():
        with np.load(data / "lgg_slices" / "lgg_slices.npz") as found:
            image, mask, patient, height = (found[key] for key in ("image", "mask", "patient", "height"))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, image=image, mask=mask, patient=patient, z=np.round(1000 * height).astype(int))
    return path


def fold_patients(path: Path, fold: int) -> list[str]:
    """The test patients of a fold."""
    with np.load(path) as found:
        patients = np.random.default_rng(0).permutation(np.unique(found["patient"]))
    return [str(name) for name in patients[fold::FOLDS]]


def configure(runs: Path, data: Path, fold: int, name: str = "lgg", *changes: str) -> RunConfig:
    """The run of a fold: trained on 32 patients, thresholds from 8, tested on 20."""
    path = slices_file(runs, data)
    overrides = [
        f"data.path={path}",
        f"data.test_patients={fold_patients(path, fold)}",
        "data.split_by=patient",
        f"training.steps={STEPS}",
        "training.preview_every=100000",
        "training.tensorboard=false",
        "segmentation.smoothing=5",
        "segmentation.drop_small=null",
        f"output={runs / f'{name}_{fold}'}",
    ]
    return load_config(shipped_configs() / "ms_slices.yaml", [*overrides, *changes])


@dataclass(frozen=True)
class Found:
    """What a way of finding lesions says of the test images of a fold: masks, maps, scores and decisions."""

    masks: np.ndarray
    maps: np.ndarray
    scores: np.ndarray
    judged: np.ndarray


@dataclass(frozen=True)
class Fold:
    """Images of a fold: for training and validation with labels, test images with masks; planes of its run."""

    val: np.ndarray
    val_patients: np.ndarray
    unhealthy: np.ndarray
    importance: np.ndarray
    val_planes: np.ndarray
    train: ImageDataset
    images: np.ndarray
    truth: np.ndarray
    patients: np.ndarray
    heights: np.ndarray
    planes: np.ndarray
    train_planes: np.ndarray
    segmenter: Segmenter
    finder: Finder
    area: int

    @property
    def foreground(self) -> np.ndarray:
        return np.asarray(self.images.mean(axis=1) > FOREGROUND)

    def without_small(self, mask: np.ndarray) -> np.ndarray:
        return drop_small(mask, self.segmenter.settings.drop_small)

    def decide(self, val_scores: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Judge by the threshold that the labels of the validation images give."""
        limit = calibrate(np.zeros((len(val_scores), 1)), val_scores, self.unhealthy).score_limit
        return np.asarray(scores >= limit)

    def peaks(self, maps: np.ndarray) -> np.ndarray:
        """Masks from half the peak of each map up."""
        return np.stack([self.without_small(half_peak_mask(one[None], 1)) for one in maps])


def weighed(fold: Fold, val: np.ndarray, test: np.ndarray, half_peak: bool = True) -> Found:
    """Planes weighted by labels; masks from half the peak up, or by the one threshold that labels give."""
    weights = fit_label_weights(val, fold.unhealthy, fold.area, fold.importance)
    values, maps = weights.values(test), weights.probabilities(test)
    scores = weights.scores(values)
    masks = fold.peaks(maps) if half_peak else np.stack([fold.without_small(one > 0) for one in values])
    return Found(masks, maps, scores, fold.decide(weights.scores(weights.values(val)), scores))


def threshold_of_labels(fold: Fold) -> Found:
    """The channel, side and threshold of smoothed intensity that tell the labels of the validation images best."""
    count = fold.images.shape[1]
    planes = [slice(count + c, count + c + 1) for c in range(count)]

    def error(plane: slice) -> float:
        weights = fit_label_weights(fold.val_planes[:, plane], fold.unhealthy, fold.area, fold.importance)
        scores = weights.scores(weights.values(fold.val_planes[:, plane]))
        return -float(roc_auc_score(fold.unhealthy, scores, sample_weight=fold.importance))

    best = min(planes, key=error)
    return weighed(fold, fold.val_planes[:, best], fold.planes[:, best], half_peak=False)


def class_activation(fold: Fold) -> Found:
    """The map of a small classifier that is trained on the same labels: of three, the best on validation images."""
    tried = [_classifier(fold, seed) for seed in range(3)]
    return max(tried, key=lambda one: one[0])[1]


def _classifier(fold: Fold, seed: int, steps: int = 600, batch: int = 32) -> tuple[float, Found]:
    """Train a classifier whose score is the mean of its map's largest values; AUROC of validation images, and finds."""
    torch.manual_seed(seed)

    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        first = [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.SiLU()]
        return [*first, nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out), nn.SiLU()]

    count = fold.images.shape[1]
    network = nn.Sequential(*block(count, 24, 1), *block(24, 48, 2), *block(48, 96, 2), nn.Conv2d(96, 1, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        x, y = fold.train.batch(rng.integers(0, len(fold.train), batch))
        x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(3), x) * (1 + 0.1 * torch.randn(batch, count, 1, 1))
        score = network(x).flatten(1).topk(8, dim=1).values.mean(dim=1)
        loss = functional.binary_cross_entropy_with_logits(score, y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def maps(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = torch.cat([network(torch.from_numpy(part)) for part in np.array_split(images, 1 + len(images) // 64)])
        high = functional.interpolate(low, size=images.shape[2:], mode="bilinear")[:, 0]
        return high.sigmoid().numpy(), low.flatten(1).topk(8, dim=1).values.mean(dim=1).numpy()

    (_, val_scores), (found, scores) = maps(fold.val), maps(fold.images)
    known = float(roc_auc_score(fold.unhealthy, val_scores, sample_weight=fold.importance))
    return known, Found(fold.peaks(found), found, scores, fold.decide(val_scores, scores))


def as_calibrated(fold: Fold) -> Found:
    """What ``heterodiff segment`` finds: by default, a segmentation network that learned from found masks."""
    parts = np.array_split(fold.images, 1 + len(fold.images) // 32)
    firsts = np.cumsum([0, *map(len, parts)])
    found = Segmentation.join(
        [
            fold.finder.segment(torch.from_numpy(part), int(first), lambda step, total: None)
            for part, first in zip(parts, firsts[:-1], strict=True)
        ]
    )
    return Found(found.masks, found.smoothed, found.score, found.unhealthy)


def taught(fold: Fold, planes: slice) -> Found:
    """A segmentation network that learned from the masks of ``planes`` weighted by labels."""
    weights = fit_label_weights(fold.val_planes[:, planes], fold.unhealthy, fold.area, fold.importance)
    settings, count = fold.segmenter.settings, len(fold.train)
    learned = weighted_masks(fold.train_planes[:, planes], weights, settings, 0.0, np.zeros(count))
    network = train_mask_network(
        fold.train,
        learned.masks,
        unsure_pixels(learned.masks, learned.smoothed),
        fold.train.labels == 1,
        steps=settings.network_steps,
        seed=settings.seed,
        device=torch.device("cpu"),
    )
    val, test = (network.segment(torch.from_numpy(part), settings.drop_small, 0) for part in (fold.val, fold.images))
    return Found(test.masks, test.maps, test.score, fold.decide(val.score, test.score))


def best_threshold(fold: Fold) -> Found:
    """The intensity threshold that is best on these test images, chosen on their masks: out of reach without masks."""
    shown = fold.truth.any(axis=(1, 2))
    best = threshold_baseline(fold.images[shown], fold.truth[shown], fold.foreground[shown], fold.without_small)
    names = [f"channel {channel}" for channel in range(fold.images.shape[1])]
    of, side = best["of"].rsplit(", ", 1)
    name, _, smooth = of.partition(", ")
    plain = fold.images[:, names.index(name)] if name in names else fold.images.mean(axis=1)
    values = uniform_filter(plain, (0, 5, 5)) if smooth else plain
    values = values if side == "above" else 1 - values
    limit = best["threshold"] if side == "above" else 1 - best["threshold"]
    masks = np.stack([fold.without_small(one) for one in (values > limit) & fold.foreground])
    scores = np.where(fold.foreground, values, 0).reshape(len(values), -1).max(axis=1)
    return Found(masks, values, scores, masks.any(axis=(1, 2)))


def median_of_patient(fold: Fold, channel: int = 1) -> Found:
    """FLAIR over the patient's median, with the threshold that the labels of the validation images give."""

    def plane(images: np.ndarray, planes: np.ndarray, patients: np.ndarray) -> np.ndarray:
        found = np.zeros_like(planes[:, :1])
        for patient in np.unique(patients):
            rows = patients == patient
            inside = images[rows, channel][images[rows].mean(axis=1) > FOREGROUND]
            found[rows, 0] = planes[rows, images.shape[1] + channel] / np.median(inside)
        return found

    val = plane(fold.val, fold.val_planes, fold.val_patients)
    return weighed(fold, val, plane(fold.images, fold.planes, fold.patients), half_peak=False)


WAYS: dict[str, Callable[[Fold], Found]] = {
    "as calibrated by default": as_calibrated,
    "network taught by label difference and intensities": lambda fold: taught(fold, slice(None)),
    "label difference and intensities": lambda fold: weighed(fold, fold.val_planes, fold.planes),
    "label difference alone": lambda fold: weighed(
        fold, fold.val_planes[:, : fold.images.shape[1]], fold.planes[:, : fold.images.shape[1]]
    ),
    "intensities, weighted by labels": lambda fold: weighed(
        fold, fold.val_planes[:, fold.images.shape[1] :], fold.planes[:, fold.images.shape[1] :]
    ),
    "one threshold, from labels": threshold_of_labels,
    "FLAIR over the patient's median, threshold from labels": median_of_patient,
    "class activation map": class_activation,
    "best threshold, chosen on masks": best_threshold,
}
BOUND = "best threshold, chosen on masks"


def open_fold(run: Path) -> Fold:
    """Calibrate a trained run, unless it is, and take what all ways of finding lesions need from its images."""
    settings, folder, data = RunFolder(run).config().segmentation, RunFolder(run), run_data(run)
    try:
        load_calibration(run, settings)
    except RunError:
        for line in calibrate_run(run):
            print(line, flush=True)
    segmenter = Segmenter(load_generation(run), settings)
    spec = folder.spec()
    assert spec is not None
    test = load_test(image_config(run), spec, split=folder.split())
    assert test.mask is not None

    def planes(part: str, images: ImageDataset) -> np.ndarray:
        file = run / f"planes_{part}_{folder.weights_digest()}.npy"  # an interrupted benchmark goes on with them
        if not file.is_file():
            found = [one.maps.numpy() for one in all_maps(segmenter, images, lambda done: None)]
            with replacing(file) as stream:
                np.save(stream, np.concatenate(found))
        return np.load(file)

    unhealthy = data.val.labels == 1
    val_patients, val_heights = patients_and_heights(data.val.names, "volumes")
    assert val_heights is not None
    return Fold(
        val=data.val.batch(range(len(data.val)))[0].numpy(),
        val_patients=val_patients,
        unhealthy=unhealthy,
        importance=overlap_weights(val_heights, unhealthy),
        val_planes=planes("val", data.val),
        train=data.train,
        images=test.images.batch(range(len(test.images)))[0].numpy(),
        truth=np.stack([test.mask(row) for row in range(len(test.images))]),
        patients=np.array(test.patients),
        heights=np.array([int(name.rpartition("/")[2]) / 1000 for name in test.images.names]),
        planes=planes("test", test.images),
        train_planes=planes("train", data.train),
        segmenter=segmenter,
        finder=open_finder(run, settings),
        area=small_area((spec.height, spec.width), settings.drop_small) + 1,
    )


def summary(folds: list[Fold], found: list[Found], bound: np.ndarray) -> dict[str, Any]:
    """Numbers over the test patients of all folds; ``bound`` is the Dice of each image by the best threshold."""

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    truth, patients = joined([fold.truth for fold in folds]), joined([fold.patients for fold in folds])
    heights = joined([fold.heights for fold in folds])
    masks, judged = joined([one.masks for one in found]), joined([one.judged for one in found])
    shown, middle = truth.any(axis=(1, 2)), (heights >= MIDDLE[0]) & (heights <= MIDDLE[1])
    mixed = masks & judged[:, None, None]
    dice, dice_mixed = overlap(masks, truth)[0], overlap(mixed, truth)[0]

    def mean_of_folds(of: Callable[[Fold, Found], float | None]) -> float | None:
        values = [value for pair in zip(folds, found, strict=True) if (value := of(*pair)) is not None]
        return float(np.mean(values)) if values else None

    def precision_recall(fold: Fold, one: Found) -> float | None:
        rows = fold.truth.any(axis=(1, 2))
        return precision_recall_area(fold.truth[rows], one.maps[rows], fold.foreground[rows])

    def auroc(fold: Fold, one: Found, part: str) -> float:
        rows = (fold.heights >= MIDDLE[0]) & (fold.heights <= MIDDLE[1]) | (part == "all")
        return float(roc_auc_score(fold.truth.any(axis=(1, 2))[rows], one.scores[rows]))

    return {
        "dice": mean_and_interval(dice[shown], patients[shown]),
        "dice_all_images": mean_and_interval(dice_mixed, patients),
        "dice_of_folds": [
            float(overlap(one.masks, fold.truth)[0][fold.truth.any(axis=(1, 2))].mean())
            for fold, one in zip(folds, found, strict=True)
        ],
        "over_best_threshold": mean_and_interval((dice - bound)[shown], patients[shown]),
        "auprc": mean_of_folds(precision_recall),
        "auroc": mean_of_folds(lambda fold, one: auroc(fold, one, "all")),
        "auroc_middle": mean_of_folds(lambda fold, one: auroc(fold, one, "middle")),
        "area_in_healthy": mean_and_interval(mixed[~shown].mean(axis=(1, 2)), patients[~shown]),
        "area_in_healthy_middle": mean_and_interval(
            mixed[~shown & middle].mean(axis=(1, 2)), patients[~shown & middle]
        ),
    }


def height_auroc(fold: Fold, middle: bool) -> float:
    """AUROC of the height of the test slices, by a quadratic function learned from those of the other half."""
    rows = (fold.heights >= MIDDLE[0]) & (fold.heights <= MIDDLE[1]) | (not middle)
    heights, ill, patients = fold.heights[rows], fold.truth.any(axis=(1, 2))[rows], fold.patients[rows]
    found = held_out_auroc(by_height(heights, ill), ill, patients, np.ones(len(ill)))
    assert found is not None
    return found


def lgg(runs: Path, data: Path) -> dict[str, Any]:
    """Train a run of each fold, and find lesions in its test patients in all ways."""
    folds, seconds = [], []
    for number in range(FOLDS):
        config = configure(runs, data.parent, number)
        assert config.output is not None
        to_the_end(config)
        seconds.append(seconds_of(config.output))
        folds.append(open_fold(config.output))
    found = {name: [way(fold) for fold in folds] for name, way in WAYS.items()}
    bound = np.concatenate([overlap(one.masks, fold.truth)[0] for one, fold in zip(found[BOUND], folds, strict=True)])
    result: dict[str, Any] = {
        "training_seconds": seconds,
        "slices": [len(fold.truth) for fold in folds],
        "auroc_of_height": float(np.mean([height_auroc(fold, False) for fold in folds])),
        "auroc_of_height_middle": float(np.mean([height_auroc(fold, True) for fold in folds])),
        "ways": {name: summary(folds, some, bound) for name, some in found.items()},
        **machine(),
    }
    for name, row in result["ways"].items():
        gain, area = row["over_best_threshold"], row["area_in_healthy"]
        print(f"{name}: Dice {_interval(row['dice'])}, over the best threshold {_interval(gain)}", flush=True)
        print(
            f"    all images {_interval(row['dice_all_images'])}, AUPRC {row['auprc']:.3f}, AUROC {row['auroc']:.3f}, "
            f"in the middle {row['auroc_middle']:.3f}, area in healthy {100 * area['mean']:.2f} %",
            flush=True,
        )
    of_height, in_middle = result["auroc_of_height"], result["auroc_of_height_middle"]
    print(f"height of a slice: AUROC {of_height:.3f}, in the middle {in_middle:.3f}")
    return result


def _interval(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def healthy(runs: Path, data: Path) -> dict[str, Any]:
    """AnoDDPM on the same folds, for the same steps: trained on slices without lesion, what it cannot repeat is marked.

    Thresholds come from the labels of the validation images, as for all other ways.
    """
    found = []
    for number in range(FOLDS):
        changes = [
            "data.train_classes=[healthy]",
            "diffusion.p_uncond=1",
            "segmentation={method: partial-noising, depth: 250, num_inference_steps: 25, threshold: half-peak, "
            "score: peak, network_steps: 0}",
        ]
        config = configure(runs, data.parent, number, "healthy", *changes)
        assert config.output is not None
        to_the_end(config)
        for line in calibrate_run(config.output):
            print(line, flush=True)
        metrics = evaluate_anomalies(config.output).metrics
        found.append({"dice": metrics["unhealthy"]["dice"], "all": metrics["mixed"]["dice"], "image": metrics["image"]})
        print(
            f"fold {number + 1}: Dice {_interval(found[-1]['dice'])}, AUROC {metrics['image']['auroc']:.3f}", flush=True
        )
    return {"folds": found}
