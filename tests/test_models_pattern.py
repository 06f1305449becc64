"""Properties of the sparse attention patterns over many map sizes."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from heterodiff.models.attention.patterns import DENSE_LIMIT, MIN_KEYS, Grid, KeyPattern, make_pattern

PATCHES = (4, 8)
SQUARES = [(n, n) for n in (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 21, 22, 24, 32, 40, 48, 63, 64, 96, 128)]
OBLONG = [(1, 3), (3, 5), (1, 128), (2, 300), (600, 1), (23, 29), (64, 20), (8, 128), (100, 36), (128, 17)]
SIZES = [*SQUARES, *OBLONG, (256, 256)]
KINDS = ["multiscale", "sequence"]
# `sequence` is for earlier checkpoints, of small maps; drawing it for a large one takes seconds.
CASES = [(size, kind) for kind in KINDS for size in SIZES if kind == "multiscale" or math.prod(size) <= 64 * 64]


def pattern_of(kind: str, size: tuple[int, int], sparsity: float = 0.9, max_keys: int = 1024, seed: int = 0):
    grid = Grid(*size, PATCHES)
    return grid, make_pattern(kind, grid, sparsity, max_keys, seed)


def digest(pattern: KeyPattern) -> str:
    parts = (pattern.queries, pattern.keys, pattern.position)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, dtype=np.int64).tobytes() for a in parts)).hexdigest()


def sees_itself(grid: Grid, pattern: KeyPattern) -> np.ndarray:
    """Boolean per token: the block that answers for it holds its own key."""
    block = pattern.position // pattern.queries.shape[1]
    shift = np.arange(len(pattern.keys)) * grid.length
    return np.isin(np.arange(grid.local) + shift[block], pattern.keys + shift[:, None])


def budget_of(grid: Grid, sparsity: float = 0.9, max_keys: int = 1024) -> int:
    return min(max(int((1 - sparsity) * grid.length), MIN_KEYS), max_keys, grid.length)


@pytest.mark.parametrize(("size", "kind"), CASES, ids=str)
def test_pattern_is_well_formed(size, kind):
    grid, pattern = pattern_of(kind, size)
    regional = sum(math.ceil(size[0] / p) * math.ceil(size[1] / p) for p in (4, 8))
    assert pattern.length == grid.length == math.prod(size) + regional
    assert pattern.keys.min() >= 0
    assert pattern.keys.max() < grid.length
    assert (np.diff(pattern.keys, axis=1) > 0).all(), "a key twice in a block, or unsorted"
    assert np.array_equal(np.unique(pattern.queries), np.arange(grid.local)), "every local token asks, no other"
    assert np.array_equal(pattern.queries.flatten()[pattern.position], np.arange(grid.local))
    assert sees_itself(grid, pattern).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.97, 0.999])
@pytest.mark.parametrize("size", [(3, 5), (16, 16), (24, 24), (9, 70)], ids=str)
def test_keys_are_distinct_at_any_sparsity(size, sparsity, kind):
    grid, pattern = pattern_of(kind, size, sparsity)
    assert (np.diff(np.sort(pattern.keys, axis=1), axis=1) > 0).all()
    assert sees_itself(grid, pattern).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_multiscale_sees_every_scale(size):
    grid, pattern = pattern_of("multiscale", size)
    budget = budget_of(grid)
    offset = grid.local
    fits = grid.length - grid.local <= int(0.8 * budget)
    for height, width in grid.regional:
        seen = ((pattern.keys >= offset) & (pattern.keys < offset + height * width)).sum(axis=1)
        assert seen.min() >= 1
        if fits:
            assert seen.min() == height * width
        offset += height * width


@pytest.mark.parametrize("size", [(40, 40), (64, 64), (128, 128), (23, 57)], ids=str)
def test_regional_keys_that_do_not_fit_are_the_nearest(size):
    grid, pattern = pattern_of("multiscale", size, max_keys=64)
    centre = np.stack(np.divmod(pattern.queries, size[1])).mean(axis=2) + 0.5  # (2, blocks), in pixels
    offset = grid.local
    for patch, shape in zip(PATCHES, grid.regional, strict=True):
        row, column = (centre // patch).astype(int)  # the patch that holds the centre
        nearest = offset + row * shape[1] + column
        assert (pattern.keys == nearest[:, None]).any(axis=1).all()
        offset += math.prod(shape)


CAPS = [(*case, 1024) for case in CASES] + [
    (size, kind, cap) for size, kind in CASES if math.prod(size) < 70 * 70 for cap in (MIN_KEYS, 20, 100)
]


@pytest.mark.parametrize(("size", "kind", "max_keys"), CAPS, ids=str)
def test_number_of_keys(size, kind, max_keys):
    grid, pattern = pattern_of(kind, size, max_keys=max_keys)
    keys = pattern.keys.shape[1]
    assert keys <= max_keys
    if kind == "sequence":
        assert keys <= 0.125 * grid.length + 1  # a band of 2 * half + 1 tokens
    elif pattern.queries.shape[1] == 1 or grid.length <= DENSE_LIMIT:
        assert keys <= max(0.1 * grid.length, MIN_KEYS)
    else:
        assert keys <= 0.125 * grid.length
    if grid.length > DENSE_LIMIT:
        assert keys >= 0.8 * budget_of(grid, max_keys=max_keys), "the budget is used"


@pytest.mark.parametrize("size", [(24, 24), (32, 32), (64, 64), (128, 128)], ids=str)
def test_a_tenth_of_the_budget_is_far(size):
    grid, pattern = pattern_of("multiscale", size)
    far = []
    for queries, keys in list(zip(pattern.queries, pattern.keys, strict=True))[::7]:
        seen = np.zeros(size, dtype=bool)
        seen.flat[keys[keys < grid.local]] = True
        islands = ndimage.label(seen)[0]
        window = islands.flat[queries[0]]
        assert (islands.flat[queries] == window).all(), "one contiguous window around all queries of the block"
        far.append(seen.sum() - (islands == window).sum())  # some far keys touch the window by chance
    assert 0.06 <= np.mean(far) / budget_of(grid) <= 0.1


def test_cost_is_linear_for_large_maps():
    scored = {}
    for n in (128, 256):
        grid, pattern = pattern_of("multiscale", (n, n))
        scored[n] = pattern.queries.size * pattern.keys.shape[1] / grid.local
    assert scored[256] == pytest.approx(scored[128], rel=0.02)
    assert scored[256] <= 1024


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides(kind):
    size = (32, 32)
    assert digest(pattern_of(kind, size, seed=1)[1]) != digest(pattern_of(kind, size, seed=0)[1])
    first = digest(pattern_of(kind, size)[1])
    make_pattern.cache_clear()
    assert digest(pattern_of(kind, size)[1]) == first


def test_same_pattern_in_another_process():
    code = (
        "from tests.test_models_pattern import *;"
        "print(' '.join(digest(pattern_of(k, s)[1]) for k in KINDS for s in [(5, 7), (24, 24), (64, 20)]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [digest(pattern_of(k, s)[1]) for k in KINDS for s in [(5, 7), (24, 24), (64, 20)]]


def test_sequence_is_a_band_with_random_keys():
    grid, pattern = pattern_of("sequence", (16, 16))
    half, keep = int(grid.length * 0.1 / 2), int(grid.length * 0.1)
    visible = pattern.visible()
    for token in range(half, grid.local):
        assert visible[token, token - half : token + half + 1].all()
    assert (visible.sum(axis=1) == 2 * half + 1 + keep // 4).all()
    assert pattern_of("sequence", (5, 6))[1].keys.shape[1] == 2 + 1  # keep = 3: no random keys


def test_visible_names_the_keys_of_each_query():
    grid, pattern = pattern_of("multiscale", (23, 29))
    visible = pattern.visible()
    assert visible.shape == (grid.local, grid.length)
    for token in range(0, grid.local, 50):
        block = pattern.position[token] // pattern.queries.shape[1]
        assert token in pattern.queries[block]
        assert set(np.flatnonzero(visible[token])) == set(pattern.keys[block])
