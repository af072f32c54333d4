"""Writing to an eventfd that a less trusted process has as well: never for ever.

Such an eventfd is non-blocking, but that is a flag of the open file, which both share. Who gets past its filter can
take it away and fill the counter: then write(2) waits, and no call that writes to an eventfd can be told not to
(RWF_NOWAIT is for reading only). So whoever writes has a timer that interrupts it (vmm.stall_watch): a write that a
signal interrupts has waited, which a non-blocking one never does.
"""

from __future__ import annotations

import os

from ipc.errors import BlockedEventError


def raise_event(descriptor: int) -> None:
    """Add 1; a counter at its maximum is signalled already. Raises BlockedEventError when the call had to wait."""
    try:
        os.eventfd_write(descriptor, 1)
    except BlockingIOError:
        pass
    except InterruptedError:
        raise BlockedEventError("a worker made an eventfd blocking that it shares, and filled it") from None
