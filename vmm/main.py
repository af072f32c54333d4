"""The controller process: put the parts together, serve until the microVM ends, clean up, return the exit code."""

from __future__ import annotations

import os
import sys
import time

from base import exit_codes, faults
from base.errors import CellblockError
from base.event_manager import EventManager
from base.lean_std import socket
from base.version import FIRECRACKER_VERSION
from ipc import bounds
from ipc.launch_plan import ROLE_VMM, LaunchPlan, Seal
from vmm import file_limit, stall_watch
from vmm.api.dispatch import Dispatcher
from vmm.api.server import ApiServer, ApiSocketError, bind
from vmm.api.streams import EventStreams
from vmm.boot import loader
from vmm.cells.supervisor import SupervisorClient
from vmm.cli import CommandLine, CommandLineError, parse
from vmm.config import metadata_file
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.config.tun_pool import TunPool
from vmm.machine.builder import MicrovmBuilder
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG, LoggerConfig, LoggerConfigError
from vmm.observe.metrics import METRICS, MetricsConfig, read_logger
from vmm.session import Session


def warm(*, kernel_cache: bool) -> None:
    """Import all that a controller may need later; the template calls it, late imports fail inside the jail."""
    loader.warm(kernel_cache=kernel_cache)


def run(plan: LaunchPlan, supervisor: socket.socket, seal: Seal) -> int:
    """Be the controller until the microVM ends; return its exit code. No exception leaves this function.

    ``supervisor`` is our end of the supervisor channel and is taken over. The walls are tightened when our threads
    exist and the API socket is bound, before a client, a worker or a guest is listened to.
    """
    try:
        return Program(plan, parse(plan.arguments), supervisor).run(seal)
    except CommandLineError as error:
        return _refuse(str(error), error.exit_code)
    except ApiSocketError as error:
        return _refuse(f"RunWithApiError error: {error}", exit_codes.GENERIC_ERROR)
    except CellblockError as error:
        return _refuse(str(error), exit_codes.GENERIC_ERROR)
    except MemoryError:
        return _refuse(f"The controller's limit of memory is reached ({bounds.describe()}).", exit_codes.GENERIC_ERROR)
    except Exception as error:  # a cell prints no traceback
        return _refuse(f"internal error: {type(error).__name__}: {error}", exit_codes.UNEXPECTED_ERROR)


def _refuse(text: str, code: int) -> int:
    """Say why the program ends, on standard error and in the log: nobody may be reading one of them."""
    try:
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass  # nobody listens
    LOG.error(text)
    return _log_end(code)


def log_refusal(line: CommandLine, text: str, code: int) -> int:
    """Tell the log of ``--log-path`` why a program ends that got no controller; return ``code``."""
    if line.log_path is not None:
        LOG.instance_id = line.id
        try:
            LOG.configure(LoggerConfig.of(line))
        except LoggerConfigError:
            return code  # what went wrong first was told
        LOG.error(text)
        _log_end(code)
    return code


