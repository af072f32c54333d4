"""Who owns the configuration and the machine that is made of it: its start, restart and end.

The API and the configuration file act on the one Session of the controller.
"""

from __future__ import annotations

import time

from base import exit_codes
from base.lean_typing import TYPE_CHECKING
from base.version import APP_NAME, FIRECRACKER_VERSION
from ipc.errors import BlockedEventError
from vmm.config import file as config_file
from vmm.cpu_config import dump
from vmm.errors import VmmError
from vmm.machine.post_mortem import as_json
from vmm.machine.report import InstanceInfo
from vmm.machine.vmm import STATE_NOT_STARTED, STATE_PAUSED
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG
from vmm.observe.metrics import METRICS, SIGNAL_KEYS

if TYPE_CHECKING:
    from base.event_manager import EventManager
    from base.lean_typing import Callable
    from ipc.messages.supervisor import Shutdown, SignalNoticed
    from vmm.config.file import VmmConfig
    from vmm.config.resources import VmResources
    from vmm.machine.vmm import Vmm
    from vmm.observe.logger import Logger
    from vmm.observe.metrics import Metrics

#: What is said before the reason of a start that failed.
START_ERROR = "Start microvm error"
#: From a start to the next one that the guest's reset makes.
RESTART_INTERVAL_NS = 1_000_000_000


