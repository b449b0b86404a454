"""mbarrier: threads and arriving bytes that a phase waits for, and the data that lands when it flips."""

from dataclasses import dataclass, field

import numpy as np

from .dtypes import PtxError, unsupported
from .registry import instruction


@dataclass
class MBarrier:
    expected: int
    pending: int
    transaction_bytes: int = 0
    phase: int = 0
    landing: list = field(default_factory=list)  # TMA data that arrives with the phase flip


def mbarrier_at(block, address):
    if address not in block.mbarriers:
        raise PtxError(f"mbarrier at shared address {address} was never initialised")
    return block.mbarriers[address]


def complete_phase(block, barrier):
    if barrier.pending or barrier.transaction_bytes:
        return
    for addresses, data in barrier.landing:
        block.shared.store(addresses, data, "TMA")
    barrier.landing = []
    barrier.phase ^= 1
    barrier.pending = barrier.expected
    block.progress()


@instruction("mbarrier")
def _mbarrier_instruction(block, ins):
    builders = {
        "init": _mbarrier_init,
        "inval": _mbarrier_inval,
        "arrive": _mbarrier_arrive,
        "expect_tx": _mbarrier_expect,
        "try_wait": _mbarrier_wait,
        "test_wait": _mbarrier_wait,
    }
    if ins.op[1] not in builders:
        raise unsupported(ins)
    return builders[ins.op[1]](block, ins)


def _mbarrier_init(block, ins):
    address, read_count = block.address(ins.operands[0]), block.source(ins.operands[1], "u32")

    def run(mask):
        lane = block.active(mask)[0]
        count = int(read_count()[lane])
        block.mbarriers[int(address()[lane])] = MBarrier(expected=count, pending=count)

    return run


def _mbarrier_inval(block, ins):
    address = block.address(ins.operands[0])

    def run(mask):
        block.mbarriers.pop(int(address()[block.active(mask)[0]]), None)

    return run


def _mbarrier_arrive(block, ins):
    bracketed = next(i for i, text in enumerate(ins.operands) if text.startswith("["))
    address = block.address(ins.operands[bracketed])
    extra = ins.operands[bracketed + 1 :]
    read_extra = block.source(extra[0], "u32") if extra else None
    expects_bytes = ins.has("expect_tx")

    def run(mask):
        for lane in block.active(mask):
            barrier = mbarrier_at(block, int(address()[lane]))
            amount = int(read_extra()[lane]) if read_extra else 1
            barrier.pending -= 1 if expects_bytes else amount
            barrier.transaction_bytes += amount if expects_bytes else 0
            complete_phase(block, barrier)

    return run


def _mbarrier_expect(block, ins):
    address, read_bytes = block.address(ins.operands[0]), block.source(ins.operands[1], "u32")

    def run(mask):
        for lane in block.active(mask):
            mbarrier_at(block, int(address()[lane])).transaction_bytes += int(read_bytes()[lane])

    return run


def _mbarrier_wait(block, ins):
    if not ins.has("parity"):
        raise unsupported(ins)
    address, read_parity = block.address(ins.operands[1]), block.source(ins.operands[2], "u32")

    def run(mask):
        lanes = block.active(mask)
        complete = np.zeros(block.num_threads, bool)
        for lane in lanes:
            barrier = mbarrier_at(block, int(address()[lane]))
            complete[lane] = barrier.phase != (int(read_parity()[lane]) & 1)
        block.write(ins.operands[0], complete, mask)
        block.spinning[lanes[~complete[lanes]]] = True

    return run
