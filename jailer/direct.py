"""Un-jailed launches: no root needed, no namespaces, no change of identity; everything else as in a jail."""

from __future__ import annotations

import os

from base import timeline
from base.errno_text import errno_text
from base.lean_std import socket
from base.lean_typing import Callable
from ipc.launch_plan import ROLE_VMM, SECCOMP_KILL, SECCOMP_OFF, LaunchPlan
from jailer import bounds, janitor, plan, start, template, verify, walls
from jailer.cell_record import Cell, Setup
from jailer.errors import ArgumentError, StepError
from jailer.filters import JANITOR, custom_filter, load_filters, of_cell, with_custom
from jailer.landlock import Rulesets
from jailer.log import Log
from jailer.memory import MemoryMaker
from jailer.operations import Step
from jailer.steps import detach, identity, network, process, user_namespace
from jailer.steps.directories import make_directory
from jailer.steps.title import TITLE
from jailer.steps.worker_cgroups import WorkerCgroups

#: What the visible process is called.
PROGRAM = "firecracker"
_ATTEMPTS = 100


def _can_be_reached(path: str) -> bool:
    """Can any user go through this directory and those above it?"""
    while os.stat(path).st_mode & 0o001:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


def make_ipc_directory(watch: janitor.Janitor, *, for_others: bool) -> str:
    """Make a directory that only we can list, where its name can be kept short; the janitor removes it at the end.

    ``for_others``: our cells, who are other users, can go through it. Raises StepError, CleanupError.
    """
    uid = os.getuid()
    last = ""
    for base in (f"/run/user/{uid}", "/run" if uid == 0 else "", os.environ.get("TMPDIR", ""), "/tmp"):
        if not base or len(base) > 60 or not os.path.isdir(base):  # sun_path has 108 bytes
            continue
        if for_others and not _can_be_reached(os.path.realpath(base)):
            continue
        for _ in range(_ATTEMPTS):
            path = os.path.join(base, f"cellblock-{os.urandom(6).hex()}")
            try:
                if make_directory(path, 0o700, watch):
                    watch.remove_tree(path)
                    if for_others:
                        os.chmod(path, 0o711)
                    return path
            except OSError as error:
                last = f"{base}: {errno_text(error)}"
                break
    raise StepError(f"Failed to make the ipc directory: {last or 'no directory for it; set TMPDIR'}")


def _check_names(off: frozenset[str]) -> None:
    unknown = sorted(off - set(walls.SWITCHES))
    if unknown:
        raise ArgumentError(f"--without {unknown[0]}: the steps are {', '.join(walls.SWITCHES)}")


def launch(
    arguments: tuple[str, ...],
    microvm_id: str,
    started: plan.Started,
    load_roles: Callable[[], template.Roles],
    *,
    wall_log: str = "",
    off: frozenset[str] = frozenset(),
) -> int:
    """Launch, supervise, return the exit code of the microVM. Raises JailerError.

    ``wall_log`` is the path of a file for the walls' reports and the supervisor's lines; ``off`` are walls that are
    switched off by name.
    """
    _check_names(off)
    made = _Made()
    try:
        return _launch(made, arguments, microvm_id, started, load_roles, wall_log=wall_log, off=off)
    except BaseException:
        start.end_cell(made.controller)
        if made.janitor is not None:
            made.janitor.undo()
        raise


class _Made:
    """What has to be ended if the launch fails."""

    __slots__ = ("controller", "janitor")

    def __init__(self) -> None:
        self.controller: Cell | None = None
        self.janitor: janitor.Janitor | None = None


def _launch(
    made: _Made,
    arguments: tuple[str, ...],
    microvm_id: str,
    started: plan.Started,
    load_roles: Callable[[], template.Roles],
    *,
    wall_log: str,
    off: frozenset[str],
) -> int:
    timeline.mark("prepare")
    inherited = _prepare()
    with Step("open /proc"):
        proc = verify.open_proc()
    log = Log(2, microvm_id)
    if wall_log:
        log.open_reports(wall_log)
    mode = SECCOMP_OFF if "--no-seccomp" in arguments or walls.SECCOMP in off else SECCOMP_KILL
    timeline.mark("load filters")
    filters = load_filters(mode)
    if path := custom_filter(arguments):
        filters = with_custom(filters, path)
    timeline.mark("fork janitor")
    made.janitor = janitor.start(filters.by_role.get(JANITOR))
    directory = make_ipc_directory(made.janitor, for_others=os.getuid() == 0 and walls.CELL_IDENTITY not in off)
    timeline.mark("import roles")
    roles = load_roles()
    timeline.mark("open host")
    host = start.open_host(proc, -1, arguments, log)
    namespace = _cell_users(host, off)
    launching = plan.Launch(microvm_id, arguments, started, mode, -1, host.console, namespace.first_uid)
    launch_plan = plan.unjailed(launching, directory, off)
    signals = start.signal_descriptor()
    _bound(host, off)
    timeline.mark("warm")
    template.warm()
    asked = _asked(host, off, namespace)
    landlock = _enter_domain(off)
    if asked.cells_own_pids:
        detach.leave_pid_namespace()
    enter = _entering(launch_plan, host, own_network=asked.own_network)
    mine, keep = of_cell(filters.by_role, ROLE_VMM), (*inherited, host.console)
    made.controller, channel = start.fork_controller(
        launch_plan, roles, mine, enter, keep, landlock=landlock, asked=asked
    )
    _leave_network(made.controller, own_network=asked.own_network)
    timeline.mark("wait for controller")
    start.wait_entered(made.controller)
    for descriptor in inherited:  # the controller has them, for paths like /dev/fd/63
        os.close(descriptor)
    # fmt: off
    setup = Setup(
        launch_plan, roles, asked, proc, host.kvm_fd, host.kvm_error, filters.by_role, MemoryMaker(False), log,
        WorkerCgroups(), landlock, made.janitor,
    )
    # fmt: on
    supervisor = start.await_controller(setup, made.controller, channel, signals)
    _confine_supervisor(setup, host, filters.warning, namespace)
    return start.supervise(supervisor)


