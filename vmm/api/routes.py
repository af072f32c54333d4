"""From a request to a typed action: paths, body rules, and the shape of every body.

Paths that Firecracker has and this version does not are known and refused by name, so that a client learns that the
feature is missing and not that it mistyped a path.
"""

from __future__ import annotations

from ipc.typed import TYPE_CHECKING, NamedTuple, NoReturn
from vmm import actions
from vmm.api import schema
from vmm.api.json_decoder import JsonError
from vmm.api.schema import BOOLEAN, PATH, STRING, U8, U64, USIZE, Converted, Field, Object, Option, Variant
from vmm.errors import VmmError
from vmm.logger import LoggerConfig, level_by_name
from vmm.resources import (
    CPU_TEMPLATES,
    HUGE_PAGES,
    HUGE_PAGES_NONE,
    BootSourceConfig,
    MachineConfigUpdate,
    SerialConfig,
    TokenBucketConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from vmm.actions import Action
    from vmm.api.http import Request

    T = TypeVar("T")


class RequestError(VmmError):
    """A request that is understood as HTTP, but is not one of the API; its text becomes the fault message."""

    code = "vmm.request"


class ParsedRequest(NamedTuple):
    """An action, and what is deprecated about the way it was asked for (None: nothing)."""

    action: Action
    deprecation: str | None = None


# -- bodies -----------------------------------------------------------------------------------------------------------

_CPU_TEMPLATE = Variant(*CPU_TEMPLATES)
_HUGE_PAGES = Variant(*HUGE_PAGES)

MACHINE_CONFIG = Object(
    "MachineConfig",
    MachineConfigUpdate,
    Field("vcpu_count", U8),
    Field("mem_size_mib", USIZE),
    Field("smt", BOOLEAN, False),
    Field("cpu_template", Option(_CPU_TEMPLATE)),
    Field("track_dirty_pages", BOOLEAN, False),
    Field("huge_pages", _HUGE_PAGES, HUGE_PAGES_NONE),
    Field("vcpu_placement", Option(STRING), extension=True),
)
_MACHINE_CONFIG_UPDATE = Object(
    "MachineConfigUpdate",
    MachineConfigUpdate,
    Field("vcpu_count", Option(U8)),
    Field("mem_size_mib", Option(USIZE)),
    Field("smt", Option(BOOLEAN)),
    Field("cpu_template", Option(_CPU_TEMPLATE)),
    Field("track_dirty_pages", Option(BOOLEAN)),
    Field("huge_pages", Option(_HUGE_PAGES)),
    Field("vcpu_placement", Option(STRING), extension=True),
)
BOOT_SOURCE = Object(
    "BootSourceConfig",
    BootSourceConfig,
    Field("kernel_image_path", STRING),
    Field("initrd_path", Option(STRING)),
    Field("boot_args", Option(STRING)),
)
LOGGER = Object(
    "LoggerConfig",
    LoggerConfig,
    Field("log_path", Option(PATH)),
    Field("level", Option(Converted(level_by_name, "Invalid LevelFilter"))),
    Field("show_level", Option(BOOLEAN)),
    Field("show_log_origin", Option(BOOLEAN)),
    Field("module", Option(STRING)),
)
_TOKEN_BUCKET = Object(
    "TokenBucketConfig",
    TokenBucketConfig,
    Field("size", U64),
    Field("one_time_burst", Option(U64)),
    Field("refill_time", U64),
    ignore_unknown=True,
)
_SERIAL = Object(
    "SerialConfig",
    SerialConfig,
    Field("serial_out_path", Option(PATH)),
    Field("rate_limiter", Option(_TOKEN_BUCKET)),
)
_ACTIONS: dict[str, Action] = {
    "FlushMetrics": actions.FlushMetrics(),
    "InstanceStart": actions.StartMicrovm(),
    "SendCtrlAltDel": actions.SendCtrlAltDel(),
}
_ACTION_BODY = Object("ActionBody", _ACTIONS.__getitem__, Field("action_type", Variant(*_ACTIONS)))
_VM_STATES: dict[str, Action] = {"Paused": actions.Pause(), "Resumed": actions.Resume()}
_VM = Object("Vm", _VM_STATES.__getitem__, Field("state", Variant(*_VM_STATES)))


def _decode(type_: schema.Type[T], body: bytes) -> T:
    try:
        return schema.decode(type_, body)
    except JsonError as error:
        raise RequestError(f"An error occurred when deserializing the json body of a request: {error}.") from error


# -- what each path does with its body and the rest of its tokens -----------------------------------------------------


def _get_vm(rest: list[str]) -> ParsedRequest | None:
    return ParsedRequest(actions.GetFullConfig()) if rest[:1] == ["config"] else None


def _put_machine_config(body: bytes, _rest: list[str]) -> ParsedRequest:
    update = _decode(MACHINE_CONFIG, body)
    return ParsedRequest(actions.UpdateMachineConfig(update), _template_deprecation("PUT", update))


def _patch_machine_config(body: bytes, _rest: list[str]) -> ParsedRequest:
    update = _decode(_MACHINE_CONFIG_UPDATE, body)
    if update == MachineConfigUpdate():
        raise RequestError("Empty PATCH request.")
    return ParsedRequest(actions.UpdateMachineConfig(update), _template_deprecation("PATCH", update))


def _template_deprecation(method: str, update: MachineConfigUpdate) -> str | None:
    return None if update.cpu_template is None else f"{method} /machine-config: cpu_template field is deprecated."


def _put_boot_source(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureBootSource(_decode(BOOT_SOURCE, body)))


def _put_logger(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureLogger(_decode(LOGGER, body)))


def _put_serial(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureSerial(_decode(_SERIAL, body)))


def _put_actions(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(_decode(_ACTION_BODY, body))


def _patch_vm(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(_decode(_VM, body))


_WITHOUT_BODY: dict[tuple[str, str], Callable[[list[str]], ParsedRequest | None]] = {
    ("GET", ""): lambda _rest: ParsedRequest(actions.GetInstanceInfo()),
    ("GET", "version"): lambda _rest: ParsedRequest(actions.GetVersion()),
    ("GET", "machine-config"): lambda _rest: ParsedRequest(actions.GetMachineConfig()),
    ("GET", "vm"): _get_vm,
    ("GET", "vcpus"): lambda rest: None if rest else ParsedRequest(actions.GetVcpus()),
}
_WITH_BODY: dict[tuple[str, str], Callable[[bytes, list[str]], ParsedRequest]] = {
    ("PUT", "actions"): _put_actions,
    ("PUT", "boot-source"): _put_boot_source,
    ("PUT", "logger"): _put_logger,
    ("PUT", "machine-config"): _put_machine_config,
    ("PUT", "serial"): _put_serial,
    ("PATCH", "machine-config"): _patch_machine_config,
    ("PATCH", "vm"): _patch_vm,
}
#: First token of the paths of features that are still to come, with the methods that they have and their names.
_NOT_YET: dict[str, tuple[tuple[str, ...], str]] = {
    "balloon": (("GET", "PUT", "PATCH"), "balloon device"),
    "cpu-config": (("PUT",), "custom CPU configuration"),
    "drives": (("PUT", "PATCH", "DELETE"), "block device"),
    "entropy": (("PUT",), "entropy device"),
    "hotplug": (("GET", "PUT", "PATCH"), "memory hot-plug device"),
    "metrics": (("PUT",), "metrics system"),
    "mmds": (("GET", "PUT", "PATCH"), "microVM metadata service"),
    "network-interfaces": (("PUT", "PATCH", "DELETE"), "network device"),
    "pmem": (("PUT", "PATCH", "DELETE"), "pmem device"),
    "snapshot": (("PUT",), "snapshot"),
    "vsock": (("PUT",), "vsock device"),
}
_EMPTY_BODY = {"PUT": "Empty PUT request.", "PATCH": "Empty PATCH request."}
_UNWANTED_BODY = {"GET": "GET request cannot have a body.", "DELETE": "Empty Delete request."}


def parse(request: Request) -> ParsedRequest:
    """Return what a request asks for. Raises RequestError."""
    tokens = path_tokens(request.path)
    first = tokens[0] if tokens else ""
    method, body = request.method, request.body
    if body is None:
        handler = _WITHOUT_BODY.get((method, first))
        parsed = handler(tokens[1:]) if handler else None
        if parsed is not None:
            return parsed
        if method in _EMPTY_BODY:
            raise RequestError(_EMPTY_BODY[method])
    else:
        if method in _UNWANTED_BODY:
            raise RequestError(_UNWANTED_BODY[method])
        body_handler = _WITH_BODY.get((method, first))
        if body_handler is not None:
            return body_handler(body, tokens[1:])
    return _refuse(method, first, tokens[1:])


def path_tokens(path: str) -> list[str]:
    """Split a path: leading slashes and one at the end do not count."""
    stripped = path.lstrip("/")
    if not stripped:
        return []
    tokens = stripped.split("/")
    return tokens[:-1] if not tokens[-1] else tokens


def _refuse(method: str, first: str, rest: list[str]) -> NoReturn:
    methods, feature = _NOT_YET.get(first, ((), ""))
    if method in methods and (first != "hotplug" or rest[:1] == ["memory"]):
        raise RequestError(f"The requested operation is not supported: the {feature} is not yet supported.")
    raise RequestError(f"Invalid request method and/or path: {method} {first}.")
