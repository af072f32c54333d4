"""What launches with and without a jail share: descriptors, the controller's fork, the last walls."""

from __future__ import annotations

import os
import select
from itertools import pairwise

from base import timeline
from base.errno_text import errno_text
from base.lean_std import signal, socket
from base.lean_typing import Callable, NamedTuple
from ipc import descriptors
from ipc.launch_plan import ROLE_SUPERVISOR, ROLE_VMM, LaunchPlan, TunDescriptors
from jailer import bounds, cell, cell_output, ending, fault_signals, syscalls, template, verify, walls
from jailer.cell_output import LogPipe
from jailer.cell_record import BLOCKED_SIGNALS, Cell, Setup, open_pidfd
from jailer.errors import CellError
from jailer.landlock import LIST_RIGHTS, Rulesets
from jailer.log import Log
from jailer.operations import Step
from jailer.seccomp.install import Filter, install
from jailer.steps import detach, identity, process
from jailer.steps.title import TITLE
from jailer.supervisor import Supervisor


class Entered(NamedTuple):
    """What the controller's process has when it is in its jail.

    ``handed_over`` are descriptors for the supervisor (see :func:`wait_entered`).
    """

    tun: TunDescriptors
    handed_over: tuple[int, ...] = ()


class Host(NamedTuple):
    """What was opened and read while the process was still on the host, with its caller's rights."""

    facts: verify.HostFacts
    kvm_fd: int
    kvm_error: str
    null: int
    kernel_cache: int
    #: Master and slave of the console's pseudo-terminal, or -1. The slave stays open so that reads do not fail.
    console: int
    console_slave: int


def open_host(proc: int, kernel_cache: int, arguments: tuple[str, ...], log: Log) -> Host:
    """Open what is planned while it is still reachable. A missing /dev/kvm is told when a microVM is started."""
    kvm_fd, kvm_error = -1, ""
    try:
        kvm_fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        kvm_error = errno_text(error)
    with Step("open /dev/null"):
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    with Step("open a pseudo-terminal for the console"):
        console, slave = open_console(log) if wants_terminal(arguments) else (-1, -1)
    with Step("read what this process is"):
        facts = verify.host_facts(proc)
    return Host(facts, kvm_fd, kvm_error, null, kernel_cache, console, slave)


def wants_terminal(arguments: tuple[str, ...]) -> bool:
    """Does the controller's command line say ``--console pty``?"""
    return ("--console", "pty") in pairwise(arguments)


def keep_terminal(arguments: tuple[str, ...], null: int) -> None:
    """In the controller: of standard input and output keep what it needs, the console or the log. Raises OSError."""
    pairs = dict(pairwise(arguments))
    if pairs.get("--console", "stdio") == "stdio":
        return
    os.dup2(null, 0)
    if "--log-path" in pairs:
        os.dup2(null, 1)
    elif os.isatty(1):
        terminal = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)  # or it could be read from
        os.dup2(terminal, 1)
        os.close(terminal)


def open_console(log: Log) -> tuple[int, int]:
    """Open a pseudo-terminal in raw mode and say where it is; return (master, slave). Raises OSError."""
    import tty

    master, slave = os.openpty()
    tty.setraw(slave)
    log.info(f"serial console: {os.ttyname(slave)}")
    return master, slave


