"""The emulator's arithmetic, logic, comparisons and conversions against numpy and torch, one small PTX program each."""

import numpy as np
import pytest
import torch

from tests.support.gpu.ptx import RNG, THREADS, apply, as_bf16, execute, floats, from_bf16, integers
from tools import ptxsim


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)])
def test_integer_arithmetic_wraps(name, function, kind):
    a, b = integers(kind), integers(kind)
    np.testing.assert_array_equal(apply(f"{name}.{kind}", kind, a, b), function(a, b))


def test_wide_and_high_multiply():
    a, b = integers("s32"), integers("s32")
    product = a.astype(np.int64) * b
    np.testing.assert_array_equal(apply("mul.wide.s32", "s32", a, b, result="s64"), product)
    np.testing.assert_array_equal(apply("mul.hi.s32", "s32", a, b), product >> 32)


def test_signed_division_truncates_toward_zero():
    a, b = integers("s32", -1000, 1000), integers("s32", 1, 30) * np.where(RNG.random(THREADS) < 0.5, -1, 1)
    b = b.astype(np.int32)
    np.testing.assert_array_equal(apply("div.s32", "s32", a, b), np.trunc(a / b))
    np.testing.assert_array_equal(apply("rem.s32", "s32", a, b), np.fmod(a, b))


@pytest.mark.parametrize(
    ("name", "function"), [("add.f32", np.add), ("sub.f32", np.subtract), ("mul.f32", np.multiply)]
)
def test_float_arithmetic(name, function):
    a, b = floats(), floats()[::-1].copy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(apply(name, "f32", a, b), function(a, b))


def test_fma_rounds_once():
    a = np.full(THREADS, 1 + 2**-12, np.float32)
    c = np.full(THREADS, -(1 + 2**-11), np.float32)
    np.testing.assert_array_equal(apply("fma.rn.f32", "f32", a, a, c), np.full(THREADS, 2**-24, np.float32))


def test_min_max_ignore_nan_unless_asked():
    a, b = floats(), np.ones(THREADS, np.float32)
    np.testing.assert_array_equal(apply("max.f32", "f32", a, b), np.fmax(a, b))
    np.testing.assert_array_equal(apply("min.NaN.f32", "f32", a, b), np.minimum(a, b))
    np.testing.assert_array_equal(apply("max.f32", "f32", a, b, 2 * b), np.fmax(np.fmax(a, b), 2 * b))


@pytest.mark.parametrize(("name", "function"), [("ex2.approx.f32", np.exp2), ("sqrt.rn.f32", np.sqrt)])
def test_functions(name, function):
    a = np.abs(floats())
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(apply(name, "f32", a), function(a), rtol=1e-6)


def test_packed_bf16_rounds_once():
    a, b = as_bf16(floats()), as_bf16(floats()[::-1].copy())
    expected = torch.from_numpy(from_bf16(a)).bfloat16() * torch.from_numpy(from_bf16(b)).bfloat16()
    pairs = [x.astype(np.uint32) | x.astype(np.uint32) << 16 for x in (a, b)]
    result = apply("mul.bf16x2", "b32", *pairs)
    np.testing.assert_array_equal(from_bf16((result >> 16).astype(np.uint16)), expected.float().numpy())
    np.testing.assert_array_equal(from_bf16((result & 0xFFFF).astype(np.uint16)), expected.float().numpy())


def test_saturating_arithmetic_is_refused_not_wrong():
    with pytest.raises(ptxsim.PtxError, match="unsupported: add.sat.s32"):
        apply("add.sat.s32", "s32", integers("s32"), integers("s32"))


