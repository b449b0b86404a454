"""The operators of shared prefixes on a GPU: errors against float64, and times; a part of bench/gpu_check.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.gpu_loss import error
from bench.gpu_place import Place
from bench.harness import time_in_turn
from bench.results import Case, Number
from opsdl.prefix.attention import partial, states

SCALE = 64**-0.5
# R responses, Hq and Hkv heads, D head dim, length, block size or 0
CHECKED = ((3, 8, 2, 64, 150, 0), (20, 4, 1, 128, 3001, 0), (8, 14, 2, 40, 777, 16), (70, 8, 8, 80, 65, 32))
# Probabilities are rounded to the operands' dtype once; float32 sums differ by their order.
LIMIT = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def in_blocks(x_LHD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(pool, block table) that hold these tokens, in random order."""
    count, device = -(-len(x_LHD) // size), x_LHD.device
    torch.manual_seed(0)  # the same table for keys and values
    table = torch.randperm(count + 5, device=device)[:count].to(torch.int32)
    pool = torch.zeros(count + 5, size, *x_LHD.shape[1:], dtype=x_LHD.dtype, device=device)
    places = torch.arange(len(x_LHD), device=device)
    slots = table.long()[places // size] * size + places % size
    torch.ops.opsdl.append_tokens(pool, x_LHD, slots)
    assert torch.equal(torch.ops.opsdl.gather_tokens(pool, table, len(x_LHD)), x_LHD)
    return pool, table


def decode_error(
    place: Place, dtype: torch.dtype, R: int, Hq: int, Hkv: int, D: int, length: int, block_size: int
) -> float:
    query = place.draw(R, Hq, D).to(dtype)
    key, value = (place.draw(length, Hkv, D, seed=seed).to(dtype) for seed in (1, 2))
    wide = [x.double().transpose(0, 1)[None] for x in (query, key, value)]
    expected, expected_lse = partial.attend_in_torch(*wide, SCALE, False)
    table = None
    if block_size:
        (key, table), (value, _) = in_blocks(key, block_size), in_blocks(value, block_size)
    out, lse = states.prefix_decode(query, key, value, SCALE, length=length, block_table=table)
    assert torch.allclose(lse.double(), expected_lse[0].T, rtol=1e-5, atol=1e-5)
    return error(out, expected[0].transpose(0, 1))


def training_error(place: Place, dtype: torch.dtype, causal: bool) -> float:
    """The largest of out, dQ, dK and dV of `attend` and its backward."""
    query, grad = (place.draw(2, 8, 300, 64, seed=seed).to(dtype) for seed in (1, 2))
    key, value = (place.draw(2, 2, 300 if causal else 777, 64, seed=seed).to(dtype) for seed in (3, 4))
    out, lse = partial.attend(query, key, value, SCALE, causal)
    got = [out, *partial.attend_backward(grad, query, key, value, out, lse, SCALE, causal)]
    wide = [x.double() for x in (query, key, value)]
    out, lse = partial.attend_in_torch(*wide, SCALE, causal)
    expected = [out, *partial.attend_backward_in_torch(grad.double(), *wide, out, lse, SCALE, causal, True)]
    return max(error(x, y) for x, y in zip(got, expected, strict=True))


def accuracy(place: Place) -> list[Case]:
    """A case for each dtype, operator and shape: its error and its limit."""
    cases = []

    def add(label: str, dtype: torch.dtype, shape: str, found: float, limit: float) -> None:
        of = {"dtype": str(dtype)[6:], "shape": shape}
        cases.append(Case("prefix error", label, of, {"error": Number(found, "1"), "limit": Number(limit, "1")}))

    for dtype, limit in LIMIT.items():
        for shape in CHECKED:
            add("prefix_decode", dtype, str(shape), decode_error(place, dtype, *shape), limit)
        for causal in (False, True):
            found = training_error(place, dtype, causal)
            add("attend and backward", dtype, "causal" if causal else "whole", found, 3 * limit)
    return cases


def timings(place: Place) -> list[Case]:
    """A step of decoding over one long prefix, beside SDPA over a view for each response, and a copy of its bytes."""
    R, Hq, Hkv, D, length = place.decode_shape
    query = place.draw(R, Hq, D).bfloat16()
    key, value = (place.draw(length, Hkv, D, seed=seed).bfloat16() for seed in (1, 2))
    by_response = [x.transpose(0, 1).expand(R, -1, -1, -1) for x in (key, value)]  # read once for each response
    ways = {
        "prefix_decode": lambda: states.prefix_decode(query, key, value, SCALE, length=length),
        "SDPA, each response over the prefix": lambda: sdpa(query[:, :, None], *by_response, enable_gqa=True),
        "a copy of keys and values": lambda: (key.clone(), value.clone()),
    }
    of = {"R": R, "Hq": Hq, "Hkv": Hkv, "D": D, "L": length, "dtype": "bfloat16"}
    found = time_in_turn(ways, warm_up=2, clock=place.clock)
    return [Case("decode time", label, of, {"time": Number.timed(ms, "ms")}) for label, ms in found.items()]
