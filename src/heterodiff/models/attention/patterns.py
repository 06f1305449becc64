"""Deterministic sparse attention patterns; ``ways.py`` computes the attention.

A sequence has S = L + R tokens: L = H*W local ones in row-major order, then ceil(H/p) * ceil(W/p) regional ones for
each patch size p in turn. Only local tokens are queries. Queries are grouped into blocks that share one key list, so
that attention can be one gather and one dense product per block.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DENSE_LIMIT = 512
"""Longest sequence in which every query has keys of its own, for dense attention under a mask."""
BLOCK_ROUNDING = 1.16
"""Largest number of keys that a block of queries shares, relative to the nominal number."""
MIN_KEYS = 16
"""Least number of keys; fewer would save nothing and starve small maps."""
FAR_SHARE = 0.1
LARGEST_TILE = 8
"""Side of the largest square of queries that share their keys."""
REGIONAL_SHARE = 0.8
SEQUENCE_BLOCK = 16

PATTERNS = ("multiscale", "sequence")


@dataclass(frozen=True)
class Grid:
    """Positions of keys: a local map and one coarser map per patch size."""

    height: int
    width: int
    patch_sizes: tuple[int, ...]

    @property
    def local(self) -> int:
        return self.height * self.width

    @property
    def regional(self) -> list[tuple[int, int]]:
        return [(math.ceil(self.height / p), math.ceil(self.width / p)) for p in self.patch_sizes]

    @property
    def length(self) -> int:
        return self.local + sum(h * w for h, w in self.regional)


@dataclass(frozen=True)
class KeyPattern:
    """Keys of each local query.

    Attributes:
        queries: (blocks, queries per block) indices of local tokens; a token may appear twice.
        keys: (blocks, K) distinct indices of tokens, shared by the queries of a block.
        position: (L,) index in ``queries.flatten()`` of each local token's output.
        length: S.
    """

    queries: np.ndarray
    keys: np.ndarray
    position: np.ndarray
    length: int

    def visible(self) -> np.ndarray:
        """Boolean (L, S), True where a query attends to a key."""
        block_of = self.position // self.queries.shape[1]
        seen = np.zeros((len(self.position), self.length), dtype=bool)
        np.put_along_axis(seen, self.keys[block_of], True, axis=1)
        return seen


@lru_cache(maxsize=64)
def make_pattern(kind: str, grid: Grid, sparsity: float, max_keys: int, seed: int) -> KeyPattern:
    """Draw the pattern ``kind`` (one of ``PATTERNS``) for ``grid``; the same arguments give the same pattern.

    Args:
        sparsity: fraction of the S keys that a query does not attend to.
        max_keys: upper bound on the keys of a query, which makes the cost linear in L for large maps.
        seed: seed of the fixed far keys.
    """
    builder = {"multiscale": _multiscale, "sequence": _sequence}[kind]
    # The legacy generator has a frozen stream: a model's keys must not change with the NumPy version.
    return builder(grid, sparsity, max_keys, np.random.RandomState(seed))


def _near_square(count: int, height: int, width: int) -> tuple[int, int]:
    """Largest near-square window of at most ``count`` positions in a (height, width) map."""
    rows = max(1, min(height, math.isqrt(count)))
    columns = max(1, min(width, count // rows))
    return max(1, min(height, count // columns)), columns


def _window(centre: np.ndarray, size: int, length: int) -> np.ndarray:
    """(n, size) consecutive indices around each ``centre``, shifted to stay inside [0, length)."""
    start = np.clip(np.floor(centre - (size - 1) / 2 + 0.5).astype(np.int64), 0, length - size)
    return start[:, None] + np.arange(size)


def _map_windows(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(n, size) flat indices of the windows of ``size`` around (rows, columns) in a map of ``shape``."""
    r = _window(rows, size[0], shape[0])
    c = _window(columns, size[1], shape[1])
    return (r[:, :, None] * shape[1] + c[:, None, :]).reshape(len(rows), -1)


def _tile_starts(length: int, tile: int) -> np.ndarray:
    """Starts of tiles that cover [0, length); the last one is shifted back inside where it would stick out."""
    return np.minimum(np.arange(0, length, tile), length - tile)


def _tile_size(window_keys: int, height: int, width: int) -> int:
    """Largest tile whose queries all keep neighbours on every side within ``window_keys`` keys."""
    for tile in (LARGEST_TILE, 4, 2):
        if tile <= min(height, width) and _window_of(tile) <= window_keys:
            return tile
    return 1


def _window_of(tile: int) -> int:
    """Keys of a window that reaches beyond a tile on every side."""
    return (tile + 2) ** 2