def test_logic_shifts_and_fields():
    a, b, c = (integers("u32") for _ in range(3))
    np.testing.assert_array_equal(apply("and.b32", "b32", a, b), a & b)
    np.testing.assert_array_equal(apply("not.b32", "b32", a), ~a)
    amount = integers("u32", 0, 40)
    shifted = [0 if n >= 32 else (int(x) << int(n)) & 0xFFFFFFFF for x, n in zip(a, amount, strict=True)]
    np.testing.assert_array_equal(apply("shl.b32", "b32", a, amount), shifted)
    signed = a.view(np.int32)
    expected = [int(x) >> min(int(n), 31) for x, n in zip(signed, amount, strict=True)]
    np.testing.assert_array_equal(apply("shr.s32", "s32", signed, amount), expected)
    np.testing.assert_array_equal(apply("popc.b32", "b32", a), [int(x).bit_count() for x in a])
    position, length = integers("u32", 0, 31), integers("u32", 0, 31)
    fields = [(int(x) >> int(p)) & ((1 << int(n)) - 1) for x, p, n in zip(a, position, length, strict=True)]
    np.testing.assert_array_equal(apply("bfe.u32", "u32", a, position, length), fields)
    funnel = [((int(y) << 32 | int(x)) >> (int(z) & 31)) & 0xFFFFFFFF for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(apply("shf.r.wrap.b32", "b32", a, b, c), funnel)


def test_lop3_and_prmt():
    a, b, c = (integers("u32") for _ in range(3))
    body = "ld.global.b32 %r1,[%a]; ld.global.b32 %r2,[%b]; ld.global.b32 %r3,[%c];"
    body += "lop3.b32 %r4, %r1, %r2, %r3, 0xe8; st.global.b32 [%out], %r4;"
    np.testing.assert_array_equal(execute(body, a, b, c, dtype=np.uint32), (a & b) | (a & c) | (b & c))
    by_bytes = np.stack([a, b], 1).view(np.uint8).reshape(THREADS, 8)
    body = "ld.global.b32 %r1,[%a]; ld.global.b32 %r2,[%b]; prmt.b32 %r4, %r1, %r2, 0xf410;"
    body += "st.global.b32 [%out], %r4;"
    sign = np.where(by_bytes[:, 7] & 128, 255, 0).astype(np.uint8)
    expected = np.stack([by_bytes[:, 0], by_bytes[:, 1], by_bytes[:, 4], sign], 1).view(np.uint32)[:, 0]
    np.testing.assert_array_equal(execute(body, a, b, dtype=np.uint32), expected)


@pytest.mark.parametrize(
    ("comparison", "function"),
    [
        ("lt", lambda a, b: a < b),
        ("ne", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
        ("geu", lambda a, b: ~(a < b)),
        ("nan", lambda a, b: np.isnan(a) | np.isnan(b)),
    ],
)
def test_float_comparison_with_nan(comparison, function):
    a, b = floats(), floats()[::-1].copy()
    b[:4] = a[:4]
    body = f"ld.global.f32 %f1,[%a]; ld.global.f32 %f2,[%b]; setp.{comparison}.f32 %p1, %f1, %f2;"
    body += "selp.b32 %r1, 1, 0, %p1; st.global.b32 [%out], %r1;"
    np.testing.assert_array_equal(execute(body, a, b, dtype=np.uint32), function(a, b))


def test_conversions():
    a = floats(1000)
    finite = np.where(np.isnan(a), 0, np.clip(a.astype(np.float64), -(2**31), 2**31 - 1))
    np.testing.assert_array_equal(apply("cvt.rzi.s32.f32", "f32", a, result="s32"), np.trunc(finite))
    np.testing.assert_array_equal(apply("cvt.rni.s32.f32", "f32", a, result="s32"), np.rint(finite))
    number = ~np.isnan(a)
    bits = apply("cvt.rn.bf16.f32", "f32", a, result="b16")
    np.testing.assert_array_equal(bits[number], as_bf16(a)[number])
    assert (bits[~number] == 0x7FFF).all()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(apply("cvt.rn.f16.f32", "f32", a, result="f16"), a.astype(np.float16))
    signed = integers("s32", -100, 100)
    np.testing.assert_array_equal(apply("cvt.rn.f32.s32", "s32", signed, result="f32"), signed)
    narrowed = apply("cvt.s8.s32", "s32", integers("s32"), result="s32")
    assert narrowed.min() < 0 and narrowed.min() >= -128 and narrowed.max() <= 127


def test_cvt_rna_tf32_rounds_to_ten_bits():
    a = RNG.standard_normal(THREADS).astype(np.float32)
    rounded = apply("cvt.rna.tf32.f32", "f32", a, result="b32").view(np.float32)
    assert (rounded.view(np.uint32) & 0x1FFF == 0).all()
    assert (np.abs(rounded - a) <= np.abs(a) * 2.0**-11).all()
