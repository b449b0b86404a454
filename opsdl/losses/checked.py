"""From the arguments of the public functions to a `Call`: checked, flat, the teacher detached, the backend chosen."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opsdl.losses.arguments import (
    check_head,
    check_options,
    check_pair,
    check_tokens,
    check_vocab_size,
    skip_limit,
    token_scale,
)
from opsdl.losses.backends import choose
from opsdl.losses.call import Call, Wanted
from opsdl.losses.values import Value

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def checked_call(
    value: Value, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, tokens: Tensor | None, mask: Tensor | None,
    token_weights: Tensor | None, temperature: float, softcap: float | None, vocab_size: int | None, reduction: str,
    skip_tolerance: float | str | None, vocab_group: dist.ProcessGroup | None, backend: str, beta: float = 1.0,
    clip: float | None = None, baseline: str | None = None,
) -> Call:  # fmt: skip
    """Return the call that these arguments ask for; the names are those of the public functions.

    Raises:
        ValueError: An argument is wrong; the message names it, what it is and what was expected.
    """
    check_options(
        temperature=temperature, softcap=softcap, beta=beta, clip=clip, baseline=baseline, reduction=reduction,
        skip_tolerance=skip_tolerance, backend=backend,
    )  # fmt: skip
    if value is not Value.LOG_PROB and teacher_hidden is None:
        raise ValueError("teacher_hidden: None; expected floating point [..., H]")
    weight, bias, teacher_weight, teacher_bias = *_whole(weight, bias), *_whole(teacher_weight, teacher_bias)
    _check_tensors(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, tokens, vocab_size, vocab_group)
    dtype = _product_dtype(hidden, weight)
    scale_N = token_scale(hidden, mask, token_weights, reduction, dtype)
    backend = choose(backend, dtype, hidden.device, beta, vocab_group)
    wanted = (x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias))
    return Call(
        hidden_NH=_flat(hidden).to(dtype), weight_VH=weight, bias_V=bias,
        teacher_hidden_NK=None if teacher_hidden is None else _flat(teacher_hidden.detach()).to(dtype),
        teacher_weight_VK=None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias_V=None if teacher_bias is None else teacher_bias.detach(),
        tokens_N=None if tokens is None else tokens.flatten(), scale_N=scale_N, value=value, temperature=temperature,
        softcap=softcap, beta=beta, clip=clip, skip_tolerance=skip_limit(skip_tolerance, dtype),
        vocab_size=vocab_size or weight.shape[0], group=vocab_group.group_name if vocab_group else "",
        backend=backend, wanted=Wanted(*wanted),
    )  # fmt: skip


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, tokens: Tensor | None, vocab_size: int | None, vocab_group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    if teacher_weight is None and teacher_bias is not None:
        raise ValueError("teacher_bias: given without teacher_weight; expected both or neither")
    check_head("student", hidden, weight, bias)
    check_vocab_size(vocab_size, weight, "student_weight", vocab_group)
    if teacher_hidden is not None:
        if teacher_weight is None:
            teacher_weight, teacher_bias = weight, bias
        check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        check_vocab_size(vocab_size, teacher_weight, "teacher_weight", vocab_group)
        check_pair(hidden, weight, teacher_hidden, teacher_weight, vocab_size)
    if tokens is not None:
        check_tokens(tokens, hidden)


def _whole(weight: MaybeTensor, bias: Tensor | None) -> tuple[MaybeTensor, Tensor | None]:
    """Gather a head that is sharded as a DTensor; the gradient finds its way back."""
    gather = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return gather(weight), gather(bias)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the operands of every product: autocast's, or the widest of hidden states and head."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
