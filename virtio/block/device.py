"""The block device: queue → requests → engine → used (virtio 1.2, 5.2)."""

from __future__ import annotations

from errno import EIO
from time import monotonic_ns

from base import native_loops
from base.counters import Counters
from base.deferral import Deferral
from base.event_manager import EDGE_TRIGGERED, IN, EventOps
from base.lean_typing import Callable, Sequence
from virtio.abi import (
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_ID_BLOCK,
)
from virtio.block.backing_file import BackingFile
from virtio.block.configuration import (
    BLOCK_COUNTERS,
    BLOCK_SECTION,
    BlockSettings,
    BlockState,
    block_config,
    block_features,
    block_queue_sizes,
)
from virtio.block.engine import Engine
from virtio.block.file_engine import FileEngine
from virtio.block.flat import flat_loop
from virtio.block.native import native_loop
from virtio.block.request import (
    BlockRequest,
    Limits,
    answer_identity,
    parse,
    plan,
)
from virtio.block.tally import Sums, Tally
from virtio.device import Activation, VirtioDevice
from virtio.errors import VirtioError
from virtio.polling import AdaptivePolling
from virtio.queue import INDEX, Queue
from virtio.rate_limiter import Bucket, RateLimiter

#: Chains served in a turn, of a queue.
BUDGET = 256
#: What a loop returns when it waits for tokens, or for room in the engine.
BLOCKED = -1


