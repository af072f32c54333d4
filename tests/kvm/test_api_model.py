"""Random sequences of requests to the real program against the model of the rules: no divergence, no leak.

The model is that of the unit tests; here every request goes over a socket to a controller with workers of its own, and
the machine that is started is real.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from lab.client import Microvm, descendants, launch_unjailed
from tests.guests.build import build
from tests.harness.api_client import Client
from tests.harness.api_model import NOT_STARTED, PREBOOT, RUNNING, ApiModel
from tests.harness.jail import children, descriptors
from tests.harness.microvms import wait_for_first_worker
from tests.harness.run_options import Scale

#: What a controller may have more than when its guest was started, in KiB, after everything that was asked of it.
GROWTH_KIB = 4096
#: i8042: 16 bytes of buffer, 4 for one Ctrl-Alt-Del; the guest does not read them.
KEYBOARD_ROOM = 4
VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)


class Program:
    """One `firecracker` with the interface of ``tests.harness.api.Api``."""

    def __init__(self, directory: Path) -> None:
        self.vm: Microvm = launch_unjailed(directory, ["--log-path", str(directory / "log"), "--level", "Debug"])
        self.vm.wait_for_api(timeout=300.0)  # a soak may have little of the machine
        wait_for_first_worker(self.vm)
        self._log = directory / "log"
        self._log_position = 0
        self._client = Client(self.vm.api_socket)
        self.requests = 0
        self.send("GET", "/")  # this connection is among the controller's descriptors from now on

    @property
    def controller(self) -> int:
        """Pid of the controller."""
        return children(self.vm.process.pid)["vmm"]

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        self.requests += 1
        return self._client.send(method, path, None if body is None else json.dumps(body))

    def fault(self, method: str, path: str, body: Any = None) -> str:
        code, reply = self.send(method, path, body)
        assert code == 400, reply
        return str(reply["fault_message"])

    def config(self) -> dict[str, Any]:
        code, shown = self.send("GET", "/vm/config")
        assert code == 200
        return dict(shown)

    def log(self) -> str:
        """Return what was logged since the last call."""
        text = self._log.read_text()[self._log_position :]
        self._log_position += len(text)
        return text

    def close(self) -> None:
        self._client.close()
        self.vm.process.terminate()
        assert self.vm.wait() == -signal.SIGTERM
        self.vm.close()


def private_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1])
    raise AssertionError("no Private_Dirty")


class ProgramModel(ApiModel):
    """The model, with what a real machine adds."""

    #: Number of steps of all runs.
    steps = 0

    def __init__(self) -> None:
        self.typed = 0
        super().__init__()
        self.before = descriptors(self.api.controller)
        self.at_start: tuple[dict[int, str], int] | None = None

    def make_api(self, directory: Path) -> Any:
        self.kernel = str(build("spin"))
        return Program(directory)

    def teardown(self) -> None:
        program: Any = self.api
        controller = program.controller
        if self.at_start is None:
            files = int(self.kernel_set) + int(self.metrics)
            now = descriptors(controller)
            assert len(now) == len(self.before) + files, sorted(set(now.items()) ^ set(self.before.items()))
        else:
            open_then, memory_then = self.at_start
            now = descriptors(controller)
            assert len(now) == len(open_then), sorted(set(now.items()) ^ set(open_then.items()))
            assert private_kib(controller) <= memory_then + GROWTH_KIB, "memory leaks"
        processes = descendants(program.vm.process.pid)
        assert len(processes) == 3
        program.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
        self.directory.cleanup()

    @rule(memory=st.sampled_from([0, 64, 128, 256]), vcpus=st.sampled_from([0, 1, 2, 33]), patch=st.booleans())
    def machine_config(self, memory: int, vcpus: int, patch: bool) -> None:
        self.set_machine(memory, vcpus, patch)

    @rule(template=st.just("None"))
    def static_template(self, template: str) -> None:
        """Which static templates there are depends on the host: tests of their own show that."""
        self.set_template(template)

    @rule()
    def instance_start(self) -> None:
        was = self.state
        self.start_instance()
        if was == NOT_STARTED and self.state == RUNNING:
            controller = self.api.controller
            self.api.send("PATCH", "/vm", {"state": "Resumed"})
            self.at_start = descriptors(controller), private_kib(controller)

    @rule(action=st.sampled_from(["FlushMetrics", "SendCtrlAltDel"]))
    def action(self, action: str) -> None:
        refusal = None if self.started else PREBOOT
        if action == "SendCtrlAltDel" and self.started:
            if self.typed == KEYBOARD_ROOM:
                refusal = "Internal VMM error: I8042 error: i8042 internal buffer full."
            else:
                self.typed += 1
        self.put("/actions", {"action_type": action}, refusal)


@pytest.mark.soak("api")
def test_the_program_agrees_with_the_model(scale: Scale, seed: int) -> None:
    """10,000 steps in full; each step is a request that may change something and five that look."""
    examples, steps = scale((3, 20), (100, 100))
    hypothesis_seed(seed)(ProgramModel)
    run_state_machine_as_test(
        ProgramModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
