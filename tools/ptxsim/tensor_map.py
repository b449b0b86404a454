"""TMA (cp.async.bulk.tensor), with tensor maps made on the host or in the kernel.

A loaded tile lands at the phase flip of its mbarrier. Simplifications: a TMA store is complete at once;
fence.proxy.async has no effect. Not modelled: im2col, gather.
"""

import copy
import re
from dataclasses import dataclass, field

import numpy as np

from .dtypes import U8, U64, unsupported
from .mbarrier import complete_phase, mbarrier_at
from .registry import instruction


@dataclass
class TensorMap:
    """A tiled TMA descriptor: innermost dimension first; strides in bytes, from the second dimension on."""

    base: int = 0
    dims: list = field(default_factory=list)
    strides: list = field(default_factory=list)
    box: list = field(default_factory=list)
    item_size: int = 2
    swizzle: int = 128  # bytes: 16 (none), 32, 64 or 128

    def tile(self, coordinates):
        """(inside, global address, offset in shared memory) of every element of the box at coordinates."""
        rank = len(coordinates)
        index = np.indices(self.box[::-1]).reshape(rank, -1)[::-1]
        position = [coordinates[i] + index[i] for i in range(rank)]
        inside = np.logical_and.reduce([(p >= 0) & (p < self.dims[i]) for i, p in enumerate(position)])
        address = self.base + position[0] * self.item_size
        offset = index[0] * self.item_size
        pitch = self.box[0] * self.item_size
        for i in range(1, rank):
            address = address + position[i] * self.strides[i - 1]
            offset = offset + index[i] * pitch
            pitch *= self.box[i]
        return inside, address, offset


def _swizzled(addresses, swizzle):
    return addresses ^ (((addresses >> 7) & (swizzle // 16 - 1)) << 4) if swizzle > 16 else addresses


def tensor_copy(block, ins):
    spaces = [word.split("::")[0] for word in ins.op if word.startswith("shared") or word == "global"]
    is_load = spaces[0] == "shared"
    if any(word.startswith(("im2col", "tile::")) for word in ins.op):
        raise unsupported(ins)
    map_operand = ins.operands[1] if is_load else ins.operands[0]
    match = re.match(r"\[\s*([%\w$#]+)\s*,\s*\{(.*)\}\s*\]", map_operand)
    read_map = block.source(match[1], "u64")
    read_coordinates = [block.source(text, "s32") for text in match[2].split(",")]
    shared_address = block.address(ins.operands[0] if is_load else ins.operands[1])
    barrier_address = block.address(ins.operands[2]) if is_load else None

    def run(mask):
        for lane in block.active(mask):
            tensor_map = block.machine.tensor_map(int(read_map()[lane]))
            inside, source, offset = tensor_map.tile([int(read()[lane]) for read in read_coordinates])
            shared = _swizzled(int(shared_address()[lane]) + offset, tensor_map.swizzle)
            if is_load:
                barrier = mbarrier_at(block, int(barrier_address()[lane]))
                _tensor_load(block, tensor_map, inside, source, shared, barrier)
            else:
                data = block.shared.load(shared, tensor_map.item_size, "TMA store")
                block.machine.memory.store(source[inside].astype(U64), data[inside], "TMA store")

    return run


def _tensor_load(block, tensor_map, inside, source, shared, barrier):
    data = np.zeros((len(source), tensor_map.item_size), U8)  # elements outside the tensor are zero
    if inside.any():
        addresses = source[inside].astype(U64)
        data[inside] = block.machine.memory.load(addresses, tensor_map.item_size, "TMA load")
    barrier.transaction_bytes -= data.size
    barrier.landing.append((shared, data))
    block.shared.invalidate(shared, tensor_map.item_size, "TMA load")
    complete_phase(block, barrier)


_ITEM_SIZE = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_LIST_FIELDS = {"box_dim": "box", "global_dim": "dims", "global_stride": "strides"}


def _set_field(tensor_map, name, position, value):
    if name == "global_address":
        tensor_map.base = value
    elif name == "swizzle_mode":
        tensor_map.swizzle = {0: 16, 1: 32, 2: 64, 3: 128}[value]
    elif name == "elemtype":
        tensor_map.item_size = _ITEM_SIZE[value]
    elif name in _LIST_FIELDS:
        entries = getattr(tensor_map, _LIST_FIELDS[name])
        entries.extend([0] * (position + 1 - len(entries)))
        entries[position] = value


@instruction("tensormap")
def _tensormap(block, ins):
    if ins.has("replace"):  # the kernel edits a copy in shared memory ...
        address, read_value = block.address(ins.operands[0]), block.source(ins.operands[-1], "u64")
        position = int(ins.operands[1], 0) if len(ins.operands) == 3 else 0

        def replace(mask):
            lane = block.active(mask)[0]
            key = ("shared", int(address()[lane]))
            tensor_map = block.machine.tensor_maps.setdefault(key, TensorMap())
            _set_field(tensor_map, ins.op[3], position, int(read_value()[lane]))

        return replace
    if ins.has("cp_fenceproxy"):  # ... and publishes it to global memory
        target, source = block.address(ins.operands[0]), block.address(ins.operands[1])

        def publish(mask):
            lane = block.active(mask)[0]
            edited = block.machine.tensor_maps[("shared", int(source()[lane]))]
            block.machine.tensor_maps[int(target()[lane])] = copy.deepcopy(edited)

        return publish
    raise unsupported(ins)
