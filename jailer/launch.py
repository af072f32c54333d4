"""The order of a launch: operations on the host, the visible process, the controller's fork, the supervisor's own jail.

The order of effects is Firecracker's where a client can observe it (docs/jailer.md lists the steps).
"""

from __future__ import annotations

import os

from base import faults, timeline
from base.errno_text import errno_text
from base.errors import FaultSpecError
from base.lean_std import socket
from base.lean_typing import Callable
from ipc.launch_plan import ROLE_VMM, SECCOMP_OFF, LaunchPlan
from jailer import bounds, janitor, plan, start, syscalls, template, verify, walls
from jailer.cell_record import Cell, Setup
from jailer.cli import Options
from jailer.errors import ArgumentError, StepError
from jailer.filters import JANITOR, Filters, custom_filter, load_filters, of_cell, with_custom
from jailer.landlock import Rulesets
from jailer.log import Log
from jailer.memory import MemoryMaker, ReserveMemory
from jailer.operations import Operation, Plan, Step
from jailer.settings import Settings
from jailer.steps import (
    cgroups,
    covers,
    detach,
    devices,
    directories,
    identity,
    network,
    process,
    rootless,
    roots,
    user_namespace,
)
from jailer.steps.title import TITLE

_NO_SECCOMP = "--no-seccomp"


