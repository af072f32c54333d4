"""Un-jailed launches: no root needed, no namespaces, no change of identity; everything else as in a jail."""

from __future__ import annotations

import os
import time

from base import timeline
from base.errno_text import errno_text
from base.lean_typing import Callable
from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS, ROLE_VMM, SECCOMP_KILL, SECCOMP_OFF, LaunchPlan
from jailer import cleanup, placement, template, verify, walls
from jailer.cell_record import Setup
from jailer.errors import StepError
from jailer.log import Log
from jailer.memory import MemoryMaker, host_gives_huge_pages
from jailer.start import (
    Started,
    close_supervisor,
    fork_controller,
    hold_signals,
    load_filters,
    new_epoch,
    open_host,
    signal_descriptor,
    wait_entered,
)
from jailer.steps import identity, process
from jailer.steps.worker_cgroups import WorkerCgroups
from jailer.supervisor import Supervisor

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
    arguments: tuple[str, ...], microvm_id: str, started: Started, load_roles: Callable[[], template.Roles]
) -> int:
    """Launch, supervise, return the exit code of the microVM. Raises JailerError."""
    timeline.mark("prepare")
    hold_signals()
    process.ensure_standard_descriptors()
    inherited = process.inherited_descriptors()
    proc = verify.open_proc()
    log = Log(2, microvm_id)
    mode = SECCOMP_OFF if "--no-seccomp" in arguments else SECCOMP_KILL
    timeline.mark("load filters")
    sealing = load_filters(mode, janitor=True)
    timeline.mark("fork janitor")
    janitor = cleanup.start_janitor(sealing.filters.get("janitor"))
    directory = make_ipc_directory()
    janitor.tree(directory)
    janitor.ready()
    timeline.mark("import roles")
    roles = load_roles()
    timeline.mark("open host")
    host = open_host(proc, -1, arguments, log)
    plan = _launch_plan(arguments, microvm_id, started, mode, directory)._replace(console_fd=host.console)
    signals = signal_descriptor()
    identity.forbid_core_files()
    if host.facts.privileged:
        identity.clear_bounding_set()
    timeline.mark("warm")
    template.warm()

    def enter() -> tuple[int, ...]:
        identity.set_no_new_privileges()
        os.close(janitor.descriptor)
        return ()

    keep = (*inherited, host.console)
    controller, channel = fork_controller(plan, roles, sealing.filters.get(ROLE_VMM), enter, keep)
    timeline.mark("wait for controller")
    wait_entered(controller)
    for descriptor in inherited:  # the controller has them, for paths like /dev/fd/63
        os.close(descriptor)
    timeline.mark("confine supervisor")
    identity.clear_capabilities()
    identity.set_no_new_privileges()
    asked = verify.Asked(host.facts, None, "", False, False, None)
    memory = MemoryMaker(False)
    setup = Setup(plan, roles, asked, proc, host.kvm_fd, host.kvm_error, sealing.filters, memory, log, WorkerCgroups())
    close_supervisor(setup, host, "firecracker", dumpable_wall=True)
    os.close(host.null)
    if sealing.warning:
        log.warning(sealing.warning)
    return Supervisor(setup, controller, channel, signals).run()


def _launch_plan(
    arguments: tuple[str, ...], microvm_id: str, started: Started, mode: str, directory: str
) -> LaunchPlan:
    kind, reason = placement.detect()
    return LaunchPlan(
        microvm_id=microvm_id,
        epoch=new_epoch(),
        jailed=False,
        uid=os.getuid(),
        gid=os.getgid(),
        arguments=arguments,
        start_time_us=started.monotonic_us,
        start_time_cpu_us=started.cpu_us,
        parent_cpu_time_us=time.process_time_ns() // 1000,
        max_workers=MAX_WORKERS,
        max_memory_bytes=MAX_MEMORY_BYTES,
        placement=kind,
        placement_reason=reason,
        seccomp=mode,
        switched_off=(walls.SECCOMP,) if mode == SECCOMP_OFF else (),
        faults=(),
        drills=(),
        controller_ipc_directory=directory,
        worker_ipc_directory=directory,
        huge_pages=host_gives_huge_pages(),
        kernel_cache_fd=-1,
        console_fd=-1,
    )
