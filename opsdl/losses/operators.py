"""The losses as registered operators: what autograd, torch.compile and torch.library.opcheck see.

    opsdl::reduced_loss(..., scale)       sum of value * scale, with its gradients taken in the same pass
    opsdl::token_losses(..., scale)       value * scale of each token; opsdl::token_losses_backward runs the pass again
    with
                                          the gradient that arrived for each token

All three take the same arguments (`_ARGUMENTS`), flat: hidden [N, H], heads [V, H], tokens and scale [N].
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsdl.losses import driver, values
from opsdl.losses.arguments import check_token_values
from opsdl.losses.call import Head, OwnHead, Problem, SharedHead, kept
from opsdl.losses.shards import Shards

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? tokens, Tensor scale, str kind, float temperature, float? softcap, float beta, float? clip, "
    "float skip_tolerance, int vocab_size, str group, str backend, bool[] wanted"
)
_SCALE, _KIND, _WANTED = 7, 8, 17  # places of those arguments
_DIFFERENTIABLE = 3  # the first ones


def _problem(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, tokens, kind, temperature, softcap, beta, clip,
    skip_tolerance, vocab_size, group,
) -> Problem:  # fmt: skip
    group = dist.distributed_c10d._resolve_process_group(group) if group else None
    head = Head(weight[:vocab_size], None if bias is None else bias[:vocab_size], temperature, softcap)
    shards = Shards.of(vocab_size, group, hidden.device)
    if teacher_hidden is None:
        second = None
    elif teacher_weight is None:
        second = SharedHead(hidden, teacher_hidden, head)
    else:
        teacher_bias = None if teacher_bias is None else teacher_bias[:vocab_size]
        second = OwnHead(teacher_hidden, Head(teacher_weight[:vocab_size], teacher_bias, temperature, softcap))
    return Problem(
        kind, hidden, head, second, tokens, beta, clip, skip_tolerance, shards, padding=weight.shape[0] - vocab_size
    )


def _run(arguments: tuple, scale_N: Tensor, wanted: list[bool]) -> driver.Result:
    *rest, backend, _ = arguments
    with torch.autocast(scale_N.device.type, enabled=False):
        problem = _problem(*rest[:_SCALE], *rest[_SCALE + 1 :])
        if problem.tokens_N is not None:
            check_token_values(problem.tokens_N, scale_N, problem.shards.total)
        return driver.run(problem, scale_N, tuple(wanted), backend)


def _gradients(result: driver.Result) -> list[Tensor]:
    """The wanted ones, empty tensors for the others: an operator returns no None."""
    return [result.values_N.new_empty(0) if x is None else x for x in result[2:]]


def reduced_loss(*arguments):
    """(loss, stats [S, N], grad_hidden, grad_weight, grad_bias); an unwanted gradient is an empty tensor.

    yielded: the caller keeps no hand on the gradients, so the backward may scale them in place.
    """
    *arguments, _ = arguments
    scale_N = arguments[_SCALE]
    result = _run(arguments, scale_N, arguments[_WANTED])
    # Masked tokens may be anything; their value is 0, and 0 is what they add.
    return (result.values_N * scale_N).sum(), result.stats_SN, *_gradients(result)


def token_losses(*arguments):
    """(value * scale [N], stats [S, N])."""
    scale_N = arguments[_SCALE]
    result = _run(arguments, scale_N, [False] * 3)
    return result.values_N * scale_N, result.stats_SN


def token_losses_backward(*arguments):
    """The wanted gradients of sum(value * scale)."""
    return tuple(_gradients(_run(arguments, arguments[_SCALE], arguments[_WANTED])))


def _fake_stats(arguments: tuple) -> Tensor:
    tokens, scale, kind, skip_tolerance = arguments[6], arguments[_SCALE], arguments[_KIND], arguments[13]
    return scale.new_empty(len(values.names(kind, tokens is not None, skip_tolerance > 0)), scale.shape[0])


def _fake_gradients(arguments: tuple) -> list[Tensor]:
    pairs = zip(arguments[:_DIFFERENTIABLE], arguments[_WANTED], strict=True)
    return [
        x.new_empty(x.shape, dtype=kept(x.dtype)) if wanted else arguments[_SCALE].new_empty(0) for x, wanted in pairs
    ]


def _fake_reduced_loss(*arguments):
    return arguments[_SCALE].new_empty(()), _fake_stats(arguments), *_fake_gradients(arguments)


def _fake_token_losses(*arguments):
    return torch.empty_like(arguments[_SCALE]), _fake_stats(arguments)


def _fake_token_losses_backward(*arguments):
    return tuple(_fake_gradients(arguments))


def _keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros of a head's size in the place of gradients that nobody sends
    ctx.wanted, ctx.yielded = inputs[_WANTED:]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:_DIFFERENTIABLE]]
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx, grad, *_):
    _refuse_second_derivative()
    if grad is None:
        return (None,) * (_WANTED + 2)
    times = _times_in_place if ctx.yielded and type(grad) is Tensor else torch.mul
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    gradients = (times(x, grad).to(dtype) if wanted else None for x, dtype, wanted in saved)
    return (*gradients, *(None,) * (_WANTED + 2 - _DIFFERENTIABLE))


def _times_in_place(x: Tensor, grad: Tensor) -> Tensor:
    """x * grad without a second tensor of a head's size, unless the graph is kept for another backward."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return x * grad
    return x if grad.device.type == "cpu" and grad.item() == 1 else x.mul_(grad)


def _keep_inputs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _SCALE + 1])
    ctx.rest = inputs[_SCALE + 1 :]


def _run_again(ctx, grad_N, _):
    _refuse_second_derivative()
    if grad_N is None:
        return (None,) * (_WANTED + 1)
    *tensors, scale_N = ctx.saved_tensors
    gradients = torch.ops.opsdl.token_losses_backward(*tensors, scale_N * grad_N, *ctx.rest)
    inputs = zip(gradients, tensors[:_DIFFERENTIABLE], ctx.rest[-1], strict=True)
    wanted = (x.to(given.dtype) if want else None for x, given, want in inputs)
    return (*wanted, *(None,) * (_WANTED + 1 - _DIFFERENTIABLE))


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("opsdl losses have no second derivative; call backward without create_graph=True")


# Not torch.library.custom_op: at its first call it imports torch._dynamo, which takes seconds.
_LIBRARY = torch.library.Library("opsdl", "FRAGMENT")
for _name, _more, _returns, _function, _fake in (
    ("reduced_loss", ", bool yielded", 5, reduced_loss, _fake_reduced_loss),
    ("token_losses", "", 2, token_losses, _fake_token_losses),
    ("token_losses_backward", "", 3, token_losses_backward, _fake_token_losses_backward),
):
    _LIBRARY.define(f"{_name}({_ARGUMENTS}{_more}) -> ({', '.join(['Tensor'] * _returns)})")
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opsdl::{_name}", _fake, lib=_LIBRARY)
for _name, _backward, _setup in (
    ("reduced_loss", _scale_gradients, _keep_gradients),
    ("token_losses", _run_again, _keep_inputs),
):
    torch.library.register_autograd(f"opsdl::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)
