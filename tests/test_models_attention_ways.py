"""The ways of sparse attention against a loop over the queries, and the table that chooses among them."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from heterodiff.models.attention import ways as attention_ways
from heterodiff.models.attention.patterns import DENSE_LIMIT, Grid, KeyPattern, make_pattern
from heterodiff.models.attention.ways import DevicePattern, choose_way, sparse_attention, way_rows
from heterodiff.models.hybrid import HybridBlock, PatternSpec, SparseSelfAttention
from heterodiff.models.variants import VARIANTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
HEADS, WIDTH = 2, 4
WAYS = ("dense", "gather", "flex")
CPU = torch.device("cpu")


def pattern_of(size: tuple[int, int], kind: str = "multiscale") -> KeyPattern:
    return make_pattern(kind, Grid(*size, (4, 8)), 0.9, 1024, 0)


def by_loop(q: Tensor, kv: Tensor, pattern: KeyPattern) -> Tensor:
    """Query by query and head by head, over the keys that the pattern lists for it."""
    channels = HEADS * WIDTH
    rows = []
    for token in range(q.shape[1]):
        keys = torch.from_numpy(pattern.keys[pattern.position[token] // pattern.queries.shape[1]])
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            k, v = kv[:, keys, :channels][..., part], kv[:, keys, channels:][..., part]
            weights = (torch.einsum("bd,bkd->bk", q[:, token, part], k) / WIDTH**0.5).softmax(-1)
            heads.append(torch.einsum("bk,bkd->bd", weights, v))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows, dim=1)


def inputs(pattern: KeyPattern, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    channels = HEADS * WIDTH
    q = torch.randn(2, len(pattern.position), channels, dtype=dtype)
    return q.requires_grad_(), torch.randn(2, pattern.length, 2 * channels, dtype=dtype).requires_grad_()


def masked(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    """What FlexAttention computes; its own kernel has no backward pass on a CPU."""
    mask = create_mask(block_mask.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "kind"), [((5, 7), "multiscale"), ((24, 24), "multiscale"), ((23, 25), "sequence")])
def test_every_way_equals_the_loop(way, size, kind, monkeypatch):
    pattern = pattern_of(size, kind)
    q, kv = inputs(pattern)
    placed = DevicePattern.place(pattern, CPU, way)
    expected = by_loop(q, kv, pattern)
    with torch.no_grad():
        assert (sparse_attention(q, kv, placed, HEADS) - expected).abs().max() <= 1e-12
    monkeypatch.setattr(attention_ways, "_flex_kernel", lambda compiled: masked)
    direction = torch.randn_like(expected)
    found = torch.autograd.grad(sparse_attention(q, kv, placed, HEADS), (q, kv), direction)
    for f, e in zip(found, torch.autograd.grad(expected, (q, kv), direction), strict=True):
        assert (f - e).abs().max() <= 1e-12 * max(1, e.abs().max())


def test_flex_skips_tiles_that_nobody_sees():
    block_mask = DevicePattern.place(pattern_of((64, 64)), CPU, "flex").block_mask
    assert block_mask.sparsity() > 60  # percent, of more keys than there are tokens


def test_gathered_gradients_are_added_up_in_float32():
    """512 queries of one key each weigh alike: a running sum in bfloat16 stops growing at half of it."""
    count = 512
    alone = np.arange(count)[:, None]
    pattern = KeyPattern(alone, np.tile([0, 1], (count, 1)), alone[:, 0], count)
    q, kv = (torch.zeros(1, count, c * HEADS * WIDTH, dtype=torch.bfloat16, requires_grad=True) for c in (1, 2))
    sparse_attention(q, kv, DevicePattern.place(pattern, CPU, "gather"), HEADS).sum().backward()
    assert kv.grad.dtype == torch.bfloat16
    assert kv.grad[0, :2, HEADS * WIDTH :].eq(count / 2).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_block_computes_alike_in_every_way(way):
    torch.manual_seed(0)
    block = HybridBlock(32, 16, VARIANTS["hae-v2"].hybrid, 0.25, 0.0, PatternSpec("multiscale", 0.9, 512, 0))
    attention = next(m for m in block.modules() if isinstance(m, SparseSelfAttention))
    x, embedding = torch.randn(1, 32, 24, 24), torch.randn(1, 16)
    with torch.no_grad():
        expected = block(x, embedding)
        attention.use_way(way)
        found = block(x, embedding)
    assert attention.device_pattern(24, 24, CPU).way == way
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_table_chooses_a_known_way_everywhere():
    assert {row["way"] for row in way_rows()} <= set(WAYS)
    assert way_rows()[-1] | {"way": ""} == {"device": "any", "length": None, "head_width": None, "way": ""}
    assert choose_way("cpu", DENSE_LIMIT, 8) == "dense"
    assert choose_way("cpu", DENSE_LIMIT + 1, 8) == "gather"


def test_the_first_row_that_fits_holds(monkeypatch):
    rows = [
        {"device": "cuda", "length": 5000, "head_width": 64, "way": "flex"},
        {"device": "any", "length": None, "head_width": None, "way": "gather"},
    ]
    monkeypatch.setattr(attention_ways, "way_rows", lambda: rows)
    assert choose_way("cuda", 5000, 64) == "flex"
    assert {choose_way(*asked) for asked in (("cuda", 5001, 64), ("cuda", 5000, 65), ("cpu", 5, 8))} == {"gather"}
