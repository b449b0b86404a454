"""The attention operators, compiled or not, against dense attention in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from opsdl import extension
from opsdl.prefix.attention import partial, states

compiled = pytest.mark.skipif(extension.load() != "available", reason="no C++ extension here")
DTYPES = [torch.float32, torch.bfloat16]
SCALE = 0.3
# B, Hq, Hkv, Lq, Lk, D, causal
SHAPES = [
    (1, 1, 1, 1, 1, 2, True),
    (1, 2, 2, 7, 7, 40, True),
    (2, 4, 2, 65, 65, 64, True),
    (1, 8, 2, 300, 300, 64, True),
    (2, 8, 1, 64, 64, 128, True),
    (1, 4, 1, 1, 300, 80, False),  # decoding
    (8, 4, 2, 1, 65, 64, False),
    (1, 8, 1, 16, 1000, 128, False),
    (1, 4, 4, 65, 7, 40, False),
    (2, 4, 2, 300, 65, 80, False),
    (1, 8, 2, 7, 300, 64, False),
    (3, 2, 1, 130, 193, 256, False),
]


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(B, Hq, Hkv, Lq, Lk, D, dtype, seed=0):
    """query, key, value, grad_out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D), (B, Hq, Lq, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(query, key, value, grad_out, causal, dtype=torch.float64):
    """out, lse, and the gradients, in `dtype`; lse is None where torch's own operator does the work."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    q, k, v = inputs
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
    lse = None
    if dtype == torch.float64:
        scores = q @ k.mT * SCALE
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=dtype).triu(1)
        lse, out = scores.logsumexp(-1), scores.softmax(-1) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE)
    return out, lse, torch.autograd.grad(out, inputs, grad_out.to(dtype))


def ours(query, key, value, grad_out, causal, key_value=True):
    out, lse = torch.ops.opsdl.attend(query, key, value, SCALE, causal)
    grads = torch.ops.opsdl.attend_backward(grad_out, query, key, value, out, lse, SCALE, causal, key_value)
    return out, lse, grads


def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def close(x, truth, limit=1e-5):
    """Relative; a gradient that is 0 but for rounding (one key's, through the softmax) has no relative error."""
    return truth.norm() < 1e-9 and x.norm() < 1e-4 or error(x, truth) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense_attention(shape, dtype):
    *sizes, causal = shape
    inputs = make(*sizes, dtype)
    out, lse, grads = ours(*inputs, causal)
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}
    true_out, true_lse, true_grads = dense(*inputs, causal)
    assert close(lse, true_lse)
    if dtype == torch.float32:
        assert close(out, true_out) and all(map(close, grads, true_grads))
        return
    peer_out, _, peer_grads = dense(*inputs, causal, torch.bfloat16)
    peers = (peer_out, *peer_grads)
    for name, x, truth, peer in zip("OQKV", (out, *grads), (true_out, *true_grads), peers, strict=True):
        assert close(x, truth, max(1e-5, 1.2 * error(peer, truth))), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
def test_groups_and_ragged_lengths(length, group, dtype):
    limit = 1e-5 if dtype == torch.float32 else 6e-3
    for keys, causal in ((length, True), (length, False), (97, False), (256, False)):
        inputs = make(1, group, 1, length, keys, 64, dtype, seed=length)
        out, lse, grads = ours(*inputs, causal)
        true_out, true_lse, true_grads = dense(*inputs, causal)
        assert close(out, true_out, limit) and close(lse, true_lse)
        for x, truth in zip(grads, true_grads, strict=True):
            assert close(x, truth, limit) or keys == 1


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    query, key, value, grad_out = make(2, 4, 2, 33, 50, 64, dtype)
    expected = ours(query, key, value, grad_out, False)
    packed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, grad_out)]
    wide = torch.cat([query, query], 3)[..., :64]
    bent = key.mT.contiguous().mT  # the last dimension is not contiguous
    for inputs in (packed, [wide, bent, value, grad_out]):
        for x, y in zip(flat(ours(*inputs, False)), flat(expected), strict=True):
            assert torch.equal(x, y)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (key, value)]
    all_ones = torch.ones((), dtype=dtype).expand(2, 4, 33, 64)
    apart = ours(query, *(x.contiguous() for x in shared), all_ones.contiguous(), False)
    for x, y in zip(flat(ours(query, *shared, all_ones, False)), flat(apart), strict=True):
        assert torch.equal(x, y)