class Session:
    """One configuration, at most one machine at a time, and the exit code of the program once it is known."""

    def __init__(
        self,
        resources: VmResources,
        instance_id: str,
        build: Callable[..., Vmm],
        events: EventManager,
        *,
        logger: Logger = LOG,
        metrics: Metrics = METRICS,
    ) -> None:
        """``build`` makes and starts a machine of resources; with ``run=False`` it stays paused. Raises VmmError."""
        self.resources = resources
        self.logger = logger
        self.metrics = metrics
        #: The machine; None before the start.
        self.vmm: Vmm | None = None
        #: Something was configured that a snapshot would bring along.
        self.boot_specific = False
        #: Does something during which no request is executed; the API server puts its own here.
        self.exclusively: Callable[[Callable[[], None]], None] = lambda operation: operation()
        self._instance_id = instance_id
        self._make = build
        self._events = events
        self._exit_code: int | None = None
        self._started_ns = 0

    @property
    def machine(self) -> Vmm:
        """The machine, for what is possible only after the start."""
        assert self.vmm is not None
        return self.vmm

    def instance_info(self) -> InstanceInfo:
        """Return id, state, version and application name (GET /)."""
        if self.vmm is not None:
            return self.vmm.instance_info
        return InstanceInfo(self._instance_id, STATE_NOT_STARTED, FIRECRACKER_VERSION, APP_NAME)

    # ------------------------------------------------------------ start

    def start(self) -> None:
        """Start the microVM, write the first line of metrics, and one a minute from now on. Raises VmmError."""
        self.resources.check_startable()
        vmm = self._build()
        self.resources.started()
        self.metrics.sources.append(vmm.read_metrics)
        self.metrics.try_flush()
        self._events.add_subscriber(self.metrics)

    def start_from_config_file(self, path: str, apply: Callable[[VmmConfig], None], cpu_config: str | None) -> None:
        """Configure the microVM by ``apply`` as a file says and start it; a failure ends the program.

        With a path for ``cpu_config`` it is built, what its first vCPU got is written there, and the program ends.
        """
        try:
            apply(config_file.parse(config_file.read(path)))
            if cpu_config is not None:
                self._dump_cpu_config(cpu_config)
                return
            self._start_prefixed()
        except config_file.ConfigFileError as error:
            self._fail_start(f"Failed to build MicroVM from Json: {error}")
        except VmmError as error:
            self._fail_start(f"Could not Start MicroVM from one single json: {error}")
        else:
            self.logger.info("Successfully started microvm that was configured from one single json")

    def _start_prefixed(self) -> None:
        try:
            self.start()
        except VmmError as error:
            raise VmmError(f"{START_ERROR}: {error}") from error

    def _fail_start(self, text: str) -> None:
        self.logger.error(text)
        self._exit_code = exit_codes.GENERIC_ERROR

    def _dump_cpu_config(self, path: str) -> None:
        self.resources.check_startable()
        self.vmm = self._make(self.resources, run=False)
        dump.write(self.vmm.dump_cpu_config()[0], path)
        self.vmm.stop(exit_codes.OK)

    def _build(self) -> Vmm:
        self._started_ns = time.monotonic_ns()
        self.vmm = self._make(self.resources)
        return self.vmm

    # ------------------------------------------------------------ restart

    def run(self) -> int:
        """Run the event loop until the program must end; return its exit code."""
        while (code := self.exit_code()) is None:
            try:
                self._events.run()
            except BlockedEventError as error:
                if self.vmm is None:
                    raise
                self.vmm.ending.event_blocked(f"{error}: the machine is ended.")
            if self.vmm is not None and self.vmm.restart_wanted and self.exit_code() is None:
                self._restart(self.vmm)
        return code

    def _restart(self, ended: Vmm) -> None:
        """The guest has reset its machine: make it anew in place. API requests wait until it runs.

        Everything is made as at the start (memory, devices, workers with their VMs), so nothing of the old machine can
        be in the new one; id, API socket, configuration and metadata stay.
        """
        try:
            self.exclusively(lambda: self._start_anew(ended))
        except VmmError as error:
            self.logger.error(f"The machine could not be started anew: {error}")
            self._exit_code = exit_codes.GENERIC_ERROR

    def _start_anew(self, ended: Vmm) -> None:
        self.logger.info("The guest has reset its machine, which starts anew.")
        EVENTS.emit("microvm-restarting")
        # A guest that resets at once, again and again, costs no more than a start a second.
        self._events.run_until(lambda: self.exit_code() is not None, self._started_ns + RESTART_INTERVAL_NS)
        if self.exit_code() is not None:
            return
        paused = ended.instance_info.state == STATE_PAUSED
        self.metrics.sources.remove(ended.read_metrics)
        self.vmm = None
        ended.close()
        vmm = self._build()
        self.metrics.sources.append(vmm.read_metrics)
        if paused:
            vmm.pause_vm()

    # ------------------------------------------------------------ end

    def exit_code(self) -> int | None:
        """Return the exit code once the program must end: what the supervisor wants, or how the microVM ended."""
        if self._exit_code is not None:
            return self._exit_code
        return None if self.vmm is None else self.vmm.shutdown_exit_code()

    def shut_down(self, notice: Shutdown) -> None:
        """The supervisor was told to end (a signal): obey."""
        self.logger.error(notice.text)
        if notice.code in SIGNAL_KEYS:
            self.metrics["signals"].store(SIGNAL_KEYS[notice.code], 1)
        elif notice.code == exit_codes.UNEXPECTED_ERROR:  # SIGSYS that somebody sent
            self.metrics["seccomp"].add("num_faults")
        self._exit_code = notice.code

    def note_signal(self, notice: SignalNoticed) -> None:
        """The visible process got a SIGPIPE, which ends nothing."""
        self.metrics["signals"].add("sigpipe")
        self.logger.error(notice.text)

    def supervisor_closed(self) -> None:
        """Without a supervisor nobody can end or reap our workers: end."""
        if self._exit_code is None:
            self.logger.error("The supervisor is gone.")
            self._exit_code = exit_codes.GENERIC_ERROR

    def close(self, code: int) -> None:
        """End the machine, if there is one, and report how the program ends: with ``code``."""
        failure = None
        if self.vmm is not None:
            self.vmm.close()
            failure = self.vmm.failure
        EVENTS.emit("ended", exit_code=code, **(as_json(failure) if failure is not None else {}))
