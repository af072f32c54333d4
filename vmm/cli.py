"""Command line of the controller (the program ``firecracker``): Firecracker's flags, and a few of our own.

This module is on the path of ``--version``, which is to cost little more than starting the interpreter: it imports
only what every path needs, and no ``typing`` at run time.
"""

from __future__ import annotations

from base.version import CELLBLOCK_VERSION, FIRECRACKER_VERSION, PRODUCT_NAME, SNAPSHOT_VERSION
from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Exit codes (base.exit_codes is not imported here: it would load ``signal`` and ``enum``).
EXIT_OK = 0
EXIT_GENERIC = 1
EXIT_BAD_CONFIGURATION = 152
EXIT_ARGUMENT_PARSING = 153

DEFAULT_API_SOCK = "/run/firecracker.socket"
DEFAULT_INSTANCE_ID = "anonymous-instance"
#: Bytes of a request body.
DEFAULT_PAYLOAD_LIMIT = 51200
MAX_INSTANCE_ID_LENGTH = 64
LEVELS = ("off", "error", "warn", "warning", "info", "debug", "trace")
#: How a kernel is entered; ``auto`` prefers PVH.
KERNEL_ENTRIES = ("auto", "pvh", "linux64")
#: Where the serial console is connected when no ``serial_out_path`` is set.
CONSOLES = ("stdio", "pty", "none")
SWITCH = ("on", "off")
_MAX_U64 = (1 << 64) - 1


class CommandLineError(VmmError):
    """The command line is refused; the process ends with ``exit_code`` and prints the text."""

    code = "vmm.command_line"

    def __init__(self, text: str, exit_code: int = EXIT_ARGUMENT_PARSING) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class _Flag:
    __slots__ = ("name", "takes_value", "default", "help", "requires", "forbids", "choices", "number")

    def __init__(
        self,
        name: str,
        help_: str,
        *,
        takes_value: bool = True,
        default: str | None = None,
        requires: str | None = None,
        forbids: str | None = None,
        choices: tuple[str, ...] = (),
        number: bool = False,
    ) -> None:
        self.name = name
        self.takes_value = takes_value
        self.default = default
        self.help = help_
        self.requires = requires
        self.forbids = forbids
        self.choices = choices
        self.number = number

    def usage(self) -> str:
        text = f"  --{self.name} <{'|'.join(self.choices) or self.name}>" if self.takes_value else f"  --{self.name}"
        return f"{text}\n      {self.help}" + (f" [default: {self.default}]" if self.default is not None else "")


_FIRECRACKER_FLAGS = (
    _Flag("api-sock", "Path of the API socket.", default=DEFAULT_API_SOCK),
    _Flag("id", "Unique id of the microVM.", default=DEFAULT_INSTANCE_ID),
    _Flag("config-file", "Path of a JSON file with the configuration; the microVM is started at once."),
    _Flag("no-api", "Do without the API socket; needs --config-file.", takes_value=False, requires="config-file"),
    _Flag("metadata", "Path of a JSON file with the content of the metadata service."),
    _Flag("log-path", "Path of a file or FIFO for the log."),
    _Flag("level", "Level of the log: Off, Error, Warning, Info, Debug or Trace."),
    _Flag("module", "Log only modules whose name begins like this."),
    _Flag("show-level", "Show the level in log lines.", takes_value=False),
    _Flag("show-log-origin", "Show file and line in log lines.", takes_value=False),
    _Flag("metrics-path", "Path of a file or FIFO for metrics."),
    _Flag("boot-timer", "Add the boot timer device.", takes_value=False),
    _Flag(
        "http-api-max-payload-size",
        "Largest body of an API request in bytes.",
        default=str(DEFAULT_PAYLOAD_LIMIT),
        number=True,
    ),
    _Flag("mmds-size-limit", "Largest content of the metadata service in bytes.", number=True),
    _Flag("enable-pci", "Use the PCI transport for devices.", takes_value=False),
    _Flag("seccomp-filter", "Path of a custom seccomp filter.", forbids="no-seccomp"),
    _Flag("no-seccomp", "Run without seccomp filters. Not recommended.", takes_value=False, forbids="seccomp-filter"),
    _Flag("start-time-us", "Wall-clock time of the process start in microseconds.", number=True),
    _Flag("start-time-cpu-us", "CPU time of the process start in microseconds.", number=True),
    _Flag("parent-cpu-time-us", "CPU time used by the parent in microseconds.", number=True),
    _Flag("version", "Print the version.", takes_value=False),
    _Flag("snapshot-version", "Print the version of the snapshot data format.", takes_value=False),
    _Flag("describe-snapshot", "Print the version of the data format of a snapshot file."),
    _Flag("help", "Print this text.", takes_value=False),
)
_CELLBLOCK_FLAGS = (
    _Flag("unpack-kernel", "Unpack compressed kernels on the host.", default="on", choices=SWITCH),
    _Flag("kernel-cache", "Directory for unpacked kernels."),
    _Flag("kernel-entry", "How the kernel is entered.", default=KERNEL_ENTRIES[0], choices=KERNEL_ENTRIES),
    _Flag("console", "Where the serial console goes without serial_out_path.", default=CONSOLES[0], choices=CONSOLES),
    _Flag("exerciser", "Add the test device.", takes_value=False),
    _Flag("wall-log", "Append the report on the walls of each cell, and the supervisor's lines, to this file."),
    _Flag("without", "Names of walls to switch off, separated by commas, for tests (always logged)."),
    _Flag(
        "dump-cpu-config",
        "Build the microVM of --config-file, write its CPUID and MSRs to this file as a CPU template, and end.",
        requires="config-file",
    ),
)


