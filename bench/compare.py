"""Run every case at every shape and dtype, round-robin, and write loss.json, loss.md and loss.png.

    python -m bench.compare            # the table of the README, into bench/results/
    python -m bench.compare --shape 64,128,4096 --out DIR

Finished shapes are kept in loss.part.json: after an interruption the same command goes on there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench.cases import CASES
from bench.inputs import DTYPES, SHAPES, Shape
from bench.machine import machine_facts
from bench.measure import ROUNDS, TIMED_NOISE, measure, measure_accuracy
from bench.report import RESULTS, write_report
from opsdl.files import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shape, action="append", metavar="N,H,V", help="instead of the usual three")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        run(options.shape or list(SHAPES), options.threads, options.out)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with the shape that was cut off")


def run(shapes: list[Shape], threads: int, out: Path) -> None:
    """Do what is not in the part file yet, then turn it into the results."""
    part = out / "loss.part.json"
    results = _begin(part, threads)
    tasks = [(f"{shape} {dtype}", measure, (shape, dtype, threads)) for shape in shapes for dtype in DTYPES]
    # Errors need the head's float64 gradient too, so they are measured on the first shape, with few tokens.
    small = Shape(min(128, shapes[0].N), shapes[0].H, shapes[0].V)
    tasks += [(f"accuracy {small} {dtype}", measure_accuracy, (small, dtype)) for dtype in DTYPES]
    for index, (key, function, arguments) in enumerate(tasks):
        say = _progress(f"[{index + 1}/{len(tasks)}] {key}")
        if key in results["measured"]:
            say("done before")
            continue
        results["measured"][key] = function(*arguments, say)
        write_whole(part, json.dumps(results, indent=1))
    # Only what was asked for now, in this order: the part file may hold shapes of an earlier command.
    results["measured"] = {key: results["measured"][key] for key, _, _ in tasks}
    write_whole(out / "loss.json", json.dumps(results, indent=1))
    part.unlink()
    write_report(out)
    print(f"written: {out / 'loss.md'}, with loss.json and loss.png beside it")


def _begin(part: Path, threads: int) -> dict[str, Any]:
    """The results so far: those of an interrupted run on the same machine and versions, or none."""
    results = {
        "machine": machine_facts(threads),
        "rounds": ROUNDS,
        "noise": TIMED_NOISE,
        "cases": {name: {"label": case.label, "kind": case.kind} for name, case in CASES.items()},
        "measured": {},
    }
    if not part.exists():
        return results
    before = json.loads(part.read_text())
    for key in ("rounds", "noise", "cases", "machine"):
        then, now = before[key], results[key]
        if key == "machine":
            then, now = ({**facts, "date": None} for facts in (then, now))
        if then != now:
            sys.exit(f"{part}: an interrupted run of other {key}; delete the file to start anew")
    print(f"going on with {part}")
    return before


def _progress(title: str) -> Callable[[str], None]:
    start = monotonic()
    return lambda text: print(f"{title} | {monotonic() - start:5.0f} s | {text}", flush=True)


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


if __name__ == "__main__":
    main()
