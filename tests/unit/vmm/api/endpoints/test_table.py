"""The table of the API has every operation with every kind of body, and every number that the description knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtool.project import ROOT
from tests.api_table import KINDS, MISSING, NUMBERS, RANGE, ROWS, STATE_CHANGES, TYPE, UNKNOWN, VALID, Row
from tests.harness.api import Api

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
METHODS = ("get", "put", "patch", "delete")
#: Operation → schema of its body, or None.
OPERATIONS: dict[tuple[str, str], Any] = {
    (method.upper(), path): item[method]["requestBody"]["content"]["application/json"]["schema"]
    if "requestBody" in item[method]
    else None
    for path, item in DOCUMENT["paths"].items()
    for method in METHODS
    if method in item and "firecracker" in item[method]["tags"]
}


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema or "allOf" in schema:
        name = schema.get("$ref", "").rpartition("/")[2]
        schema = DOCUMENT["components"]["schemas"][name] if name else schema["allOf"][0]
    return schema


def operation(method: str, path: str) -> tuple[str, str] | None:
    for known_method, template in OPERATIONS:
        if known_method == method and re.fullmatch(re.sub(r"\{[a-z_]+\}", "[^/]+", template), path):
            return known_method, template
    return None


def numbers(schema: dict[str, Any], prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Return the paths of all numeric fields of a schema."""
    schema = resolve(schema)
    if schema.get("type") == "integer":
        return {prefix}
    if schema.get("type") == "array":
        return numbers(schema["items"], prefix)
    found = set()
    for key, inner in schema.get("properties", {}).items():
        found |= numbers(inner, (*prefix, key))
    return found


def paths_to(value: Any, wanted: Any, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(value, dict):
        return set().union(*[paths_to(inner, wanted, (*prefix, key)) for key, inner in value.items()])
    if isinstance(value, list):
        return set().union(*[paths_to(inner, wanted, prefix) for inner in value])
    return {prefix} if value == wanted else set()


def test_every_operation_is_there_with_every_kind_that_it_can_have():
    there = {(operation(row.method, row.path), row.kind) for row in (*ROWS, *STATE_CHANGES)}
    missing = []
    assert len(OPERATIONS) == 38 + 3
    for key, schema in OPERATIONS.items():
        body = {} if schema is None else resolve(schema)
        possible = {VALID, UNKNOWN}
        if schema is not None:
            possible |= {MISSING} if body.get("required") else set()
            possible |= {TYPE}
            possible |= {RANGE} if numbers(schema) or "enum" in json.dumps(body) else set()
            if body.get("additionalProperties") is not False:
                possible -= {UNKNOWN}
        missing += [(key, kind) for kind in KINDS if kind in possible and (key, kind) not in there]
    assert not missing, missing


def test_every_number_has_its_edges_in_the_table():
    there = set()
    for number in NUMBERS:
        body = json.loads(number.body.replace("VALUE", "424242"))
        there |= {(operation(number.method, number.path), path) for path in paths_to(body, 424242)}
    described = {(key, path) for key, schema in OPERATIONS.items() if schema for path in numbers(schema)}
    assert described - there == set()


@pytest.mark.parametrize("state", ["before", "running", "paused"])
def test_the_controller_answers_as_the_table_says(state, api: Api, kernel: str, tmp_path: Path):
    """Without a process; tests/kvm/test_api_table.py asks the program."""
    if state != "before":
        assert api.send("PUT", "/boot-source", {"kernel_image_path": kernel})[0] == 204
        assert api.send("PUT", "/actions", {"action_type": "InstanceStart"})[0] == 204
    if state == "paused":
        assert api.send("PATCH", "/vm", {"state": "Paused"})[0] == 204
    wrong = []
    for row in ROWS:
        expected = getattr(row, state)
        body = None if row.body is None else bound(row, kernel, str(tmp_path / "metrics")).encode()
        status, reply = api.send(row.method, row.path, body)
        shown = status if status < 400 else reply["fault_message"]
        if shown != expected:
            wrong.append((row.name, shown, expected))
    assert not wrong, "\n".join(f"{name}\n  got      {shown}\n  expected {expected}" for name, shown, expected in wrong)


def bound(row: Row, kernel: str, metrics: str) -> str:
    assert row.body is not None
    return row.body.replace("KERNEL", kernel).replace("METRICS", metrics)