class CommandLine:
    """What the command line says. Attributes are the flags with ``_`` for ``-``; None: not given and no default."""

    __slots__ = (
        "api_sock",
        "id",
        "config_file",
        "no_api",
        "metadata",
        "log_path",
        "level",
        "module",
        "show_level",
        "show_log_origin",
        "metrics_path",
        "boot_timer",
        "http_api_max_payload_size",
        "mmds_size_limit",
        "enable_pci",
        "seccomp_filter",
        "no_seccomp",
        "start_time_us",
        "start_time_cpu_us",
        "parent_cpu_time_us",
        "snapshot_version",
        "describe_snapshot",
        "unpack_kernel",
        "kernel_cache",
        "kernel_entry",
        "console",
        "exerciser",
        "wall_log",
        "without",
        "dump_cpu_config",
    )

    api_sock: str
    id: str
    config_file: str | None
    no_api: bool
    metadata: str | None
    log_path: str | None
    #: In lower case.
    level: str | None
    module: str | None
    show_level: bool
    show_log_origin: bool
    metrics_path: str | None
    boot_timer: bool
    #: Bytes.
    http_api_max_payload_size: int
    #: Bytes; the payload limit when it is not given.
    mmds_size_limit: int
    enable_pci: bool
    seccomp_filter: str | None
    no_seccomp: bool
    start_time_us: int | None
    start_time_cpu_us: int | None
    parent_cpu_time_us: int | None
    snapshot_version: bool
    describe_snapshot: str | None
    unpack_kernel: bool
    kernel_cache: str | None
    kernel_entry: str
    console: str
    exerciser: bool
    wall_log: str | None
    without: str | None
    dump_cpu_config: str | None

    def __repr__(self) -> str:
        return f"CommandLine({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse the arguments after the program's name. Raises CommandLineError."""
    values = _collect(arguments)
    _check_requirements(values)
    line = CommandLine()
    for flag in (*_FIRECRACKER_FLAGS, *_CELLBLOCK_FLAGS):
        attribute = flag.name.replace("-", "_")
        if attribute not in CommandLine.__slots__:
            continue
        value = values.get(flag.name, flag.default)
        if not flag.takes_value:
            setattr(line, attribute, flag.name in values)
        elif value is None:
            setattr(line, attribute, None)
        elif flag.number:
            setattr(line, attribute, _number(flag.name, value))
        else:
            _check_choice(flag, value)
            setattr(line, attribute, value)
    line.unpack_kernel = values.get("unpack-kernel", "on") == "on"
    if "mmds-size-limit" not in values:
        line.mmds_size_limit = line.http_api_max_payload_size
    _check_instance_id(line.id)
    if line.level is not None:
        line.level = _level(line.level)
    return line


def answer(arguments: Sequence[str]) -> tuple[str, int] | None:
    """Return text and exit code for flags that only ask something; None if the command line asks for a microVM.

    Text that is an error (exit code not 0) belongs on standard error. Raises CommandLineError.
    """
    own = _own_arguments(arguments)
    if "--help" in own or "-h" in own:
        return help_text(), EXIT_OK
    if "--version" in own:
        return f"Firecracker v{FIRECRACKER_VERSION}\n", EXIT_OK
    line = parse(arguments)
    if line.snapshot_version:
        return f"v{SNAPSHOT_VERSION}\n", EXIT_OK
    if line.describe_snapshot is not None:
        return _describe_snapshot(line.describe_snapshot)
    return None