def flat(results):
    out, lse, grads = results
    return (out, lse, *grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_a_whole_have_its_gradients(dtype):
    query, key, value, grad_out = make(2, 4, 2, 70, 300, 64, dtype)
    states = [partial.attend(query, key[:, :, s], value[:, :, s], SCALE, False) for s in (slice(200), slice(200, 300))]
    out, lse = partial.merge(*states[0], *states[1])
    true_out, true_lse, true_grads = dense(query, key, value, grad_out, False)
    limit = 1e-5 if dtype == torch.float32 else 6e-3
    assert close(out, true_out, limit) and close(lse, true_lse)
    grads = [
        partial.attend_backward(grad_out, query, key[:, :, s], value[:, :, s], out, lse, SCALE, False)
        for s in (slice(200), slice(200, 300))
    ]
    merged = grads[0][0] + grads[1][0], *(torch.cat(pair, 2) for pair in zip(grads[0][1:], grads[1][1:], strict=True))
    for x, truth in zip(merged, true_grads, strict=True):
        assert close(x, truth, limit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_detached_part_costs_no_key_gradient(dtype):
    inputs = make(1, 4, 2, 70, 150, 64, dtype)
    *_, (grad_query, _, _) = ours(*inputs, False)
    *_, (alone, grad_key, grad_value) = ours(*inputs, False, key_value=False)
    assert torch.equal(alone, grad_query) and grad_key.numel() == grad_value.numel() == 0


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_probability_have_no_gradient(dtype):
    """lse = -inf of a row that sees no key, inf of a slot without a token; the gradient may have another dtype."""
    query, key, value, grad_out = make(1, 2, 1, 20, 30, 64, dtype)
    out, lse = torch.ops.opsdl.attend(query, key, value, SCALE, False)
    lse[:, :, 3], lse[:, :, 7] = -torch.inf, torch.inf
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for grad in (grad_out, grad_out.to(other)):
        grads = torch.ops.opsdl.attend_backward(grad, query, key, value, out, lse, SCALE, False, True)
        assert all(x.isfinite().all() for x in grads)
        assert grads[0][:, :, [3, 7]].abs().sum() == 0 and grads[0][:, :, 4].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1000, 64, False), (1, 8, 2, 130, 130, 64, True)], ids=str)
def test_repetition_gives_the_same_bits(shape, dtype):
    inputs = make(*shape[:6], dtype)
    first = flat(ours(*inputs, shape[6]))
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, flat(ours(*inputs, shape[6])), strict=True))


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads(threads):
    inputs = make(1, 4, 1, 40, 700, 64, torch.float32)
    out, lse, grads = dense(*inputs, False)
    torch.set_num_threads(threads)
    try:
        got = flat(ours(*inputs, False))
    finally:
        torch.set_num_threads(2)
    assert all(map(close, got, (out, lse, *grads)))


def test_large_scores_and_nan():
    query, key, value, _ = make(1, 1, 1, 3, 300, 64, torch.float32)
    out, lse = torch.ops.opsdl.attend(query * 1000, key, value, SCALE, False)
    true_out, true_lse, _ = dense(query * 1000, key, value, torch.zeros_like(query), False)
    assert error(lse, true_lse) < 1e-6 and error(out, true_out) < 1e-2 and out.isfinite().all()
    query[0, 0, 1, 5] = torch.nan
    out, lse = torch.ops.opsdl.attend(query, key, value, SCALE, False)
    assert out.isnan().any(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True, False]


