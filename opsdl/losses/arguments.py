"""Checks of the losses' arguments: every message names the argument, what it is, and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses.backends import check_backend


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless [..., H], [V, H], [V] fit together."""
    if hidden.ndim < 1 or not hidden.is_floating_point():
        raise ValueError(f"{name}_hidden: {hidden.dtype} {tuple(hidden.shape)}; expected floating point [..., H]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}_weight: {tuple(weight.shape)}; expected [V, {hidden.shape[-1]}] for {name}_hidden")
    if not weight.is_floating_point():
        raise ValueError(f"{name}_weight: {weight.dtype} {tuple(weight.shape)}; expected floating point")
    if weight.shape[0] == 0:
        raise ValueError(f"{name}_weight: {tuple(weight.shape)}; expected at least one vocabulary entry")
    check_device(f"{name}_weight", weight, hidden)
    if bias is None:
        return
    if bias.shape != weight.shape[:1] or not bias.is_floating_point():
        raise ValueError(
            f"{name}_bias: {bias.dtype} {tuple(bias.shape)}; expected floating point {tuple(weight.shape[:1])}"
        )
    check_device(f"{name}_bias", bias, hidden)


def check_device(name: str, x: Tensor, hidden: Tensor) -> None:
    """Raise ValueError unless x is where the hidden states are."""
    if x.device != hidden.device:
        raise ValueError(f"{name}: on {x.device}; expected {hidden.device}, where the hidden states are")


def check_pair(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    vocab_size: int | None,
) -> None:
    """Raise ValueError unless the teacher scores the same tokens over the same vocabulary."""
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: {tuple(teacher_hidden.shape)}; expected {tuple(student_hidden.shape[:-1])} tokens, as in"
            " student_hidden"
        )
    if teacher_weight.shape[0] != student_weight.shape[0] and vocab_size is None:
        raise ValueError(
            f"teacher_weight: vocabulary of {teacher_weight.shape[0]}; expected {student_weight.shape[0]}, that of"
            " student_weight, or vocab_size"
        )
    check_device("teacher_hidden", teacher_hidden, student_hidden)


def check_vocab_size(vocab_size: int | None, weight: Tensor, name: str, vocab_group: object | None) -> None:
    """Raise ValueError unless the head of that name has so many entries, and no other rank has more of them."""
    if vocab_size is None:
        return
    if vocab_group is not None:
        raise ValueError("vocab_size: given with vocab_group; expected heads sharded without their padding")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size: {vocab_size}; expected 1 to {weight.shape[0]}, the rows of {name}")


def check_options(
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    beta: float = 1.0,
    clip: float | None = None,
    baseline: str | None = None,
    reduction: str = "mean",
    skip_tolerance: float | str | None = None,
    backend: str = "auto",
    **_: object,
) -> None:
    """Raise ValueError for an option that no tensors could make right; the others are ignored."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature}; expected a positive number")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: {softcap}; expected None or a positive number")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta}; expected 0 (forward KL) to 1 (reverse KL)")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip}; expected None or a positive number of nats")
    if baseline not in (None, "kl"):
        raise ValueError(f"baseline: {baseline!r}; expected None or 'kl'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r}; expected 'mean', 'sum' or 'none'")
    skip_limit(skip_tolerance, torch.float32)
    check_backend(backend)


def check_tokens(tokens: Tensor, hidden: Tensor) -> None:
    """Raise ValueError unless there is an int64 token for each hidden state."""
    leading = hidden.shape[:-1]
    if tokens.shape != leading or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: {tokens.dtype} {tuple(tokens.shape)}; expected int64 {tuple(leading)}")
    check_device("tokens", tokens, hidden)


def check_token_values(tokens_N: Tensor, scale_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every token that is not masked is an entry of the vocabulary.

    This reads the tokens, so it stands where the loss is computed, not where it is traced.
    """
    tokens_N = tokens_N[scale_N != 0]
    if tokens_N.numel() and not (0 <= int(tokens_N.min()) and int(tokens_N.max()) < vocabulary):
        raise ValueError(f"tokens: from {int(tokens_N.min())} to {int(tokens_N.max())}; expected 0 to {vocabulary - 1}")


def skip_limit(value: float | str | None, dtype: torch.dtype) -> float:
    """Return the relative error allowed in the gradient for the logits.

    Raises:
        ValueError: The value is neither None nor "auto" nor in [0, 1).
    """
    if value == "auto":
        return torch.finfo(dtype).eps / 20  # measured on real hidden states by bench/skipping.py
    if value is None:
        return 0.0
    if isinstance(value, str) or not 0 <= value < 1:
        raise ValueError(f"skip_tolerance: {value!r}; expected None, 'auto' or a number in [0, 1)")
    return float(value)


def token_scale(
    hidden: Tensor, mask: Tensor | None, token_weights: Tensor | None, reduction: str, products: torch.dtype
) -> Tensor:
    """Return the factor of each token of hidden [..., H] in the reduced loss, [N]; for "none", of its own value.

    Raises:
        ValueError: The mask or the weights are not bool / floating point of the leading shape, on the device of the
            hidden states.
    """
    leading = hidden.shape[:-1]
    if mask is not None and (mask.shape != leading or mask.dtype != torch.bool):
        raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(leading)}")
    if token_weights is not None and (token_weights.shape != leading or not token_weights.is_floating_point()):
        raise ValueError(
            f"token_weights: {token_weights.dtype} {tuple(token_weights.shape)}; expected floating point"
            f" {tuple(leading)}"
        )
    for name, x in (("mask", mask), ("token_weights", token_weights)):
        if x is not None:
            check_device(name, x, hidden)
    dtype = torch.float64 if products == torch.float64 else torch.float32
    scale = torch.ones(leading, dtype=dtype, device=hidden.device)
    if mask is not None:
        scale = scale * mask
    if reduction == "mean":
        scale = scale / scale.sum().clamp(min=1)
    if token_weights is not None:
        scale = scale * token_weights.detach().to(dtype)
    return scale.flatten()