def _far_keys(rng: np.random.RandomState, local: int, window: np.ndarray, count: int) -> np.ndarray:
    """(n, count) distinct local tokens outside each block's ``window`` (n, k)."""
    order = rng.permutation(local)
    blocks, size = window.shape
    candidates = order[(np.arange(blocks)[:, None] * count + np.arange(count + size)) % local]
    # Block by block: all comparisons at once would take blocks * size^2 bytes, gigabytes for large maps.
    return np.stack([c[~np.isin(c, w)][:count] for c, w in zip(candidates, window, strict=True)])


def _multiscale(grid: Grid, sparsity: float, max_keys: int, rng: np.random.RandomState) -> KeyPattern:
    """Keys at all scales: regional tokens, a local window around the query, a few far local tokens."""
    height, width, length = grid.height, grid.width, grid.length
    nominal = int((1 - sparsity) * length)
    budget = min(max(nominal, MIN_KEYS), max_keys, length)
    far = min(int(FAR_SHARE * budget), max(0, grid.local - budget))
    rounded = min(int(BLOCK_ROUNDING * (1 - sparsity) * length), max_keys)
    # Where not all regional tokens fit, they leave room for the window of the largest tile.
    at_most = max(budget // 2, rounded - far - _window_of(LARGEST_TILE))
    scales = _regional_sizes(grid, int(REGIONAL_SHARE * budget), at_most)
    regional = sum(math.prod(size) for size in scales)
    tile = _tile_size(rounded - regional - far, height, width) if length > DENSE_LIMIT else 1
    window_keys = max(1, (rounded if tile > 1 else budget) - regional - far)

    top, left = _tile_starts(height, tile), _tile_starts(width, tile)
    tile_rows = np.repeat(top, len(left))
    tile_columns = np.tile(left, len(top))
    centre_row, centre_column = tile_rows + (tile - 1) / 2, tile_columns + (tile - 1) / 2
    queries = _map_windows(centre_row, centre_column, (tile, tile), (height, width))
    window_size = _near_square(window_keys, height, width)
    window = _map_windows(centre_row, centre_column, window_size, (height, width))
    far = min(far, grid.local - window.shape[1])  # low sparsity: the window leaves fewer keys outside
    keys = [window, _far_keys(rng, grid.local, window, far)]
    offset = grid.local
    for patch, shape, size in zip(grid.patch_sizes, grid.regional, scales, strict=True):
        row, column = (centre_row + 0.5) / patch - 0.5, (centre_column + 0.5) / patch - 0.5
        keys.append(offset + _map_windows(row, column, size, shape))
        offset += shape[0] * shape[1]
    return _pattern(queries, np.concatenate(keys, axis=1), grid)


def _regional_sizes(grid: Grid, budget: int, at_most: int) -> list[tuple[int, int]]:
    """Window in each regional map: the whole map if all fit ``budget``, else equal shares, coarsest map first.

    These together have at most ``at_most`` keys.
    """
    if sum(h * w for h, w in grid.regional) <= budget:
        return grid.regional
    budget = min(budget, at_most)
    sizes: dict[int, tuple[int, int]] = {}
    for patch in sorted(grid.patch_sizes, reverse=True):
        height, width = grid.regional[grid.patch_sizes.index(patch)]
        share = max(1, budget // (len(grid.patch_sizes) - len(sizes)))
        sizes[patch] = (height, width) if height * width <= share else _near_square(share, height, width)
        budget -= math.prod(sizes[patch])
    return [sizes[patch] for patch in grid.patch_sizes]


def _sequence(grid: Grid, sparsity: float, max_keys: int, rng: np.random.RandomState) -> KeyPattern:
    """A band over the concatenated sequence plus random keys, the pattern of earlier checkpoints.

    Per query up to ``DENSE_LIMIT`` tokens; beyond, blocks of 16 queries share the band around their centre.
    """
    length, local = grid.length, grid.local
    keep = max(1, int(length * (1 - sparsity)))
    half = min(int(length * (1 - sparsity) / 2), (max_keys * 4 // 5 - 1) // 2)
    random_keys = min(max(1, keep // 4), max_keys // 5) if keep > 4 else 0
    block = min(SEQUENCE_BLOCK, half + 1) if length > DENSE_LIMIT else 1  # a query stays within its own band
    starts = _tile_starts(local, min(block, local))
    queries = starts[:, None] + np.arange(min(block, local))
    centre = starts + (queries.shape[1] - 1) / 2
    band = _window(centre, min(2 * half + 1, length), length)
    far = _far_keys(rng, length, band, min(random_keys, length - band.shape[1]))
    return _pattern(queries, np.concatenate([band, far], axis=1), grid)


def _pattern(queries: np.ndarray, keys: np.ndarray, grid: Grid) -> KeyPattern:
    flat = queries.reshape(-1)
    position = np.empty(grid.local, dtype=np.int64)
    position[flat[::-1]] = np.arange(len(flat))[::-1]  # the first output of a token that appears twice
    return KeyPattern(queries, np.sort(keys, axis=1), position, grid.length)
