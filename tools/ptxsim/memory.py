"""Global and shared memory with the checks that make the emulator worth running.

Global memory: every access must lie inside one registered buffer and be aligned. Buffers get virtual
addresses far apart, so running off one of them never lands in another, and addresses are the same in every
run. Shared memory: a read must find bytes somebody wrote (and, for asynchronous copies, that have landed);
two warps must not touch the same byte in the same barrier interval unless both read, or write the same value.
Traffic: 32-byte sectors per warp request (coalescing) and shared memory wavefronts (bank conflicts).
"""

from dataclasses import dataclass

import numpy as np

from .dtypes import U8, U64, PtxError

SHARED_WINDOW = 0x7F5A00000000  # where generic addresses see shared memory
_FIRST_BUFFER = 1 << 40
_BUFFER_SPACING = 1 << 36
_SEVERAL_WARPS = -9
_CHECKED_SIZES = (2, 4, 8, 16)  # accesses that must be aligned to their size


@dataclass
class Buffer:
    start: int
    bytes: np.ndarray
    name: str


class GlobalMemory:
    def __init__(self):
        self._buffers = []
        self._starts = np.zeros(0, U64)
        self._known = {}

    def register(self, array, name=""):
        """Make a numpy array visible to kernels, in place; returns its device address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"buffer {name!r} is not contiguous")
        data = array.reshape(-1).view(U8)
        key = (data.ctypes.data, data.size)
        if key not in self._known:
            # Keep the host's misalignment below 16 bytes: a GPU would fault on a vector access there too.
            start = _FIRST_BUFFER + _BUFFER_SPACING * len(self._buffers) + data.ctypes.data % 16
            self._buffers.append(Buffer(start, data, name))
            self._starts = np.append(self._starts, U64(start))
            self._known[key] = start
        return self._known[key]

    def _locate(self, addresses, size, what):
        """Yield (which lanes, the buffer's bytes, their offsets in it) per buffer touched."""
        owner = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        for index in np.unique(owner):
            lanes = owner == index
            if index < 0:
                raise PtxError(f"{what}: address {int(addresses[lanes][0]):#x} below every buffer")
            buffer = self._buffers[index]
            offsets = (addresses[lanes] - U64(buffer.start)).astype(np.int64)
            if (offsets + size > buffer.bytes.size).any():
                raise PtxError(
                    f"{what}: out of bounds: buffer {buffer.name!r} of {buffer.bytes.size} bytes, "
                    f"byte offset {int(offsets.max())}..+{size}"
                )
            if size in _CHECKED_SIZES and (addresses[lanes] % U64(size)).any():
                raise PtxError(f"{what}: misaligned {size}-byte access in {buffer.name!r}")
            yield lanes, buffer.bytes, offsets

    def load(self, addresses, size, what="ld.global"):
        out = np.empty((len(addresses), size), U8)
        for lanes, data, offsets in self._locate(addresses, size, what):
            out[lanes] = data[offsets[:, None] + np.arange(size)]
        return out

    def store(self, addresses, values, what="st.global"):
        size = values.shape[1]
        for lanes, data, offsets in self._locate(addresses, size, what):
            data[offsets[:, None] + np.arange(size)] = values[lanes]


class SharedMemory:
    """Shared memory of one block. Pass lanes (thread indices) to have races between warps checked."""

    def __init__(self, size):
        self.size = size
        self.epoch = 1  # counts block barriers
        self._data = np.full(size, 0xFF, U8)
        self._written = np.zeros(size, bool)
        self._write_epoch = np.zeros(size, np.int32)
        self._read_epoch = np.zeros(size, np.int32)
        self._write_warp = np.zeros(size, np.int16)
        self._read_warp = np.zeros(size, np.int16)

    def _index(self, addresses, size, what):
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise PtxError(f"{what}: shared address {int(addresses.max())}+{size} outside {self.size}")
        if size <= 16 and (addresses % size).any():
            raise PtxError(f"{what}: misaligned shared access")
        return addresses[:, None] + np.arange(size)

    @staticmethod
    def _warps(lanes, shape):
        return np.broadcast_to((lanes >> 5).astype(np.int16)[:, None], shape)

    @staticmethod
    def _no_race(kind, index, conflict, what):
        if conflict.any():
            offset = int(index[conflict][0])
            raise PtxError(f"{what}: shared memory race ({kind}) between warps without a barrier, offset {offset}")

    def load(self, addresses, size, what="ld.shared", lanes=None):
        index = self._index(addresses, size, what)
        written = self._written[index]
        if not written.all():
            offset = int(addresses[~written.all(1)][0])
            raise PtxError(
                f"{what}: reads shared memory nobody wrote (or async data that has not landed), offset {offset}"
            )
        if lanes is not None:
            self._note_read(index, self._warps(lanes, index.shape), what)
        return self._data[index]

    def _note_read(self, index, warp, what):
        fresh = self._write_epoch[index] == self.epoch
        self._no_race("read after write", index, fresh & (self._write_warp[index] != warp), what)
        several = (self._read_epoch[index] == self.epoch) & (self._read_warp[index] != warp)
        self._read_epoch[index] = self.epoch
        self._read_warp[index] = warp
        several |= self._read_warp[index] != warp  # two warps read the byte in this very instruction
        self._read_warp[index[several]] = _SEVERAL_WARPS

    def store(self, addresses, values, what="st.shared", lanes=None):
        index = self._index(addresses, values.shape[1], what)
        if lanes is None:
            self._write_epoch[index] = 0
            self._data[index] = values
            self._written[index] = True
            return
        warp = self._warps(lanes, index.shape)
        read_by_other = (self._read_epoch[index] == self.epoch) & (self._read_warp[index] != warp)
        self._no_race("write after read", index, read_by_other, what)
        written_by_other = (self._write_epoch[index] == self.epoch) & (self._write_warp[index] != warp)
        self._no_race("write after write", index, written_by_other & (self._data[index] != values), what)
        self._write_epoch[index] = self.epoch
        self._write_warp[index] = warp
        self._data[index] = values
        self._written[index] = True
        lost = (self._write_warp[index] != warp) & (self._data[index] != values)
        self._no_race("write after write", index, lost, what)

    def invalidate(self, addresses, size, what):
        """The target of an asynchronous copy: reading it before the copy lands is an error."""
        self._written[self._index(addresses, size, what)] = False

    def load_tensor_operand(self, addresses):
        """Single bytes for wgmma, which must not read what a warp wrote since the last barrier."""
        fresh = self._write_epoch[addresses] == self.epoch
        self._no_race("wgmma operand written since the last barrier", addresses, fresh, "wgmma")
        return self.load(addresses, 1, "wgmma operand")


@dataclass
class GlobalTraffic:
    requests: int = 0
    sectors: int = 0
    bytes: int = 0

    @property
    def efficiency(self):
        """1.0 if every 32-byte sector moved was asked for in full; more if lanes read the same bytes."""
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0


@dataclass
class SharedTraffic:
    requests: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def bank_conflicts(self):
        return self.wavefronts - self.ideal_wavefronts


class TrafficCounters(dict):
    """e.g. counters["global.ld"].sectors, counters["shared.ldmatrix"].bank_conflicts."""

    def count(self, kind, addresses, size, lanes):
        for warp in np.unique(lanes >> 5):
            requested = addresses[(lanes >> 5) == warp]
            if kind.startswith("global"):
                self._count_sectors(kind, requested, size)
            else:
                self._count_wavefronts(kind, requested, size)

    def _count_sectors(self, kind, addresses, size):
        entry = self.setdefault(kind, GlobalTraffic())
        touched = addresses[:, None] + np.arange(0, size, min(size, 32))
        entry.requests += 1
        entry.sectors += len(np.unique((touched >> 5).ravel()))
        entry.bytes += size * len(addresses)

    def _count_wavefronts(self, kind, addresses, size):
        entry = self.setdefault(kind, SharedTraffic())
        entry.requests += 1
        lanes_together = 128 // max(size, 4)  # 32 lanes for 4 bytes each, 16 for 8, 8 for 16
        for first in range(0, len(addresses), lanes_together):
            group = addresses[first : first + lanes_together]
            words = np.unique(((group[:, None] >> 2) + np.arange(max(size // 4, 1))).ravel())
            entry.wavefronts += int(np.bincount(words & 31).max())
            entry.ideal_wavefronts += 1
