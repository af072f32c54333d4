"""The walls and steps that ``--without`` switches off, by name: one source for flags, launch and checks."""

from __future__ import annotations

DESCRIPTORS = "descriptors"
ENVIRONMENT = "environment"
CGROUP = "cgroup"
DEVICES = "devices"
UNUSED_DEVICES = "unused-devices"
PID_FILE = "pid-file"
LOG_PIPE = "log-pipe"
LIMITS = "limits"
ROOT = "root"
IPC_NAMESPACE = "ipc-namespace"
UTS_NAMESPACE = "uts-namespace"
NETWORK_NAMESPACE = "network-namespace"
PID_NAMESPACE = "pid-namespace"
IDENTITY = "identity"
CELL_IDENTITY = "cell-identity"
UNPRIVILEGED_USER = "unprivileged-user"
CAPABILITIES = "capabilities"
NO_NEW_PRIVILEGES = "no-new-privileges"
DEATH_SIGNAL = "death-signal"
CORE_LIMIT = "core-limit"
PROCESS_LIMIT = "process-limit"
LANDLOCK = "landlock"
MEMORY_LIMIT = "memory-limit"
KERNEL_LIMITS = "kernel-limits"
SECCOMP = "seccomp"
DUMPABLE = "dumpable"
VERIFY = "verify"

#: Name → what is missing without it.
SWITCHES: dict[str, str] = {
    DESCRIPTORS: "descriptors inherited from the caller stay open",
    ENVIRONMENT: "the caller's environment is kept",
    CGROUP: "the cgroups of --cgroup and --vcpu-cgroup are neither made nor joined",
    DEVICES: "no device nodes in the jail root",
    UNUSED_DEVICES: "the controller may open /dev/kvm, /dev/net/tun, /dev/userfaultfd in the jail root",
    LOG_PIPE: "the cells hold the caller's standard error, and can read what is typed there",
    PID_FILE: "the controller may remove or replace the pid file",
    LIMITS: "the limits of --resource-limit are not set",
    ROOT: "the cells see the host's file system",
    IPC_NAMESPACE: "the cells share the host's System V IPC and POSIX message queues",
    UTS_NAMESPACE: "the cells share the host's name",
    NETWORK_NAMESPACE: "the cells share the caller's network",
    PID_NAMESPACE: "the cells can name, and signal, other processes of their user",
    IDENTITY: "the cells keep the caller's user, group and supplementary groups",
    CELL_IDENTITY: "workers and device cells have the user and group of the controller",
    UNPRIVILEGED_USER: "--uid 0 is taken: the controller is the user of every process of root",
    CAPABILITIES: "the cells keep the caller's capabilities",
    NO_NEW_PRIVILEGES: "set-user-ID programs would work (seccomp then needs privileges)",
    DEATH_SIGNAL: "a cell outlives its supervisor",
    CORE_LIMIT: "a crash may write a core file",
    PROCESS_LIMIT: "a cell may create processes and threads (if the filter lets it)",
    LANDLOCK: "nothing but users and namespaces bounds files, abstract sockets and signals (filters aside)",
    MEMORY_LIMIT: "a cell may take as much of the host's memory as the caller may",
    KERNEL_LIMITS: "a cell may lock memory, make message queues, raise its priority; some may open more files",
    SECCOMP: "every system call is allowed",
    DUMPABLE: "processes of the same user may trace a cell and read its memory",
    VERIFY: "the walls are reported but a difference does not end the launch",
}
