"""The one timing loop of all benches, what long runs keep on disk, and the options that every bench has."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from bench.results import RESULTS, Case
from opsdl.files import write_whole

ROUNDS = 5  # rounds that count; no bench takes fewer

Step = Callable[[], object]
Say = Callable[[str], None]
Clock = Callable[[Step], float]  # runs the step once and returns milliseconds


def wall_clock(step: Step) -> float:
    start = perf_counter()
    result = step()
    milliseconds = (perf_counter() - start) * 1000
    del result  # giving the memory back is not part of the step
    return milliseconds


def cuda_clock(step: Step) -> float:
    """Milliseconds between two events on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_in_turn(
    steps: Mapping[str, Step],
    *,
    rounds: int = ROUNDS,
    warm_up: int = 1,
    untimed: int = 0,
    repeat: int = 1,
    clock: Clock = wall_clock,
    say: Say | None = None,
) -> dict[str, list[float]]:
    """Time every step once a round, A B C A B C ..., so that a noisy minute hits all of them.

    Args:
        steps: Name -> what is timed, in the order of their turns.
        rounds: The number of rounds that count.
        warm_up: The number of rounds before them that do not.
        untimed: How often a step runs at the start of its turn before it is timed. The first run pays for memory that
            the step before it gave back to the system, and for code that other steps made torch compile again.
        repeat: How often a step is run and timed in one turn; the time is the mean.
        clock: Runs a step and returns milliseconds: `wall_clock`, or `cuda_clock` for work on a GPU.
        say: Told the times of every round.

    Returns:
        Name -> milliseconds of every round that counts.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warm_up + rounds):
        for name, step in steps.items():
            for _ in range(untimed):
                step()
            times[name].append(sum(clock(step) for _ in range(repeat)) / repeat)
        if say is not None:
            which = f"round {index - warm_up + 1} of {rounds}" if index >= warm_up else "warm-up"
            say(f"{which}: " + ", ".join(f"{name} {found[-1]:.4g} ms" for name, found in times.items()))
    return {name: found[warm_up:] for name, found in times.items()}


def speaker(title: str) -> Say:
    """A function that prints to stderr what a bench is doing, with the title and the seconds since now."""
    start = monotonic()
    return lambda text: print(f"{title} | {monotonic() - start:5.0f} s | {text}", file=sys.stderr, flush=True)


class Part:
    """What a long run has measured so far, on disk: after an interruption the same command goes on from there.

    Args:
        path: NAME.part.json. A file that is there already must be of a run under the same conditions.
        conditions: All that must not differ between the two halves of a run: machine, versions, settings.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self._path, self._conditions = path, json.loads(json.dumps(conditions))
        self._measured: dict[str, list[dict[str, Any]]] = {}
        if not path.exists():
            return
        before = json.loads(path.read_text())
        for key, value in self._conditions.items():
            if before["conditions"].get(key) != value:
                sys.exit(f"{path}: an interrupted run of other {key}; delete the file to start anew")
        self._measured = before["measured"]
        print(f"going on with {path}", file=sys.stderr)

    def cases(self, key: str, measure: Callable[[], list[Case]]) -> list[Case]:
        """What `measure` returns: from the file if an earlier run measured `key`, else measured now and written."""
        if key not in self._measured:
            self._measured[key] = [asdict(case) for case in measure()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps({"conditions": self._conditions, "measured": self._measured}, indent=1))
        return [Case.read(case) for case in self._measured[key]]

    def discard(self) -> None:
        """Remove the file, once the whole result is written."""
        self._path.unlink(missing_ok=True)


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has, under its docstring."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc, formatter_class=form)
    made.add_argument("--quick", action="store_true", help="a tiny size, to see that it runs; needs --out")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results, bench/results unless given")
    return made


def parse(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse, keep the command line as `command`, and set torch's threads."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = made.parse_args(arguments)
    if options.quick and options.out.resolve() == RESULTS.resolve():
        made.error("--quick: give --out DIR too; its numbers say nothing and do not belong into bench/results")
    options.command = shlex.join([*made.prog.split(), *arguments])
    torch.set_num_threads(options.threads)
    return options
