"""The emulator's memory, warps and barriers, and the errors that it must raise."""

import numpy as np
import pytest

from tests.support.gpu.ptx import THREADS, as_slots, execute, integers, program
from tools import ptxsim
from tools.ptxsim.memory import GlobalMemory, SharedMemory


def test_vector_loads_and_signed_bytes():
    a = integers("u64")
    body = "ld.global.v2.b32 {%r1, %r2}, [%a]; mov.b64 %d1, {%r2, %r1}; st.global.b64 [%out], %d1;"
    np.testing.assert_array_equal(execute(body, a, dtype=np.uint64), (a >> 32) | (a << 32))
    body = "ld.global.s8 %r1, [%a+1]; st.global.b32 [%out], %r1;"
    np.testing.assert_array_equal(execute(body, a, dtype=np.int32), ((a >> 8) & 255).astype(np.int8))


@pytest.mark.parametrize("collide", [False, True])
def test_atomics(collide):
    step = "0" if collide else "4"
    body = f"""
    ld.param.u64 %d1, [c]; mul.wide.u32 %d2, %r63, {step}; add.s64 %d1, %d1, %d2;
    ld.global.f32 %f1, [%a]; atom.global.add.f32 %f2, [%d1], %f1; st.global.f32 [%out], %f2;"""
    a = np.arange(THREADS, dtype=np.float32)
    totals = np.zeros((THREADS, 8), np.uint8)
    out = np.zeros((THREADS, 8), np.uint8)
    ptxsim.run_ptx(program(body), (1,), THREADS, [as_slots(a), as_slots(a), totals, out])
    before = out.view(np.float32)[:, 0]
    if collide:
        assert totals.view(np.float32)[0, 0] == a.sum()
        np.testing.assert_array_equal(before, np.cumsum(a) - a)
    else:
        np.testing.assert_array_equal(totals.reshape(-1).view(np.float32)[:THREADS], a)


def test_compare_and_swap_lets_one_thread_win():
    body = """
    ld.param.u64 %d1, [c]; add.u32 %r1, %r63, 1;
    atom.global.cas.b32 %r2, [%d1], 0, %r1; st.global.b32 [%out], %r2;"""
    before = execute(body, np.zeros(THREADS), np.zeros(THREADS), np.zeros(THREADS), dtype=np.uint32)
    np.testing.assert_array_equal(before, [0] + [1] * (THREADS - 1))


