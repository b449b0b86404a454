"""The timing loop, the results that go on after an interruption, and peak memory."""

import pytest

from bench import harness, loss_cases
from bench.memory import peak_in_child
from bench.results import Case, Number


def test_cases_take_turns_and_the_warm_up_does_not_count():
    calls, clock = [], iter(range(100))
    steps = {name: lambda name=name: calls.append(name) for name in "ABC"}

    def tick(step):
        step()
        return float(next(clock))

    times = harness.time_in_turn(steps, rounds=2, warm_up=1, clock=tick)
    assert calls == list("ABCABCABC")
    assert times == {"A": [3, 6], "B": [4, 7], "C": [5, 8]}


def test_a_turn_may_begin_untimed_and_repeat():
    calls, clock = [], iter([1.0, 3.0, 5.0, 9.0])

    def tick(step):
        step()
        return next(clock)

    times = harness.time_in_turn({"A": lambda: calls.append(0)}, rounds=2, warm_up=0, untimed=1, repeat=2, clock=tick)
    assert times == {"A": [2.0, 7.0]} and len(calls) == 6


def test_numbers_are_medians_and_ratios_are_taken_round_by_round():
    slow, fast = [10.0, 4.0, 90.0], [5.0, 4.0, 30.0]
    assert Number.timed(slow, "ms") == Number(10.0, "ms", slow)
    assert Number.ratio(slow, fast) == Number(2.0, "1", [2.0, 1.0, 3.0])


CASES = [Case("a", "A", {"N": 1}, {"time": Number.timed([1.0, 2.0, 3.0], "ms")}), Case("b", "B", {}, {}, "missing")]


def never():
    raise AssertionError("measured again")


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "x.part.json"
    assert harness.Part(path, {"sizes": (1, 2)}).cases("first", lambda: CASES) == CASES
    part = harness.Part(path, {"sizes": (1, 2)})
    assert part.cases("first", never) == CASES
    assert part.cases("second", lambda: CASES[:1]) == CASES[:1]
    assert harness.Part(path, {"sizes": (1, 2)}).cases("second", never) == CASES[:1]
    part.discard()
    assert not path.exists()


def test_an_interrupted_run_of_other_conditions_is_refused(tmp_path):
    path = tmp_path / "x.part.json"
    harness.Part(path, {"machine": "this"}).cases("first", lambda: CASES)
    with pytest.raises(SystemExit, match="other machine; delete"):
        harness.Part(path, {"machine": "that"})


def test_peak_memory_holds_the_results_of_the_step():
    """A float32 head of 8 MiB gets a gradient, beside 2 MiB of logits twice; the inputs do not count."""
    peak = peak_in_child(loss_cases.step_of, "products", 64, 256, 8192, "float32")
    assert 8 << 20 < peak < 48 << 20


def test_a_child_that_dies_has_no_peak(capfd):
    assert peak_in_child(loss_cases.step_of, "no such way", 1, 1, 1, "float32") is None
    assert "KeyError" in capfd.readouterr().err
