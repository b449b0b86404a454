"""Decoding over one prefix, and merging any number of states, against the formulas."""

import pytest
import torch

from opsdl import extension
from opsdl.prefix.attention import states
from tests.support.attention import SCALE, close, dense, error, make

compiled = pytest.mark.skipif(extension.load() != "available", reason="no C++ extension here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 4, 1, 64), (8, 8, 2, 300, 64), (3, 6, 1, 513, 40), (40, 8, 2, 70, 128), (2, 4, 2, 33, 7)], ids=str
)
def test_decoding_over_a_prefix(sizes, in_blocks, dtype):
    rows, heads, key_heads, length, size = sizes
    query, key, value, _ = make(1, heads, key_heads, rows, length, size, dtype)
    true_out, true_lse, _ = dense(query, key, value, torch.zeros_like(query), False)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    table = None
    if in_blocks:
        table = torch.randperm(50)[: -(-length // 16)].to(torch.int32)
        pools = torch.randn(2, 50, 16, key_heads, size).to(dtype)
        for pool, x in zip(pools, (key, value), strict=True):
            padded = torch.cat([x, x.new_zeros(-length % 16, key_heads, size)])
            pool[table.long()] = padded.unflatten(0, (-1, 16))
        key, value = pools
    out, lse = states.prefix_decode(query, key, value, SCALE, length=length, block_table=table)
    assert out.dtype == lse.dtype == torch.float32
    limit = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 6e-3}[dtype]
    assert close(out, true_out[0].transpose(0, 1), limit) and close(lse, true_lse[0].T)


@compiled
def test_what_decoding_refuses():
    query, pool = torch.randn(2, 4, 64), torch.randn(5, 16, 2, 64)
    for table, length, message in (
        ([0, 1], 33, "length 33"), ([0, 5], 20, "outside the pool"), ([-1, 2], 20, "outside the pool"),
        ([0], 0, "above 0"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            states.prefix_decode(query, pool, pool, SCALE, length=length, block_table=torch.tensor(table))
    with pytest.raises(RuntimeError, match="multiple of Hkv"):
        states.prefix_decode(query[:, :3], pool[0], pool[0], SCALE, length=4)


@compiled
def test_merging_refuses():
    for out, lse in (((0, 3, 4, 8), (0, 3, 4)), ((2, 3, 4, 0), (2, 3, 4)), ((2, 3, 4, 8), (2, 3)), ((3, 4, 8), (3, 4))):
        with pytest.raises(RuntimeError, match="merge_states"):
            states.merge_states(torch.zeros(out), torch.zeros(lse))
    assert states.merge_states(torch.zeros(2, 0, 4, 8), torch.zeros(2, 0, 4))[0].shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_merging_parts(parts, dtype):
    """By the formula, with parts and rows that hold nothing, and 100 heads."""
    out, lse = torch.randn(parts, 3, 100, 16, dtype=dtype), 4 * torch.randn(parts, 3, 100, dtype=dtype)
    lse[0, 0], lse[:, 1] = -torch.inf, -torch.inf
    if parts > 1:
        lse[1, 0, :50] = torch.inf  # what some flash kernels write for no key
    out = torch.where(lse.isinf()[..., None], torch.nan, out)
    merged, merged_lse = states.merge_states(out, lse)
    empty = lse.isinf()
    weights = lse.double().masked_fill(empty, -1e300).softmax(0) * ~empty
    expected = (weights[..., None] * out.double().masked_fill(empty[..., None], 0)).sum(0)
    expected_lse = lse.double().masked_fill(empty, -torch.inf).logsumexp(0)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert error(merged, expected) <= tolerance
    assert torch.allclose(merged_lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    assert (merged[1] == 0).all() and (merged_lse[1] == -torch.inf).all()
