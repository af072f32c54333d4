"""docs/openapi.yaml says what the API does: the same paths, the same fields, the same defaults and choices."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from devtool.project import ROOT
from tests.harness.api import Api
from vmm.api.dispatch import endpoints, parse
from vmm.api.endpoints import instance, vcpus
from vmm.api.endpoints.table import RequestError
from vmm.api.http import Request
from vmm.config import (
    balloon,
    boot_source,
    drives,
    entropy,
    machine,
    memory_hotplug,
    mmds,
    network,
    pmem,
    rate_limiter,
    serial,
    snapshot,
    vsock,
)
from vmm.config import file as config_file
from vmm.cpu_config import template
from vmm.json.schema import REQUIRED, Boolean, List, Object, Option, String, Unsigned, Variant
from vmm.observe.logger import LOGGER_CONFIG
from vmm.observe.metrics import METRICS_CONFIG

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
METHODS = ("get", "put", "patch", "delete")
OPERATIONS = [
    (method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in METHODS if method in item
]
#: Schema of the document → decoder.
BODIES: dict[str, Object[Any]] = {
    "MachineConfig": machine.MACHINE_CONFIG,
    "MachineConfigUpdate": machine.MACHINE_CONFIG_UPDATE,
    "BootSource": boot_source.BOOT_SOURCE,
    "Logger": LOGGER_CONFIG,
    "Metrics": METRICS_CONFIG,
    "Serial": serial.SERIAL,
    "Action": instance.ACTION,
    "Vm": instance.VM_STATE,
    "VcpuAction": vcpus.VCPU_ACTION,
    "TokenBucket": rate_limiter.TOKEN_BUCKET,
    "RateLimiter": rate_limiter.RATE_LIMITER,
    "Drive": drives.DRIVE,
    "DriveUpdate": drives.DRIVE_UPDATE,
    "Pmem": pmem.PMEM,
    "PmemUpdate": pmem.PMEM_UPDATE,
    "NetworkInterface": network.NETWORK,
    "NetworkInterfaceUpdate": network.NETWORK_UPDATE,
    "Vsock": vsock.VSOCK,
    "Entropy": entropy.ENTROPY,
    "Balloon": balloon.BALLOON,
    "BalloonUpdate": balloon.BALLOON_UPDATE,
    "BalloonStatisticsUpdate": balloon.BALLOON_STATS_UPDATE,
    "StartHinting": balloon.START_HINTING,
    "MemoryHotplug": memory_hotplug.MEMORY_HOTPLUG,
    "MemoryHotplugUpdate": memory_hotplug.MEMORY_HOTPLUG_UPDATE,
    "MmdsConfig": mmds.MMDS_CONFIG,
    "CpuTemplate": template.CPU_TEMPLATE,
    "CreateSnapshot": snapshot.CREATE_SNAPSHOT,
    "LoadSnapshot": snapshot.LOAD_SNAPSHOT,
}


def concrete(path: str) -> str:
    return path.replace("{drive_id}", "a").replace("{iface_id}", "a").replace("{id}", "a")


def as_in_the_rows(path: str) -> str:
    """Return a path as the rows write it: any name in braces is an id."""
    return re.sub(r"\{(drive_|iface_)?id\}", "{id}", path.lstrip("/"))


def test_every_row_is_described_and_every_description_is_a_row():
    described = {(method, as_in_the_rows(path)) for method, path in OPERATIONS}
    assert described == {(row.method, row.path) for row in endpoints()}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_described_path_is_known(method, path):
    """A body that is nonsense is refused as a body, a path that does not exist as a path."""
    item = DOCUMENT["paths"][path][method.lower()]
    body = b"nonsense" if "requestBody" in item else None
    request = Request(method, concrete(path), "HTTP/1.1", body)
    if body is None:
        assert parse(request).deprecation is None
        return
    with pytest.raises(RequestError, match=r"^An error occurred when deserializing the json body of a request: "):
        parse(request)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_body_is_needed_where_one_is_described(method, path):
    item = DOCUMENT["paths"][path][method.lower()]
    if not item.get("requestBody", {}).get("required"):
        assert parse(Request(method, concrete(path), "HTTP/1.1", None))
        return
    with pytest.raises(RequestError) as error:
        parse(Request(method, concrete(path), "HTTP/1.1", None))
    assert str(error.value) == f"Empty {method} request."


def test_operations_have_names_of_their_own():
    items = [DOCUMENT["paths"][path][method.lower()] for method, path in OPERATIONS]
    assert len({item["operationId"] for item in items}) == len(items)
    assert all(item["tags"] in (["firecracker"], ["cellblock"]) and item["summary"].endswith(".") for item in items)
    # The 38 operations of Firecracker's own description, the 3 DELETE that it leaves out, and ours.
    assert len(items) == 38 + 3 + 6
    assert [item["tags"] for item in items].count(["cellblock"]) == 6


def test_references_lead_somewhere():
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if isinstance(reference, str):
                target: Any = DOCUMENT
                for part in reference.removeprefix("#/").split("/"):
                    target = target[part]
            for item in node.values():
                walk(item)
        elif isinstance(node, list):
            for item in node:
                walk(item)

    walk(DOCUMENT)


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """Follow references and single allOf."""
    while "$ref" in schema or "allOf" in schema:
        inner = schema["allOf"][0] if "allOf" in schema else SCHEMAS[schema["$ref"].rpartition("/")[2]]
        schema = {**inner, **{key: value for key, value in schema.items() if key not in ("$ref", "allOf")}}
    return schema


@pytest.mark.parametrize("name", BODIES)
def test_a_body_has_the_fields_that_are_described(name):
    schema, decoder = SCHEMAS[name], BODIES[name]
    described = schema["properties"]
    own = [field.key for field in BODIES[name].fields if not field.extension]
    assert [key for key in described if key in own] == own  # the order in which a list stands for the object
    assert list(described) == [field.key for field in decoder.fields] or set(described) == {
        field.key for field in decoder.fields
    }
    required = {field.key for field in decoder.fields if field.default is REQUIRED}
    assert set(schema.get("required", ())) == required
    assert (schema.get("additionalProperties") is False) == (not decoder.ignore_unknown)
    for field in decoder.fields:
        _check_field(field.key, resolve(described[field.key]), field)


def _check_field(key: str, described: dict[str, Any], field: Any) -> None:
    kind = field.type
    if isinstance(kind, Option):
        assert described.get("nullable"), key
        kind = kind.inner
    else:
        assert not described.get("nullable"), key
        if field.default not in (REQUIRED, (), []):
            assert described["default"] == field.default, key
    if isinstance(kind, Unsigned):
        assert described["type"] == "integer"
        # The description may be stricter: what is checked after decoding, it says too.
        assert 0 <= described["minimum"] <= described["maximum"] <= kind.maximum
    elif isinstance(kind, Boolean):
        assert described["type"] == "boolean"
    elif isinstance(kind, Variant):
        assert {choice for choice in described["enum"] if choice is not None} == set(kind.names)
    elif isinstance(kind, String):
        assert described["type"] == "string"
    elif isinstance(kind, List):
        assert described["type"] == "array"
    elif isinstance(kind, Object):
        assert described["type"] == "object"
        assert set(described["properties"]) == {inner.key for inner in kind.fields}


def test_the_full_configuration_has_the_sections_that_are_described(api: Api):
    shown = api.config()
    assert set(SCHEMAS["FullConfig"]["required"]) == set(SCHEMAS["FullConfig"]["properties"]) == set(shown)
    assert set(shown) == {field.key for field in config_file._FIELDS}
