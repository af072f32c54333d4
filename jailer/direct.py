"""Un-jailed launches: no root needed, no namespaces, no change of identity; everything else as in a jail."""

from __future__ import annotations

import os

from base import timeline
from base.errno_text import errno_text
from base.lean_std import socket
from base.lean_typing import Callable
from ipc.errors import IpcError
from ipc.launch_plan import ROLE_VMM, SECCOMP_KILL, SECCOMP_OFF
from jailer import cleanup, plan, template, verify
from jailer.cell_record import Cell, Setup
from jailer.errors import StepError
from jailer.filters import JANITOR, load_filters, of_cell
from jailer.landlock import Rulesets
from jailer.log import Log
from jailer.memory import MemoryMaker
from jailer.start import (
    Entered,
    Host,
    close_supervisor,
    fork_controller,
    hold_signals,
    keep_terminal,
    open_host,
    signal_descriptor,
    supervise,
    wait_entered,
)
from jailer.steps import identity, network, process
from jailer.steps.title import TITLE
from jailer.steps.worker_cgroups import WorkerCgroups

#: What the visible process is called.
PROGRAM = "firecracker"
_ATTEMPTS = 100


def make_ipc_directory() -> str:
    """Make a directory that only we can enter, where its name can be kept short. Raises StepError."""
    uid = os.getuid()
    last = ""
    for base in (f"/run/user/{uid}", "/run" if uid == 0 else "", os.environ.get("TMPDIR", ""), "/tmp"):
        if not base or len(base) > 60 or not os.path.isdir(base):  # sun_path has 108 bytes
            continue
        for _ in range(_ATTEMPTS):
            path = os.path.join(base, f"cellblock-{os.urandom(6).hex()}")
            try:
                os.mkdir(path, 0o700)
                return path
            except FileExistsError:
                continue
            except OSError as error:
                last = f"{base}: {errno_text(error)}"
                break
    raise StepError(f"Failed to make the ipc directory: {last or 'no directory for it; set TMPDIR'}")


def launch(
    arguments: tuple[str, ...],
    microvm_id: str,
    started: plan.Started,
    load_roles: Callable[[], template.Roles],
    wall_log: str = "",
) -> int:
    """Launch, supervise, return the exit code of the microVM. Raises JailerError.

    ``wall_log`` is the path of a file for the walls' reports and the supervisor's lines.
    """
    timeline.mark("prepare")
    hold_signals()
    TITLE.find(PROGRAM)
    process.ensure_standard_descriptors()
    inherited = process.inherited_descriptors()
    proc = verify.open_proc()
    log = Log(2, microvm_id)
    if wall_log:
        log.open_reports(wall_log)
    mode = SECCOMP_OFF if "--no-seccomp" in arguments else SECCOMP_KILL
    timeline.mark("load filters")
    filters = load_filters(mode, janitor=True)
    timeline.mark("fork janitor")
    janitor = cleanup.start_janitor(filters.by_role.get(JANITOR))
    directory = make_ipc_directory()
    janitor.tree(directory)
    janitor.ready()
    timeline.mark("import roles")
    roles = load_roles()
    timeline.mark("open host")
    host = open_host(proc, -1, arguments, log)
    launch_plan = plan.unjailed(plan.Launch(microvm_id, arguments, started, mode, -1, host.console), directory)
    signals = signal_descriptor()
    identity.forbid_core_files()
    if host.facts.privileged:
        identity.clear_bounding_set()
    timeline.mark("warm")
    template.warm()
    landlock, own_network = _enter_domain(), host.facts.may_make_namespaces
    enter = _entering(arguments, host, janitor, own_network=own_network)
    mine, keep = of_cell(filters.by_role, ROLE_VMM), (*inherited, host.console)
    controller, channel = fork_controller(launch_plan, roles, mine, enter, keep, landlock=landlock)
    _leave_network(controller, own_network=own_network)
    timeline.mark("wait for controller")
    wait_entered(controller)
    for descriptor in inherited:  # the controller has them, for paths like /dev/fd/63
        os.close(descriptor)
    asked = verify.Asked(host.facts, None, "", own_network, False, None)
    # fmt: off
    setup = Setup(
        launch_plan, roles, asked, proc, host.kvm_fd, host.kvm_error, filters.by_role, MemoryMaker(False), log,
        WorkerCgroups(), landlock,
    )
    # fmt: on
    _confine_supervisor(setup, host, filters.warning)
    return supervise(setup, controller, channel, signals)


def _enter_domain() -> Rulesets:
    """Enter the Landlock domain of the microVM, for which an ordinary user needs no_new_privs. Raises StepError."""
    identity.set_no_new_privileges()
    landlock = Rulesets(wanted=True)
    landlock.enter_domain()
    return landlock


def _entering(
    arguments: tuple[str, ...], host: Host, janitor: cleanup.Janitor, *, own_network: bool
) -> Callable[[socket.socket], Entered]:
    """Return what the controller's process does first, with its end of the seal channel."""

    def enter(supervisor: socket.socket) -> Entered:
        keep_terminal(arguments, host.null)
        tun = network.open_tun()
        if own_network:
            network.join_network(supervisor)
        identity.keep_capabilities(host.facts.unjailed_capabilities)
        identity.set_no_new_privileges()
        os.close(janitor.descriptor)
        return Entered(tun)

    return enter


def _leave_network(controller: Cell, *, own_network: bool) -> None:
    """Share an empty network namespace with the controller. Raises StepError; then the controller is gone, too."""
    timeline.mark("leave network")
    if not own_network:
        return
    assert controller.seal is not None
    try:
        network.leave_network()
        network.share_network(controller.seal)
    except (OSError, IpcError) as error:
        raise StepError(str(error)) from None


def _confine_supervisor(setup: Setup, host: Host, warning: str) -> None:
    timeline.mark("confine supervisor")
    identity.clear_capabilities()
    identity.set_no_new_privileges()
    close_supervisor(setup, host, PROGRAM, dumpable_wall=True)
    os.close(host.null)
    if warning:
        setup.log.warning(warning)