class JailedLaunch:
    """One run of ``jailer``."""

    def __init__(self, options: Options, settings: Settings, started: plan.Started) -> None:
        self._options = options
        self._settings = settings
        self._started = started
        mode = options.value("seccomp-mode")
        self._off = set(options.values_of("without"))
        if mode == SECCOMP_OFF or walls.SECCOMP in self._off or _NO_SECCOMP in options.arguments:
            mode = SECCOMP_OFF
            self._off.add(walls.SECCOMP)
        self._mode = mode
        self._rootless = rootless.is_needed()
        self._uid = settings.uid if self._has(walls.IDENTITY) else os.getuid()
        self._gid = settings.gid if self._has(walls.IDENTITY) else os.getgid()
        self._log = Log(2, settings.microvm_id)
        self._janitor: janitor.Janitor | None = None
        self._plan_on_host: Plan | None = None
        self._namespace = user_namespace.UserNamespace()
        self._controller: Cell | None = None

    def run(self, load_roles: Callable[[], template.Roles]) -> int:
        """Launch, supervise, return the exit code of the microVM. Raises JailerError if the launch fails.

        Then nothing of it is left, as if it is killed (jailer.janitor).
        """
        try:
            return self._launch(load_roles)
        except BaseException:
            self._undo()
            raise

    def _launch(self, load_roles: Callable[[], template.Roles]) -> int:
        timeline.mark("prepare")
        settings = self._settings
        start.hold_signals()
        TITLE.find(settings.exec_name)
        if self._rootless:
            rootless.enter(self._uid, self._gid)
        shortcomings = self._shortcomings()
        with Step("open /proc"):
            proc = verify.open_proc()
        self._open_wall_log()
        self._arm()
        filters = load_filters(self._mode, with_faults=bool(self._options.values_of("arm-fault")))
        self._janitor = janitor.start(filters.by_role.get(JANITOR))
        timeline.mark("import roles")
        roles = load_roles()
        timeline.mark("open host")
        host = start.open_host(proc, self._open_kernel_cache(), self._options.arguments, self._log)
        cgroup_plan = cgroups.plan_parent_only(settings)
        cgroup_items = cgroups.plan_items(settings, self._janitor)
        timeline.mark("warm")
        with Step("prepare the memory that the cells share"):
            # Before the cgroup is joined: what it moves is charged to who starts us, as all imports are.
            template.warm()
        memory = self._act_on_host(self._janitor, cgroup_plan, cgroup_items)
        filters = self._with_custom_filter(filters)
        timeline.mark("make users")
        self._make_cell_users(host.facts.capabilities)
        timeline.mark("detach")
        launcher = detach.detach(settings.daemonize, settings.new_pid_ns)
        setup, channel, signals = self._make_microvm(proc, host, filters, roles, memory)
        assert self._controller is not None
        supervisor = start.await_controller(setup, self._controller, channel, signals)
        timeline.mark("confine supervisor")
        self._drop_privileges(self._namespace)
        start.close_supervisor(setup, host, settings.exec_name, dumpable_wall=self._has(walls.DUMPABLE))
        if settings.daemonize:
            with Step("give up standard error"):
                detach.redirect_standard_descriptors(host.null, (2,))
        os.close(host.null)
        launcher.ready()
        for warning in (filters.warning, self._switches_warning(), shortcomings, *start.warnings(setup)):
            if warning:
                self._log.warning(warning)
        return start.supervise(supervisor)

    def _undo(self) -> None:
        """Take back what this launch did, or have it taken back."""
        start.end_cell(self._controller)
        if self._janitor is None or self._janitor.is_over:
            return
        if self._plan_on_host is not None:
            self._plan_on_host.undo()
        self._janitor.undo()

    # ------------------------------------------------------------ on the host

    def _shortcomings(self) -> str:
        settings = self._settings
        if not self._rootless:
            return ""
        has_cgroup = settings.parent_cgroup_given or bool(settings.cgroups or settings.vcpu_cgroups)
        return rootless.shortcomings(own_processes=settings.new_pid_ns, own_cgroup=has_cgroup)

    def _open_wall_log(self) -> None:
        path = self._options.value("wall-log")
        if path:
            self._log.open_reports(path)

    def _arm(self) -> None:
        armed = self._options.values_of("drill")
        try:
            faults.arm(self._options.values_of("arm-fault"))
            if armed:
                from ipc import drills  # the cells run them only if the template has loaded them

                drills.check(armed)
        except (FaultSpecError, ValueError) as error:
            raise ArgumentError(str(error)) from None

    def _open_kernel_cache(self) -> int:
        path = self._options.value("kernel-cache")
        if not path:
            return -1
        try:
            return roots.clone_read_only(path)
        except OSError as error:
            raise StepError(f"Failed to open kernel cache {path}: {errno_text(error)}") from None

    def _act_on_host(
        self, journal: janitor.Janitor, parent: cgroups.CgroupPlan, items: cgroups.CgroupPlan
    ) -> MemoryMaker:
        """Carry out the operations on the host, in Firecracker's order."""
        settings = self._settings
        off = frozenset(self._off)
        self._root = root = directories.MakeJailRoot(settings.jail_root, journal)
        program = directories.CopyExecFile(settings.exec_file, root, settings.jail_root, self._uid, self._gid)
        operations: list[Operation] = [*parent.operations, root, program]
        if settings.netns:
            operations.append(network.JoinNetworkNamespace(settings.netns))
        reserve = ReserveMemory(settings.limits.file_size is not None and walls.LIMITS not in off)
        operations += [reserve, process.SetLimits(settings.limits), *items.operations]
        self._plan_on_host = Plan(operations, off, self._log.error)
        self._plan_on_host.execute()
        self._clean_up_at_end([root, *(each for each in items.operations if isinstance(each, cgroups.MakeCgroup))])
        self._cgroups = items.directories if walls.CGROUP not in off else ()
        self._worker_cgroups = items.workers
        return reserve.maker

    def _clean_up_at_end(self, made: list[directories.MakeJailRoot | cgroups.MakeCgroup]) -> None:
        if self._janitor is None or "cleanup" not in self._options.switches:
            return
        for operation in made:
            for path in operation.made:
                self._janitor.remove_empty(path)

    # ------------------------------------------------------------ controller

    def _make_microvm(
        self, proc: int, host: start.Host, filters: Filters, roles: template.Roles, memory: MemoryMaker
    ) -> tuple[Setup, socket.socket, int]:
        """Fork the controller into its jail and wait until it is in it; then enter ours."""
        assert self._janitor is not None
        with Step("read our process id"):
            visible_pid = detach.outer_pid()
        timeline.mark("own mounts")
        with Step(f"enter {self._settings.jail_root}"):
            os.fchdir(self._root.descriptor)
        trees = self._make_trees()
        self._wanted_nodes = devices.nodes()
        self._nodes = self._clone_nodes()
        with Step("make the launch plan"):
            launch_plan = self._launch_plan(host)
        with Step("read what the walls will be compared with"):
            asked = self._asked(host)
        jailed_proc = self._mount_proc(proc)
        signals = start.signal_descriptor()
        self._bound()
        landlock = Rulesets(wanted=self._has(walls.LANDLOCK))
        landlock.enter_domain()
        if self._has(walls.PID_NAMESPACE):
            detach.leave_pid_namespace()
        self._controller, channel = start.fork_controller(
            launch_plan,
            roles,
            of_cell(filters.by_role, ROLE_VMM),
            lambda supervisor: self._enter_jail(host, trees, visible_pid, supervisor),
            (host.kernel_cache, host.console),
            landlock=landlock,
            asked=asked,
        )
        timeline.mark("leave namespaces")
        self._leave_namespaces(self._controller)
        timeline.mark("wait for controller")
        start.wait_entered(self._controller)  # the locked pid file stays open as long as we live
        if "cleanup" in self._options.switches:
            for directory in self._cgroups:
                self._janitor.remove_cgroup(directory)
            self._janitor.remove_tree(self._settings.jail_directory)
        self._plan_on_host = None  # we leave the host's root and our privileges: from here on it is for the janitor
        if trees is not None:
            os.close(trees.controller)
            timeline.mark("enter empty root")
            with Step("enter the empty root"):
                roots.enter_empty_root(trees.others)
            os.close(trees.others)
        self._root.close()
        # fmt: off
        setup = Setup(
            launch_plan, roles, asked, jailed_proc, host.kvm_fd, host.kvm_error, filters.by_role, memory, self._log,
            self._worker_cgroups, landlock, self._janitor,
        )
        # fmt: on
        return setup, channel, signals

    def _bound(self) -> None:
        """What every process of the launch loses."""
        if self._has(walls.CORE_LIMIT):
            with Step("forbid core files"):
                identity.forbid_core_files()
        if self._has(walls.CAPABILITIES):
            with Step("empty the capability bounding set"):
                identity.clear_bounding_set()

    def _make_cell_users(self, capabilities: int) -> None:
        """Before we are in another process namespace than /proc, by which the map is written."""
        if self._has(walls.CELL_IDENTITY):
            first = self._settings.first_cell_uid
            mine = 0 if self._rootless else capabilities  # in a namespace of one user they are worth nothing here
            self._namespace = user_namespace.make(self._uid, self._gid, first, mine)

    def _has(self, wall: str) -> bool:
        return wall not in self._off

    def _with_custom_filter(self, filters: Filters) -> Filters:
        """Add the filter that the controller's command line names, by its path in the jail."""
        path = custom_filter(self._options.arguments)
        return with_custom(filters, path, self._root.descriptor) if path else filters

    def _make_trees(self) -> roots.IpcTrees | None:
        """Make the ipc directory; without the root wall it is an ordinary directory in the jail root."""
        if not self._has(walls.ROOT):
            return None
        roots.isolate_mounts()
        return roots.IpcTrees(self._uid, self._gid, 0o711 if self._namespace.first_uid else 0o700)

    def _clone_nodes(self) -> dict[str, int] | None:
        """Return the host's device nodes where none can be made, as detached mounts."""
        return (
            rootless.clone_nodes(devices.paths(self._wanted_nodes))
            if self._rootless and self._has(walls.DEVICES)
            else None
        )

    def _mount_device(self, directory: devices.MakeDirectory, path: str) -> Operation | None:
        trees = self._nodes or {}
        return rootless.MountDevice(directory, path, trees[path]) if path in trees else None

    def _mount_proc(self, proc: int) -> int:
        """Return a /proc of our process namespace that is mounted nowhere, hence has no way out."""
        if self._rootless and not self._settings.new_pid_ns:
            os.close(proc)
            return rootless.clone_proc()
        quiet = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
        with Step("mount a /proc for the supervisor"):
            detached = syscalls.mount_detached("proc", (("subset", "pid"),), quiet | syscalls.MOUNT_ATTR_RDONLY)
        os.close(proc)
        return detached

    def _read_only_files(self) -> tuple[str, ...]:
        """Return what the controller sees under a mount that cannot be written to, replaced or removed."""
        has = self._has(walls.ROOT) and self._has(walls.PID_FILE)
        return (f"/{self._settings.exec_name}.pid",) if has else ()

    def _closed_devices(self) -> tuple[str, ...]:
        """Return the device nodes that the controller sees under a mount that lets none be opened."""
        has = self._has(walls.ROOT) and self._has(walls.DEVICES) and self._has(walls.UNUSED_DEVICES)
        if not has:
            return ()
        unused = devices.unused(self._wanted_nodes)
        return tuple(path for path in unused if self._nodes is None or path in self._nodes)

    def _passages(self) -> tuple[str, ...]:
        """Return the directories in the jail root that workers pass through, who are other users: none, as a rule.

        Without the root wall they go by the host's path.
        """
        has = self._namespace.first_uid and not self._has(walls.ROOT)
        return ("/", "/run", roots.CONTROLLER_IPC_DIRECTORY) if has else ()

    def _launch_plan(self, host: start.Host) -> LaunchPlan:
        options = self._options
        directories = (roots.CONTROLLER_IPC_DIRECTORY, roots.WORKER_IPC_DIRECTORY)
        if not self._has(walls.ROOT):  # both see an ordinary directory in the jail root
            directories = (f"{self._settings.jail_root}{roots.CONTROLLER_IPC_DIRECTORY}",) * 2
        return plan.jailed(
            plan.Launch(
                self._settings.microvm_id,
                options.arguments,
                self._started,
                self._mode,
                host.kernel_cache,
                host.console,
                self._namespace.first_uid,
            ),
            directories,
            (self._uid, self._gid),
            self._off,
            faults=options.values_of("arm-fault"),
            drills=options.values_of("drill"),
        )

    def _asked(self, host: start.Host) -> verify.Asked:
        settings = self._settings
        status = os.fstat(self._root.descriptor)
        return verify.Asked(
            host=host.facts,
            limits=settings.limits,
            cgroup=cgroups.read_file("/proc/self/cgroup") + "\n",
            own_network=self._shares_network() or self._joins_another_network(host.facts),
            new_pid_namespace=settings.new_pid_ns,
            cells_own_pids=self._has(walls.PID_NAMESPACE),
            jail_root=(status.st_dev, status.st_ino),
            inherited=bounds.read_inherited(),
            groups=tuple(os.getgroups()) if self._rootless else (),
            read_only_files=self._read_only_files(),
            closed_devices=self._closed_devices(),
            unavailable=self._namespace.unavailable_walls(),
        )

    def _enter_jail(
        self, host: start.Host, trees: roots.IpcTrees | None, visible_pid: int, supervisor: socket.socket
    ) -> start.Entered:
        """In the controller's process: its namespaces, root, devices, the pid file, its identity."""
        settings = self._settings
        if settings.daemonize:
            detach.redirect_standard_descriptors(host.null, (0, 1) if self._has(walls.LOG_PIPE) else (0, 1, 2))
        else:
            start.keep_terminal(self._options.arguments, host.null)
        flags = 0
        if self._has(walls.IPC_NAMESPACE):
            flags |= syscalls.CLONE_NEWIPC
        if self._has(walls.UTS_NAMESPACE):
            flags |= syscalls.CLONE_NEWUTS
        with Step("unshare into new ipc and uts namespaces"):
            syscalls.unshare(flags)
        made, nodes = devices.operations(
            self._wanted_nodes,
            (self._uid, self._gid),
            mounts=self._root.mounts_are_hosts,
            journal=self._root.journal,
            make=self._mount_device if self._rootless else None,
        )
        by_path = {each.path: each for each in made}
        tun = network.OpenTun(lambda: by_path["/dev/net"].descriptor)
        operations: list[Operation] = [roots.EnterJailRoot(), *made, *nodes, tun]
        if trees is not None:
            place = by_path[roots.CONTROLLER_IPC_DIRECTORY]
            operations.append(roots.AttachIpcDirectory(trees.controller, lambda: place.descriptor))
        pid_file = detach.WritePidFile(lambda: made[0].descriptor, settings.exec_name, visible_pid, self._root.journal)
        operations.append(pid_file)
        operations += [covers.CoverDevice(by_path[os.path.dirname(path)], path) for path in self._closed_devices()]
        operations += [covers.CoverPidFile(made[0], path) for path in self._read_only_files()]
        operations.append(devices.GiveDirectories(made, self._uid, self._gid, self._passages()))
        Plan(operations, frozenset(self._off), self._log.error).execute()
        if trees is not None:
            os.close(trees.controller)
        if self._shares_network():
            network.join_network(supervisor)
        self._drop_privileges(user_namespace.UserNamespace())
        return start.Entered(tun.opened, (pid_file.descriptor,))

    # ------------------------------------------------------------ supervisor

    def _shares_network(self) -> bool:
        """Is the controller in the empty network namespace of the others, too?"""
        return self._has(walls.NETWORK_NAMESPACE) and not self._settings.netns

    def _joins_another_network(self, facts: verify.HostFacts) -> bool:
        """Does ``--netns`` name another namespace than the caller's?"""
        path = self._settings.netns
        return bool(path) and os.stat(path).st_ino != facts.namespaces["net"]

    def _leave_namespaces(self, controller: Cell) -> None:
        if self._has(walls.NETWORK_NAMESPACE):
            network.leave_network()
        if self._shares_network():
            assert controller.seal is not None
            network.share_network(controller.seal)
        flags = 0
        for wall, flag in ((walls.IPC_NAMESPACE, syscalls.CLONE_NEWIPC), (walls.UTS_NAMESPACE, syscalls.CLONE_NEWUTS)):
            if self._has(wall):
                flags |= flag
        with Step("unshare into new ipc and uts namespaces"):
            syscalls.unshare(flags)

    def _drop_privileges(self, namespace: user_namespace.UserNamespace) -> None:
        """``namespace``: that of the users of our cells, for the supervisor."""
        if namespace.first_uid:
            user_namespace.enter(namespace, bounded=self._has(walls.CAPABILITIES))
        if self._has(walls.IDENTITY):
            with Step(f"become user {self._uid}, group {self._gid}"):
                identity.become(self._uid, self._gid, keep_groups=self._rootless)
        if self._has(walls.CAPABILITIES):
            with Step("limit the capabilities"):
                identity.keep_capabilities(identity.SUPERVISOR_CAPABILITIES if namespace.first_uid else 0)
        if self._has(walls.NO_NEW_PRIVILEGES):
            with Step("set no_new_privs"):
                identity.set_no_new_privileges()

    def _switches_warning(self) -> str:
        return f"switched off: {', '.join(sorted(self._off))}" if self._off else ""
