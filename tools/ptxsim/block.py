"""One thread block: registers of all threads, operand access, and the scheduler.

Each register is a numpy array with one element per thread. Among the threads that can run, those with the
lowest program counter go first, all together, until a branch or barrier: divergent warps therefore reconverge
by themselves.
"""

import re
import struct
from collections import Counter

import numpy as np

from .dtypes import DTYPES, U8, U32, U64, UNSIGNED_OF_SIZE, PtxError, unsupported
from .memory import SHARED_WINDOW, SharedMemory
from .registry import BUILDERS

NOT_WAITING = -1
_ENDS_STRAIGHT_LINE = frozenset(("bra", "ret", "exit", "bar", "barrier", "mbarrier"))
_IMMEDIATE = re.compile(r"-?\d|0[xXfFdD]")
_ADDRESS = re.compile(r"\[\s*([%\w$#]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_BUILD_ERRORS = (PtxError, KeyError, IndexError, ValueError, StopIteration, OverflowError, TypeError)
_RUN_ERRORS = (KeyError, IndexError, ValueError, TypeError)


class Block:
    def __init__(self, machine, kernel, params, grid, index, shape, dynamic_shared):
        """params: name -> (value, PTX type); shape: threads in x, y, z."""
        self.machine = machine
        self.kernel = kernel
        self.params = params
        self.num_threads = shape[0] * shape[1] * shape[2]
        self.lane = np.arange(self.num_threads)
        self.registers = {}
        self.shared = SharedMemory(kernel.static_shared + dynamic_shared)
        self.pc = np.zeros(self.num_threads, np.int64)
        self.waiting = np.full(self.num_threads, NOT_WAITING)  # number of the barrier a thread waits at
        self.done = np.zeros(self.num_threads, bool)
        self.spinning = np.zeros(self.num_threads, bool)  # failed mbarrier.try_wait; woken by any progress
        self.open_copies = []  # cp.async not yet committed
        self.committed_copies = []
        self.mbarriers = {}
        self.opcodes = Counter()
        self.instructions = 0
        self._specials = self._special_registers(grid, index, shape, dynamic_shared)
        self._code = [self._build(instruction) for instruction in kernel.program]

    def _special_registers(self, grid, index, shape, dynamic_shared):
        zero = 0 * self.lane
        specials = {
            "%laneid": self.lane & 31,
            "%warpid": self.lane >> 5,
            "%clock": zero,
            "%clock64": zero,
            "%cluster_ctarank": zero,
            "%dynamic_smem_size": zero + dynamic_shared,
            "%tid.x": self.lane % shape[0],
            "%tid.y": self.lane // shape[0] % shape[1],
            "%tid.z": self.lane // (shape[0] * shape[1]),
        }
        for axis, name in enumerate("xyz"):
            specials["%ntid." + name] = zero + shape[axis]
            specials["%ctaid." + name] = zero + index[axis]
            specials["%nctaid." + name] = zero + grid[axis]
            specials["%clusterid." + name] = zero + index[axis]
            specials["%cluster_ctaid." + name] = zero
        return specials

    # ---- operands: builders call these once and get a function that reads the current value

    def source(self, text, ptx_type):
        """() -> array of ptx_type with one value per thread."""
        dtype = DTYPES[ptx_type]
        text = text.strip()
        negated = text.startswith("!")
        text = text.lstrip("!")
        constant = self._constant(text, dtype)
        if constant is not None:
            return lambda: constant
        if not self.kernel.declares(text):
            raise PtxError("unknown operand " + text)
        if dtype.kind == "b":
            return lambda: ~self.registers[text] if negated else self.registers[text]

        def read():
            value = self.registers.get(text)
            if value is None:
                value = self.registers[text] = np.zeros(self.num_threads, UNSIGNED_OF_SIZE[dtype.itemsize])
            if value.dtype.kind == "b" or value.itemsize != dtype.itemsize:
                value = value.astype(UNSIGNED_OF_SIZE[dtype.itemsize])
            return value.view(dtype)

        return read

    def _constant(self, text, dtype):
        if text in self._specials:
            return self._specials[text].astype(dtype)
        if _IMMEDIATE.match(text):
            return self._immediate(text, dtype)
        if text in self.kernel.shared_symbols:
            return np.full(self.num_threads, self.kernel.shared_symbols[text], dtype)
        if text in self.machine.global_symbols:
            return np.full(self.num_threads, self.machine.global_symbols[text], dtype)
        if text in self.params:
            return np.full(self.num_threads, self.params[text][0]).astype(dtype)
        return None

    def _immediate(self, text, dtype):
        if text[:2] in ("0f", "0F"):
            value = np.array(int(text[2:], 16), U32).view(np.float32)
        elif text[:2] in ("0d", "0D"):
            value = np.array(int(text[2:], 16), U64).view(np.float64)
        else:
            number = int(text.rstrip("U"), 0)
            if dtype.kind == "b":
                return np.full(self.num_threads, number != 0)
            bits = number & ((1 << dtype.itemsize * 8) - 1)
            value = np.array(bits, UNSIGNED_OF_SIZE[dtype.itemsize])
        return np.full(self.num_threads, value.view(dtype) if value.itemsize == dtype.itemsize else value, dtype)

    def address(self, text):
        """() -> int64 addresses, for "[register + offset]"."""
        match = _ADDRESS.match(text)
        if not match:
            raise PtxError("address " + text)
        base, offset = match[1], int(match[2], 0) if match[2] else 0
        if re.match(r"-?\d", base):
            fixed = np.full(self.num_threads, int(base, 0) + offset, np.int64)
            return lambda: fixed
        symbols = (self.kernel.shared_symbols, self.machine.global_symbols, self.params)
        if any(base in table for table in symbols):
            read = self.source(base, "u64")
            return lambda: read().astype(np.int64) + offset
        return lambda: self.registers[base].astype(np.int64) + offset

    def write(self, register, values, mask):
        if register == "_":
            return
        values = np.asarray(values)
        if values.dtype.kind != "b":
            values = np.ascontiguousarray(values).view(UNSIGNED_OF_SIZE[values.itemsize])
        if mask is None:
            whole = values.shape == (self.num_threads,)
            self.registers[register] = values if whole else np.broadcast_to(values, (self.num_threads,)).copy()
            return
        old = self.registers.get(register)
        new = np.zeros(self.num_threads, values.dtype) if old is None else old.astype(values.dtype)
        np.copyto(new, values, where=mask)
        self.registers[register] = new

    def param_bytes(self, name, offset, size):
        value, ptx_type = self.params[name]
        if isinstance(value, bytes):
            data = value
        elif isinstance(value, float):
            data = struct.pack("<d" if ptx_type == "f64" else "<f", value)
        else:
            data = struct.pack("<Q", int(value) & (2**64 - 1))
        if offset + size > len(data):
            raise PtxError(f"ld.param: bytes {offset}..+{size} of the {len(data)}-byte parameter {name}")
        return data[offset : offset + size]

    def active(self, mask):
        """Thread indices that execute."""
        return self.lane if mask is None else np.nonzero(mask)[0]

    def active_warps(self, mask):
        """The same as rows of 32, for instructions that need whole warps."""
        lanes = self.active(mask)
        if len(lanes) % 32 or (lanes[::32] % 32).any() or (lanes[31::32] - lanes[::32] != 31).any():
            raise PtxError("a warp-wide instruction runs with part of a warp inactive")
        return lanes.reshape(-1, 32)

    # ---- memory of any state space

    def _in_shared_window(self, addresses):
        return ((addresses >= SHARED_WINDOW) & (addresses < SHARED_WINDOW + self.shared.size)).all()

    def _count_traffic(self, space, kind, addresses, size, lanes):
        if self.machine.traffic is not None and lanes is not None and len(lanes):
            place = "shared" if space == "shared" else "global"
            self.machine.traffic.count(f"{place}.{kind}", addresses, size, lanes)

    def load(self, space, addresses, size, lanes=None):
        """Pass lanes to have races checked and traffic counted (atomics do not)."""
        self._count_traffic(space, "ld", addresses, size, lanes)
        if space == "shared":
            return self.shared.load(addresses, size, lanes=lanes)
        if space == "generic" and self._in_shared_window(addresses):
            return self.shared.load(addresses - SHARED_WINDOW, size, lanes=lanes)
        return self.machine.memory.load(addresses.astype(U64), size)

    def store(self, space, addresses, values, lanes=None):
        self._count_traffic(space, "st", addresses, values.shape[1], lanes)
        if space == "shared":
            self.shared.store(addresses, values, lanes=lanes)
        elif space == "generic" and self._in_shared_window(addresses):
            self.shared.store(addresses - SHARED_WINDOW, values, lanes=lanes)
        else:
            self.machine.memory.store(addresses.astype(U64), values)

    # ---- execution

    def _build(self, instruction):
        """An instruction that cannot be built raises only if the program reaches it."""
        builder = BUILDERS.get(instruction.op[0])
        try:
            if builder is None:
                raise unsupported(instruction)
            return builder(self, instruction)
        except _BUILD_ERRORS as error:
            message = f"{type(error).__name__} {error} in: {instruction.text}"
            if isinstance(error, PtxError) and str(error).startswith("unsupported"):
                message = str(error)

        def fail(mask):
            raise PtxError(message)

        return fail

    def progress(self):
        """Something changed that a spinning thread may wait for."""
        self.spinning[:] = False

    def run(self, limit=10_000_000):
        with np.errstate(all="ignore"):
            while not self.done.all():
                self._run_lowest_group(limit)

    def _run_lowest_group(self, limit):
        ready = ~self.done & (self.waiting == NOT_WAITING)
        if not ready.any():
            stuck = sorted({self.kernel.program[pc - 1].text for pc in self.pc[~self.done]})
            raise PtxError("barrier divergence / deadlock: " + ", ".join(stuck))
        runnable = ready & ~self.spinning
        if not runnable.any():
            raise PtxError("deadlock: every live thread spins on an mbarrier")
        pc = self.pc[runnable].min()
        group = runnable & (self.pc == pc)
        others = self.pc[runnable & ~group]
        self._run_straight_line(pc, group, others.min() if len(others) else len(self.kernel.program), limit)

    def _run_straight_line(self, pc, group, stop, limit):
        """Run the group up to a branch, a barrier, or the place where other threads wait to join."""
        all_threads = group.all()
        while True:
            instruction = self.kernel.program[pc]
            self.opcodes[".".join(instruction.op[:2])] += 1
            self.instructions += 1
            if self.instructions > limit:
                raise PtxError("step limit")
            self.pc[group] = pc + 1
            try:
                mask = self._predicate(instruction, group, all_threads)
                if mask is None or mask.any():
                    self._code[pc](mask)
            except PtxError as error:
                raise PtxError(f"{error}\n  at: {instruction.text}") from None
            except _RUN_ERRORS as error:
                raise PtxError(f"{type(error).__name__} {error}\n  at: {instruction.text}") from error
            if instruction.op[0] in _ENDS_STRAIGHT_LINE:
                return
            pc += 1
            if pc >= stop:
                return

    def _predicate(self, instruction, group, all_threads):
        if instruction.predicate is None:
            return None if all_threads else group
        value = self.registers[instruction.predicate]
        if instruction.negated:
            value = ~value
        return None if all_threads and value.all() else value & group


def first_modifier(instruction, choices):
    """The one word of "shfl.sync.bfly.b32" that is among choices."""
    for word in instruction.op:
        if word in choices:
            return word
    raise unsupported(instruction)


def elementwise(block, operands, types, function, result_type=None):
    """run(mask) for: operands[0] = function(*operands[1:]); types is one PTX type or one per source."""
    same = isinstance(types, str)
    reads = [block.source(o, types if same else types[i]) for i, o in enumerate(operands[1:])]
    dtype = DTYPES[result_type or (types if same else types[0])]

    def run(mask):
        result = function(*[read() for read in reads])
        block.write(operands[0], np.asarray(result).astype(dtype, copy=False), mask)

    return run


def register_bytes(values):
    """Rows of register values as rows of bytes."""
    return np.ascontiguousarray(values).view(U8).reshape(len(values), -1)
