"""The controller process: put the parts together, serve until the microVM ends, clean up, return the exit code."""

from __future__ import annotations

import os
import sys
import time

from base import exit_codes, faults
from base.errors import CellblockError
from base.event_manager import EventManager
from base.lean_std import socket
from base.lean_typing import Callable
from ipc.launch_plan import ROLE_VMM, LaunchPlan
from ipc.messages.supervisor import Shutdown, SignalNoticed
from vmm import file_limit
from vmm.actions import StartMicrovm
from vmm.api.handler import ApiHandler
from vmm.api.server import ApiServer, bind
from vmm.api.streams import EventStreams
from vmm.boot import loader
from vmm.cells.supervisor import SupervisorClient
from vmm.cli import CommandLine, CommandLineError, parse
from vmm.config import file as config_file
from vmm.config import metadata_file
from vmm.config.resources import StartOptions, VmResources
from vmm.controller import Controller
from vmm.cpu_config import dump
from vmm.errors import VmmError
from vmm.machine.builder import MicrovmBuilder
from vmm.machine.post_mortem import as_json
from vmm.machine.vmm import STATE_PAUSED, Vmm
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG, LoggerConfig
from vmm.observe.metrics import METRICS, SIGNAL_KEYS, MetricsConfig, read_logger
from vmm.version import FIRECRACKER_VERSION

#: From a start to the next one that the guest's reset makes.
RESTART_INTERVAL_NS = 1_000_000_000


def warm(*, kernel_cache: bool) -> None:
    """Import all that a controller may need later; the template calls it, late imports fail inside the jail."""
    loader.warm(kernel_cache=kernel_cache)


def run(plan: LaunchPlan, supervisor: socket.socket, seal: Callable[[], None]) -> int:
    """Be the controller until the microVM ends; return its exit code. No exception leaves this function.

    ``supervisor`` is our end of the supervisor channel and is taken over. ``seal`` is called once, when our threads
    exist and the API socket is bound, before a client or a guest is served.
    """
    try:
        return Program(plan, parse(plan.arguments), supervisor).run(seal)
    except CommandLineError as error:
        return _complain(str(error), error.exit_code)
    except CellblockError as error:
        return _complain(str(error), exit_codes.GENERIC_ERROR)
    except Exception as error:  # a cell prints no traceback
        return _complain(f"internal error: {type(error).__name__}: {error}", exit_codes.UNEXPECTED_ERROR)


def _complain(text: str, code: int) -> int:
    os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    return code


