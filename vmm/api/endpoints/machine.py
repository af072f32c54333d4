"""The machine, and what it has one of: /machine-config, /boot-source, /cpu-config, /serial, /entropy and /vsock."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any, Callable
from vmm.api.endpoints.table import Endpoint, RequestError, checked_id
from vmm.config.boot_source import BOOT_SOURCE
from vmm.config.entropy import ENTROPY
from vmm.config.machine import MACHINE_CONFIG, MACHINE_CONFIG_UPDATE, MachineConfigUpdate
from vmm.config.serial import SERIAL
from vmm.config.vsock import VSOCK
from vmm.cpu_config.template import CPU_TEMPLATE

if TYPE_CHECKING:
    from vmm.config.vsock import VsockConfig
    from vmm.json.text import JsonValue
    from vmm.session import Session


def _machine_config(session: Session, _id: str, _body: Any) -> JsonValue:
    return session.resources.machine_config.to_json()


def _update_machine_config(session: Session, _id: str, update: MachineConfigUpdate) -> None:
    session.resources.update_machine_config(update)


def _not_empty(_rest: list[str], update: MachineConfigUpdate) -> None:
    if update == MachineConfigUpdate():
        raise RequestError("Empty PATCH request.")


def _template_deprecation(method: str) -> Callable[[MachineConfigUpdate], str | None]:
    text = f"{method} /machine-config: cpu_template field is deprecated."
    return lambda update: None if update.cpu_template is None else text


def _check_vsock_id(_rest: list[str], config: VsockConfig) -> None:
    if config.vsock_id is not None:
        checked_id(config.vsock_id)


def _vsock_id_deprecation(config: VsockConfig) -> str | None:
    return None if config.vsock_id is None else "PUT /vsock: vsock_id field is deprecated."


ENDPOINTS = (
    Endpoint("GET", "machine-config", None, _machine_config, _machine_config, counted="machine_cfg"),
    Endpoint(
        "PUT", "machine-config", MACHINE_CONFIG, _update_machine_config, None, "Machine config error",
        counted="machine_cfg", boot_specific=True, deprecation=_template_deprecation("PUT"), section="machine-config",
    ),
    Endpoint(
        "PATCH", "machine-config", MACHINE_CONFIG_UPDATE, _update_machine_config, None, "Machine config error",
        counted="machine_cfg", boot_specific=True, check=_not_empty, deprecation=_template_deprecation("PATCH"),
    ),
    Endpoint(
        "PUT", "boot-source", BOOT_SOURCE, lambda session, _id, config: session.resources.set_boot_source(config),
        None, "Boot source error", counted="boot_source", boot_specific=True, section="boot-source",
    ),
    Endpoint(
        "PUT", "cpu-config", CPU_TEMPLATE, lambda session, _id, template: session.resources.set_cpu_template(template),
        None, "Configure CPU error", counted="cpu_cfg", section="cpu-config",
    ),
    Endpoint(
        "PUT", "serial", SERIAL, lambda session, _id, config: session.resources.set_serial(config), None,
        counted="serial",
    ),
    Endpoint(
        "PUT", "entropy", ENTROPY, lambda session, _id, config: session.resources.set_entropy(config), None,
        "Entropy config error", boot_specific=True, section="entropy",
    ),
    Endpoint(
        "PUT", "vsock", VSOCK, lambda session, _id, config: session.resources.set_vsock(config), None,
        "Vsock config error", counted="vsock", boot_specific=True, check=_check_vsock_id,
        deprecation=_vsock_id_deprecation, section="vsock",
    ),
)  # fmt: skip
