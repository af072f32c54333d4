"""A block device whose queue a vhost-user back end serves, for example qemu-storage-daemon.

The device only talks: kicks of the driver go straight to the back end, and its interrupts straight to the guest. A back
end that goes away is told of (``lost``). With another connection, and the table of requests in flight that it has left
(an in-flight region), a new one goes on where it was: nothing is lost, and what was begun is done once more.
"""

from __future__ import annotations

import os
from time import monotonic_ns

from base.counters import Counters
from base.deferral import Deferral
from base.event_manager import EventOps
from base.lean_typing import TYPE_CHECKING, Any, Callable, Sequence
from virtio.abi import (
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
)
from virtio.block.configuration import QUEUE_SIZE
from virtio.device import Activation, VirtioDevice
from virtio.errors import VhostUserError
from virtio.queue import INDEX, Queue
from virtio.vhost_user import protocol
from virtio.vhost_user.connection import Connection
from virtio.vhost_user.protocol import Inflight, Message

if TYPE_CHECKING:
    from virtio.vhost_user.connection import Conversation

#: struct virtio_blk_config up to max_secure_erase_sectors; a driver reads no more of it.
CONFIG_SIZE = 60
#: What a back end may offer a driver. Whether it may write is the back end's word.
_OFFERED = (
    VIRTIO_F_VERSION_1
    | VIRTIO_F_EVENT_IDX
    | VIRTIO_F_INDIRECT_DESC
    | VIRTIO_BLK_F_RO
    | VIRTIO_BLK_F_SEG_MAX
    | VIRTIO_BLK_F_DISCARD
    | VIRTIO_BLK_F_WRITE_ZEROES
)
_PROTOCOL = protocol.PROTOCOL_F_REPLY_ACK | protocol.PROTOCOL_F_CONFIG | protocol.PROTOCOL_F_INFLIGHT_SHMFD
#: How often, and how long, is looked whether a stopped back end has given back what it had in flight.
_DRAIN_STEP_NS = 1_000_000
DRAIN_NS = 10_000_000_000
#: docs/formats/metrics.md
COUNTERS = "activate_fails cfg_fails =init_time_us =activate_time_us =config_change_time_us"


