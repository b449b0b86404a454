"""Attention over one set of keys, compiled or not, against dense attention in float64; and the merge of two."""

import pytest
import torch

from opsdl import extension
from opsdl.prefix.attention import partial
from tests.support.attention import SCALE, close, dense, error, make
from tests.support.models import relative

compiled = pytest.mark.skipif(extension.load() != "available", reason="no C++ extension here")
DTYPES = [torch.float32, torch.bfloat16]
# B, Hq, Hkv, Lq, Lk, D, causal
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


def ours(query, key, value, grad_out, causal, key_value=True):
    out, lse = torch.ops.opsdl.attend(query, key, value, SCALE, causal)
    grads = torch.ops.opsdl.attend_backward(grad_out, query, key, value, out, lse, SCALE, causal, key_value)
    return out, lse, grads


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


def test_two_parts_without_keys_stay_one():
    out, lse = torch.randn(2, 1, 4, 3, 8), torch.randn(2, 1, 4, 3)
    lse[:, :, :2], lse[0, :, 2] = -torch.inf, -torch.inf
    merged, merged_lse = partial.merge(out[0], lse[0], out[1], lse[1])
    assert (merged[:, :2] == 0).all() and (merged_lse[:, :2] == -torch.inf).all()
    assert torch.equal(merged[:, 2], out[1, :, 2]) and torch.equal(merged_lse[:, 2], lse[1, :, 2])
    assert merged.isfinite().all()


def test_written_out_partials_agree_with_the_operator(monkeypatch):
    """The path of other devices, run on this one."""
    generator = torch.Generator().manual_seed(4)
    query, key, value, grad_out = (
        torch.randn(2, heads, 13, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)
    )
    for causal in (False, True):
        out, lse = partial.attend(query, key, value, 0.3, causal)
        backward = partial.attend_backward(grad_out, query, key, value, out, lse, 0.3, causal)

        class Elsewhere(torch.Tensor):
            device = torch.device("meta")

        moved = query.as_subclass(Elsewhere)
        monkeypatch.setattr(partial, "_scores", lambda q, *a, f=partial._scores: f(q.as_subclass(torch.Tensor), *a))
        out_2, lse_2 = partial.attend(moved, key, value, 0.3, causal)
        backward_2 = partial.attend_backward(grad_out, moved, key, value, out, lse, 0.3, causal)
        monkeypatch.undo()
        for x, y in zip((out, lse, *backward), (out_2, lse_2, *backward_2), strict=True):
            assert relative(y.as_subclass(torch.Tensor), x) < 1e-14


def test_what_torch_would_crash_on_is_refused():
    for heads, lengths, causal, message in (
        ((5, 2, 2), (3, 3, 3), False, "multiple"),
        ((2, 2, 2), (3, 0, 0), False, "non-empty"),
        ((2, 2, 2), (3, 4, 4), True, "Lq == Lk"),
    ):
        operands = [torch.zeros(1, h, n, 8) for h, n in zip(heads, lengths, strict=True)]
        with pytest.raises(ValueError, match=message):
            partial.attend(*operands, 1.0, causal)
