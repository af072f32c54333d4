"""The engine of a drive with an overlay, over the engines of its two files: reads across both, copies on write.

What is wholly in one file goes straight to that file's engine. A write to clusters that are not in the overlay writes
whole ones: what the guest does not bring of the first and the last is read from the base first. The clusters count as
mapped when all of that is written, and only then is the request done. While it is under way, no other request changes
clusters of its range; reads go on, and see what was there before.
"""

from __future__ import annotations

import mmap
from ctypes import addressof, c_char
from errno import EIO, EOPNOTSUPP

from base.lean_std import deque
from base.lean_typing import Any, Sequence
from ipc.guest_memory import GuestMemory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES_UNMAP, Buffer, Engine, IoRequest
from virtio.block.overlay.backing import OverlayBacking
from virtio.block.overlay.cluster_map import runs_of

#: Requests taken at a time, as the other engines take them.
ENTRIES = 128
#: Clusters being copied at a time, over all requests; the others wait.
COPIES = 8
_ZEROS = bytes(1 << 16)

Parts = Sequence[tuple[int, int]]


class _Job:
    """A request in more than one step. ``first`` and ``last`` are the clusters that it maps; none: last < first."""

    __slots__ = ("done", "error", "first", "last", "left", "request")

    def __init__(self, request: IoRequest, first: int = 0, last: int = -1) -> None:
        self.request = request
        self.first = first
        self.last = last
        #: Steps that are not done; one is held while steps are being added.
        self.left = 1
        self.done = 0
        self.error = 0


class _Step:
    """A part of a job that one of the two engines does; ``length`` bytes have to be done."""

    __slots__ = ("job", "length")

    def __init__(self, job: _Job, length: int) -> None:
        self.job = job
        self.length = length


class _Copy:
    """A cluster that is written as a whole: ``start`` and ``end`` within it are the request's, the rest the base's."""

    __slots__ = ("cluster", "end", "is_read", "job", "parts", "slot", "start")

    def __init__(self, job: _Job, cluster: int, start: int, end: int, parts: Parts) -> None:
        self.job = job
        self.cluster = cluster
        self.start = start
        self.end = end
        #: What the guest writes; empty for zeros.
        self.parts = parts
        self.slot = -1
        self.is_read = False


class _Flush:
    """A flush under way, for some requests at once. First the data, then what it makes true in the map."""

    __slots__ = ("jobs", "pending", "written")

    def __init__(self, jobs: list[_Job], pending: Sequence[tuple[int, bytes]]) -> None:
        self.jobs = jobs
        self.pending = pending
        self.written: Sequence[tuple[int, bytes]] = ()


