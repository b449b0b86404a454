"""What the Triton kernels would take on an H100 by their own arithmetic, beside TRL 1.16. A model: nothing runs.

    python bench/gpu_model.py > gpu_model.md

The launchers of opsdl.kernels run on tensors without storage, with recorders in the place of the kernels. Counted is
therefore every launch that they make, with its tiles, workspace and flags; only TRL's numbers are typed in.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SHAPES = ((8192, 4096, 128256), (8192, 2048, 151936), (1024, 1024, 32000))  # N tokens, H hidden size, V vocabulary
PEAK, BANDWIDTH = 989e12, 3.35e12  # H100 SXM: dense bf16 operations a second, bytes of memory a second
PROCESSORS, L2_BYTES = 132, 50e6
KERNELS = {"forward": ("moments_kernel",), "backward": ("gradient_kernel", "product_kernel")}
BY_TOKEN, BY_ENTRY = ("hidden_ptr", "teacher_ptr"), ("weight_ptr", "teacher_weight_ptr")
RESULTS = ("moments_ptr", "picked_ptr", "grad_ptr")


@dataclass
class Work:
    launches: int = 0
    operations: float = 0.0
    tile_bytes: float = 0.0  # operands of tiles as the programs load them, from L2 or memory
    memory_bytes: float = 0.0  # loads that L2 does not serve, and results
    workspace_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.launches + other.launches,
            self.operations + other.operations,
            self.tile_bytes + other.tile_bytes,
            self.memory_bytes + other.memory_bytes,
            max(self.workspace_bytes, other.workspace_bytes),
        )

    @property
    def seconds(self) -> float:
        return max(self.operations / PEAK, self.memory_bytes / BANDWIDTH)


@dataclass
class Recorder:
    """Stands for a kernel, and adds up the work of what would have been launched."""

    kernel: Any
    work: dict[str, Work] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*values: Any, **named: Any) -> None:
            x = {**dict(zip(self.kernel.arg_names, values, strict=False)), **named}
            name, work = product_work(x) if "a_ptr" in x else logits_work(x, grid)
            self.work[name] = self.work.get(name, Work()) + work

        return launch


def logits_work(x: dict[str, Any], grid: tuple[int, ...]) -> tuple[str, Work]:
    """Tiles of logits from one or two products; with SHARED, one load of the head's tile serves both."""
    N, V, BN, BV = x["N"], x["V"], x["BN"], x["BV"]
    depths = [x["H"]] + [x["K"]] * bool(x["HAS_TEACHER"])
    heads = depths[:1] if x["SHARED"] else depths
    size = x["hidden_ptr"].element_size()
    loads = ceil_div(N, BN) * ceil_div(V, BV) * size * (BN * sum(depths) + BV * sum(heads))
    by_token = sum(BN * t.shape[1] * size for t in (x[name] for name in BY_TOKEN) if t is not None)
    by_entry = sum(BV * t.shape[1] * size for t in (x[name] for name in BY_ENTRY) if t is not None)
    results = [t for t in (x.get(name) for name in RESULTS) if t is not None]
    memory = missed(programs(x, grid), by_token, by_entry)
    memory += sum(t.numel() * t.element_size() for t in results)
    return "moments" if "moments_ptr" in x else "logit gradient", Work(1, 2.0 * N * V * sum(depths), loads, memory)


def programs(x: dict[str, Any], grid: tuple[int, ...]) -> list[tuple[int, range]]:
    """(token tile, its vocabulary tiles) of every program, in the order in which they start."""
    tiles_n, tiles_v = ceil_div(x["N"], x["BN"]), ceil_div(x["V"], x["BV"])
    each = x.get("tiles_per_split", 1)
    group = x.get("GROUP", tiles_n)  # token tiles that take turns at one part of the vocabulary before others begin
    out = []
    for first in range(0, tiles_n, group):
        for part in range(0, tiles_v, each):
            out += [(n, range(part, min(part + each, tiles_v))) for n in range(first, min(first + group, tiles_n))]
    assert len(out) == math.prod(grid), "another order of programs: teach it to this model"
    return out


def missed(order: list[tuple[int, range]], token_bytes: int, entry_bytes: int) -> float:
    """Bytes read from memory, with PROCESSORS programs in step and an L2 that drops what was used longest ago."""
    held: OrderedDict[tuple[str, int], int] = OrderedDict()
    total = used = 0
    for start in range(0, len(order), PROCESSORS):
        wave = order[start : start + PROCESSORS]
        for step in range(max(len(entries) for _, entries in wave)):
            for tile_n, entries in wave:
                if step >= len(entries):
                    continue
                for key, size in ((("token", tile_n), token_bytes), (("entry", entries[step]), entry_bytes)):
                    if key in held:
                        held.move_to_end(key)
                        continue
                    held[key] = size
                    total, used = total + size, used + size
                    while used > L2_BYTES:
                        used -= held.popitem(last=False)[1]
    return total


def product_work(x: dict[str, Any]) -> tuple[str, Work]:
    M, N, K, BM, BN, size = x["M"], x["N"], x["K"], x["BM"], x["BN"], x["a_ptr"].element_size()
    loads = ceil_div(M, BM) * ceil_div(N, BN) * K * (BM + BN) * size
    memory = size * (M * K + K * N) + 4 * M * N * (2 if x["ADD"] else 1)
    return "dHead" if x["a_row"] == 1 else "dHidden", Work(1, 2.0 * M * N * K, loads, memory)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@contextlib.contextmanager