class Program:
    """One run of the controller."""

    def __init__(self, plan: LaunchPlan, command_line: CommandLine, supervisor: socket.socket) -> None:
        self._plan = plan
        self._command_line = command_line
        self._exit_code: int | None = None
        self._events = EventManager()
        self._supervisor = SupervisorClient(supervisor, plan.epoch, self._events)
        self._supervisor.on_shutdown = self._shutdown
        self._supervisor.on_signal = self._signal_noticed
        self._supervisor.on_closed = self._supervisor_closed
        file_limit.catch()
        LOG.instance_id = command_line.id
        LOG.configure(LoggerConfig.of(command_line))
        METRICS.instance_id = command_line.id
        METRICS.sources.append(lambda: read_logger(METRICS, LOG))
        if command_line.metrics_path is not None:
            METRICS.configure(MetricsConfig(command_line.metrics_path))
        self._resources = VmResources(_start_options(command_line))
        self._builder = MicrovmBuilder(plan, self._events, self._supervisor)
        self._vmm: Vmm | None = None
        self._controller = Controller(self._resources, command_line.id, self._build, LOG, self._started)
        self._server: ApiServer | None = None
        self._started_ns = 0
        self._streams = EventStreams(EVENTS)

    def run(self, seal: Callable[[], None]) -> int:
        """Serve until the end; return the exit code."""
        LOG.info(f"Running Firecracker v{FIRECRACKER_VERSION}")
        listener = None if self._command_line.no_api else bind(self._command_line.api_sock)
        try:
            self._events.add_subscriber(self._supervisor)
            self._builder.bind()
            self._builder.prepare()  # the worker starts while our walls are being closed
            seal()
            _run_drills(self._plan)
            faults.visit("vmm.start")
            if listener is not None:
                LOG.info(f"Listening on API socket ({self._command_line.api_sock}).")
                self._events.add_subscriber(self._streams)
                handler = ApiHandler(self._controller, LOG, METRICS, self._streams)
                self._server = ApiServer(listener, handler, LOG, self._command_line.http_api_max_payload_size)
                self._note_startup_time()
            metadata_file.load(self._command_line.metadata, self._resources.mmds, LOG)
            # Clients can connect already; they are served when the start has succeeded or failed.
            self._start_from_config_file()
            if self._server is not None:
                self._events.add_subscriber(self._server)
            while (code := self._end()) is None:
                self._events.run()
                if self._vmm is not None and self._vmm.restart_wanted and self._end() is None:
                    self._restart(self._vmm)
        except file_limit.FileSizeLimitReached as error:
            LOG.error(str(error))
            METRICS["signals"].store("sigxfsz", 1)
            self._clean_up(listener, code := exit_codes.SIGXFSZ)
            return _log_end(code)
        except BaseException as error:
            expected = isinstance(error, CellblockError)
            METRICS["vmm"].store("panic_count", 0 if expected else 1)
            self._clean_up(listener, exit_codes.GENERIC_ERROR if expected else exit_codes.UNEXPECTED_ERROR)
            raise
        self._clean_up(listener, code)
        return _log_end(code)

    def _note_startup_time(self) -> None:
        """Store how long it took from the start of the program to the API, if we were told when it was started."""
        group = METRICS["api_server"]
        if self._plan.start_time_us:
            group.store("process_startup_time_us", max(0, time.monotonic_ns() // 1000 - self._plan.start_time_us))
        cpu_us = time.process_time_ns() // 1000 - self._plan.start_time_cpu_us + self._plan.parent_cpu_time_us
        group.store("process_startup_time_cpu_us", max(0, cpu_us))

    def _restart(self, ended: Vmm) -> None:
        """The guest has reset its machine: make it anew in place. API requests wait until it runs.

        Everything is made as at the start (memory, devices, workers with their VMs), so nothing of the old machine can
        be in the new one; id, API socket, configuration and metadata stay.
        """
        try:
            if self._server is not None:
                self._server.exclusively(lambda: self._start_anew(ended))
            else:
                self._start_anew(ended)
        except VmmError as error:
            LOG.error(f"The machine could not be started anew: {error}")
            self._exit_code = exit_codes.GENERIC_ERROR

    def _start_anew(self, ended: Vmm) -> None:
        LOG.info("The guest has reset its machine, which starts anew.")
        EVENTS.emit("microvm-restarting")
        # A guest that resets at once, again and again, costs no more than a start a second.
        self._events.run_until(lambda: self._end() is not None, self._started_ns + RESTART_INTERVAL_NS)
        if self._end() is not None:
            return
        paused = ended.instance_info().state == STATE_PAUSED
        METRICS.sources.remove(ended.read_metrics)
        self._vmm = None
        ended.close()
        vmm = self._build(self._resources)
        METRICS.sources.append(vmm.read_metrics)
        self._controller.restarted(vmm)
        if paused:
            vmm.pause_vm()

    def _started(self, _vmm: Vmm) -> None:
        """The microVM runs: write the first line of metrics, and one a minute from now on."""
        assert self._vmm is not None
        METRICS.sources.append(self._vmm.read_metrics)
        METRICS.try_flush()
        self._events.add_subscriber(METRICS)

    def _build(self, resources: VmResources) -> Vmm:
        self._started_ns = time.monotonic_ns()
        self._vmm = self._builder.build(resources)
        return self._vmm

    def _start_from_config_file(self) -> None:
        path = self._command_line.config_file
        if path is None:
            return
        try:
            config_file.load(path, self._resources, LOG, METRICS)
            if self._command_line.dump_cpu_config is not None:
                self._dump_cpu_config(self._command_line.dump_cpu_config)
                return
            self._controller.execute(StartMicrovm())
        except config_file.ConfigFileError as error:
            LOG.error(f"Failed to build MicroVM from Json: {error}")
            self._exit_code = exit_codes.BAD_CONFIGURATION
        except VmmError as error:
            LOG.error(f"Could not Start MicroVM from one single json: {error}")
            self._exit_code = exit_codes.BAD_CONFIGURATION
        else:
            LOG.info("Successfully started microvm that was configured from one single json")

    def _dump_cpu_config(self, path: str) -> None:
        """Build the microVM without running it, write down what its first vCPU got, and end. Raises VmmError."""
        self._resources.check_startable()
        self._vmm = self._builder.build(self._resources, run=False)
        dump.write(self._vmm.dump_cpu_config()[0], path)
        self._vmm.stop(exit_codes.OK)

    def _end(self) -> int | None:
        """Return the exit code once the program must end: what the supervisor wants, or how the microVM ended."""
        if self._exit_code is not None:
            return self._exit_code
        return None if self._vmm is None else self._vmm.shutdown_exit_code()

    def _shutdown(self, notice: Shutdown) -> None:
        """The supervisor was told to end (a signal): obey."""
        LOG.error(notice.text)
        if notice.code in SIGNAL_KEYS:
            METRICS["signals"].store(SIGNAL_KEYS[notice.code], 1)
        elif notice.code == exit_codes.UNEXPECTED_ERROR:  # SIGSYS that somebody sent
            METRICS["seccomp"].add("num_faults")
        self._exit_code = notice.code

    def _signal_noticed(self, notice: SignalNoticed) -> None:
        """The visible process got a SIGPIPE, which ends nothing."""
        METRICS["signals"].add("sigpipe")
        LOG.error(notice.text)

    def _supervisor_closed(self) -> None:
        """Without a supervisor nobody can end or reap our workers: end."""
        if self._exit_code is None:
            LOG.error("The supervisor is gone.")
            self._exit_code = exit_codes.GENERIC_ERROR

    def _clean_up(self, listener: socket.socket | None, code: int) -> None:
        """Release everything; what was counted until then goes into the last line of metrics."""
        try:
            self._release(listener, code)
        finally:
            METRICS.try_flush()

    def _release(self, listener: socket.socket | None, code: int) -> None:
        if self._server is not None:
            self._server.close()
        elif listener is not None:
            listener.close()
        if self._vmm is not None:
            self._vmm.close()
        failure = self._vmm.failure if self._vmm is not None else None
        EVENTS.emit("ended", exit_code=code, **(as_json(failure) if failure is not None else {}))
        self._streams.close()
        self._builder.close()
        self._resources.close()
        self._supervisor.close()
        self._events.close()


def _start_options(line: CommandLine) -> StartOptions:
    """Return what the command line adds to the configuration. Raises CommandLineError for what is not built yet."""
    for flag in ("seccomp_filter", "enable_pci"):
        if getattr(line, flag):
            raise CommandLineError(f"--{flag.replace('_', '-')} is not supported yet: start without it.")
    cache = -1
    if line.kernel_cache is not None:
        try:
            cache = os.open(line.kernel_cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CommandLineError(f"--kernel-cache {line.kernel_cache}: {error.strerror}.") from None
    return StartOptions.of(line, cache, tuple(sorted(os.sched_getaffinity(0))))


def _log_end(code: int) -> int:
    if code == exit_codes.OK:
        LOG.info("Firecracker exiting successfully. exit_code=0")
    else:
        LOG.error(f"Firecracker exiting with error. exit_code={code}")
    return code


def _run_drills(plan: LaunchPlan) -> None:
    """Attack our own walls if the jailer armed a drill (ipc.drills, imported by the template only then)."""
    drills = sys.modules.get("ipc.drills")
    if drills is not None:
        drills.run(plan.drills, ROLE_VMM)
