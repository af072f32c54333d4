"""What a freshly forked cell does before its role runs, and the seal that closes its walls, in two stages.

Setup: its own filter goes on before the role's first statement, the supervisor reads the walls back, the cell becomes
non-dumpable; only then it reads what another cell has sent. Running: a second, tighter filter, when the role needs no
more than that; the supervisor looks again. Filters add up: what one of them forbids is forbidden.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from base import faults
from base.errno_text import errno_text
from base.errors import CellblockError
from base.lean_std import signal, socket
from base.lean_typing import Callable, NamedTuple, NoReturn
from base.threads import MadeByLibrary
from ipc import descriptors
from ipc.errors import IpcError
from ipc.launch_plan import ROLE_DEVICE, ROLE_VMM, SECCOMP_REPORT, LaunchPlan, cell_name
from jailer import bounds, fault_signals, walls
from jailer.errors import CellError, JailerError, PolicyError
from jailer.filters import RUNNING, SETUP
from jailer.landlock import Rulesets
from jailer.operations import Step
from jailer.seccomp.install import Filter, install
from jailer.steps import identity
from jailer.steps.title import TITLE

# Frames of a seal channel, cell → supervisor. ENTERED: the controller is in its jail (with the locked pid file, if
# there is one). FILTERED: the filter of a stage is on; it brings the listener in report mode. HIDDEN: the cell is not
# dumpable any more. TIGHTENING (report mode only): the listener of the first filter is not needed any more, and
# another one is possible when it is closed. FAILED is followed by a text.
ENTERED = b"entered"
FILTERED = b"filtered"
HIDDEN = b"hidden"
TIGHTENING = b"tightening"
FAILED = b"failed:"
#: Its layer of Landlock is in force; nothing in /proc tells. Comes before the first FILTERED.
LANDLOCKED = b"landlocked"
# Supervisor → cell.
VERIFIED = b"verified"
GO = b"go"
REFUSED = b"refused"

#: Signals that end a process by default and that a terminal or a service manager sends to a whole process group.
#: Only the supervisor, the visible process, acts on them.
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
EXIT_FAILED = 1
#: How long a listener that the supervisor closed may stay open in a cell that is being forked (report mode).
_LISTENER_S = 2.0
_PAUSE_S = 0.001


class CellContext(NamedTuple):
    """What the supervisor prepared for one cell. ``seal`` is the cell's end of its seal channel.

    ``filters`` are those of the cell, by stage; none if seccomp is off.
    """

    plan: LaunchPlan
    role: str
    number: int
    seal: socket.socket
    filters: dict[str, Filter]
    limits: bounds.Limits
    landlock: Rulesets | None = None
    #: Process 1 has the supervisor signal it here, if faults are armed (jailer.fault_signals), else -1.
    fault_signals: int = -1

    @property
    def name(self) -> str:
        return cell_name(self.role, self.number)

    def has(self, wall: str) -> bool:
        """Is this wall asked for?"""
        return wall not in self.plan.switched_off


def count_faults() -> None:
    """In the supervisor, after a fork: count the fault points that the cell passes, so that "after=N" skips N cells."""
    for point in ("cell.forked", "cell.confined", "cell.filtered", "cell.verified", "cell.sealed"):
        faults.count(point)


def reset_signals() -> None:
    """Undo the supervisor's signal set-up: nothing blocked, group signals ignored, the rest as by default.

    SIGTTIN is ignored: who reads a terminal in the background gets an error instead of being stopped.

    The interpreter ignores SIGXFSZ; here a cell that writes beyond its file-size limit ends by it, or catches it.
    """
    for number in (*_GROUP_SIGNALS, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def confine(context: CellContext) -> None:
    """The last steps before the role runs, in a process that is confined otherwise. Raises CellError, StepError."""
    if context.has(walls.DEATH_SIGNAL):
        with Step(f"set the death signal of {context.name}"):
            identity.die_with(context.seal.fileno())
    with Step(f"set the limits of {context.name}"):
        bounds.apply(context.limits)
    with Step(f"name {context.name}, and make it readable"):
        # For the supervisor, until it has verified the walls (Seal.await_verified).
        identity.set_dumpable(True)
        identity.set_name(context.name)
    TITLE.show_role(context.name)
    faults.visit("cell.confined")


class Seal:
    """The two stages of a cell's walls. :func:`run` begins; the role goes on when it is ready for that."""

    def __init__(self, context: CellContext) -> None:
        self._context = context
        self._channel: socket.socket | None = context.seal
        self._verified = False
        #: The channel, while the supervisor reads the second filter back.
        self._tightened: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Has the cell not begun to tighten its walls? Then the supervisor hears what it says."""
        return self._channel is not None

    def begin(self) -> None:
        """Install the filter of the setup stage and ask the supervisor to read the walls back; does not wait for it.

        Raises CellError, PolicyError, IpcError, OSError.
        """
        self._install(SETUP, self._open_channel())
        faults.visit("cell.filtered")

    def await_verified(self) -> None:
        """Wait until the walls are verified, and become non-dumpable: what other cells send may be read from here on.

        Every thread exists, but for those of a device cell's engines. Raises CellError if a wall differs.
        """
        if self._verified:
            return
        channel = self._open_channel()
        self._verified = True
        try:
            self._expect(channel, VERIFIED)
            if not self._makes_threads_later:
                self._forbid_processes()
            if self._context.has(walls.DUMPABLE):
                identity.set_dumpable(False)
            descriptors.send(channel, HIDDEN)
        except (OSError, IpcError) as error:
            raise CellError(f"{self._context.name} cannot be sealed: {_reason(error)}") from None
        faults.visit("cell.verified")

    def tighten(self) -> None:
        """Install the filter of the running stage on all threads, and ask the supervisor to read it back. Once.

        Does not wait for that (:meth:`await_tightened`). Raises CellError.
        """
        self.await_verified()
        self._tightened = channel = self._open_channel()
        self._channel = None
        try:
            if self._makes_threads_later:
                self._forbid_processes()
            if self._context.plan.seccomp == SECCOMP_REPORT:
                descriptors.send(channel, TIGHTENING)
                self._expect(channel, GO)
            self._install(RUNNING, channel)
        except (OSError, IpcError, PolicyError) as error:
            raise CellError(f"{self._context.name} cannot be sealed: {_reason(error)}") from None

    def await_tightened(self) -> None:
        """Wait until the walls of the running stage are verified. Raises CellError if one differs."""
        channel, self._tightened = self._tightened, None
        if channel is None:
            return
        try:
            self._expect(channel, GO)
        except (OSError, IpcError) as error:
            raise CellError(f"{self._context.name} cannot be sealed: {_reason(error)}") from None
        finally:
            channel.close()
        faults.visit("cell.sealed")

    @property
    def _makes_threads_later(self) -> bool:
        """A device cell is told which engines it has to make; the kernel then makes workers of its own for some."""
        return self._context.role == ROLE_DEVICE

    def _forbid_processes(self) -> None:
        if self._context.has(walls.PROCESS_LIMIT):
            identity.forbid_processes()

    def _open_channel(self) -> socket.socket:
        if self._channel is None:
            raise CellError(f"{self._context.name} is sealed already")
        return self._channel

    def _install(self, stage: str, channel: socket.socket) -> None:
        """Install the filter of a stage, if there is one, and say so. Raises PolicyError, IpcError, OSError."""
        listener = -1
        chosen = self._context.filters.get(stage)
        if chosen is not None:
            listener = _install_when_possible(chosen)
        if listener >= 0:
            descriptors.send(channel, FILTERED, (listener,))
            os.close(listener)
        else:
            os.write(channel.fileno(), FILTERED)  # sendmsg(2) is not for a worker that is sealed

    def _expect(self, channel: socket.socket, wanted: bytes) -> None:
        frame, owned = descriptors.receive(channel)
        owned.close()
        if frame != wanted:
            raise CellError(f"the supervisor refused the walls of {self._context.name}")


def _install_when_possible(chosen: Filter) -> int:
    """Install a filter; in report mode, wait for the listener of the one before to be gone. Raises PolicyError.

    The kernel gives a process one listener at a time. The supervisor has closed that of the setup stage by now, but a
    cell that is being forked at this moment has a copy, for as long as it takes to close what it does not keep.
    """
    deadline = time.monotonic() + _LISTENER_S
    while True:
        try:
            return install(chosen)
        except PolicyError as error:
            if error.number != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_S)


def _reason(error: Exception) -> str:
    return errno_text(error) if isinstance(error, OSError) else str(error)


def report_failure(context: CellContext, text: str) -> None:
    """Tell the supervisor, as long as the seal channel is open, why this cell cannot go on."""
    try:
        descriptors.send(context.seal, FAILED + text.encode("utf-8", "replace")[:1000])
    except (OSError, IpcError, ValueError):
        pass  # sealed already, or the supervisor is gone: the exit status tells


def describe_error(error: BaseException) -> str:
    """Say in one line what an unexpected error was and where; no source file is opened for it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {os.path.basename(place.tb_frame.f_code.co_filename)}:{place.tb_lineno}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def run(context: CellContext, prepare: Callable[[], tuple[int, ...]], role: Callable[[Seal], int]) -> NoReturn:
    """Run a cell in a freshly forked child; never returns to the supervisor's code.

    ``prepare`` finishes the confinement; what it raises is reported over the seal channel, and what descriptors it
    returns are handed to the supervisor (by the controller, when it is in its jail). ``role`` runs the cell.
    """
    status = EXIT_FAILED
    try:
        faults.freeze()
        if context.fault_signals >= 0:
            faults.signal_by(fault_signals.sender(context.fault_signals))
        faults.visit("cell.forked")
        sys.excepthook = lambda *_: None
        status = _run(context, prepare, role)
    except BaseException as error:  # the last line of defence: nothing may unwind into the supervisor's stack
        _complain(context, describe_error(error))
    os._exit(status)


