"""The log: one line per event, to standard output or to a file or FIFO, never blocking and never raising.

A line is ``YYYY-MM-DDTHH:MM:SS.nnnnnnnnn [ID:THREAD[:LEVEL][:FILE:LINE]] message`` in local time. Lines that cannot
be written at once are lost and counted. Characters that would break the line up (a client or a guest may have chosen
them) are escaped. Places that a guest can make log are limited by a ``LimitedSite``.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.cli import DEFAULT_INSTANCE_ID
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_output
from vmm.json.schema import BOOLEAN, PATH, STRING, Converted, Field, Object, Option

if TYPE_CHECKING:
    from vmm.cli import CommandLine

OFF, ERROR, WARN, INFO, DEBUG, TRACE = range(6)
LEVEL_NAMES = ("OFF", "ERROR", "WARN", "INFO", "DEBUG", "TRACE")
DEFAULT_LEVEL = INFO
#: Thread names as they appear in lines; the API has no thread of its own here, its lines say so all the same.
MAIN_THREAD = "main"
API_THREAD = "fc_api"

#: A line longer than this is cut: a request body may be as large as the payload limit, and more says no more.
MAX_MESSAGE = 65536
#: A limited site writes at most so many lines in so much time.
LIMIT_LINES = 10
LIMIT_NS = 5_000_000_000

#: What a pipe takes at once when poll says that it is writable (POSIX PIPE_BUF).
_ATOMIC = select.PIPE_BUF
_STANDARD_OUTPUT = 1
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + "/"
_ESCAPES = {number: f"\\x{number:02x}" for number in (*range(0x20), 0x7F, *range(0x80, 0xA0))} | {
    0x2028: "\\u2028",  # line and paragraph separator
    0x2029: "\\u2029",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}


class LoggerConfigError(VmmError):
    """The log cannot be set up as asked; nothing was changed."""

    code = "vmm.logger"


class LoggerConfig(NamedTuple):
    """Body of PUT /logger, the ``logger`` section of a configuration file, and the logger flags.

    ``level`` is one of the constants of this module. What is None keeps its value, but the level, which falls back
    to Info. ``module`` is a dotted prefix of the module that logs; ``::`` may stand for the dot.
    """

    log_path: str | None = None
    level: int | None = None
    show_level: bool | None = None
    show_log_origin: bool | None = None
    module: str | None = None

    @staticmethod
    def of(line: CommandLine) -> LoggerConfig:
        """Return what the logger flags of a command line say."""
        level = None if line.level is None else level_by_name(line.level)
        return LoggerConfig(line.log_path, level, line.show_level or None, line.show_log_origin or None, line.module)


def level_by_name(name: str) -> int | None:
    """Return the level that a client names, in any case; None if there is no such level."""
    upper = name.upper()
    if upper == "WARNING":
        return WARN
    return LEVEL_NAMES.index(upper) if upper in LEVEL_NAMES else None


LOGGER_CONFIG = Object(
    "LoggerConfig",
    LoggerConfig,
    Field("log_path", Option(PATH)),
    Field("level", Option(Converted(level_by_name, "Invalid LevelFilter"))),
    Field("show_level", Option(BOOLEAN)),
    Field("show_log_origin", Option(BOOLEAN)),
    Field("module", Option(STRING)),
)


class Logger:
    """Where log lines go. ``LOG`` is the one that the controller uses."""

    def __init__(self, instance_id: str = DEFAULT_INSTANCE_ID) -> None:
        self.instance_id = instance_id
        self.level = DEFAULT_LEVEL
        self.show_level = False
        self.show_log_origin = False
        self.module = ""
        #: Lines that were lost, whole or in part, because the target did not take them.
        self.missed_log_count = 0
        #: Lines that limited sites held back.
        self.rate_limited_log_count = 0
        self._fd = _STANDARD_OUTPUT
        #: Whether we opened it, hence whether it is non-blocking and ours to close.
        self._owns_fd = False
        #: Set when the last line was cut off in the middle: the next one starts on a new line.
        self._torn = False
        self._second = -1
        self._second_text = ""
        self._poll = _poll_for_writing(_STANDARD_OUTPUT)

    def configure(self, config: LoggerConfig) -> None:
        """Apply a configuration; may be repeated. Raises LoggerConfigError, and then nothing has changed."""
        if config.log_path is not None:
            try:
                fd = open_output(config.log_path)
            except FileOpenError as error:
                raise LoggerConfigError(f"Failed to open target file: {error}") from error
            self._set_target(fd, owned=True)
        self.level = DEFAULT_LEVEL if config.level is None else config.level
        if config.show_level is not None:
            self.show_level = config.show_level
        if config.show_log_origin is not None:
            self.show_log_origin = config.show_log_origin
        if config.module is not None:
            self.module = config.module.replace("::", ".")

    def use_descriptor(self, fd: int) -> None:
        """Write to a descriptor that stays the caller's (one that was opened before the jail was entered)."""
        self._set_target(fd, owned=False)

    def close(self) -> None:
        """Close the log file; later lines go to standard output."""
        self._set_target(_STANDARD_OUTPUT, owned=False)

    def error(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Error."""
        if self.level >= ERROR:
            self.write(ERROR, message, thread, 2)

    def warn(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Warn."""
        if self.level >= WARN:
            self.write(WARN, message, thread, 2)

    def info(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Info."""
        if self.level >= INFO:
            self.write(INFO, message, thread, 2)

    def debug(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Debug. Where the message is costly to make, ask ``logger.level >= DEBUG`` first."""
        if self.level >= DEBUG:
            self.write(DEBUG, message, thread, 2)

    def trace(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Trace."""
        if self.level >= TRACE:
            self.write(TRACE, message, thread, 2)

    def log(self, level_name: str, message: str) -> None:
        """Log at a level that is given by name (``Warn``)."""
        level = level_by_name(level_name)
        assert level is not None, level_name
        if self.level >= level:
            self.write(level, message, MAIN_THREAD, 2)

    def write(self, level: int, message: str, thread: str = MAIN_THREAD, depth: int = 1) -> None:
        """Write a line whatever the level is; ``depth`` counts the frames up to the place that logs."""
        origin = ""
        if self.module or self.show_log_origin:
            frame = sys._getframe(depth)
            if self.module and not frame.f_globals.get("__name__", "").startswith(self.module):
                return
            if self.show_log_origin:
                origin = f":{frame.f_code.co_filename.removeprefix(_PACKAGE_PARENT)}:{frame.f_lineno}"
        level_text = f":{LEVEL_NAMES[level]}" if self.show_level else ""
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}… ({len(message)} characters)"
        prefix = f"{self._timestamp()} [{self.instance_id}:{thread}{level_text}{origin}] "
        line = f"{prefix}{message.translate(_ESCAPES)}\n".encode(errors="backslashreplace")
        if not self._put(b"\n" + line if self._torn else line):
            self.missed_log_count += 1

    def _set_target(self, fd: int, owned: bool) -> None:
        if self._owns_fd:
            os.close(self._fd)
        self._fd = fd
        self._owns_fd = owned
        self._torn = False
        self._poll = _poll_for_writing(fd)

    def _timestamp(self) -> str:
        second, nanosecond = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._second_text}.{nanosecond:09}"

    def _put(self, line: bytes) -> bool:
        """Write one line and tell whether all of it was taken."""
        start = 0
        while start < len(line):
            # Only what we opened ourselves is non-blocking: others share the state of an inherited descriptor, so
            # it is left as it is and asked first.
            if not self._owns_fd and not self._poll.poll(0):
                break
            part = line[start:] if self._owns_fd else line[start : start + _ATOMIC]
            try:
                start += os.write(self._fd, part)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                break
        self._torn = 0 < start < len(line) or (self._torn and start == 0)
        return start == len(line)


class LimitedSite:
    """A place that a guest can make log: at most ``LIMIT_LINES`` lines in ``LIMIT_NS``, the rest is counted.

    Make one per place, once, and log through it. The first line after a pause says how many were held back.
    """

    __slots__ = ("_logger", "_name", "_window_ns", "_count", "suppressed")

    def __init__(self, logger: Logger, name: str) -> None:
        self._logger = logger
        self._name = name
        self._window_ns = -LIMIT_NS
        self._count = 0
        self.suppressed = 0

    def error(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Error, within the limit."""
        self._log(ERROR, message, thread)

    def warn(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Warn, within the limit."""
        self._log(WARN, message, thread)

    def info(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Info, within the limit."""
        self._log(INFO, message, thread)

    def debug(self, message: str, thread: str = MAIN_THREAD) -> None:
        """Log at level Debug, within the limit."""
        self._log(DEBUG, message, thread)

    def flush(self) -> None:
        """Say how many lines were held back, if any were (at the end of the microVM)."""
        if self.suppressed:
            self._logger.write(WARN, f"{self.suppressed} log lines were held back: {self._name}", MAIN_THREAD, 2)
            self.suppressed = 0

    def _log(self, level: int, message: str, thread: str) -> None:
        logger = self._logger
        if logger.level < level:
            return
        now = time.monotonic_ns()
        if now - self._window_ns >= LIMIT_NS:
            self._window_ns = now
            self._count = 0
            if self.suppressed:
                logger.write(WARN, f"{self.suppressed} log lines were held back: {self._name}", thread, 3)
                self.suppressed = 0
        if self._count >= LIMIT_LINES:
            self.suppressed += 1
            logger.rate_limited_log_count += 1
            return
        self._count += 1
        logger.write(level, message, thread, 3)


def _poll_for_writing(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


#: The controller's log.
LOG = Logger()
