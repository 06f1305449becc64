"""Three ways to compute attention under a sparse pattern, and the table that chooses one.

- ``dense``: all scores under a mask, for short sequences.
- ``gather``: blocks of queries gather the keys they share; other keys are neither scored nor stored.
- ``flex``: torch's FlexAttention over tiles of tokens, which skips tiles without visible keys. Compiled, so not for a
  CPU, where it has no backward pass.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from heterodiff.models.attention.patterns import KeyPattern

GATHER_BYTES = {"cpu": 4 * 2**20, "other": 256 * 2**20}
"""Keys and values gathered at once: on a CPU as many as fit its cache, elsewhere enough to keep the device busy."""
FLEX_TILE = 128
"""Side of the tiles that FlexAttention computes or skips."""
FEW_KEYS = 16
"""Number of visible keys below which a tile is not worth computing."""


@cache
def way_rows() -> tuple[dict[str, Any], ...]:
    """Read ``ways.json``: rows of ``device`` (or "any"), largest ``length`` and ``head_width`` (null: any) and ``way``.

    A row goes in front of the others where a benchmark on such a device has found its way to be the fastest.
    """
    return tuple(json.loads(files(__package__).joinpath("ways.json").read_text("utf-8")))


def choose_way(device: str, length: int, head_width: int) -> str:
    """Choose by the first row of :func:`way_rows` that fits a device type, S tokens and the width of a head."""
    for row in way_rows():
        bounds = ((length, row["length"]), (head_width, row["head_width"]))
        if row["device"] in (device, "any") and all(bound is None or value <= bound for value, bound in bounds):
            return row["way"]
    raise AssertionError("the last row of ways.json fits all")


@dataclass(frozen=True)
class DevicePattern:
    """A :class:`KeyPattern` as tensors on one device, ready for one way of :func:`sparse_attention`.

    Attributes:
        way: ``dense``, ``gather`` or ``flex``; attributes that it does not need are None.
        mask: (L, S), True where a query attends to a key.
        queries, keys, position: see :class:`KeyPattern`.
        order: (n,) tokens in the order of the tiles, some of them twice.
        block_mask: FlexAttention's, for queries in the order of ``queries`` and keys in that of ``order``.
    """

    way: str
    mask: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    position: Tensor | None = None
    order: Tensor | None = None
    block_mask: Any = None

    @classmethod
    def place(cls, pattern: KeyPattern, device: torch.device, way: str) -> "DevicePattern":
        if way == "dense":
            return cls(way, torch.from_numpy(pattern.visible()).to(device))
        arrays = {"queries": pattern.queries, "keys": pattern.keys, "position": pattern.position}
        placed = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        if way == "flex":
            order, seen = _tiles(pattern)
            placed["order"] = torch.from_numpy(order).to(device)
            return cls(way, **placed, block_mask=_block_mask(pattern, torch.from_numpy(seen).to(device)))
        return cls(way, **placed)


def _tiles(pattern: KeyPattern) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) in an order that leaves most tiles without visible keys, and (blocks, n), True for visible ones.

    The queries of a block lie side by side, and so do most of the keys around it. Few visible keys alone in a tile are
    repeated at the end, those of one tile of queries together.
    """
    local, blocks = np.argsort(pattern.position), len(pattern.keys)
    order = np.concatenate([local, np.arange(len(local), pattern.length)])
    seen = np.zeros((blocks, pattern.length), dtype=bool)
    np.put_along_axis(seen, pattern.keys, True, axis=1)
    padding = -len(order) % FLEX_TILE
    orders = [np.append(order, np.zeros(padding, dtype=order.dtype))]
    columns = [np.pad(seen[:, order], ((0, 0), (0, padding)))]
    together = max(1, FLEX_TILE // pattern.queries.shape[1])  # blocks in a tile of queries
    for first in range(0, blocks, together):
        group = columns[0][first : first + together]
        wanted = group.any(axis=0)
        few = wanted.reshape(-1, FLEX_TILE).sum(axis=1) < FEW_KEYS
        moved = np.flatnonzero(wanted & few.repeat(FLEX_TILE))
        padding = -len(moved) % FLEX_TILE
        orders.append(np.append(orders[0][moved], np.zeros(padding, dtype=order.dtype)))
        columns.append(np.zeros((blocks, len(moved) + padding), dtype=bool))
        columns[-1][first : first + together, : len(moved)] = group[:, moved]
        group[:, moved] = False
    return np.concatenate(orders), np.concatenate(columns, axis=1)


def _block_mask(pattern: KeyPattern, seen: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # takes a while to import

    size = pattern.queries.shape[1]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[query // size, key]

    return create_block_mask(
        sees, None, None, pattern.queries.size, seen.shape[1], device=str(seen.device), BLOCK_SIZE=FLEX_TILE
    )


def sparse_attention(q: Tensor, kv: Tensor, pattern: DevicePattern, num_heads: int) -> Tensor:
    """Multi-head attention of each query over the keys of its pattern.

    Args:
        q: (B, L, C) queries.
        kv: (B, S, 2C) keys and values side by side, so that one gather serves both.

    Returns:
        (B, L, C).
    """
    return {"dense": _dense, "gather": _gather, "flex": _flex}[pattern.way](q, kv, pattern, num_heads)


def _heads(q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, L, C), keys and values (B, S, 2C) -> each (B, heads, L or S, C / heads)."""
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q.unflatten(-1, (num_heads, -1)).transpose(1, 2), k, v


def _joined(out: Tensor) -> Tensor:
    """(B, heads, L, C / heads) -> (B, L, C)."""
    return out.transpose(1, 2).flatten(2)


def _dense(q: Tensor, kv: Tensor, pattern: DevicePattern, num_heads: int) -> Tensor:
    return _joined(F.scaled_dot_product_attention(*_heads(q, kv, num_heads), attn_mask=pattern.mask))


def _flex(q: Tensor, kv: Tensor, pattern: DevicePattern, num_heads: int) -> Tensor:
    assert pattern.queries is not None
    assert pattern.order is not None
    assert pattern.position is not None
    q, kv = _take(q, _flat(pattern.queries, q)), _take(kv, _flat(pattern.order, kv))
    compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()
    out = _joined(_flex_kernel(compiled)(*_heads(q, kv, num_heads), block_mask=pattern.block_mask))
    return _take(out, _flat(pattern.position, out))


@cache
def _flex_kernel(compiled: bool) -> Any:
    """FlexAttention; uncompiled it forms all scores, unless it is part of what is being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _gather(q: Tensor, kv: Tensor, pattern: DevicePattern, num_heads: int) -> Tensor:
    assert pattern.queries is not None
    assert pattern.keys is not None
    assert pattern.position is not None
    if torch.compiler.is_compiling():
        out = _attend_blocks(q, kv, pattern.queries, pattern.keys, num_heads)
    else:
        out = _BlockAttention.apply(q, kv, pattern.queries, pattern.keys, num_heads)
    return _take(out, _flat(pattern.position, out))


def _flat(index: Tensor, x: Tensor) -> Tensor:
    """Indices among the B*S tokens of x (B, S, C) of tokens ``index`` in every row; gathering along them is fastest."""
    batch, length = x.shape[:2]
    if batch == 1:
        return index.flatten()
    first = length * torch.arange(batch, device=index.device)
    return (first[:, None] + index.flatten()).flatten()


def _take(x: Tensor, flat: Tensor) -> Tensor:
    """(B, S, C), B n indices -> (B, n, C)."""
    return x.flatten(0, 1).index_select(0, flat).view(x.shape[0], -1, x.shape[2])


def _attend_blocks(q: Tensor, kv: Tensor, queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Gather and attend: q (B, L, C), kv (B, S, 2C), queries (n, Q), keys (n, K) -> (B, n Q, C)."""
    return _attend(_take(q, _flat(queries, q)), _take(kv, _flat(keys, kv)), len(queries), num_heads)


def _attend(qb: Tensor, kvb: Tensor, blocks: int, num_heads: int) -> Tensor:
    """qb (B, n Q, C), kvb (B, n K, 2C), gathered -> (B, n Q, C)."""
    batch, _, channels = qb.shape
    q, kv = (x.view(batch * blocks, -1, x.shape[2]) for x in (qb, kvb))
    return _joined(F.scaled_dot_product_attention(*_heads(q, kv, num_heads))).reshape(batch, -1, channels)


class _BlockAttention(torch.autograd.Function):
    """:func:`_attend_blocks`, a few blocks at a time, recomputed in the backward pass.

    Every block gathers its keys, so all gathered keys together take many times the memory of the keys. A few blocks at
    a time fit the processor's cache, and recomputing attention costs less than writing and reading saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(q, kv, queries, keys)
        ctx.num_heads = num_heads
        parts = _parts(kv, queries, keys)
        answers = [_attend_blocks(q, kv, some_queries, some_keys, num_heads) for some_queries, some_keys in parts]
        return answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, queries, keys = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # for sums of many small numbers
        grad_q, grad_kv = torch.zeros_like(q, dtype=wide), torch.zeros_like(kv, dtype=wide)
        start = 0
        for some_queries, some_keys in _parts(kv, queries, keys):
            some = grad.narrow(1, start, some_queries.numel())
            start += some_queries.numel()
            flat_q, flat_kv = _flat(some_queries, q), _flat(some_keys, kv)
            with torch.enable_grad():
                qb, kvb = _take(q, flat_q).requires_grad_(), _take(kv, flat_kv).requires_grad_()
                answer = _attend(qb, kvb, len(some_queries), ctx.num_heads)
            grad_qb, grad_kvb = torch.autograd.grad(answer, (qb, kvb), some)
            grad_q.flatten(0, 1).index_add_(0, flat_q, grad_qb.flatten(0, 1).to(wide))
            grad_kv.flatten(0, 1).index_add_(0, flat_kv, grad_kvb.flatten(0, 1).to(wide))
        return grad_q.to(q.dtype), grad_kv.to(kv.dtype), None, None, None


def _parts(kv: Tensor, queries: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of blocks whose gathered keys and values fit ``GATHER_BYTES``."""
    block = kv.shape[0] * keys.shape[1] * kv.shape[2] * kv.element_size()
    count = max(1, GATHER_BYTES["cpu" if kv.device.type == "cpu" else "other"] // block)
    return zip(queries.split(count), keys.split(count), strict=True)