class Block(VirtioDevice):
    """A drive. It owns its engine, and the engine owns the file."""

    kind = VIRTIO_ID_BLOCK
    SECTION = BLOCK_SECTION

    def __init__(
        self,
        id: str,
        engine: Engine,
        settings: BlockSettings,
        limiter: RateLimiter | None = None,
        state: BlockState | None = None,
    ) -> None:
        super().__init__(id, block_queue_sizes(settings), Counters(BLOCK_COUNTERS))
        self.engine = engine
        self.settings = settings
        self.read_only = settings.read_only
        #: What the kernel had to write is lost, and it tells so once: no later flush may be acknowledged.
        self._flush_failed = False
        self.limiter = RateLimiter(state=state.limiter) if state else limiter or RateLimiter()
        self.sectors = state.sectors if state else engine.file.sectors
        self._identity = engine.file.identity()
        self.reads, self.writes = Tally(), Tally()
        self._kicks = 0
        self._engine_was_full = False
        self._limits = Limits(0, True)
        self._polling = tuple(AdaptivePolling(settings.look_ns) for _ in self.queue_sizes)
        self._turns: list[Callable[[], None]] = []
        self._spans: Sequence[tuple[int, int, int]] = ()
        #: What the loops that count by themselves hand over.
        self._takes: list[Callable[[], tuple[Sums, Sums]]] = []
        #: While a stop, or a change of the file, waits for what is in flight: what is done then.
        self._draining: list[Callable[[], None]] = []

    # -- for the transport --------------------------------------------------------------------------------------------

    def features(self) -> int:
        """Return what is offered."""
        return block_features(self.settings)

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        return block_config(self.settings, self.sectors)

    def init(self, ops: EventOps) -> None:
        """Use the loop's timers, and watch the engine."""
        super().init(ops)
        self.limiter.attach(ops, self._room)
        self._watch()

    def _watch(self) -> None:
        if self.loop is not None and self.engine.event >= 0:
            self.loop.watch(self.engine.event, IN | EDGE_TRIGGERED, self._completed)

    def begin(self, activation: Activation) -> None:
        """Make the loops for the queues that there are."""
        features = activation.features
        self.engine.start(activation.memory)
        # Who cannot flush gets each write to stable storage before it is acknowledged (5.2.6.2).
        self.engine.write_through = self.settings.writeback and not features & VIRTIO_BLK_F_FLUSH
        self._make_loops(activation)

    def _make_loops(self, activation: Activation) -> None:
        features = activation.features
        self._limits = Limits(
            self.sectors,
            self.read_only,
            bool(features & VIRTIO_BLK_F_DISCARD),
            bool(features & VIRTIO_BLK_F_WRITE_ZEROES),
        )
        self._spans = activation.memory.spans
        self._take_counts()
        self._takes.clear()
        self._turns = [
            self._turn(queue, number, *self._loop_for(queue, number)) if queue is not None else _nothing
            for number, queue in enumerate(activation.queues)
        ]

    def _turn(
        self, queue: Queue, number: int, loop: Callable[[int], int], arm: Callable[[], bool]
    ) -> Callable[[], None]:
        """Return what a notification leads to: serve, look a little longer, ask for the next notification."""
        engine, polling, available = self.engine, self._polling[number], queue.available
        looks = bool(self.settings.look_ns)

        def go_on() -> None:
            self.notified(number)

        def turn() -> None:
            if looks:
                polling.woken()
            left = BUDGET
            while True:
                count = loop(left)
                if count == BLOCKED:
                    return
                left -= count
                if left <= 0:
                    assert self.loop is not None
                    self.loop.soon(go_on)
                    return
                if count > 1 and available[INDEX] != queue.next_available:
                    continue  # without asking for a notification: a request alone is seldom followed so soon
                if looks and polling.window_ns and not engine.in_flight and polling.look(queue):
                    continue
                if not arm():
                    break
            if looks:
                polling.asleep()

        return turn

    def _loop_for(self, queue: Queue, number: int) -> tuple[Callable[[int], int], Callable[[], bool]]:
        """Return the fastest loop that can serve this queue as it is to be served, and its Queue.arm()."""
        if type(self.engine) is not FileEngine or self.engine.write_through or self.limiter.limits:
            return self._structured_loop(queue, number), queue.arm
        loops = native_loops.loops()
        if loops is None or len(self._spans) > loops.MAX_SPANS:
            return flat_loop(self, queue, number), queue.arm
        native = native_loop(loops, self, queue, number)
        self._takes.append(native.take)
        return native.serve, native.arm

    def stop(self) -> Deferral | None:
        """Begin nothing; done when the engine has nothing in flight, and the driver has been told of all of it."""
        self.limiter.stop()
        if self.activation is None:
            return None
        if not self.engine.in_flight:
            self.activation = None
            return None
        deferral = Deferral()

        def stopped() -> None:
            self.activation = None
            deferral.complete()

        self._draining.append(stopped)
        return deferral

    def save(self) -> BlockState:
        """Return what the constructor makes the device of."""
        return BlockState(self.sectors, self.limiter.save())

    def close(self) -> None:
        """Close the engine and its file."""
        self._unwatch()
        self.engine.close()

    def _unwatch(self) -> None:
        if self.loop is not None and self.engine.event >= 0:
            self.loop.remove(self.engine.event)

    # -- changes at run time ------------------------------------------------------------------------------------------

    def update_file(self, file: BackingFile) -> Deferral | None:
        """Serve from another file, or from the same one whose size has changed; the driver is told of the new size.

        What is in flight ends on the old file, which is closed, unless it is the same one. An engine that does not take
        the new one (``update_fails``) goes on with the old one, and the new one is closed.
        """
        if not self.engine.in_flight:
            self._change_file(file)
            self._serve_all()
            return None
        deferral = Deferral()

        def change() -> None:
            self._change_file(file)
            deferral.complete()

        self._draining.append(change)
        return deferral

    def update_files(self, files: Sequence[int]) -> Deferral | None:
        """Serve from an open file, which is taken, or look at the size of the old one again, if there is none.

        Raises BackingFileError.
        """
        file = self.engine.file
        if files:
            (descriptor,) = files
            file = BackingFile(descriptor, read_only=self.read_only)
        else:
            file.refresh()
        return self.update_file(file)

    def _change_file(self, file: BackingFile) -> None:
        if file is not self.engine.file:
            try:
                self.engine.replace_file(file)
            except OSError:
                self.counters.add("update_fails")
                file.close()
                return
            self._identity = file.identity()
            self._flush_failed = False
        self.sectors = file.sectors
        self.counters.add("update_count")
        activation = self.activation
        if activation is not None:
            self._make_loops(activation)
            activation.notify.config_changed()

    def update_limiter(self, bandwidth: Bucket | None, ops: Bucket | None) -> None:
        """Replace the limiter's buckets; None leaves one as it is. Another loop may fit then."""
        self.limiter.update(bandwidth, ops)
        if self.activation is not None:
            self._make_loops(self.activation)
            self._serve_all()

    # -- serving ------------------------------------------------------------------------------------------------------

    def notified(self, queue: int) -> None:
        """The driver has made chains available in a queue: serve them, at most :data:`BUDGET` in a turn.

        The same as the base's, in one call: a request alone would feel the others.
        """
        activation = self.activation
        if activation is None or self._needs_reset or self._draining:
            return
        self._kicks += 1
        try:
            if activation.memory.spans is not self._spans:
                self._make_loops(activation)
            self._turns[queue]()
        except VirtioError as error:
            self.fail(error)

    def _structured_loop(self, queue: Queue, number: int) -> Callable[[int], int]:
        """Return the loop that serves any request, with any engine."""
        activation, limiter, counters = self.activation, self.limiter, self.counters
        assert activation is not None
        view = activation.memory.view
        at_once = self.engine.event < 0

        def serve(budget: int) -> int:
            if limiter.is_blocked:
                return BLOCKED
            count = 0
            blocked = False
            try:
                while count < budget and (chain := queue.pop()) is not None:
                    request = parse(chain, view, number)
                    if limiter.limits and not limiter.take(1, request.transferred):
                        counters.add("rate_limiter_throttled_events")
                        blocked = True
                    elif not self._begin(request):
                        counters.add("io_engine_throttled_events")
                        self._engine_was_full = blocked = True
                    if blocked:
                        queue.undo_pop()
                        break
                    count += 1
                    if at_once:  # buffers that overlap those of another request are then written in order
                        self._finish_all()
            finally:  # what was begun before a chain that is wrong is brought to its end, too: a stop waits for it
                self.engine.kick()
                self._complete()
            return BLOCKED if blocked else count

        return serve

    def serve_head(self, queue: Queue, number: int, head: int) -> None:
        """Serve one chain that a faster loop did not know. The engine is done at once. Raises VirtioError."""
        assert self.activation is not None
        begun = self._begin(parse(queue.chain(head), self.activation.memory.view, number))
        assert begun
        self._finish_all()

    def _begin(self, request: BlockRequest) -> bool:
        """Answer a request, or hand it to the engine; False if that is full."""
        assert self.activation is not None
        view = self.activation.memory.view
        if request.type == VIRTIO_BLK_T_FLUSH and self._flush_failed:
            self._finish(request, -EIO)
            return True
        if request.type == VIRTIO_BLK_T_GET_ID:
            answered = answer_identity(request, view, self._identity)
            self._answer(request, VIRTIO_BLK_S_OK if answered else VIRTIO_BLK_S_IOERR)
            return True
        planned = plan(request, view, self._limits)
        if isinstance(planned, int):
            self.counters.add("invalid_reqs_count")
            self._answer(request, planned)
            return True
        request.begun_ns = monotonic_ns()
        return self.engine.submit(planned)

    def _finish_all(self) -> None:
        for request, result in self.engine.completions():
            self._finish(request, result)

    def _finish(self, request: BlockRequest, result: int) -> None:
        """The engine has done a request: ``result`` bytes of it, or -errno."""
        counters = self.counters
        if result < 0 or (request.transferred and result < request.size):
            counters.add("execute_fails")
            self._flush_failed = self._flush_failed or request.type == VIRTIO_BLK_T_FLUSH
            self._answer(request, VIRTIO_BLK_S_IOERR)
            return
        if request.type == VIRTIO_BLK_T_IN:
            self.reads.add(1, result, monotonic_ns() - request.begun_ns)
        elif request.type == VIRTIO_BLK_T_OUT:
            self.writes.add(1, result, monotonic_ns() - request.begun_ns)
        elif request.type == VIRTIO_BLK_T_FLUSH:
            counters.add("flush_count")
        self._answer(request, VIRTIO_BLK_S_OK)

    def _answer(self, request: BlockRequest, status: int) -> None:
        activation = self.activation
        assert activation is not None
        activation.memory.view[request.status] = status
        queue = activation.queues[request.queue]
        assert queue is not None
        queue.add_used(request.chain, request.written)

    def _complete(self) -> None:
        """Give back what the engine has done, and tell the driver."""
        self._finish_all()
        activation = self.activation
        assert activation is not None
        for number, queue in enumerate(activation.queues):
            if queue is not None and queue.publish():
                activation.notify.used(number)

    def _completed(self, _: int) -> None:
        """The engine's event: what was in flight is done."""
        if self.activation is None:
            return
        if self._needs_reset:  # nothing is given back any more, but a stop waits for it
            self.engine.completions()
        else:
            self._complete()
        if not self._draining:
            if self._engine_was_full:
                self._engine_was_full = False
                self._serve_all()
        elif not self.engine.in_flight:
            waiting, self._draining = self._draining, []
            for each in waiting:
                each()
            self._serve_all()  # not before the last: it may have been a stop

    def _serve_all(self) -> None:
        for number, queue in enumerate(self.activation.queues if self.activation is not None else ()):
            if queue is not None:
                self.notified(number)

    def _room(self) -> None:
        self.counters.add("rate_limiter_event_count")
        self._serve_all()

    def collect(self) -> Counters:
        """Return the counters, up to date."""
        counters = self.counters
        self._take_counts()
        for name, tally in (("read", self.reads), ("write", self.writes)):
            count, size, latencies = tally.take()
            counters.add(f"{name}_count", count)
            counters.add(f"{name}_bytes", size)
            counters.aggregates[f"{name}_agg"].merge(latencies)
        counters.add("queue_event_count", self._kicks)
        self._kicks = 0
        return counters

    def _take_counts(self) -> None:
        for take in self._takes:
            reads, writes = take()
            self.reads.merge(reads)
            self.writes.merge(writes)


def _nothing() -> None:
    """The turn of a queue that the driver does not use."""