def print_answer(answered: tuple[str, int]) -> int:
    """Print a text, on standard error if it is one of an error; return its exit status."""
    import sys

    text, code = answered
    stream = sys.stderr if code else sys.stdout
    stream.write(text)
    stream.flush()
    return code


def help_text() -> str:
    """Return what --help prints."""
    theirs = "\n".join(flag.usage() for flag in _FIRECRACKER_FLAGS)
    ours = "\n".join(flag.usage() for flag in _CELLBLOCK_FLAGS)
    return (
        f"Firecracker v{FIRECRACKER_VERSION}\n\n{PRODUCT_NAME} {CELLBLOCK_VERSION}: runs a microVM and serves "
        f"Firecracker's API.\n\nFlags that Firecracker has too:\n{theirs}\n\nFlags of {PRODUCT_NAME}:\n{ours}\n"
    )


def _own_arguments(arguments: Sequence[str]) -> list[str]:
    """Return what comes before a separating ``--``."""
    own = list(arguments)
    return own[: own.index("--")] if "--" in own else own


def _error(text: str) -> CommandLineError:
    return CommandLineError(f"Arguments parsing error: {text} \n\nFor more information try --help.")


def _collect(arguments: Sequence[str]) -> dict[str, str]:
    """Return flags with their values; flags without a value have an empty one."""
    flags = {flag.name: flag for flag in (*_FIRECRACKER_FLAGS, *_CELLBLOCK_FLAGS)}
    values: dict[str, str] = {}
    rest = iter(_own_arguments(arguments))
    for argument in rest:
        name = argument.removeprefix("--")
        flag = flags.get(name) if name != argument else None
        if flag is None:
            raise _error(f"Found argument '{name}' which wasn't expected, or isn't valid in this context.")
        if name in values:
            raise _error(f"The argument '{name}' was provided more than once.")
        value = next(rest, None) if flag.takes_value else ""
        if value is None or value.startswith("--"):
            raise _error(f"The argument '{name}' requires a value, but none was supplied.")
        values[name] = value
    return values


def _check_requirements(values: dict[str, str]) -> None:
    for flag in (*_FIRECRACKER_FLAGS, *_CELLBLOCK_FLAGS):
        if flag.name not in values:
            continue
        if flag.requires is not None and flag.requires not in values:
            raise _error(f"Argument '{flag.requires}' required, but not found.")
        if flag.forbids is not None and flag.forbids in values:
            raise _error(f"Argument '{flag.forbids}' cannot be used together with argument '{flag.name}'.")


def _number(name: str, value: str) -> int:
    digits = value.removeprefix("+")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > len(str(_MAX_U64)) or int(digits) > _MAX_U64:
        raise _error(f"The value '{value}' of argument '{name}' is not a number from 0 to {_MAX_U64}.")
    return int(digits)


def _check_choice(flag: _Flag, value: str) -> None:
    if flag.choices and value not in flag.choices:
        raise _error(f"The value '{value}' of argument '{flag.name}' is not one of: {', '.join(flag.choices)}.")


def _check_instance_id(value: str) -> None:
    if not 0 < len(value) <= MAX_INSTANCE_ID_LENGTH:
        raise CommandLineError(
            f"Invalid instance ID: Invalid len ({len(value)});  the length must be between 1 and "
            f"{MAX_INSTANCE_ID_LENGTH}"
        )
    for position, character in enumerate(value):
        if not (character.isascii() and (character.isalnum() or character == "-")):
            raise CommandLineError(f"Invalid instance ID: Invalid char ({character}) at position {position}")


def _level(value: str) -> str:
    level = value.lower()
    if level not in LEVELS:
        raise CommandLineError(
            f"Invalid value for logger level: Failed to parse string to level filter: {value}."
            "Possible values: [Error, Warning, Info, Debug]",
            EXIT_BAD_CONFIGURATION,
        )
    return level


def _describe_snapshot(path: str) -> tuple[str, int]:
    """Describe a snapshot file; there is no format that could be described yet, only files that cannot be opened."""
    from vmm.files import FileOpenError, read_text

    try:
        read_text(path, 1 << 20)
    except FileOpenError as error:
        text = f"Unable to open snapshot state file: {error}"
    else:
        text = "Invalid data format version of snapshot file: snapshots are not yet supported"
    return f"When printing Snapshot Data format: {text}\n", EXIT_GENERIC
