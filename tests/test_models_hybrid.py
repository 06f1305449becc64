"""The hybrid decoder block against dense masked attention over the same key sets."""

import pytest
import torch
import torch.nn.functional as F

from heterodiff.models.attention.patterns import DENSE_LIMIT, Grid, make_pattern
from heterodiff.models.hybrid import HybridBlock, PatternSpec
from heterodiff.models.variants import VARIANTS
from tests.oracles import dense_hybrid

C, E = 32, 24
SMALL = [(1, 1), (3, 5), (8, 8), (16, 16)]
LARGE = [(24, 24), (32, 32), (23, 29), (64, 20), (40, 40)]


def make_block(variant: str, pattern: str) -> HybridBlock:
    torch.manual_seed(0)
    block = HybridBlock(C, E, VARIANTS[variant].hybrid, 0.25, 0.0, PatternSpec(pattern, 0.9, 1024, 0))
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=parameter[0].numel() ** -0.5)
    return block


def visible_keys(pattern: str, height: int, width: int) -> torch.Tensor:
    """(L, S), read token by token from the pattern's key lists."""
    grid = Grid(height, width, (4, 8))
    p = make_pattern(pattern, grid, 0.9, 1024, 0)
    seen = torch.zeros(grid.local, grid.length, dtype=torch.bool)
    for token, slot in enumerate(p.position):
        block, place = divmod(int(slot), p.queries.shape[1])
        assert p.queries[block, place] == token
        seen[token, torch.from_numpy(p.keys[block])] = True
    return seen


def outputs_and_gradients(variant, size, pattern, dtype):
    """Ours and the oracle's: {name: (ours, expected)} of the output and all gradients of a random projection."""
    block = make_block(variant, pattern).to(dtype)
    batch = 2 if size in SMALL else 1
    x = torch.randn(batch, C, *size, dtype=dtype, requires_grad=True)
    embedding = torch.randn(batch, E, dtype=dtype, requires_grad=True)
    parameters = dict(block.named_parameters())
    visible = visible_keys(pattern, *size)
    assert (visible.shape[1] > DENSE_LIMIT) == (size in LARGE)
    ours = block(x, F.silu(embedding))
    expected = dense_hybrid.hybrid_block(parameters, x, embedding, visible)
    weights = torch.randn_like(expected)
    inputs = {"x": x, "embedding": embedding, **parameters}
    found = torch.autograd.grad((ours * weights).sum(), list(inputs.values()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(inputs.values()))
    pairs = {name: (f, w) for name, f, w in zip(inputs, found, wanted, strict=True)}
    return {"output": (ours, expected)}, pairs


@pytest.mark.parametrize("pattern", ["multiscale", "sequence"])
@pytest.mark.parametrize(
    ("variant", "size"),
    [("hae-v2", size) for size in SMALL + LARGE]
    + [(variant, size) for variant in ("hae", "hae-lite") for size in [(1, 1), (3, 5), (16, 16), (23, 29)]],
)
def test_hybrid_block_equals_dense_masked_attention(variant, size, pattern):
    output, gradients = outputs_and_gradients(variant, size, pattern, torch.float64)
    for name, (ours, expected) in (output | gradients).items():
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-10 * max(1, expected.abs().max()), name


@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
@pytest.mark.parametrize("variant", ["hae", "hae-lite", "hae-v2"])
def test_hybrid_block_equals_dense_masked_attention_in_float32(variant, size):
    output, gradients = outputs_and_gradients(variant, size, "multiscale", torch.float32)
    ours, expected = output["output"]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    largest = max(expected.abs().max() for _, expected in gradients.values())
    for name, (ours, expected) in gradients.items():
        # The gradient of a bias before a norm of one channel a group is zero: its rounding has the others' scale.
        assert (ours - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 0.1 * largest), name


def test_given_masks_replace_the_pattern():
    block = make_block("hae-v2", "multiscale")
    x, embedding = torch.randn(1, C, 5, 6), torch.randn(1, E)
    grid = Grid(5, 6, (4, 8))
    mask = torch.rand(grid.length, grid.length) < 0.7
    mask.fill_diagonal_(False)
    before = block(x, F.silu(embedding))
    block.transformer_branch.multihead_attn.set_mask(mask)
    expected = dense_hybrid.hybrid_block(dict(block.named_parameters()), x, embedding, ~mask[: grid.local])
    assert (block(x, F.silu(embedding)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3


def test_a_pattern_first_met_in_inference_mode_serves_training():
    block = make_block("hae-v2", "multiscale")
    for size in (6, 24):
        x, embedding = torch.randn(1, C, size, size), torch.randn(1, E)
        with torch.inference_mode():
            expected = block(x, embedding)
        out = block(x, embedding)
        out.sum().backward()
        assert torch.equal(out, expected)
