"""A worker is killed, crashes or stops in every state of its life: one declared outcome each, with its cause.

By fault points inside the worker where a state lasts too short to be hit from outside. The outcomes:

- *refused*: InstanceStart fails with the cause, the program lives on and can start the microVM again;
- *started*: the start goes on with another worker;
- *ended*: the microVM ends with the exit code of the signal, cause, black box and console's tail in log and events;
- *undone*: the replacement fails with the cause, the guest runs on in the old worker;
- *replaced*: the replacement succeeds; nobody needs that worker any more.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.client import Reply, without_log
from tests.harness.jail import PATIENCE_S, PROMISE_S, JailedMicrovm, id_of, is_alive, microvm, status, wait_for
from tests.harness.jail_left import after_the_janitor
from tests.harness.run_options import NoLeftovers

EXIT_CODES = {"SIGKILL": 1, "SIGSEGV": 150}
ACTIONS = {"kill": "SIGKILL", "crash": "SIGSEGV"}


class Case(NamedTuple):
    """``fault`` is armed with the action; without one the victim is signalled from outside."""

    state: str
    outcome: str
    fault: str = ""
    options: str = ""
    slow: tuple[str, ...] = ()


CASES = (
    Case("spawned", "refused", "vcpu.hello"),
    Case("greeted", "started"),
    Case("configured", "refused", slow=("vmm.configured=delay,ms=400",)),
    Case("started", "refused", "vcpu.resume"),
    Case("running", "ended"),
    Case("paused", "ended"),
    Case("running (told to pause)", "ended", "vcpu.pause"),
    Case("paused (told to hand over)", "ended", "vcpu.hand_over"),
    Case("paused (told to save)", "ended", "vcpu.save"),
    Case("saved", "ended", slow=("vcpu.load=delay,ms=400",)),
    Case("successor spawned", "undone", "cell.sealed", ",after=2"),
    Case("successor greeted", "undone", "vcpu.resumes_other"),
    Case("successor configured", "undone", "vcpu.load"),
    Case("successor loaded", "undone", "vcpu.take_over"),
    Case("replaced", "replaced", "vcpu.finish"),
)


class Events:
    """Everything that GET /events tells."""

    def __init__(self, jailed: JailedMicrovm) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(jailed.api_socket))
        self._socket.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        self._file = self._socket.makefile("rb")
        assert self._file.readline().startswith(b"HTTP/1.1 200")
        while self._file.readline() != b"\r\n":
            pass

    def until(self, event: str, **wanted: Any) -> dict[str, Any]:
        """Return the next such event."""
        for line in self._file:
            told: dict[str, Any] = json.loads(line)
            if told["event"] == event and wanted.items() <= told.items():
                return told
        raise AssertionError(f"the stream ended without {event} {wanted}")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def workers(jailed: JailedMicrovm) -> list[int]:
    """The pids of all workers, in the order of their forks."""
    found = []
    for pid in Path(f"/proc/{jailed.pid}/task/{jailed.pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            if Path(f"/proc/{pid}/comm").read_text().startswith("vcpu"):
                found.append(int(pid))
    return sorted(found)


class Later:
    """An API request in a thread of its own."""

    def __init__(self, jailed: JailedMicrovm, method: str, target: str, body: Any) -> None:
        self.reply: Reply | None = None
        self._thread = threading.Thread(target=self._run, args=(jailed, method, target, body))
        self._thread.start()

    def _run(self, *request: Any) -> None:
        jailed, *rest = request
        try:
            self.reply = jailed.api(*rest)
        except OSError:
            pass  # the microVM ended before it could answer

    def join(self) -> Reply | None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "no answer"
        return self.reply


def operation(case: Case) -> tuple[str, str, Any]:
    """Return the request during which it happens."""
    if case.outcome in ("refused", "started"):
        return "PUT", "/actions", {"action_type": "InstanceStart"}
    if case.fault == "vcpu.pause":
        return "PATCH", "/vm", {"state": "Paused"}
    return "PATCH", "/vcpus/0", {"action": "Replace"}


def prepare(jailed: JailedMicrovm, case: Case) -> None:
    """Bring the microVM to where the operation can begin."""
    jailed.add_guest("spin")
    jailed.start().wait_up()
    for target, body in (
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}),
        ("/boot-source", {"kernel_image_path": "/kernel"}),
    ):
        assert jailed.api("PUT", target, body).status == 204
    if case.outcome not in ("refused", "started"):
        assert jailed.api("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204, jailed.describe()
        wait_for(lambda: "spinning" in without_log(jailed.output().encode()), jailed.describe)
    if case.state == "paused":
        assert jailed.api("PATCH", "/vm", {"state": "Paused"}).status == 204


def hit_from_outside(jailed: JailedMicrovm, case: Case, number: int) -> tuple[Later | None, int]:
    """Signal the worker in its state; return the request that goes on meanwhile, and the victim."""
    if case.state in ("running", "paused", "greeted"):
        wait_for(lambda: len(workers(jailed)) == 1 and jailed.api("GET", "/").status == 200, "the worker")
        (victim,) = workers(jailed)
        os.kill(victim, number)
        if case.state != "greeted":
            return None, victim
        events = Events(jailed)
        events.until("worker-state", state="ended", pid=victim)  # the controller knows it, too
        events.close()
        return Later(jailed, *operation(case)), victim
    events = Events(jailed)
    later = Later(jailed, *operation(case))
    victim = events.until("worker-state", state=case.state)["pid"]
    os.kill(victim, number)
    events.close()
    return later, victim


def check_end(jailed: JailedMicrovm, events: Events, name: str) -> None:
    """The microVM has ended for this signal, and has said so."""
    told = events.until("worker-failed")
    assert (told["cause"], told["detail"]) == ("signal", name)
    assert told["black_box"]["0"].startswith("last exit ")
    assert "rip=" in told["black_box"]["0"]
    assert "spinning" in told["console_tail"]
    ended = events.until("ended")
    assert (ended["exit_code"], ended["cause"], ended["detail"]) == (EXIT_CODES[name], "signal", name)
    assert jailed.process.wait(PROMISE_S) == EXIT_CODES[name], jailed.describe()
    log = jailed.output()
    assert f"was ended by signal {name}" in log
    assert "vCPU 0: last exit " in log
    assert "The console's last words: " in log


@pytest.mark.slow
@pytest.mark.soak("smp")
@pytest.mark.parametrize("action", ["kill", "crash"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.state)
def test_a_worker_that_dies(base: Path, no_leftovers: NoLeftovers, case: Case, action: str) -> None:
    name = ACTIONS[action]
    armed = (*case.slow, *((f"{case.fault}={action}{case.options}",) if case.fault else ()))
    faults = [word for each in armed for word in ("--arm-fault", each)]
    with no_leftovers(base, names=(id_of(base),)), microvm(base, "--cleanup", *faults) as jailed:
        prepare(jailed, case)
        events = Events(jailed)
        if case.fault:
            later: Later | None = Later(jailed, *operation(case))
        else:
            later, _ = hit_from_outside(jailed, case, signal.Signals[name])
        if case.outcome == "ended":
            check_end(jailed, events, name)
        reply = later.join() if later is not None else None
        if case.outcome == "ended":
            assert reply is None or reply.status == 400
        else:
            assert reply is not None
            check_life(jailed, events, case, name, reply)
        events.close()
        after_the_janitor(jailed)


def check_life(jailed: JailedMicrovm, events: Events, case: Case, name: str, reply: Reply) -> None:
    """The program lives on, and the microVM is what the outcome says."""
    text = str(reply.body)
    state = jailed.api("GET", "/").body["state"]
    if case.outcome == "refused":
        assert (reply.status, state) == (400, "Not started"), text
        assert name in text
    elif case.outcome == "undone":
        assert (reply.status, state) == (400, "Running"), text
        assert name in text
        wait_for(lambda: len(workers(jailed)) == 1, "the end of the successor")
        (vcpu,) = jailed.api("GET", "/vcpus").body
        assert (vcpu["state"], vcpu["replacements"], vcpu["pid"]) == ("running", 0, workers(jailed)[0])
        assert jailed.api("PATCH", "/vm", {"state": "Paused"}).status == 204
        assert jailed.api("PATCH", "/vm", {"state": "Resumed"}).status == 204
    else:
        assert (reply.status, state) == (204, "Running"), text
        (vcpu,) = jailed.api("GET", "/vcpus").body
        assert vcpu["replacements"] == int(case.outcome == "replaced")
        wait_for(lambda: workers(jailed) == [vcpu["pid"]], "the end of the other worker")
    assert jailed.stop() == -signal.SIGTERM, jailed.describe()
    assert events.until("ended")["exit_code"] == 143


@pytest.mark.slow
@pytest.mark.soak("smp")
@pytest.mark.parametrize("case", [case for case in CASES if case.state != "greeted"], ids=lambda case: case.state)
def test_a_worker_that_stops_and_goes_on(base: Path, no_leftovers: NoLeftovers, case: Case, scale: Any) -> None:
    """SIGSTOP is no death: what was going on is completed once it goes on. Longer stops are reported."""
    armed = (*case.slow, *((f"{case.fault}=stop{case.options}",) if case.fault else ()))
    faults = [word for each in armed for word in ("--arm-fault", each)]
    # Long enough to be reported. Who is being replaced, or is to replace, is not waited for that long.
    long = scale(case.state == "running", case.state in ("running", "paused"))
    with no_leftovers(base, names=(id_of(base),)), microvm(base, "--cleanup", *faults) as jailed:
        prepare(jailed, case)
        events = Events(jailed)
        if case.fault:
            later: Later | None = Later(jailed, *operation(case))
            victims = wait_for(lambda: [pid for pid in workers(jailed) if status(pid)["State"][0] == "T"], "the stop")
            (victim,) = victims
        else:
            later, victim = hit_from_outside(jailed, case, signal.SIGSTOP)
        if long:
            assert events.until("worker-stalled")["pid"] == victim
        time.sleep(0.1)
        if is_alive(victim):  # a predecessor that does not finish is killed
            os.kill(victim, signal.SIGCONT)
        if long:
            assert events.until("worker-answers")["pid"] == victim
        reply = later.join() if later is not None else None
        assert reply is None or reply.status == 204, reply.body
        wanted = "Paused" if case.state == "paused" or case.fault == "vcpu.pause" else "Running"
        assert jailed.api("GET", "/").body["state"] == wanted
        assert jailed.stop() == -signal.SIGTERM, jailed.describe()
        events.close()
        after_the_janitor(jailed)
