"""The operators of shared prefixes on the GPU at hand; a part of bench/gpu_check.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from opsdl.prefix.attention import partial, states

SCALE = 64**-0.5
# R rows, Hq, Hkv, D, length, page size or 0
CHECKED = ((3, 8, 2, 64, 150, 0), (20, 4, 1, 128, 3001, 0), (8, 14, 2, 40, 777, 16), (70, 8, 8, 80, 65, 32))
TIMED = (8, 32, 8, 128, 131072)
# Probabilities are rounded to the operands' dtype once; float32 sums differ by their order.
LIMIT = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def paged(x_LHD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(pool, block table) that hold these tokens, in random order."""
    blocks = -(-len(x_LHD) // size)
    torch.manual_seed(0)  # the same table for keys and values
    table = torch.randperm(blocks + 5, device="cuda")[:blocks].to(torch.int32)
    pool = torch.zeros(blocks + 5, size, *x_LHD.shape[1:], dtype=x_LHD.dtype, device="cuda")
    places = torch.arange(len(x_LHD), device="cuda")
    slots = table.long()[places // size] * size + places % size
    torch.ops.opsdl.append_tokens(pool, x_LHD, slots)
    assert torch.equal(torch.ops.opsdl.gather_tokens(pool, table, len(x_LHD)), x_LHD)
    return pool, table


def decode_error(R: int, Hq: int, Hkv: int, D: int, length: int, page: int, dtype: torch.dtype) -> float:
    query, key, value = draw(R, Hq, D, dtype=dtype), *(draw(length, Hkv, D, dtype=dtype) for _ in range(2))
    wide = [x.double().transpose(0, 1)[None] for x in (query, key, value)]
    expected, expected_lse = partial.attend_in_torch(*wide, SCALE, False)
    table = None
    if page:
        (key, table), (value, _) = paged(key, page), paged(value, page)
    out, lse = states.prefix_decode(query, key, value, SCALE, length=length, block_table=table)
    assert torch.allclose(lse.double(), expected_lse[0].T, rtol=1e-5, atol=1e-5)
    expected = expected[0].transpose(0, 1)
    return float((out.double() - expected).norm() / expected.norm())


def training_error(causal: bool, dtype: torch.dtype) -> float:
    """The largest of out, dQ, dK and dV of `attend` and its backward."""
    query, grad = (draw(2, 8, 300, 64, dtype=dtype) for _ in range(2))
    key, value = (draw(2, 2, 300 if causal else 777, 64, dtype=dtype) for _ in range(2))
    out, lse = partial.attend(query, key, value, SCALE, causal)
    got = [out, *partial.attend_backward(grad, query, key, value, out, lse, SCALE, causal)]
    wide = [x.double() for x in (query, key, value)]
    out, lse = partial.attend_in_torch(*wide, SCALE, causal)
    expected = [out, *partial.attend_backward_in_torch(grad.double(), *wide, out, lse, SCALE, causal, True)]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(got, expected, strict=True))


def accuracy() -> tuple[list[str], bool]:
    """Markdown rows, and whether all passed."""
    rows, good = ["| dtype | operator | error | limit |", "|---|---|---|---|"], True
    for dtype, limit in LIMIT.items():
        for shape in CHECKED:
            if dtype != torch.float32 and shape[3] % 8:
                continue
            found = decode_error(*shape, dtype)
            rows.append(f"| {str(dtype)[6:]} | prefix_decode {shape} | {found:.1e} | {limit:.1e} |")
            good &= found <= limit
        for causal in (False, True):
            found = training_error(causal, dtype)
            rows.append(f"| {str(dtype)[6:]} | attend and backward, causal {causal} | {found:.1e} | {3 * limit:.1e} |")
            good &= found <= 3 * limit
    return rows, good


def timings(measured: Callable[[Callable[[], object]], tuple[float, int]]) -> list[str]:
    """A step of decoding over one long prefix, beside SDPA over a copy for each row, and the bare read of its bytes."""
    R, Hq, Hkv, D, length = TIMED
    dtype = torch.bfloat16
    query, key, value = draw(R, Hq, D, dtype=dtype), *(draw(length, Hkv, D, dtype=dtype) for _ in range(2))
    by_row = [x.transpose(0, 1).expand(R, -1, -1, -1) for x in (key, value)]  # read once for each row
    ways = {
        "prefix_decode": lambda: states.prefix_decode(query, key, value, SCALE, length=length),
        "SDPA, each row over the prefix": lambda: sdpa(query[:, :, None], *by_row, enable_gqa=True),
        "a copy of keys and values": lambda: (key.clone(), value.clone()),
    }
    rows = [f"| decode, R={R} Hq={Hq} Hkv={Hkv} D={D} L={length} bf16 | ms |", "|---|---|"]
    return rows + [f"| {name} | {measured(way)[0]:.3f} |" for name, way in ways.items()]
