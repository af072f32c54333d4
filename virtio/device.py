"""What a virtio device is to its transport: two verbs, ``activate`` and ``stop``, are its whole life.

Pause is stop; resume is activate with the same queues; a reset is stop and reset; saving is stop and save; moving to
another process is stop there and activate here. The transport has the registers, the status and the queues'
configuration; a device never sees one. A device has no "paused" flag.
"""

from __future__ import annotations

from base.counters import Counters
from base.deferral import Deferral
from base.event_manager import EventOps, Events
from base.lean_typing import TYPE_CHECKING, Any, Callable, NamedTuple, Protocol
from ipc.guest_memory import GuestMemory
from virtio.errors import SettingsError, VirtioError
from virtio.queue import Queue
from virtio.rate_limiter import Bucket

if TYPE_CHECKING:
    from ipc.schema import Section


class DriverNotifier(Protocol):
    """How a device reaches its driver: through its transport."""

    def used(self, queue: int) -> None:
        """Chains came back in this queue, and the driver wants to know."""

    def config_changed(self) -> None:
        """The configuration space has changed: the transport reads it anew and bumps the generation."""

    def needs_reset(self, reason: str) -> None:
        """The device cannot go on (DEVICE_NEEDS_RESET)."""


class Activation(NamedTuple):
    """What a device works with from now on: ``queues`` are None where the driver has not made one ready."""

    memory: GuestMemory
    queues: tuple[Queue | None, ...]
    features: int
    notify: DriverNotifier


class VirtioDevice:
    """Base of the devices; also a subscriber of the event loop, and Saveable.

    A device serves its queues in :meth:`serve`, with a bound of work, and goes on in the next turn (``soon``). Whatever
    the driver does wrong is a VirtioError there: the driver is told once that the device needs a reset, and nothing is
    served until then. Nothing but a fault of the device itself leaves it.
    """

    #: VIRTIO_ID_*.
    kind = 0
    if TYPE_CHECKING:
        SECTION: Section

    def __init__(self, id: str, queue_sizes: tuple[int, ...], counters: Counters) -> None:
        self.id = id
        self.instance = id
        self.queue_sizes = queue_sizes
        self.counters = counters
        self.activation: Activation | None = None
        self.loop: EventOps | None = None
        self._needs_reset = False

    # -- for the transport --------------------------------------------------------------------------------------------

    def features(self) -> int:
        """Return what is offered, 64 bits."""
        raise NotImplementedError

    def config(self) -> bytes:
        """Return the whole device-specific configuration space."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space: nothing, unless the device says otherwise."""

    def activate(self, activation: Activation) -> Deferral | None:
        """Begin, or go on; every queue is looked at once, for a notification may have come before. While stopped."""
        assert self.activation is None
        self.activation = activation
        self._needs_reset = False
        self.begin(activation)
        for number, queue in enumerate(activation.queues):
            if queue is not None:
                self.notified(number)
        return None

    def stop(self) -> Deferral | None:
        """Begin nothing any more; done (the Deferral, if there is one) when nothing is in flight. Harmless twice."""
        self.activation = None
        return None

    def reset(self) -> None:
        """Forget what the driver has said. While stopped."""
        self._needs_reset = False

    def save(self) -> Any:
        """Return the record of ``SECTION.fields``. While stopped."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the device holds. While stopped."""

    def notified(self, queue: int) -> None:
        """The driver has made chains available in a queue: serve them."""
        if self.activation is not None and not self._needs_reset:
            try:
                self.serve(queue)
            except VirtioError as error:
                self.fail(error)

    def update_limiter(self, bandwidth: Bucket | None, ops: Bucket | None) -> None:
        """Replace the buckets that are given. Raises SettingsError where nothing is limited."""
        raise SettingsError("the device has no rate limiter")

    def update_files(self, files: list[int]) -> Deferral | None:
        """Serve from these files, which are the device's from here on; none: look at the size of the old ones again.

        Raises VirtioError, and then nothing has changed.
        """
        raise SettingsError("the device has no files")

    def collect(self) -> Counters:
        """Return the counters, up to date."""
        return self.counters

    # -- for the devices ----------------------------------------------------------------------------------------------

    def begin(self, activation: Activation) -> None:
        """Take what :meth:`serve` needs from the activation."""

    def serve(self, queue: int) -> None:
        """Serve a queue. Raises VirtioError for what the driver does wrong."""
        raise NotImplementedError

    def fail(self, error: VirtioError) -> None:
        """Tell the driver, once, that nothing goes on without a reset."""
        if self.activation is not None and not self._needs_reset:
            self._needs_reset = True
            self.activation.notify.needs_reset(str(error))

    def guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return ``call`` as :meth:`serve` is called: not while stopped or failed, and its VirtioError is the end."""

        def guarded_call() -> None:
            if self.activation is not None and not self._needs_reset:
                try:
                    call()
                except VirtioError as error:
                    self.fail(error)

        return guarded_call

    def init(self, ops: EventOps) -> None:
        """Become a subscriber of a loop, before the first activation."""
        self.loop = ops

    def process(self, events: Events, ops: EventOps) -> None:
        """Nothing is watched through this: devices name a handler for each descriptor."""