class OverlayEngine(Engine):
    """It owns both engines, which have one event, or none. Made before the cell's seal, as they are.

    A flush that failed has lost nobody knows what: every later one fails, too.
    """

    def __init__(self, base: Engine, overlay: Engine, backing: OverlayBacking) -> None:
        super().__init__(backing)
        assert (base.event < 0) == (overlay.event < 0)
        self.event = overlay.event
        self._base = base
        self._overlay = overlay
        self._overlay_file = backing.overlay
        self._bits = backing.overlay.geometry.cluster_bits
        self._data = backing.overlay.geometry.data_offset
        self._view = memoryview(b"")
        self._pool = mmap.mmap(-1, COPIES << self._bits, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer = Buffer(memoryview(self._pool), addressof(c_char.from_buffer(self._pool)))
        self._slots = list(range(COPIES))
        self._copies: deque[_Copy] = deque()
        #: What an engine had no room for.
        self._backlog: deque[tuple[Engine, IoRequest]] = deque()
        #: Jobs that map clusters, and requests that wait for them.
        self._mapping: list[_Job] = []
        self._parked: list[IoRequest] = []
        self._flush: _Flush | None = None
        self._flush_waits: list[_Job] = []
        self._flush_error = 0
        self._done: list[tuple[Any, int]] = []

    def start(self, memory: GuestMemory) -> None:
        """Work with this guest memory."""
        self._view = memory.view
        self._base.start(memory)
        self._overlay.start(memory)

    # -- taking requests ----------------------------------------------------------------------------------------------

    def submit(self, request: IoRequest) -> bool:
        """Take a request."""
        if self.in_flight >= ENTRIES:
            return False
        kind, length = request.kind, request.length
        if kind == FLUSH:
            self._flush_for(_Job(request))
        elif not length:
            self._done.append((request.token, 0))
        else:
            first = request.offset >> self._bits
            count = (request.offset + length - 1 >> self._bits) + 1 - first
            bits = self._overlay_file.map.bits(first, count)
            if bits == (1 << count) - 1:
                self._overlay.write_through = self.write_through
                if not self._overlay.submit(request._replace(offset=request.offset + self._data)):
                    return False
            elif kind != READ:
                if kind == DISCARD:  # to do nothing would show what a base, or a crash, has left there
                    request = request._replace(kind=WRITE_ZEROES_UNMAP)
                self._change(request, first, count, bits)
            elif bits or request.offset + length > self._overlay_file.base_size:
                self._read(request, first, count, bits)
            elif not self._base.submit(request):
                return False
        self.in_flight += 1
        return True

    def kick(self) -> None:
        """Begin what was submitted since."""
        self._base.kick()
        self._overlay.kick()

    def _read(self, request: IoRequest, first: int, count: int, bits: int) -> None:
        """Read what is in both files, or behind the end of the base."""
        job = _Job(request)
        for start, end, is_mapped in self._pieces(request, first, count, bits):
            if is_mapped:
                self._step(job, self._overlay, (READ, start, end), self._data)
                continue
            border = min(max(start, self._overlay_file.base_size), end)
            if border > start:
                self._step(job, self._base, (READ, start, border))
            self._zero(self._parts(request, border, end))
            job.done += end - border
        self._settle(job)

    def _zero(self, parts: Parts) -> None:
        """Fill parts of guest memory with zeros."""
        for offset, length in parts:
            for at in range(offset, offset + length, len(_ZEROS)):
                count = min(len(_ZEROS), offset + length - at)
                self._view[at : at + count] = _ZEROS[:count]

    def _change(self, request: IoRequest, first: int, count: int, bits: int) -> None:
        """Write, or zero, where not all of the clusters are in the overlay."""
        last = first + count - 1
        if any(job.first <= last and first <= job.last for job in self._mapping):
            self._parked.append(request)
            return
        job = _Job(request, first, last)
        self._mapping.append(job)
        for begin, end, is_mapped in self._pieces(request, first, count, bits):
            start = begin if is_mapped else self._copy_head(job, begin, end)
            tail = end if is_mapped else self._copy_tail(job, start, end)
            if start < tail:
                self._step(job, self._overlay, (request.kind, start, tail), self._data)
        self._settle(job)

    def _copy_head(self, job: _Job, start: int, end: int) -> int:
        """Copy the first cluster of a piece, if it is not whole; return where whole ones begin."""
        mask = (1 << self._bits) - 1
        border = min(end, (start | mask) + 1)
        if not start & mask and (border == (start | mask) + 1 or border == self._overlay_file.geometry.size):
            return start
        self._copy(job, start, border)
        return border

    def _copy_tail(self, job: _Job, start: int, end: int) -> int:
        """Copy the last cluster of a piece, if it is not whole; return where whole ones end."""
        border = end & -(1 << self._bits)
        if start >= end or end in (border, self._overlay_file.geometry.size):
            return end
        self._copy(job, border, end)
        return border

    def _pieces(self, request: IoRequest, first: int, count: int, bits: int) -> list[tuple[int, int, bool]]:
        """Return (first byte, the one behind the last, whether it is in the overlay) of each piece of a request."""
        begin, end = request.offset, request.offset + request.length
        return [
            (max(begin, first + at << self._bits), min(end, first + at + length << self._bits), is_mapped)
            for at, length, is_mapped in runs_of(bits, count)
        ]

    def _parts(self, request: IoRequest, start: int, end: int) -> list[tuple[int, int]]:
        """Return where in guest memory a piece of a request is."""
        skip, left = start - request.offset, end - start
        found = []
        for offset, length in request.parts:
            if skip >= length:
                skip -= length
                continue
            taken = min(length - skip, left)
            if not taken:
                break
            found.append((offset + skip, taken))
            skip = 0
            left -= taken
        return found

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, job: _Job, engine: Engine, piece: tuple[int, int, int], shift: int = 0) -> None:
        """Have an engine do a piece of a job: kind, first byte, the one behind the last; ``shift`` bytes further on."""
        kind, start, end = piece
        job.left += 1
        parts = self._parts(job.request, start, end)
        self._submit(engine, IoRequest(kind, start + shift, end - start, parts, _Step(job, end - start)))

    def _submit(self, engine: Engine, request: IoRequest) -> None:
        if self._backlog or not engine.submit(request):
            self._backlog.append((engine, request))

    def _copy(self, job: _Job, start: int, end: int) -> None:
        """Write a part of a cluster that is not in the overlay."""
        request = job.request
        cluster = start >> self._bits
        begin = cluster << self._bits
        job.left += 1
        parts = self._parts(request, start, end) if request.kind == WRITE else ()
        self._copies.append(_Copy(job, cluster, start - begin, end - begin, parts))
        self._begin_copies()

    def _begin_copies(self) -> None:
        while self._copies and self._slots:
            copy = self._copies.popleft()
            copy.slot = self._slots.pop()
            begin = copy.cluster << self._bits
            length = max(0, min(self._overlay_file.base_size - begin, 1 << self._bits))
            if length:
                parts = [(copy.slot << self._bits, length)]
                self._submit(self._base, IoRequest(READ, begin, length, parts, copy, self._buffer))
            else:
                self._fill(copy, 0)

    def _fill(self, copy: _Copy, length: int) -> None:
        """The base's bytes are there, ``length`` of them: put the guest's over them, and write the cluster."""
        copy.is_read = True
        view, at = self._buffer.view, copy.slot << self._bits
        size = 1 << self._bits
        view[at + length : at + size] = bytes(size - length)
        if copy.parts:
            to = at + copy.start
            for offset, count in copy.parts:
                view[to : to + count] = self._view[offset : offset + count]
                to += count
        else:
            view[at + copy.start : at + copy.end] = bytes(copy.end - copy.start)
        self._submit(
            self._overlay,
            IoRequest(WRITE, self._data + (copy.cluster << self._bits), size, [(at, size)], copy, self._buffer),
        )

    def _copied(self, copy: _Copy, result: int) -> None:
        """A step of a copy has ended."""
        size = 1 << self._bits
        wanted = size if copy.is_read else min(self._overlay_file.base_size - (copy.cluster << self._bits), size)
        if result == wanted and not copy.is_read:
            self._fill(copy, wanted)
            return
        self._slots.append(copy.slot)
        self._ended(copy.job, copy.end - copy.start if result == wanted else min(result, 0) or -EIO)
        self._begin_copies()

    def _ended(self, job: _Job, result: int) -> None:
        """A step of a job has ended: bytes of the request, or -errno."""
        if result < 0:
            job.error = job.error or result
        else:
            job.done += result
        self._settle(job)

    def _settle(self, job: _Job) -> None:
        """One step less is to be waited for; after the last one the job is done."""
        job.left -= 1
        if job.left:
            return
        if job.first <= job.last:
            self._map(job)
            if not job.error and self.write_through:
                self._flush_for(job)
                return
        self._done.append((job.request.token, job.error or job.done))

    def _map(self, job: _Job) -> None:
        """All of a job's clusters are written: they are in the overlay from now on. Others may change them again."""
        self._mapping.remove(job)
        if not job.error:
            try:
                self._overlay_file.add(job.first, job.last - job.first + 1)
            except OSError as error:
                job.error = -(error.errno or EIO)
        parked, self._parked = self._parked, []
        for request in parked:
            first = request.offset >> self._bits
            count = (request.offset + request.length - 1 >> self._bits) + 1 - first
            self._change(request, first, count, self._overlay_file.map.bits(first, count))

    # -- flushes ------------------------------------------------------------------------------------------------------

    def _flush_for(self, job: _Job) -> None:
        self._flush_waits.append(job)
        if self._flush is None:
            self._begin_flush()

    def _begin_flush(self) -> None:
        """Flush what was done before; who asks meanwhile waits for the next one."""
        jobs, self._flush_waits = self._flush_waits, []
        self._flush = _Flush(jobs, self._overlay_file.map.pending())
        self._submit(self._overlay, IoRequest(FLUSH, 0, 0, (), self._flush))

    def _flushed(self, flush: _Flush, result: int) -> None:
        """The overlay's engine has done a flush."""
        map = self._overlay_file.map
        if result >= 0 and not self._flush_error:
            if flush.pending:
                try:
                    flush.written = self._overlay_file.write_durable(flush.pending)
                except OSError as error:
                    result = -(error.errno or EIO)
                else:
                    flush.pending = ()
                    self._submit(self._overlay, IoRequest(FLUSH, 0, 0, (), flush))
                    return
            else:
                map.settle(flush.written)
        if result < 0:
            self._flush_error = self._flush_error or result
        for job in flush.jobs:
            self._done.append((job.request.token, self._flush_error or job.done))
        self._flush = None
        if self._flush_waits:
            self._begin_flush()

    # -- what is done -------------------------------------------------------------------------------------------------

    def completions(self) -> Sequence[tuple[Any, int]]:
        """Return what was completed since, and go on with what it was waited for."""
        while True:
            ended = [*self._base.completions(), *self._overlay.completions()]
            for token, result in ended:
                kind = type(token)
                if kind is _Step:
                    self._ended(token.job, result if result < 0 or result == token.length else -EIO)
                elif kind is _Copy:
                    self._copied(token, result)
                elif kind is _Flush:
                    self._flushed(token, result)
                else:
                    self._done.append((token, result))
            if not self._push_backlog() and not ended:
                break
            self.kick()
        done = self._done
        self._done = []
        self.in_flight -= len(done)
        return done

    def _push_backlog(self) -> bool:
        """Hand on what had no room; tell whether anything was."""
        moved = False
        while self._backlog and self._backlog[0][0].submit(self._backlog[0][1]):
            self._backlog.popleft()
            moved = True
        return moved

    def replace_file(self, file: BackingFile) -> None:
        """A drive with an overlay keeps its files. Raises OSError."""
        raise OSError(EOPNOTSUPP, "a drive with an overlay keeps its files")

    def close(self) -> None:
        """Make what was written durable as far as the disk does it, and give everything back."""
        try:
            if not self._flush_error:
                self._overlay_file.flush()
        except OSError:
            pass  # what is lost was not acknowledged as durable
        self._base.close()
        self._overlay.close()
        self._buffer.view.release()
        self._buffer = Buffer(memoryview(b""), 0)
        self._pool.close()