@pytest.mark.parametrize(
    ("mode", "argument", "bounds", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 3, 31, lambda lane: np.where(lane + 3 < 32, lane + 3, lane)),
        ("up", 3, 0, lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, argument, bounds, source):
    a = integers("u32")
    body = f"ld.global.b32 %r1,[%a]; shfl.sync.{mode}.b32 %r2|%p1, %r1, {argument}, {bounds}, -1;"
    thread = np.arange(THREADS)
    expected = a[thread // 32 * 32 + source(thread % 32)]
    np.testing.assert_array_equal(execute(body + "st.global.b32 [%out], %r2;", a, dtype=np.uint32), expected)


def test_votes():
    a = integers("u32", 0, 1)
    body = "ld.global.b32 %r1,[%a]; setp.ne.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r2, %p1, -1;"
    ballots = [int("".join(map(str, warp[::-1])), 2) for warp in a.reshape(-1, 32)]
    result = execute(body + "st.global.b32 [%out], %r2;", a, dtype=np.uint32)
    np.testing.assert_array_equal(result, np.repeat(ballots, 32))


def test_divergent_branches_and_loops_reconverge():
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
LOOP:
    add.u32 %r1, %r1, 1; add.u32 %r2, %r2, %r1;
    setp.le.u32 %p1, %r1, %r63;
    @%p1 bra LOOP;
    bar.sync 0;
    st.global.b32 [%out], %r2;"""
    thread = np.arange(THREADS)
    np.testing.assert_array_equal(execute(body, dtype=np.uint32), (thread + 1) * (thread + 2) // 2)


SWAP_WARPS = """
    mov.u32 %r10, smem; mul.lo.u32 %r11, %r63, 4; add.u32 %r11, %r10, %r11;
    ld.global.b32 %r1, [%a]; st.shared.b32 [%r11], %r1;
    {barrier}
    xor.b32 %r12, %r63, 32; mul.lo.u32 %r12, %r12, 4; add.u32 %r12, %r10, %r12;
    ld.shared.b32 %r2, [%r12]; st.global.b32 [%out], %r2;"""


def test_shared_memory_with_a_barrier():
    a = integers("u32")
    result = execute(SWAP_WARPS.format(barrier="bar.sync 0;"), a, dtype=np.uint32, shared=256)
    np.testing.assert_array_equal(result, np.roll(a, 32))


def test_nested_register_scopes_hide_outer_registers():
    body = "mov.u32 %r1, 7; { .reg .b32 %r1; mov.u32 %r1, 9; } st.global.b32 [%out], %r1;"
    assert (execute(body, dtype=np.uint32) == 7).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SWAP_WARPS.format(barrier=""), "shared memory race .read after write."),
        ("mov.u32 %r1, smem; ld.shared.b32 %r2, [%r1];", "nobody wrote"),
        ("mov.u32 %r1, 9999; st.shared.b32 [%r1], 1;", "outside 256"),
        ("ld.global.b32 %r1, [%a+512];", "out of bounds: buffer 'a'"),
        ("ld.global.b32 %r1, [%a+2];", "misaligned 4-byte access in 'a'"),
        ("mov.u64 %d1, 64; ld.global.b32 %r1, [%d1];", "below every buffer"),
        ("setp.lt.u32 %p1, %r63, 32; @%p1 ret; bar.sync 0;", "after some threads returned"),
        ("setp.lt.u32 %p1, %r63, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;", "deadlock"),
        (
            "setp.lt.u32 %p1, %r63, 7; mov.u32 %r1, 1; @%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;",
            "inactive lane",
        ),
        ("mov.u32 %r1, %no_such_register;", "unknown operand"),
        ("tcgen05.fence::before_thread_sync;", "unsupported: tcgen05"),
        ("trap;", "trap"),
    ],
)
def test_errors(body, message):
    with pytest.raises(ptxsim.PtxError, match=message):
        execute(body, integers("u32"), dtype=np.uint32, shared=256)


def cp_async(wait):
    return f"""
    mov.u32 %r10, smem; mul.lo.u32 %r11, %r63, 8; add.u32 %r11, %r10, %r11;
    cp.async.ca.shared.global [%r11], [%a], 8;
    cp.async.commit_group;
    {wait}
    ld.shared.b64 %d1, [%r11]; st.global.b64 [%out], %d1;"""


def test_cp_async_lands_at_the_wait():
    a = integers("u64")
    result = execute(cp_async("cp.async.wait_group 0;"), a, dtype=np.uint64, shared=1024)
    np.testing.assert_array_equal(result, a)
    for missing in ("", "cp.async.wait_group 1;"):
        with pytest.raises(ptxsim.PtxError, match="has not landed"):
            execute(cp_async(missing), a, dtype=np.uint64, shared=1024)


def test_waiting_for_an_mbarrier_nobody_completes_is_a_deadlock():
    body = """
    mov.u32 %r1, smem; setp.eq.u32 %p2, %r63, 0;
    @%p2 mbarrier.init.shared::cta.b64 [%r1], 1;
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;
    @!%p1 bra WAIT;"""
    with pytest.raises(ptxsim.PtxError, match="spins on an mbarrier"):
        execute(body, dtype=np.uint32)


def test_buffers_are_far_apart_and_keep_misalignment():
    memory = GlobalMemory()
    data = np.zeros(64, np.float32)
    first, second = memory.register(data[:32], "first"), memory.register(data[33:], "second")
    assert abs(second - first) > 1 << 30 and second % 16 == data[33:].ctypes.data % 16
    assert memory.register(data[:32], "again") == first
    with pytest.raises(ptxsim.PtxError, match="out of bounds: buffer 'first'"):
        memory.load(np.array([first + 128], np.uint64), 4)


def test_race_check_forgets_at_barriers_and_forgives_equal_values():
    shared, address = SharedMemory(16), np.array([0])
    warp0, warp1 = np.array([0]), np.array([32])
    one, two = np.full((1, 4), 1, np.uint8), np.full((1, 4), 2, np.uint8)
    shared.store(address, one, lanes=warp0)
    shared.store(address, one, lanes=warp1)
    with pytest.raises(ptxsim.PtxError, match="write after write"):
        shared.store(address, two, lanes=warp0)
    shared.epoch += 1
    shared.load(address, 4, lanes=warp0)
    with pytest.raises(ptxsim.PtxError, match="write after read"):
        shared.store(address, two, lanes=warp1)
    shared.epoch += 1
    shared.store(address, two, lanes=warp1)
