"""The exception tree of ``jailer``."""

from __future__ import annotations

from base.errors import CellblockError


class JailerError(CellblockError):
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
    """A seccomp policy cannot be read, compiled or installed; ``number`` is the kernel's errno, or 0."""

    code = "jailer.policy"

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number


class CleanupError(JailerError):
    """What a microVM left behind could not be removed."""

    code = "jailer.cleanup"