def hold_signals() -> None:
    """Hold back the signals that the supervisor acts on: one that comes during the launch ends the microVM after it.

    A caller that ignores SIGCHLD would keep us from learning how our children end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def signal_descriptor() -> int:
    """Return the descriptor that delivers the signals that are held back."""
    with Step("make a descriptor for signals"):
        return syscalls.signalfd(BLOCKED_SIGNALS)


def fork_controller(
    plan: LaunchPlan,
    roles: template.Roles,
    filters: dict[str, Filter],
    enter: Callable[[socket.socket], Entered],
    keep: tuple[int, ...],
    *,
    landlock: Rulesets,
    asked: verify.Asked,
) -> tuple[Cell, socket.socket]:
    """Fork the controller; return its record and our end of its channel.

    ``enter`` runs in it first, with its end of the seal channel. ``asked.cells_own_pids``: it is process 1 of a new pid
    namespace (:func:`jailer.steps.detach.leave_pid_namespace`).
    """
    with Step("make the channels of the controller"):
        ours, theirs = descriptors.channel_pair()
        seal, cell_seal = descriptors.channel_pair()
        output = LogPipe(plan)
        fault_ends = fault_signals.pair() if plan.faults and asked.cells_own_pids else (-1, -1)
    timeline.mark("fork controller")
    with Step("fork the controller"):
        pid = os.fork()
    if pid == 0:
        timeline.enter(1)
        limits = bounds.wanted(plan, ROLE_VMM, None, asked.inherited)
        context = cell.CellContext(plan, ROLE_VMM, 0, cell_seal, filters, limits, landlock, fault_ends[1])
        entered = Entered(TunDescriptors())

        def prepare() -> tuple[int, ...]:
            nonlocal entered
            with Step("give the controller its standard error"):
                output.become_standard_error()
            ours.close()
            seal.close()
            entered = enter(cell_seal)
            landlock.allow_root(ROLE_VMM)
            if plan.kernel_cache_fd >= 0:
                landlock.allow(ROLE_VMM, plan.kernel_cache_fd)
            own = (fault_ends[1], *entered.tun.descriptors, *entered.handed_over, landlock.descriptor(ROLE_VMM))
            with Step("close what is not the controller's"):
                process.keep_only((theirs.fileno(), cell_seal.fileno(), *keep, *own))
            cell.reset_signals()
            return entered.handed_over

        cell.run(context, prepare, lambda sealed: roles.vmm(plan._replace(tun=entered.tun), theirs, sealed))
    cell.count_faults()
    landlock.drop(ROLE_VMM)
    theirs.close()
    cell_seal.close()
    with Step("open a descriptor of the controller's process"):
        controller = Cell(ROLE_VMM, 0, pid, open_pidfd(pid), seal)
    controller.output = output.take("")
    if fault_ends[1] >= 0:
        os.close(fault_ends[1])
        controller.fault_signals = fault_ends[0]
    return controller, ours


def end_cell(controller: Cell | None) -> None:
    """The launch has failed: kill the controller, and with it what is in its pid namespace, and wait for its end."""
    if controller is None or controller.pidfd < 0:
        return
    try:
        controller.kill()
    except PermissionError:
        controller.close()  # we are half-way to another user; at the end of its seal channel it ends by itself
    try:
        os.waitpid(controller.pid, 0)
    except ChildProcessError:
        pass  # :func:`wait_entered` or the supervisor has waited for it already


def wait_entered(controller: Cell) -> int:
    """Wait until the controller is in its jail; return the descriptor that it handed over, or -1.

    Raises CellError with its reason when it cannot get there.
    """
    assert controller.seal is not None
    _answer_faults(controller, controller.seal)
    frame, owned = descriptors.receive(controller.seal, 1)
    if frame == cell.ENTERED:
        return owned.take() if len(owned) else -1
    controller.kill()
    os.waitpid(controller.pid, 0)
    if controller.output is not None:
        cell_output.write(controller.output.drain())
    if frame.startswith(cell.FAILED):
        raise CellError(frame[len(cell.FAILED) :].decode("utf-8", "replace"))
    raise CellError("the controller ended before it was in its jail")


def _answer_faults(controller: Cell, seal: socket.socket) -> None:
    """Until the controller says something, carry out the armed faults that it meets."""
    while controller.fault_signals >= 0:
        poll = select.poll()
        for descriptor in (seal.fileno(), controller.fault_signals):
            poll.register(descriptor, select.POLLIN)
        if any(descriptor == seal.fileno() for descriptor, _ in poll.poll()):
            return
        controller.meet_fault()


def close_supervisor(setup: Setup, host: Host, name: str, *, dumpable_wall: bool) -> None:
    """The supervisor's last walls but Landlock, and its name. Raises StepError, PolicyError, OSError."""
    setup.landlock.allow(ROLE_SUPERVISOR, setup.proc)
    if setup.plan.jailed and walls.ROOT not in setup.plan.switched_off:
        setup.landlock.allow_root(ROLE_SUPERVISOR, LIST_RIGHTS)
    with Step("give up the standard descriptors"):
        detach.redirect_standard_descriptors(host.null, (0, 1))
    for descriptor in (host.kernel_cache, host.console):
        if descriptor >= 0:
            os.close(descriptor)
    TITLE.show_arguments(setup.plan.arguments)
    with Step("set the limits of the supervisor"):
        bounds.apply(bounds.wanted(setup.plan, ROLE_SUPERVISOR, None, setup.asked.inherited))
    with Step("name the supervisor, and forbid to trace it"):
        identity.set_name(name)
        if dumpable_wall:
            identity.set_dumpable(False)
    chosen = setup.filters.get(ROLE_SUPERVISOR)
    if chosen is not None:
        install(chosen, setup.plan.first_cell_uid)


def warnings(setup: Setup) -> list[str]:
    """Say which walls this launch asked for and cannot have."""
    return [f"{wall} cannot be had: {reason}" for wall, reason in setup.asked.unavailable]


def await_controller(setup: Setup, controller: Cell, channel: socket.socket, signals: int) -> Supervisor:
    """Wait until the controller's walls of the setup stage are read, which needs more than a supervisor keeps."""
    timeline.mark("verify controller")
    supervisor = Supervisor(setup, controller, channel, signals)
    with Step("verify the controller"):
        supervisor.await_controller()
    return supervisor


def supervise(supervisor: Supervisor) -> int:
    """Be the supervisor until the microVM has ended; return its exit code, or die by the signal that ended it."""
    with Step("supervise the microVM"):
        code = supervisor.run()
    if supervisor.dies_by:
        ending.die_by(supervisor.dies_by)
    return code
