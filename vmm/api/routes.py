"""From a request to a typed action: paths, body rules, and the shape of every body.

Those of devices, snapshots and the metadata service are in vmm.api.device_routes.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm import actions
from vmm.api import device_routes
from vmm.api.request import ParsedRequest, RequestError, decode_body, invalid_path
from vmm.config.rate_limiter import TOKEN_BUCKET
from vmm.config.resources import (
    CPU_TEMPLATES,
    HUGE_PAGES,
    HUGE_PAGES_NONE,
    REBOOT_ACTIONS,
    BootSourceConfig,
    MachineConfigUpdate,
    SerialConfig,
)
from vmm.json.schema import BOOLEAN, PATH, STRING, STRING_MAP, U8, USIZE, Converted, Field, Object, Option, Variant
from vmm.observe.logger import LoggerConfig, level_by_name
from vmm.observe.metrics import MetricsConfig

if TYPE_CHECKING:
    from vmm.actions import Action
    from vmm.api.device_routes import WithBody, WithoutBody
    from vmm.api.http import Request


# -- bodies -----------------------------------------------------------------------------------------------------------

_CPU_TEMPLATE = Variant(*CPU_TEMPLATES)
_HUGE_PAGES = Variant(*HUGE_PAGES)
_REBOOT_ACTION = Variant(*REBOOT_ACTIONS)

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
    Field("reboot_action", Option(_REBOOT_ACTION), extension=True),
    Field("vcpu_affinity", Option(STRING), extension=True),
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
    Field("reboot_action", Option(_REBOOT_ACTION), extension=True),
    Field("vcpu_affinity", Option(STRING), extension=True),
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
METRICS = Object(
    "MetricsConfig",
    MetricsConfig,
    Field("metrics_path", PATH),
    Field("emit_id", BOOLEAN, False),
    Field("properties", Option(STRING_MAP)),
    ignore_unknown=True,
)
_SERIAL = Object(
    "SerialConfig",
    SerialConfig,
    Field("serial_out_path", Option(PATH)),
    Field("rate_limiter", Option(TOKEN_BUCKET)),
)
_ACTIONS: dict[str, Action] = {
    "FlushMetrics": actions.FlushMetrics(),
    "InstanceStart": actions.StartMicrovm(),
    "SendCtrlAltDel": actions.SendCtrlAltDel(),
}
_ACTION_BODY = Object("ActionBody", _ACTIONS.__getitem__, Field("action_type", Variant(*_ACTIONS)))
_VM_STATES: dict[str, Action] = {"Paused": actions.Pause(), "Resumed": actions.Resume()}
_VM = Object("Vm", _VM_STATES.__getitem__, Field("state", Variant(*_VM_STATES)))
_VCPU_ACTION = Object("VcpuAction", str, Field("action", Variant("Replace")))


# -- what each path does with its body and the rest of its tokens -----------------------------------------------------


def _get_vm(rest: list[str]) -> ParsedRequest | None:
    return ParsedRequest(actions.GetFullConfig()) if rest[:1] == ["config"] else None


def _put_machine_config(body: bytes, _rest: list[str]) -> ParsedRequest:
    update = decode_body(MACHINE_CONFIG, body)
    return ParsedRequest(actions.UpdateMachineConfig(update), _template_deprecation("PUT", update))


def _patch_machine_config(body: bytes, _rest: list[str]) -> ParsedRequest:
    update = decode_body(_MACHINE_CONFIG_UPDATE, body)
    if update == MachineConfigUpdate():
        raise RequestError("Empty PATCH request.")
    return ParsedRequest(actions.UpdateMachineConfig(update), _template_deprecation("PATCH", update))


def _template_deprecation(method: str, update: MachineConfigUpdate) -> str | None:
    return None if update.cpu_template is None else f"{method} /machine-config: cpu_template field is deprecated."


def _put_boot_source(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureBootSource(decode_body(BOOT_SOURCE, body)))


def _put_logger(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureLogger(decode_body(LOGGER, body)))


def _put_serial(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureSerial(decode_body(_SERIAL, body)))


def _put_actions(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(decode_body(_ACTION_BODY, body))


def _patch_vm(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(decode_body(_VM, body))


def _patch_vcpus(body: bytes, rest: list[str]) -> ParsedRequest:
    decode_body(_VCPU_ACTION, body)
    if not rest:
        return ParsedRequest(actions.ReplaceWorkers(None))
    number = rest[0]
    if len(rest) > 1 or not (number.isascii() and number.isdigit()) or len(number) > 4:
        raise RequestError(f"Invalid vCPU index: {number[:64]!r}.")
    return ParsedRequest(actions.ReplaceWorkers(int(number)))


def _get_metrics(rest: list[str]) -> ParsedRequest | None:
    return ParsedRequest(actions.GetPrometheusMetrics()) if rest[:1] == ["prometheus"] else None


def _put_metrics(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.ConfigureMetrics(decode_body(METRICS, body)))


_WITHOUT_BODY: dict[tuple[str, str], WithoutBody] = {
    ("GET", ""): lambda _rest: ParsedRequest(actions.GetInstanceInfo()),
    ("GET", "events"): lambda _rest: ParsedRequest(actions.StreamEvents()),
    ("GET", "version"): lambda _rest: ParsedRequest(actions.GetVersion()),
    ("GET", "machine-config"): lambda _rest: ParsedRequest(actions.GetMachineConfig()),
    ("GET", "metrics"): _get_metrics,
    ("GET", "vm"): _get_vm,
    ("GET", "vcpus"): lambda rest: None if rest else ParsedRequest(actions.GetVcpus()),
    **device_routes.WITHOUT_BODY,
}
_WITH_BODY: dict[tuple[str, str], WithBody] = {
    ("PUT", "actions"): _put_actions,
    ("PUT", "boot-source"): _put_boot_source,
    ("PUT", "logger"): _put_logger,
    ("PUT", "machine-config"): _put_machine_config,
    ("PUT", "metrics"): _put_metrics,
    ("PUT", "serial"): _put_serial,
    ("PATCH", "machine-config"): _patch_machine_config,
    ("PATCH", "vcpus"): _patch_vcpus,
    ("PATCH", "vm"): _patch_vm,
    **device_routes.WITH_BODY,
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
    return invalid_path(method, first)


def path_tokens(path: str) -> list[str]:
    """Split a path: leading slashes and one at the end do not count."""
    stripped = path.lstrip("/")
    if not stripped:
        return []
    tokens = stripped.split("/")
    return tokens[:-1] if not tokens[-1] else tokens


def routes() -> set[tuple[str, str]]:
    """Return method and first token of every path that exists."""
    return {*_WITHOUT_BODY, *_WITH_BODY}
