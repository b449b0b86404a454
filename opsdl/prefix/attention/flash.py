"""`attend` and `attend_backward` on CUDA: torch's flash attention, for bf16, fp16 and head dims of a multiple of 8.

What torch calls flash attention is chosen by torch: its own, or flash-attn 3 or 4 where they are installed and
`torch.nn.attention.activate_flash_attention_impl` was called. Its partial outputs come rounded to the operands' type,
and dK and dV too; the merge and everything after it is float32. Other operands take the written-out formulas.
Not run on a GPU; the tests check shapes, types and layouts against torch's own fake tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix.attention import partial
from opsdl.prefix.attention.operators import implementation


def _takes(query_BHLD: Tensor) -> bool:
    return query_BHLD.dtype in (torch.bfloat16, torch.float16) and query_BHLD.shape[3] % 8 == 0


def _token_major(*tensors_BHLD: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors_BHLD]


@implementation("attend", "CUDA")
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    partial.check(query, key, value, causal)
    if not _takes(query):
        return partial.attend_in_torch(query, key, value, scale, causal)
    out_BLHD, lse_BHL, *_ = torch.ops.aten._flash_attention_forward(
        *_token_major(query, key, value), None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale
    )
    return out_BLHD.transpose(1, 2).float(), lse_BHL


@implementation("attend_backward", "CUDA")
def attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    key_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _takes(query):
        return partial.attend_backward_in_torch(grad_out, query, key, value, out, lse, scale, causal, key_value)
    random_state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of a dropout that is 0
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    grad_BLHD, query_BLHD, key_BLHD, value_BLHD, out_BLHD = _token_major(
        grad_out.to(query.dtype), query, key, value, out.to(query.dtype)
    )
    gradients = torch.ops.aten._flash_attention_backward(
        grad_BLHD, query_BLHD, key_BLHD, value_BLHD, out_BLHD, lse.contiguous(), None, None, query.shape[2],
        key.shape[2], 0.0, causal, random_state, unused, scale=scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (x.transpose(1, 2).float() for x in gradients)
    if not key_value:
        return grad_query, grad_query.new_empty(0), grad_query.new_empty(0)
    return grad_query, grad_key, grad_value
