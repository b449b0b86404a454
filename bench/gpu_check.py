"""The kernels on the GPU at hand: errors against float64, times and memory, into bench/results/gpu_check.{json,md}.

    python bench/gpu_check.py         in a checkout, installed or not: it builds csrc/ in place first
    python bench/gpu_check.py --dry   the same steps on the CPU, tiny, with plain torch in the place of the kernels

Takes some minutes; the largest shape needs about 40 GB. It passes only if the compiled operators were loaded, Triton
kernels of ours were launched, and every error is within its limit: a fallback that gives right numbers is a failure
here. Peers that are not installed (bench/requirements-peers.txt) are left out by name, and so is what does not fit into
memory.

Exit code: 0 passed, 1 failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import checkout  # noqa: E402

checkout.make_importable()

import torch  # noqa: E402

from bench.gpu_claims import claim  # noqa: E402
from bench.gpu_place import CPU_IN_ITS_PLACE, GPU  # noqa: E402
from bench.results import RESULTS, Case  # noqa: E402


def built() -> Case:
    """Build the extensions for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    failure = checkout.build(f"{major}.{minor}")
    print(failure or "gpu_check: csrc/ is built", flush=True)
    return claim("csrc/ compiles in place", failure is None, (failure or "").strip().rpartition("\n")[2])


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python bench/gpu_check.py", description=__doc__, formatter_class=form)
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny; needs --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    options = parser.parse_args(arguments)
    if options.dry and options.out.resolve() == RESULTS.resolve():
        parser.error("--dry: give --out DIR too; its numbers do not belong into bench/results")
    if not options.dry and not torch.cuda.is_available():
        print("gpu_check: no GPU here (torch.cuda.is_available() is False); nothing was run")
        return 2
    cases = [] if options.dry else [built()]
    # Only now: importing opsdl's operators loads the libraries, and finds out which of them there are.
    from bench.gpu_stages import run

    return run(CPU_IN_ITS_PLACE if options.dry else GPU, options.out, cases)


if __name__ == "__main__":
    sys.exit(main())