def _cell_users(host: start.Host, off: frozenset[str]) -> user_namespace.UserNamespace:
    """Return the namespace of the users of workers and device cells, where we may make one. Raises StepError."""
    if walls.CELL_IDENTITY in off:
        return user_namespace.UserNamespace()
    return user_namespace.make(os.getuid(), os.getgid(), 0, host.facts.capabilities)


def _asked(host: start.Host, off: frozenset[str], namespace: user_namespace.UserNamespace) -> verify.Asked:
    may = host.facts.may_make_namespaces
    missing = () if may else tuple(each for each in (walls.NETWORK_NAMESPACE, walls.PID_NAMESPACE) if each not in off)
    unavailable = (*namespace.unavailable_walls(), *((each, "CAP_SYS_ADMIN is needed") for each in missing))
    own_network, own_pids = may and walls.NETWORK_NAMESPACE not in off, may and walls.PID_NAMESPACE not in off
    asked = verify.Asked(host.facts, None, "", own_network, False, own_pids, None, bounds.read_inherited())
    return asked._replace(unavailable=unavailable)


def _prepare() -> tuple[int, ...]:
    """Make this process ready for the launch; return the descriptors that the caller left open."""
    start.hold_signals()
    TITLE.find(PROGRAM)
    process.ensure_standard_descriptors()
    return process.inherited_descriptors()


def _bound(host: start.Host, off: frozenset[str]) -> None:
    """What every process of the launch loses."""
    if walls.CORE_LIMIT not in off:
        with Step("forbid core files"):
            identity.forbid_core_files()
    if host.facts.privileged and walls.CAPABILITIES not in off:
        with Step("empty the capability bounding set"):
            identity.clear_bounding_set()


def _enter_domain(off: frozenset[str]) -> Rulesets:
    """Enter the Landlock domain of the microVM, for which an ordinary user needs no_new_privs. Raises StepError."""
    if walls.NO_NEW_PRIVILEGES not in off:
        with Step("set no_new_privs"):
            identity.set_no_new_privileges()
    landlock = Rulesets(wanted=walls.LANDLOCK not in off)
    landlock.enter_domain()
    return landlock


def _entering(
    launch_plan: LaunchPlan, host: start.Host, *, own_network: bool
) -> Callable[[socket.socket], start.Entered]:
    """Return what the controller's process does first, with its end of the seal channel."""
    off = launch_plan.switched_off

    def enter(supervisor: socket.socket) -> start.Entered:
        start.keep_terminal(launch_plan.arguments, host.null)
        tun = network.open_tun()
        if own_network:
            network.join_network(supervisor)
        if walls.CAPABILITIES not in off:
            with Step("limit the capabilities"):
                identity.keep_capabilities(host.facts.unjailed_capabilities)
        if walls.NO_NEW_PRIVILEGES not in off:
            with Step("set no_new_privs"):
                identity.set_no_new_privileges()
        return start.Entered(tun)

    return enter


def _leave_network(controller: Cell, *, own_network: bool) -> None:
    """Share an empty network namespace with the controller. Raises StepError."""
    timeline.mark("leave network")
    if not own_network:
        return
    assert controller.seal is not None
    network.leave_network()
    network.share_network(controller.seal)


def _confine_supervisor(setup: Setup, host: start.Host, warning: str, namespace: user_namespace.UserNamespace) -> None:
    timeline.mark("confine supervisor")
    off = setup.plan.switched_off
    if namespace.first_uid:
        user_namespace.enter(namespace, bounded=walls.CAPABILITIES not in off)
    if walls.CAPABILITIES not in off:
        with Step("limit the capabilities"):
            identity.keep_capabilities(identity.SUPERVISOR_CAPABILITIES if namespace.first_uid else 0)
    if walls.NO_NEW_PRIVILEGES not in off:
        with Step("set no_new_privs"):
            identity.set_no_new_privileges()
    start.close_supervisor(setup, host, PROGRAM, dumpable_wall=walls.DUMPABLE not in off)
    os.close(host.null)
    switched_off = f"switched off: {', '.join(off)}" if set(off) - {walls.SECCOMP} else ""
    for each in (warning, switched_off, *(start.warnings(setup) if setup.plan.uid == 0 else ())):
        if each:
            setup.log.warning(each)