class VhostUserBlock(VirtioDevice):
    """Made with a connected socket, which it owns. ``ready`` is done when features and configuration are known.

    ``lost(reason)`` is called whenever the back end cannot be used any more; :meth:`update_files` brings a connection
    to another one. Nothing waits here: what takes time is a Deferral, and ends in ``lost`` if it fails.
    """

    kind = VIRTIO_ID_BLOCK

    def __init__(self, id: str, fd: int, *, writeback: bool, lost: Callable[[str], None]) -> None:
        super().__init__(id, (QUEUE_SIZE,), Counters(COUNTERS))
        self._fd = fd
        self._lost = lost
        self._wanted = _OFFERED | (VIRTIO_BLK_F_FLUSH if writeback else 0)
        self._connection: Connection | None = None
        #: What the back end said: features of virtio, of the protocol, the configuration space.
        self._backend = self._protocol = 0
        self._config = b""
        self.ready = Deferral()
        self._started: Deferral | None = None
        self._stopping: Deferral | None = None
        self._kicks: Sequence[int] = ()
        self._interrupt = -1
        self._inflight: Inflight | None = None
        self._inflight_fd = -1
        #: Whether an in-flight region is asked for, also if the back end does not offer it.
        self._wants_inflight = True

    # -- for the transport --------------------------------------------------------------------------------------------

    def features(self) -> int:
        """Return what is offered; nothing before the back end has said."""
        return self._backend & self._wanted

    def config(self) -> bytes:
        """Return the configuration space, which is the back end's."""
        return self._config

    def init(self, ops: EventOps) -> None:
        """Begin to talk."""
        super().init(ops)
        self._connect()

    def use_eventfds(self, kicks: Sequence[int], interrupt: int) -> None:
        """These are what the driver kicks, and what interrupts it: they go to the back end. They stay the caller's."""
        self._kicks, self._interrupt = kicks, interrupt

    def activate(self, activation: Activation) -> Deferral | None:
        """Have the back end serve the queues; done when it does, or when that has failed (``lost``)."""
        assert self.activation is None
        self.activation = activation
        self._needs_reset = False
        started = self._started = Deferral()
        self._start()
        return None if started.done else started

    def serve(self, queue: int) -> None:
        """Nothing: the back end is kicked."""

    def stop(self) -> Deferral | None:
        """Take the queues back; done when the back end has nothing in flight, or is gone."""
        activation = self.activation
        if activation is None:
            return None
        connection = self._connection
        if connection is None:
            self.activation = None
            return None
        stopped = Deferral()
        self._stopping = stopped
        connection.converse(self._stop_queues(activation), lambda: self._drain(activation, monotonic_ns() + DRAIN_NS))
        return stopped

    def reset(self) -> None:
        """Forget the requests that the driver has forgotten."""
        super().reset()
        self._forget_inflight()

    def save(self) -> Any:
        """A device that another program serves is not saved. Raises VhostUserError."""
        raise VhostUserError(f"the state of {self.id} is with its vhost-user back end")

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._forget_inflight()

    # -- changes at run time ------------------------------------------------------------------------------------------

    def update_files(self, files: Sequence[int]) -> Deferral | None:
        """Go on with another back end, by a connected socket; without one ask this one for its configuration again."""
        if files:
            (self._fd,) = files
            if self._connection is not None:
                self._connection.close()
            self.ready = Deferral()
            self._connect()
            return self.ready
        if self._connection is None:
            raise VhostUserError("the back end is gone")
        begun = monotonic_ns()
        done = Deferral()

        def told() -> None:
            self.counters.values["config_change_time_us"] = (monotonic_ns() - begun) // 1000
            if self.activation is not None:
                self.activation.notify.config_changed()
            done.complete()

        self._connection.converse(self._ask_config(), told)
        return done

    # -- conversations ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        assert self.loop is not None
        begun = monotonic_ns()
        fd, self._fd = self._fd, -1
        self._connection = Connection(fd, self.loop, self._failed)

        def known() -> None:
            self.counters.values["init_time_us"] = (monotonic_ns() - begun) // 1000
            if self.activation is not None:
                self.activation.notify.config_changed()
                self._start()
            self.ready.complete()

        self._connection.converse(self._introduce(), known)

    def _introduce(self) -> Conversation:
        yield Message(protocol.SET_OWNER)
        offered = protocol.parse_u64((yield protocol.ask(protocol.GET_FEATURES)).payload)
        if not offered & protocol.F_PROTOCOL_FEATURES or not offered & VIRTIO_F_VERSION_1:
            raise VhostUserError(f"the back end offers features {offered:#x}: no virtio 1, or no protocol features")
        features = protocol.parse_u64((yield protocol.ask(protocol.GET_PROTOCOL_FEATURES)).payload)
        if not features & protocol.PROTOCOL_F_CONFIG:
            raise VhostUserError(f"the back end offers protocol features {features:#x}: no configuration space")
        activation = self.activation
        if activation is not None and activation.features & ~offered:
            raise VhostUserError(f"the back end does not offer {activation.features & ~offered:#x}, which is in use")
        self._protocol = features & _PROTOCOL
        if self._wants_inflight:
            # libvhost-user, and so qemu-storage-daemon, implements it and leaves it to each program to say so.
            self._protocol |= protocol.PROTOCOL_F_INFLIGHT_SHMFD
        yield protocol.u64(protocol.SET_PROTOCOL_FEATURES, self._protocol)
        if self._protocol & protocol.PROTOCOL_F_INFLIGHT_SHMFD and self._inflight is None:
            self._wants_inflight = bool(features & protocol.PROTOCOL_F_INFLIGHT_SHMFD)  # not again if this is the end
            yield from self._make_inflight(len(self.queue_sizes))
            self._wants_inflight = True
        yield from self._ask_config()
        self._backend = offered

    def _ask_config(self) -> Conversation:
        reply = yield protocol.get_config(CONFIG_SIZE)
        self._config = protocol.parse_config(reply.payload, CONFIG_SIZE)

    def _start(self) -> None:
        activation, connection = self.activation, self._connection
        assert activation is not None
        if connection is None:
            self._end_start()
            return
        begun = monotonic_ns()

        def started() -> None:
            self.counters.values["activate_time_us"] = (monotonic_ns() - begun) // 1000
            # What was made available, and what was given back, while nobody was told.
            for fd in (*self._kicks, self._interrupt):
                os.eventfd_write(fd, 1)
            self._end_start()

        connection.converse(self._hand_over(activation), started)

    def _end_start(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started.complete()

    def _hand_over(self, activation: Activation) -> Conversation:
        """Give the back end memory, queues and eventfds. It begins with the last message."""
        queues = [(number, queue) for number, queue in enumerate(activation.queues) if queue is not None]
        memory = activation.memory
        yield protocol.u64(protocol.SET_FEATURES, activation.features | protocol.F_PROTOCOL_FEATURES)
        yield protocol.memory_table(memory.regions, memory.descriptor)
        if self._protocol & protocol.PROTOCOL_F_INFLIGHT_SHMFD:
            yield from self._share_inflight(len(activation.queues))
        for number, queue in queues:
            state = queue.state()
            yield protocol.vring(protocol.SET_VRING_NUM, number, state.size)
            yield protocol.vring(protocol.SET_VRING_BASE, number, self._base(queue))
            yield protocol.vring_addresses(number, state.descriptor_table, state.used_ring, state.available_ring)
            yield protocol.vring_fd(protocol.SET_VRING_CALL, number, self._interrupt)
            yield protocol.vring_fd(protocol.SET_VRING_KICK, number, self._kicks[number])
        acknowledges = bool(self._protocol & protocol.PROTOCOL_F_REPLY_ACK)
        for number, _ in queues:
            yield protocol.vring(protocol.SET_VRING_ENABLE, number, 1, acknowledged=acknowledges)

    def _share_inflight(self, queues: int) -> Conversation:
        """Hand over the table of requests in flight, which the first back end has made."""
        if self._inflight is None:
            yield from self._make_inflight(queues)
        assert self._inflight is not None
        yield protocol.set_inflight(self._inflight, self._inflight_fd)

    def _make_inflight(self, queues: int) -> Conversation:
        reply = yield protocol.get_inflight(queues, QUEUE_SIZE)
        if not reply.fds:
            raise VhostUserError("an in-flight region without a file")
        (self._inflight_fd,) = reply.fds
        self._inflight = protocol.parse_inflight(reply.payload, queues, QUEUE_SIZE)

    def _base(self, queue: Queue) -> int:
        """Return where in the available ring a back end is to begin.

        After a loss that is where the used ring stands: what an in-flight region names the back end takes first.
        Without one it is not known which chains were done, unless none or all were. Raises VhostUserError.
        """
        used = queue.used[INDEX]
        has_table = self._protocol & protocol.PROTOCOL_F_INFLIGHT_SHMFD
        if not has_table and queue.next_used != used != queue.available[INDEX]:
            error = VhostUserError("the back end before has left requests in flight, and no table of them")
            self.fail(error)
            raise error
        queue.next_used = queue.next_available = used
        return used

    def _stop_queues(self, activation: Activation) -> Conversation:
        for number, queue in enumerate(activation.queues):
            if queue is not None:
                reply = yield protocol.get_vring_base(number)
                queue.next_available = protocol.parse_base(reply.payload, number)

    def _drain(self, activation: Activation, deadline_ns: int) -> None:
        """Wait until the back end has given back what it had in flight when it was stopped."""
        loop = self.loop
        assert loop is not None
        queues = [queue for queue in activation.queues if queue is not None]
        if self._stopping is None:
            return
        if any(queue.used[INDEX] != queue.next_available for queue in queues):
            if monotonic_ns() < deadline_ns:
                loop.add_timer(monotonic_ns() + _DRAIN_STEP_NS, lambda: self._drain(activation, deadline_ns))
                return
            if self._connection is not None:
                self._connection.close()
            self._failed(VhostUserError("the back end was stopped, and keeps requests in flight"))
            return
        for queue in queues:
            queue.next_used = queue.used[INDEX]
        self.activation = None
        self._end_stop()

    def _end_stop(self) -> None:
        stopped, self._stopping = self._stopping, None
        if stopped is not None:
            stopped.complete()

    def _failed(self, error: VhostUserError) -> None:
        """The back end is of no use any more."""
        self._connection = None
        self.counters.add("activate_fails" if self._started is not None else "cfg_fails")
        self._end_start()
        if self._stopping is not None:
            self.activation = None
            self._end_stop()
        self._lost(str(error))

    def _forget_inflight(self) -> None:
        self._inflight = None
        if self._inflight_fd >= 0:
            os.close(self._inflight_fd)
            self._inflight_fd = -1
