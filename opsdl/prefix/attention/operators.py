"""The operators of shared prefixes: one schema each here, implementations in csrc/cpu and csrc/cuda.

Every operator also has a fallback in torch, registered where it is written (`fallback`); the dispatcher prefers the
compiled implementation of the device. Sizes: R responses, L tokens, Hq and Hkv heads, D numbers of a head, S states.
out and lse are float32 (lse natural-log), whatever the operands.

    attend(query [B, Hq, Lq, D], key, value [B, Hkv, Lk, D]) -> out [B, Hq, Lq, D], lse [B, Hq, Lq]
    attend_backward: dQ, dK, dV float32 from the merged out and lse; without key_value no dK, dV, and empty tensors
    merge_states(out [S, R, Hq, D], lse [S, R, Hq]) -> out [R, Hq, D], lse [R, Hq]
    prefix_decode(query [R, Hq, D], key, value) -> out [R, Hq, D], lse [R, Hq]: the keys are read once for all;
        key and value [L, Hkv, D], or pools [blocks, block_size, Hkv, D] and their block_table, int32
    append_tokens: pool[slot // block_size, slot % block_size] = token for tokens [N, Hkv, D], slots int64 [N]
    gather_tokens: the first `length` tokens [length, Hkv, D] of the blocks in block_table
    copy_blocks: pool[targets] = pool[sources], int64 each
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from opsdl import extension

_LIBRARY = torch.library.Library("opsdl", "FRAGMENT")
for _schema in (
    "attend(Tensor query, Tensor key, Tensor value, float scale, bool causal) -> (Tensor, Tensor)",
    "attend_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, float scale,"
    " bool causal, bool key_value) -> (Tensor, Tensor, Tensor)",
    "merge_states(Tensor out, Tensor lse) -> (Tensor, Tensor)",
    "prefix_decode(Tensor query, Tensor key, Tensor value, Tensor? block_table, int length, float scale)"
    " -> (Tensor, Tensor)",
    "append_tokens(Tensor(a!) pool, Tensor tokens, Tensor slots) -> ()",
    "gather_tokens(Tensor pool, Tensor block_table, int length) -> Tensor",
    "copy_blocks(Tensor(a!) pool, Tensor sources, Tensor targets) -> ()",
):
    _LIBRARY.define(_schema)
extension.load()
if torch.version.cuda:
    extension.load_cuda()


def fallback(name: str) -> Callable[[Callable], Callable]:
    """Decorator: what the operator runs on a device that has no implementation of its own."""

    def register(function: Callable) -> Callable:
        @wraps(function)
        def in_torch(tensor: Tensor, *others: Any) -> Any:
            if tensor.is_cuda:
                extension.warn_without_cuda()
            return function(tensor, *others)

        implementation(name, "CompositeExplicitAutograd")(in_torch)
        return function

    return register


def implementation(name: str, key: str) -> Callable[[Callable], Callable]:
    """Decorator: what the operator runs under this dispatch key."""

    def register(function: Callable) -> Callable:
        _LIBRARY.impl(name, function, key)
        return function

    return register
