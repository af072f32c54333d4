"""The exception tree of ``jailer`` and the texts of operating system errors as Firecracker's clients know them."""

from __future__ import annotations

import errno
import os

#: Firecracker is linked with musl; where musl and glibc word an error differently, clients compare musl's words.
_MUSL_TEXTS = {
    errno.ENOMEM: "Out of memory",
    errno.EBUSY: "Resource busy",
    errno.EMFILE: "No file descriptors available",
    errno.ENOTTY: "Not a tty",
    errno.ELOOP: "Symbolic link loop",
    errno.ENAMETOOLONG: "Filename too long",
    errno.ESPIPE: "Invalid seek",
    errno.EXDEV: "Cross-device link",
    errno.EOVERFLOW: "Value too large for data type",
    errno.ENOSYS: "Function not implemented",
    errno.EOPNOTSUPP: "Not supported",
}


def errno_text(number: int) -> str:
    """Return ``TEXT (os error N)``."""
    return f"{_MUSL_TEXTS.get(number) or os.strerror(number)} (os error {number})"


def os_error_text(error: OSError) -> str:
    """Return ``TEXT (os error N)`` for an exception."""
    return errno_text(error.errno) if error.errno else str(error)


class JailerError(Exception):
    """Base of every error that this package raises; ``code`` is stable, the text says what happened."""

    code = "jailer"


class ArgumentError(JailerError):
    """The command line cannot be understood."""

    code = "jailer.arguments"


class StepError(JailerError):
    """A step of the launch failed; what was done before it was undone."""

    code = "jailer.step"


class CellError(JailerError):
    """A cell could not be confined, or reported something that it must not."""

    code = "jailer.cell"


class WallError(JailerError):
    """A wall that was read back is not the wall that was asked for."""

    code = "jailer.wall"


class PolicyError(JailerError):
    """A seccomp policy cannot be read, compiled or installed."""

    code = "jailer.policy"


class CleanupError(JailerError):
    """What a microVM left behind could not be removed."""

    code = "jailer.cleanup"