class Program:
    """One run of the controller: its parts, and how they hang together."""

    def __init__(self, plan: LaunchPlan, command_line: CommandLine, supervisor: socket.socket) -> None:
        self._plan = plan
        self._command_line = command_line
        self._events = EventManager()
        self._supervisor = SupervisorClient(supervisor, plan.epoch, self._events)
        file_limit.catch()
        stall_watch.catch()
        LOG.instance_id = command_line.id
        LOG.configure(LoggerConfig.of(command_line))
        METRICS.instance_id = command_line.id
        METRICS.sources.append(lambda: read_logger(METRICS, LOG))
        if command_line.metrics_path is not None:
            METRICS.configure(MetricsConfig(command_line.metrics_path))
        self._resources = VmResources(StartOptions.of(command_line)._replace(boot_id=plan.boot_id), TunPool(plan.tun))
        self._builder = MicrovmBuilder(plan, self._events, self._supervisor)
        self._session = Session(self._resources, command_line.id, self._builder.build, self._events)
        self._supervisor.on_shutdown = self._session.shut_down
        self._supervisor.on_signal = self._session.note_signal
        self._supervisor.on_closed = self._session.supervisor_closed
        self._streams = EventStreams(EVENTS)
        self._dispatcher = Dispatcher(self._session, self._streams)
        self._listener: socket.socket | None = None
        self._server: ApiServer | None = None

    def run(self, seal: Seal) -> int:
        """Serve until the end; return the exit code."""
        LOG.info(f"Running Firecracker v{FIRECRACKER_VERSION}")
        try:
            if not self._command_line.no_api:
                self._listener = bind(self._command_line.api_sock)
            self._events.add_subscriber(self._supervisor)
            self._builder.bind()
            self._builder.prepare()  # the worker starts while our walls are being closed
            seal.tighten()
            seal.await_tightened()
            _log_walls(self._plan)
            _run_drills(self._plan, self._resources.tun)
            faults.visit("vmm.start")
            code = self._serve()
        except file_limit.FileSizeLimitReached as error:
            LOG.error(str(error))
            METRICS["signals"].store("sigxfsz", 1)
            self._clean_up(code := exit_codes.SIGXFSZ)
            return _log_end(code)
        except BaseException as error:
            expected = isinstance(error, CellblockError | MemoryError)
            METRICS["vmm"].store("panic_count", 0 if expected else 1)
            self._clean_up(exit_codes.GENERIC_ERROR if expected else exit_codes.UNEXPECTED_ERROR)
            raise
        self._clean_up(code)
        return _log_end(code)

    def _serve(self) -> int:
        line = self._command_line
        if self._listener is not None:
            LOG.info(f"Listening on API socket ({line.api_sock}).")
            self._events.add_subscriber(self._streams)
            self._server = ApiServer(self._listener, self._dispatcher, LOG, line.http_api_max_payload_size)
            self._session.exclusively = self._server.exclusively
            self._note_startup_time()
        metadata_file.load(line.metadata, self._resources.mmds, LOG)
        # Clients can connect already; they are served when the start has succeeded or failed.
        if line.config_file is not None:
            self._session.start_from_config_file(line.config_file, self._dispatcher.apply, line.dump_cpu_config)
        if self._server is not None:
            self._events.add_subscriber(self._server)
        return self._session.run()

    def _note_startup_time(self) -> None:
        """Store how long it took from the start of the program to the API, if we were told when it was started."""
        group = METRICS["api_server"]
        if self._plan.start_time_us:
            group.store("process_startup_time_us", max(0, time.monotonic_ns() // 1000 - self._plan.start_time_us))
        cpu_us = time.process_time_ns() // 1000 - self._plan.start_time_cpu_us + self._plan.parent_cpu_time_us
        group.store("process_startup_time_cpu_us", max(0, cpu_us))

    def _clean_up(self, code: int) -> None:
        """Release everything; what was counted until then goes into the last line of metrics."""
        try:
            self._release(code)
        finally:
            METRICS.try_flush()

    def _release(self, code: int) -> None:
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        self._session.close(code)
        self._streams.close()
        self._builder.close()
        self._resources.close()
        self._supervisor.close()
        self._events.close()


def _log_end(code: int) -> int:
    if code == exit_codes.OK:
        LOG.info("Firecracker exiting successfully. exit_code=0")
    else:
        LOG.error(f"Firecracker exiting with error. exit_code={code}")
    return code


def _log_walls(plan: LaunchPlan) -> None:
    """One line for people; the report on each wall is for programs, and in the supervisor's wall log."""
    off = f", switched off: {', '.join(plan.switched_off)}" if plan.switched_off else ""
    LOG.info(f"Walls of {ROLE_VMM} verified (seccomp: {plan.seccomp}{off}).")


def _run_drills(plan: LaunchPlan, tun: TunPool) -> None:
    """Attack our own walls if the jailer armed a drill (ipc.drills, imported by the template only then)."""
    drills = sys.modules.get("ipc.drills")
    if drills is not None:
        sys.modules["ipc.drills.network"].__dict__["take_tun"] = tun.take
        drills.run(plan.drills, ROLE_VMM)
