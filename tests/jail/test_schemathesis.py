"""What schemathesis makes of docs/openapi.yaml, sent to a jailed controller: no 5xx, no schema violation, no hang."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from devtool.project import ROOT
from tests.harness.http import BASE_URL, session
from tests.harness.jail import is_alive, microvm
from tests.harness.run_options import Scale

#: The longest that an answer may take; what takes longer hangs.
PATIENCE_S = 60.0
DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
#: A stream does not end, and has a test of its own.
STREAMS = {"/events"}
MODES = ("POSITIVE", "NEGATIVE")


def prepared() -> dict[str, Any]:
    """Return the description without streams, and with paths of the jail for files that a guest or a log needs."""
    return {**DOCUMENT, "paths": {path: item for path, item in DOCUMENT["paths"].items() if path not in STREAMS}}


class Fuzz:
    """Sends generated requests of all operations over one kept connection."""

    def __init__(self, socket: Path, examples: int, seed: int) -> None:
        import schemathesis
        from schemathesis import checks
        from schemathesis.specs.openapi import checks as openapi_checks

        self._schema = schemathesis.openapi.from_dict(prepared())
        self._modes = [getattr(schemathesis.GenerationMode, name) for name in MODES]
        self._checks = [
            checks.not_a_server_error,
            openapi_checks.status_code_conformance,
            openapi_checks.content_type_conformance,
            openapi_checks.response_headers_conformance,
            openapi_checks.response_schema_conformance,
        ]
        self._session = session(socket, PATIENCE_S)
        self._examples = examples
        self._seed = seed
        self.sent = 0
        self.operations: set[str] = set()
        self.statuses: dict[int, int] = {}
        self.slowest = 0.0

    def run(self) -> None:
        """Send what there is to send; the first violation is raised with the request that shows it."""
        for result in self._schema.get_all_operations():
            operation = result.ok()  # type: ignore[union-attr]
            self.operations.add(f"{operation.method.upper()} {operation.path}")
            for mode in self._modes:
                self._run(operation, mode)

    def _run(self, operation: Any, mode: Any) -> None:
        @hypothesis.seed(self._seed)
        @settings(
            max_examples=self._examples,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=False,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            begun = time.monotonic()
            response = case.call(base_url=BASE_URL, session=self._session, timeout=PATIENCE_S)
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.sent += 1
            self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
            case.validate_response(response, checks=self._checks)

        try:
            send()
        except hypothesis.errors.Unsatisfiable:
            pass  # there is no wrong request of this operation


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.soak("api")
@pytest.mark.parametrize("state", ["before", "running", "paused"])
def test_generated_requests(base: Path, state: str, scale: Scale, seed: int) -> None:
    with microvm(base) as jailed:
        if state == "before":
            jailed.start().wait_up()
        else:
            jailed.boot()
        if state == "paused":
            assert jailed.api("PATCH", "/vm", {"state": "Paused"}).status == 204
        fuzz = Fuzz(jailed.api_socket, scale(1, 60), seed)
        fuzz.run()
        print(f"\n{state}: {fuzz.sent} requests, {fuzz.statuses}, slowest {fuzz.slowest:.3f} s, seed {seed}")
        described = {f"{method.upper()} {path}" for path, item in prepared()["paths"].items() for method in item
                     if method in ("get", "put", "patch", "delete")}  # fmt: skip
        assert fuzz.operations == described
        assert fuzz.statuses.keys() <= {200, 204, 400, 413}
        assert fuzz.statuses[400] > 0
        assert jailed.api("GET", "/version").status == 200
        assert is_alive(jailed.pid)
        assert "Internal VMM error: unexpected" not in jailed.output()
        assert jailed.stop() == -signal.SIGTERM