def _run(context: CellContext, prepare: Callable[[], tuple[int, ...]], role: Callable[[Seal], int]) -> int:
    try:
        handed_over = prepare()
        confine(context)
        if context.role == ROLE_VMM:
            descriptors.send(context.seal, ENTERED, handed_over)
        for descriptor in handed_over:
            os.close(descriptor)
        if context.landlock is not None and context.landlock.enforce(context.role):
            descriptors.send(context.seal, LANDLOCKED)
        seal = Seal(context)
        seal.begin()
    except (JailerError, IpcError, OSError) as error:
        report_failure(
            context,
            f"Failed to confine {context.name}: {errno_text(error)}" if isinstance(error, OSError) else str(error),
        )
        return EXIT_FAILED
    if not context.has(walls.LOG_PIPE):  # else the supervisor hears what a library says on standard error
        MadeByLibrary.last_words = context.seal.fileno()
    try:
        return role(seal)
    except Exception as error:
        text = str(error) if isinstance(error, CellblockError) else describe_error(error)
        if seal.is_open:
            report_failure(context, text)
        else:
            _complain(context, text)
        return EXIT_FAILED


def _complain(context: CellContext, text: str) -> None:
    try:
        label = f"{context.name}: " if context.role == ROLE_VMM else ""  # the supervisor adds that of a worker
        os.write(2, f"{label}{' '.join(text.split())}\n".encode("utf-8", "replace")[:1000])
    except OSError:
        pass  # nobody listens
