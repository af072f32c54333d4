"""The owner of configuration and machine: start, restart in place, end. Machines are stand-ins, the loop is real."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base import exit_codes
from base.event_manager import IN, EventManager, EventOps, Events
from ipc.messages.supervisor import Shutdown, SignalNoticed
from tests.harness.api import BuilderError, FakeVmm
from vmm import session as session_module
from vmm.config.boot_source import BootSourceConfig
from vmm.config.file import VmmConfig
from vmm.config.resources import VmResources
from vmm.errors import VmmError
from vmm.machine.post_mortem import Cause, Failure
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import Logger, LoggerConfig
from vmm.observe.metrics import Metrics, MetricsConfig
from vmm.session import Session

FAILED_START = exit_codes.GENERIC_ERROR


class Machine(FakeVmm):
    """What a session needs of a machine beyond its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.restart_wanted = False
        self.code: int | None = None
        self.failure: Failure | None = None

    def shutdown_exit_code(self) -> int | None:
        return self.code

    def stop(self, code: int) -> None:
        self._call(f"stop {code}")
        self.code = code

    def dump_cpu_config(self) -> list[Any]:
        raise BuilderError("no worker")

    def close(self) -> None:
        self._call("close")


class Script:
    """Does one thing after the other, one a turn of the loop."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self._steps = list(steps)
        self._event = os.eventfd(len(steps) or 1, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def init(self, ops: EventOps) -> None:
        ops.add(self._event, IN)

    def process(self, events: Events, _ops: EventOps) -> None:
        os.eventfd_read(events.fd)
        self._steps.pop(0)()

    def close(self) -> None:
        os.close(self._event)


class Bench:
    """A session on stand-ins; ``error`` makes the next machine fail to be built."""

    def __init__(self, directory: Path, kernel: str) -> None:
        self.directory = directory
        self.kernel = kernel
        self.logger = Logger("test")
        self.logger.configure(LoggerConfig(str(directory / "log")))
        self.metrics = Metrics()
        self.metrics.configure(MetricsConfig(str(directory / "metrics")))
        self.events = EventManager()
        self.machines: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.error: VmmError | None = None
        self.resources = VmResources()
        self.session = Session(
            self.resources, "test", self._build, self.events, logger=self.logger, metrics=self.metrics
        )

    def _build(self, resources: VmResources, **options: Any) -> Any:
        assert resources is self.resources
        self.options.append(options)
        if self.error is not None:
            raise self.error
        self.machines.append(Machine())
        return self.machines[-1]

    def configure(self, *_document: VmmConfig) -> None:
        self.resources.set_boot_source(BootSourceConfig(self.kernel))

    def start(self) -> Any:
        self.configure()
        self.session.start()
        return self.machines[-1]

    def config_file(self, **sections: Any) -> str:
        path = self.directory / "config.json"
        path.write_text(json.dumps({"boot-source": {"kernel_image_path": self.kernel}, "drives": [], **sections}))
        return str(path)

    def run(self, *steps: Callable[[], None]) -> int:
        script = Script(*steps)
        number = self.events.add_subscriber(script)
        try:
            return self.session.run()
        finally:
            self.events.remove_subscriber(number)
            script.close()

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def lines_of_metrics(self) -> list[Any]:
        return [json.loads(line) for line in (self.directory / "metrics").read_text().splitlines()]

    def close(self) -> None:
        self.metrics.close()
        self.logger.close()
        self.resources.close()
        self.events.close()


@pytest.fixture
def bench(tmp_path: Path, kernel: str) -> Iterator[Bench]:
    made = Bench(tmp_path, kernel)
    yield made
    made.close()


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    """What is emitted from now on."""
    seen: list[dict[str, Any]] = []

    def listener(line: bytes) -> None:
        seen.append(json.loads(line))

    EVENTS.listen(listener)
    yield seen
    EVENTS.leave(listener)


def emitted(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


# -- start ------------------------------------------------------------------------------------------------------------


def test_before_the_start(bench: Bench) -> None:
    assert bench.session.vmm is None
    assert bench.session.exit_code() is None
    assert bench.session.instance_info() == ("test", "Not started", "1.17.0-dev", "Firecracker")


def test_a_start_writes_a_line_of_metrics_and_closes_what_it_needed(bench: Bench) -> None:
    machine = bench.start()
    assert bench.session.machine is machine
    assert bench.session.instance_info().state == "Running"
    assert bench.metrics.sources[-1] == machine.read_metrics
    assert len(bench.lines_of_metrics()) == 1
    assert bench.resources.require_boot_source().kernel_fd == -1


def test_a_start_that_fails_leaves_nothing_and_can_be_repeated(bench: Bench) -> None:
    sources = list(bench.metrics.sources)
    bench.error = BuilderError("no memory")
    bench.configure()
    with pytest.raises(BuilderError):
        bench.session.start()
    assert bench.session.vmm is None
    assert bench.session.exit_code() is None
    assert bench.metrics.sources == sources
    assert not bench.lines_of_metrics()
    bench.error = None
    bench.session.start()
    assert bench.session.vmm is bench.machines[0]


def test_a_configuration_file_starts_the_microvm(bench: Bench) -> None:
    applied: list[VmmConfig] = []

    def apply(document: VmmConfig) -> None:
        applied.append(document)
        bench.configure()

    bench.session.start_from_config_file(bench.config_file(), apply, None)
    assert [key for document in applied for key, _ in document.in_order()] == ["boot-source"]
    assert bench.session.vmm is bench.machines[0]
    assert bench.session.exit_code() is None
    assert "Successfully started microvm that was configured from one single json\n" in bench.log()


def test_a_configuration_file_that_cannot_be_used_ends_the_program(bench: Bench) -> None:
    bench.session.start_from_config_file("/nix", bench.configure, None)
    assert (
        "Failed to build MicroVM from Json: Unable to open or read from the configuration file: No such file or "
        "directory (os error 2)\n"
    ) in bench.log()
    assert bench.session.exit_code() == FAILED_START
    assert bench.run() == FAILED_START


def test_a_start_from_a_configuration_file_that_fails_ends_the_program(bench: Bench) -> None:
    bench.error = BuilderError("no memory")
    bench.session.start_from_config_file(bench.config_file(), bench.configure, None)
    assert "Could not Start MicroVM from one single json: Start microvm error: no memory\n" in bench.log()
    assert bench.session.exit_code() == FAILED_START


def test_a_cpu_configuration_is_asked_of_a_machine_that_never_runs(bench: Bench) -> None:
    bench.session.start_from_config_file(bench.config_file(), bench.configure, str(bench.directory / "cpu"))
    assert bench.options == [{"run": False}]
    assert "Could not Start MicroVM from one single json: no worker\n" in bench.log()
    assert bench.session.vmm is bench.machines[0], "it is to be closed at the end"


# -- restart ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "RESTART_INTERVAL_NS", 0)


@pytest.mark.parametrize("paused", [False, True])
def test_a_machine_that_was_reset_starts_anew_in_place(bench: Bench, events: Any, at_once: None, paused: bool) -> None:
    first = bench.start()
    exclusive: list[str] = []

    def exclusively(operation: Callable[[], None]) -> None:
        exclusive.append("begins")
        operation()
        exclusive.append("ends")

    bench.session.exclusively = exclusively

    def reset() -> None:
        first.state = "Paused" if paused else "Running"
        first.restart_wanted = True

    assert bench.run(reset, lambda: bench.machines[1].stop(3)) == 3
    assert exclusive == ["begins", "ends"]
    assert first.calls == ["close"]
    second = bench.machines[1]
    assert second.calls == (["pause", "stop 3"] if paused else ["stop 3"])
    assert first.read_metrics not in bench.metrics.sources
    assert second.read_metrics in bench.metrics.sources
    assert "The guest has reset its machine, which starts anew.\n" in bench.log()
    assert emitted(events) == ["microvm-restarting"]
    assert bench.session.vmm is second


def test_a_machine_that_cannot_start_anew_ends_the_program(bench: Bench, at_once: None) -> None:
    first = bench.start()

    def reset() -> None:
        bench.error = BuilderError("no memory")
        first.restart_wanted = True

    assert bench.run(reset) == exit_codes.GENERIC_ERROR
    assert "The machine could not be started anew: no memory\n" in bench.log()
    assert bench.session.vmm is None


def test_an_end_that_is_asked_for_while_a_restart_waits_comes_first(bench: Bench) -> None:
    first = bench.start()
    order = Shutdown(exit_codes.SIGHUP, "a signal")

    def reset() -> None:
        first.restart_wanted = True

    assert bench.run(reset, lambda: bench.session.shut_down(order)) == exit_codes.SIGHUP
    assert bench.machines == [first]


# -- end --------------------------------------------------------------------------------------------------------------


def test_the_machine_ends_the_loop(bench: Bench) -> None:
    machine = bench.start()
    assert bench.run(lambda: machine.stop(7)) == 7


@pytest.mark.parametrize(
    ("code", "group", "key", "value"),
    [(156, "signals", "sighup", 1), (154, "signals", "sigxcpu", 1), (2, "seccomp", "num_faults", 1)],
)
def test_what_the_supervisor_orders_counts_first(bench: Bench, code: int, group: str, key: str, value: int) -> None:
    machine = bench.start()
    machine.stop(0)
    bench.session.shut_down(Shutdown(code, "Shutting down."))
    assert bench.session.exit_code() == code
    assert bench.metrics[group].values[key] == value
    assert "Shutting down.\n" in bench.log()


def test_a_signal_that_ends_nothing_is_counted(bench: Bench) -> None:
    bench.session.note_signal(SignalNoticed(13, "Received signal 13."))
    assert bench.session.exit_code() is None
    assert bench.metrics["signals"].values["sigpipe"] == 1
    assert "Received signal 13.\n" in bench.log()


def test_without_a_supervisor_the_program_ends(bench: Bench) -> None:
    bench.session.supervisor_closed()
    assert bench.session.exit_code() == exit_codes.GENERIC_ERROR
    assert "The supervisor is gone.\n" in bench.log()


def test_a_supervisor_that_goes_after_its_order_changes_nothing(bench: Bench) -> None:
    bench.session.shut_down(Shutdown(exit_codes.SIGHUP, "a signal"))
    bench.session.supervisor_closed()
    assert bench.session.exit_code() == exit_codes.SIGHUP


def test_closing_ends_the_machine_and_says_why(bench: Bench, events: Any) -> None:
    machine = bench.start()
    machine.failure = Failure(Cause.SIGNAL, "SIGKILL", "Worker vcpu 0 was ended by signal SIGKILL.", 1)
    bench.session.close(1)
    assert machine.calls == ["close"]
    assert emitted(events) == ["ended"]
    assert events[-1]["exit_code"] == 1
    assert events[-1]["cause"] == "signal"


def test_closing_without_a_machine(bench: Bench, events: Any) -> None:
    bench.session.close(0)
    assert [(event["event"], event["exit_code"]) for event in events] == [("ended", 0)]
    assert "cause" not in events[0]
