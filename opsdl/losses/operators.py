"""The losses as registered operators: what autograd, torch.compile and torch.library.opcheck see.

    opsdl::reduced_loss             sum of value * scale, with its gradients taken in the same pass
    opsdl::token_losses             value * scale of each token
    opsdl::token_losses_backward    the pass again, for the gradients of sum(value * scale), scale being what arrived

All three take the fields of a `Call`. What they return is taken from a `Result`: a real one of the driver, or for the
fakes that torch.compile traces with, an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsdl.losses import driver
from opsdl.losses.arguments import check_token_values
from opsdl.losses.call import FIELDS, Call, Gradients, Wanted, kept, schema
from opsdl.losses.driver import Result

Outputs = tuple[Tensor, ...]


def _reduced_loss(call: Call, run: Callable[[Call], Result]) -> Outputs:
    """(loss, stats [S, N], dHidden, dWeight, dBias); an unwanted gradient is an empty tensor."""
    result = run(call)
    # Masked tokens may be anything; their value is 0, and 0 is what they add.
    return (result.values_N * call.scale_N).sum(), result.stats_SN, *_tensors(result)


def _token_losses(call: Call, run: Callable[[Call], Result]) -> Outputs:
    """(value * scale [N], stats [S, N])."""
    result = run(replace(call, wanted=Wanted(False, False, False)))
    return result.values_N * call.scale_N, result.stats_SN


def _token_losses_backward(call: Call, run: Callable[[Call], Result]) -> Outputs:
    """(dHidden, dWeight, dBias); an unwanted gradient is an empty tensor."""
    return _tensors(run(call))


def _tensors(result: Result) -> Outputs:
    """The gradients with empty tensors for those that are not wanted: an operator returns no None."""
    return tuple(result.values_N.new_empty(0) if x is None else x for x in result.gradients)


def _run(call: Call) -> Result:
    with torch.autocast(call.scale_N.device.type, enabled=False):
        if call.tokens_N is not None:
            check_token_values(call.tokens_N, call.scale_N, call.shards.total)
        return driver.run(call)


def _empty(call: Call) -> Result:
    """A result of the right shapes and dtypes."""
    pairs = zip(call.differentiable, call.wanted, strict=True)
    gradients = (x.new_empty(x.shape, dtype=kept(x.dtype)) if x is not None and want else None for x, want in pairs)
    stats_SN = call.scale_N.new_empty(len(call.statistics), call.scale_N.shape[0])
    return Result(torch.empty_like(call.scale_N), stats_SN, Gradients(*gradients))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)  # no zeros of a head's size in the place of gradients that nobody sends
    call = Call.unflat(inputs)
    ctx.wanted, ctx.yielded = call.wanted, call.yielded
    ctx.dtypes = [None if x is None else x.dtype for x in call.differentiable]
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    if grad is None:
        return _of_arguments(())
    times = _times_in_place if ctx.yielded and type(grad) is Tensor else torch.mul
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return _of_arguments(times(x, grad).to(dtype) if wanted else None for x, dtype, wanted in saved)


def _times_in_place(x: Tensor, grad: Tensor) -> Tensor:
    """x * grad without a second tensor of a head's size, unless the graph is kept for another backward."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return x * grad
    return x if grad.device.type == "cpu" and grad.item() == 1 else x.mul_(grad)


def _keep_call(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _run_again(ctx: Any, grad_N: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    if grad_N is None:
        return _of_arguments(())
    tensors = iter(ctx.saved_tensors)
    call = Call.unflat(next(tensors) if other is None else other[0] for other in ctx.others)
    gradients = torch.ops.opsdl.token_losses_backward(*replace(call, scale_N=call.scale_N * grad_N).flat())
    found = zip(gradients, call.differentiable, call.wanted, strict=True)
    return _of_arguments(x.to(given.dtype) if want and given is not None else None for x, given, want in found)


def _of_arguments(gradients: Any) -> tuple[Tensor | None, ...]:
    """What a backward returns: a gradient for each field of a `Call`, of which the first ones have any."""
    gradients = tuple(gradients)
    return (*gradients, *(None,) * (len(FIELDS) - len(gradients)))


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("opsdl losses have no second derivative; call backward without create_graph=True")


# Not torch.library.custom_op: at its first call it imports torch._dynamo, which takes seconds.
_LIBRARY = torch.library.Library("opsdl", "FRAGMENT")


def _register(name: str, returns: int, operator: Callable[[Call, Callable[[Call], Result]], Outputs]) -> None:
    def real(*arguments: Any) -> Outputs:
        return operator(Call.unflat(arguments), _run)

    def fake(*arguments: Any) -> Outputs:
        return operator(Call.unflat(arguments), _empty)

    _LIBRARY.define(f"{name}({schema()}) -> ({', '.join(['Tensor'] * returns)})")
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opsdl::{name}", fake, lib=_LIBRARY)


_register("reduced_loss", 5, _reduced_loss)
_register("token_losses", 2, _token_losses)
_register("token_losses_backward", 3, _token_losses_backward)
torch.library.register_autograd("opsdl::reduced_loss", _scale_gradients, setup_context=_keep_gradients, lib=_LIBRARY)
torch.library.register_autograd("opsdl::token_losses", _run_again, setup_context=_keep_call, lib=_LIBRARY)