@compiled
def test_what_it_refuses():
    query, key, value, grad_out = make(1, 4, 2, 6, 5, 8, torch.float32)
    attend, back = torch.ops.opsdl.attend, torch.ops.opsdl.attend_backward
    out, lse = attend(query, key, value, SCALE, False)
    cases = [
        (lambda: attend(query[:, :, :0], key, value, SCALE, False), "query is .* non-empty"),
        (lambda: attend(query, key[:, :, :0], value[:, :, :0], SCALE, False), "key is .* non-empty"),
        (lambda: attend(query[0], key, value, SCALE, False), "query is"),
        (lambda: attend(query[:, :3], key, value, SCALE, False), "multiple of Hkv"),
        (lambda: attend(query, key[..., :4], value[..., :4], SCALE, False), "same B and D"),
        (lambda: attend(query.expand(2, -1, -1, -1), key, value, SCALE, False), "same B and D"),
        (lambda: attend(query, key, value[:, :, :4], SCALE, False), "value is"),
        (lambda: attend(query, key, value, SCALE, True), "causal"),
        (lambda: attend(query[..., :7], key[..., :7], value[..., :7], SCALE, False), "even number"),
        (lambda: attend(query.double(), key.double(), value.double(), SCALE, False), "query is Double"),
        (lambda: attend(query, key.bfloat16(), value, SCALE, False), "key is BFloat16"),
        (lambda: back(grad_out[:, :, :3], query, key, value, out, lse, SCALE, False, True), "grad_out is"),
        (lambda: back(grad_out, query, key, value, out[:, :2], lse, SCALE, False, True), "out is"),
        (lambda: back(grad_out, query, key, value, out, lse.double(), SCALE, False, True), "lse is"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


@compiled
def test_without_the_operators_the_parts_are_those_of_torch(monkeypatch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = make(1, 4, 2, 20, 20, 64, dtype)
        results = []
        for state in ("available", "not built"):
            monkeypatch.setattr(extension, "load", lambda state=state: state)
            for causal in (False, True):
                out, lse = partial.attend(*inputs[:3], SCALE, causal)
                grads = partial.attend_backward(inputs[3], *inputs[:3], out, lse, SCALE, causal)
                results.append((out, lse, *grads))
        limit = 6e-3 if dtype == torch.bfloat16 else 1e-5
        for x, y in zip(sum(results[:2], ()), sum(results[2:], ()), strict=True):
            assert x.dtype == y.dtype == torch.float32 and close(x, y.double(), limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 4, 1, 64), (8, 8, 2, 300, 64), (3, 6, 1, 513, 40), (40, 8, 2, 70, 128), (2, 4, 2, 33, 7)], ids=str
)
def test_decoding_over_a_prefix(sizes, paged, dtype):
    rows, heads, key_heads, length, size = sizes
    query, key, value, _ = make(1, heads, key_heads, rows, length, size, dtype)
    true_out, true_lse, _ = dense(query, key, value, torch.zeros_like(query), False)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    table = None
    if paged:
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


def test_two_parts_without_keys_stay_one():
    out, lse = torch.randn(2, 1, 4, 3, 8), torch.randn(2, 1, 4, 3)
    lse[:, :, :2], lse[0, :, 2] = -torch.inf, -torch.inf
    merged, merged_lse = partial.merge(out[0], lse[0], out[1], lse[1])
    assert (merged[:, :2] == 0).all() and (merged_lse[:, :2] == -torch.inf).all()
    assert torch.equal(merged[:, 2], out[1, :, 2]) and torch.equal(merged_lse[:, 2], lse[1, :, 2])
    assert merged.isfinite().all()


@compiled
def test_merging_refuses():
    for out, lse in (((0, 3, 4, 8), (0, 3, 4)), ((2, 3, 4, 0), (2, 3, 4)), ((2, 3, 4, 8), (2, 3)), ((3, 4, 8), (3, 4))):
        with pytest.raises(RuntimeError, match="merge_states"):
            states.merge_states(torch.zeros(out), torch.zeros(lse))
    assert states.merge_states(torch.zeros(2, 0, 4, 8), torch.zeros(2, 0, 4))[0].shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_merging_parts(parts, dtype):
    """Value and gradient by the formula, with parts and rows that hold nothing, and 100 heads."""
    out, lse = torch.randn(parts, 3, 100, 16, dtype=dtype), 4 * torch.randn(parts, 3, 100, dtype=dtype)
    lse[0, 0], lse[:, 1] = -torch.inf, -torch.inf
    if parts > 1:
        lse[1, 0, :50] = torch.inf  # what some flash kernels write for no key
    out = torch.where(lse.isinf()[..., None], torch.nan, out).requires_grad_()
    lse.requires_grad_()
    merged, merged_lse = states.merge_states(out, lse)
    empty = lse.isinf()
    weights = lse.double().masked_fill(empty, -1e300).softmax(0) * ~empty
    expected = (weights[..., None] * out.double().masked_fill(empty[..., None], 0)).sum(0)
    expected_lse = lse.double().masked_fill(empty, -torch.inf).logsumexp(0)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert error(merged, expected) <= tolerance
    assert torch.allclose(merged_lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    assert (merged[1] == 0).all() and (merged_lse[1] == -torch.inf).all()

    grads = torch.randn_like(merged), torch.randn_like(merged_lse)
    held = ~expected_lse.isinf()
    got = torch.autograd.grad([merged, merged_lse[held]], [out, lse], [grads[0], grads[1][held]])
    wide = [grads[0].double(), grads[1][held].double()]
    truth = torch.autograd.grad([expected, expected_lse[held]], [out, lse], wide)
    for x, y in zip(got, truth, strict=True):
        y = y.nan_to_num()  # of an empty part, whose logsumexp has none
        assert x.isfinite().all() and (x - y).norm() <= 10 * tolerance * y.norm()