def recorders(package: str) -> Iterator[dict[str, Work]]:
    """Within: the launchers of the package fill the yielded table instead of launching."""
    work: dict[str, Work] = {}
    with contextlib.ExitStack() as undo:
        for file, names in KERNELS.items():
            module = importlib.import_module(f"{package}.{file}")
            for name in names:
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, Recorder(getattr(module, name), work))
        yield work


def count(N: int, H: int, V: int, package: str = "opsdl.kernels") -> dict[str, Work]:
    """Work of each kernel for one reverse KL and its gradients in bf16, student and teacher of one head."""
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    gap_form_N, index_N = empty(N, dtype=torch.int8), empty(N, dtype=torch.int64)
    factors_6N = [empty(N, dtype=torch.float32) for _ in range(6)]
    gradients = empty(N, H), empty(V, H, dtype=torch.float32), None
    forward, backward = (importlib.import_module(f"{package}.{name}") for name in KERNELS)
    operands = importlib.import_module(f"{package}.operands").Operands(
        empty(N, H), empty(V, H), None, empty(N, H), None, None, gap_form_N, index_N, None, 1.0, None
    )
    with recorders(package) as work, Allocations() as allocated:
        moments_7SN, _ = forward.linear_moments(operands)
        work["moments"].workspace_bytes = moments_7SN.numel() * 4
        allocated.bytes.clear()
        backward.linear_gradient(operands, factors_6N, *gradients)
        work["logit gradient"].workspace_bytes = sum(allocated.bytes)
    return work


class Allocations(TorchFunctionMode):
    """Bytes of each torch.empty or torch.zeros within."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.zeros):
            self.bytes.append(out.numel() * out.element_size())
        return out


def trl(N: int, H: int, V: int) -> Work:
    """TRL 1.16's ChunkedDivergenceFunction at beta 1, from its source: six products of cuBLAS, tiles of 4096 x 32768.

    Of every pair of logits: float32 written by the products and read by its kernel, twice (forward, recomputation);
    then the gradient written as float32, read, written as bf16, and read by two products.
    """
    chunks_n, chunks_v = ceil_div(N, 4096), ceil_div(V, 32768)
    logits = N * V * (2 * (8 + 8) + 4 + 4 + 2 + 2 * 2)
    head = 2 * V * H * 5 * chunks_n + 8 * V * H * chunks_n  # five reads in bf16; dHead read and written in float32
    hidden = 2 * N * H * 5 * chunks_v + 8 * N * H * chunks_v
    return Work(0, 6 * 2.0 * N * V * H, 0.0, logits + head + hidden, 2 * min(N, 4096) * 32768 * 4)


def whole_seconds(work: dict[str, Work]) -> float:
    return sum(part.seconds for part in work.values())  # one kernel after another


def row(name: str, work: Work, product: float, seconds: float | None = None) -> str:
    bound = "products" if work.operations / PEAK >= work.memory_bytes / BANDWIDTH else "memory"
    cells = [name, work.launches or "-", f"{work.operations / product:.2f}", f"{work.operations / 1e12:.2f}"]
    cells += [f"{work.tile_bytes / 1e9:,.1f}", f"{work.operations / work.tile_bytes:.0f}"] if work.tile_bytes else "--"
    cells += [f"{work.memory_bytes / 1e9:.1f}", f"{work.workspace_bytes / 2**20:,.1f}" if work.workspace_bytes else "-"]
    return "| " + " | ".join(str(cell) for cell in [*cells, f"{1e3 * (seconds or work.seconds):.2f}", bound]) + " |"


def table(N: int, H: int, V: int, package: str = "opsdl.kernels") -> str:
    product = 2.0 * N * V * H
    columns = ("kernel", "launches", "products", "TFLOP", "tile loads GB", "FLOP/B", "memory GB", "workspace MiB")
    columns += ("roofline ms", "bound")
    lines = [f"## N={N} H={H} V={V}, bf16\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    work = count(N, H, V, package)
    lines += [row(name, part, product) for name, part in work.items()]
    lines.append(row("**opsdl**", sum(work.values(), Work()), product, whole_seconds(work)))
    lines.append(row("TRL 1.16", trl(N, H, V), product))
    lines.append(row("four bare products", Work(0, 4 * product, 0.0, 0.0), product))
    return "\n".join(lines) + "\n"


HEADER = """\
# The kernels on an H100 SXM: a model, not a measurement

Nothing here was timed. Reverse KL and its gradients for hidden states and head, one head for student and teacher, from
the launches that the launchers make. A product is 2 N V H operations. **Tile loads** are what programs load for their
tiles, most of it from L2, and FLOP/B the operations for each byte of it. **Memory** is what an L2 of 50 MB does not
serve when 132 programs run in step, and the results; products from the workspace, and TRL's six, are counted as if they
read their operands once. **Workspace** is what is allocated besides dHidden and a float32 dHead. The **roofline** is
the larger of operations / 989 TFLOP/s and memory / 3.35 TB/s, and for a whole the sum of its kernels'.

A token whose hidden states are close and need more than bf16 for their difference (`kernels/operands.py`) takes a third
product in the two kernels of logits, which is not counted.
"""


def main() -> int:
    if importlib.util.find_spec("triton") is None:
        print("gpu_model: triton is not installed", file=sys.stderr)
        return 2
    print(HEADER)
    print("\n".join(table(*shape) for shape in SHAPES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
