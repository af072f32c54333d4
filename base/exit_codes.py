"""Process exit codes of the visible process, as Firecracker's clients know them."""

from __future__ import annotations

from base.lean_std import signal

OK = 0
GENERIC_ERROR = 1
UNEXPECTED_ERROR = 2
BAD_SYSCALL = 148
SIGBUS = 149
SIGSEGV = 150
SIGXFSZ = 151
BAD_CONFIGURATION = 152
ARGUMENT_PARSING = 153
SIGXCPU = 154
SIGPIPE = 155
SIGHUP = 156
SIGILL = 157

#: With this a cell ends that has met its limit of memory; the supervisor knows it, clients see GENERIC_ERROR.
CELL_OUT_OF_MEMORY = 71

#: What a cell that was ended by a signal means for the exit code of the microVM.
BY_SIGNAL: dict[int, int] = {
    int(signal.SIGSYS): BAD_SYSCALL,
    int(signal.SIGBUS): SIGBUS,
    int(signal.SIGSEGV): SIGSEGV,
    int(signal.SIGXFSZ): SIGXFSZ,
    int(signal.SIGXCPU): SIGXCPU,
    int(signal.SIGHUP): SIGHUP,
    int(signal.SIGILL): SIGILL,
}


#: Signals that Firecracker leaves alone, so that it dies by them: so does the visible process, after an orderly end.
#: Where it cannot (process 1 of a namespace does not die by its own signal), its exit code is 128 + the number.
DIE_BY: tuple[int, ...] = (int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGQUIT))


def of_intercepted(number: int) -> int:
    """Return the exit code for a signal that somebody sent to the visible process.

    A SIGSYS that is sent is no fault of a filter, and not expected.
    """
    return UNEXPECTED_ERROR if number == signal.SIGSYS else BY_SIGNAL.get(number, 128 + number)


def of_signal(number: int) -> int:
    """Return the exit code that stands for "ended by signal ``number``"."""
    return BY_SIGNAL.get(number, GENERIC_ERROR)
