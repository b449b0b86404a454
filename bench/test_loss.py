"""Single cases under pytest-benchmark, and what must hold of the errors.

    python -m pytest bench/test_loss.py -k "opsdl-auto and bfloat16 and N1024"

pytest-benchmark runs one case after the other; on a machine with other work, compare with `python -m bench.loss`,
where the cases take turns.
"""

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import ROUNDS
from bench.inputs import DTYPES, NOISE, SHAPES, Shape, make_inputs, relative_error, truth
from bench.loss_cases import TIMED_NOISE, WAYS, Differentiate

SMALL = Shape(64, 96, 2048)
make_inputs_once = lru_cache(maxsize=1)(make_inputs)  # the cases of one shape and dtype follow one another


def make_step(name: str) -> Differentiate:
    try:
        return WAYS[name].make()
    except ImportError as error:
        pytest.skip(f"not installed: {error}; see bench/requirements-peers.txt")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape.N}-H{shape.H}-V{shape.V}")
def test_speed(benchmark: BenchmarkFixture, shape: Shape, dtype: str, name: str) -> None:
    torch.compiler.reset()
    torch.set_num_threads(2)
    benchmark.group = f"{shape} {dtype}"
    inputs = make_inputs_once(shape, dtype, TIMED_NOISE)
    benchmark.pedantic(make_step(name), args=(inputs,), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith("opsdl") and name != "opsdl-ce"])
def test_our_error_is_the_rounding_of_the_result(name: str, level: int, dtype: str) -> None:
    """At any KL the error is that of a gradient rounded to the dtype, or in float32 of a few sums."""
    inputs = make_inputs(SMALL, dtype, NOISE[dtype][level])
    expected, result = truth(inputs), make_step(name)(inputs)
    bound = torch.finfo(torch.bfloat16).eps / 2 if dtype == "bfloat16" else 50 * torch.finfo(torch.float32).eps
    assert relative_error(result.loss, expected.loss) < bound
    assert relative_error(result.grad_hidden_NH, expected.grad_hidden_NH) < bound
    assert relative_error(result.grad_weight_VH, expected.grad_weight_VH) < bound


def test_the_truth_agrees_with_autograd() -> None:
    """The float64 formula, written for small KL, against the plain one differentiated by torch, where both are good."""
    inputs = make_inputs(SMALL, "float64", 0.3)
    x = inputs.leaves()
    log_p, log_q = ((h @ x.weight_VH.T).log_softmax(-1) for h in (x.hidden_NH, x.teacher_NH))
    loss = (log_p.exp() * (log_p - log_q.detach())).sum(-1).mean()
    got = truth(inputs)
    assert relative_error(got.loss, loss.detach()) < 1e-12
    for gradient, expected in zip(got[1:], torch.autograd.grad(loss, (x.hidden_NH, x.weight_VH)), strict=True):
        assert relative_error(gradient, expected) < 1e-12
