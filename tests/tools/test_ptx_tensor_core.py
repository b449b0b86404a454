"""The emulator's tensor cores and grids against torch."""

import math

import numpy as np
import pytest
import torch

from tools import ptxsim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_m16n8k16_with_ldmatrix(dtype):
    """D = A B with A loaded by ldmatrix.x4, B (stored K x N) by ldmatrix.x2.trans."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.zeros(16, 8)
    ptx = f"""
.version 8.0
.target sm_80
.address_size 64
.shared .align 16 .b8 smem[768];
.visible .entry kernel(.param .u64 a, .param .u64 b, .param .u64 d)
{{
    .reg .b32 %r<32>; .reg .f32 %f<8>; .reg .b64 %d<16>; .reg .pred %p<2>;
    mov.u32 %r0, %tid.x; mov.u32 %r1, smem;
    ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; ld.param.u64 %d3, [d];
    mul.lo.u32 %r2, %r0, 16; cvt.u64.u32 %d4, %r2; add.s64 %d5, %d1, %d4; add.u32 %r3, %r1, %r2;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d5]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    setp.lt.u32 %p1, %r0, 16;
    add.s64 %d6, %d2, %d4;
    @%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d6];
    @%p1 st.shared.v4.b32 [%r3+512], {{%r4, %r5, %r6, %r7}};
    bar.sync 0;
    and.b32 %r8, %r0, 15; mul.lo.u32 %r9, %r8, 32; shr.u32 %r10, %r0, 4; mul.lo.u32 %r10, %r10, 16;
    add.u32 %r9, %r9, %r10; add.u32 %r9, %r1, %r9;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r12, %r13, %r14, %r15}}, [%r9];
    mul.lo.u32 %r11, %r8, 16; add.u32 %r11, %r1, %r11;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r16, %r17}}, [%r11+512];
    mov.f32 %f0, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%f1, %f2, %f3, %f4}},
        {{%r12, %r13, %r14, %r15}}, {{%r16, %r17}}, {{%f0, %f0, %f0, %f0}};
    shr.u32 %r20, %r0, 2; and.b32 %r21, %r0, 3; mul.lo.u32 %r22, %r20, 32; mad.lo.u32 %r22, %r21, 8, %r22;
    cvt.u64.u32 %d7, %r22; add.s64 %d8, %d3, %d7;
    st.global.v2.f32 [%d8], {{%f1, %f2}}; st.global.v2.f32 [%d8+256], {{%f3, %f4}};
    ret;
}}
"""
    report = ptxsim.run_ptx(ptx, (1,), 32, [a, b, d], count_traffic=True)
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    assert report.tensor_core_instructions == 1
    assert report.traffic["global.st"].efficiency == 1.0


def test_grid_and_block_indices():
    ptx = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 out)
{
    .reg .b32 %r<12>; .reg .b64 %d<4>;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mad.lo.u32 %r4, %r2, %r3, %r1;
    mov.u32 %r5, %tid.x; mov.u32 %r6, %tid.y; mov.u32 %r7, %ntid.x; mad.lo.u32 %r8, %r6, %r7, %r5;
    mad.lo.u32 %r9, %r4, 32, %r8;
    ld.param.u64 %d1, [out]; mul.wide.u32 %d2, %r9, 4; add.s64 %d3, %d1, %d2;
    st.global.b32 [%d3], %r9;
    ret;
}
"""
    out = np.zeros((3 * 2, 32), np.int32)
    report = ptxsim.run_ptx(ptx, (3, 2), (8, 4), [out])
    np.testing.assert_array_equal(out.reshape(-1), np.arange(out.size))
    assert report.blocks == 6 and math.prod(out.shape) == 192
