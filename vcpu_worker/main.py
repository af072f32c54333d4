"""Entry point of a worker cell: the control thread, from the fork to the exit code."""

from __future__ import annotations

import os
import select
import sys

import zmq

from base import faults
from base.errors import CellblockError
from base.exit_codes import CELL_OUT_OF_MEMORY, GENERIC_ERROR
from base.lean_std import socket
from base.lean_typing import Any, Callable
from base.threads import ZEROMQ_THREADS, MadeByLibrary
from ipc.channel import Channel, PairChannel, await_endpoint, await_welcome
from ipc.launch_plan import (
    PLACEMENT_SPLIT,
    ROLE_RUNNING_VCPU,
    ROLE_VCPU,
    Assignment,
    LaunchPlan,
    Seal,
    endpoint,
)
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.records import WORKER
from ipc.messages.worker import Hello, Welcome
from vcpu_worker import affinity
from vcpu_worker.commands import Control
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import WorkerError
from vcpu_worker.ghosts import watch
from vcpu_worker.kvm.system import KvmSystem
from vcpu_worker.machine import Machine
from vcpu_worker.refusal import Refusal
from vcpu_worker.serving import Commands, serve
from vcpu_worker.vcpu_thread import Completions, Job, VcpuThread, install_kick_handler

#: How long the last message may take to leave the process.
_LINGER_MS = 200


def run(
    plan: LaunchPlan,
    assignment: Assignment,
    channel: socket.socket,
    kvm_fd: int,
    seal: Seal,
) -> int:
    """Be the worker ``assignment`` until the controller says Finish or is gone; return the exit code of the cell.

    ``channel`` is our end of the descriptor channel, non-blocking, ``kvm_fd`` an open /dev/kvm; both are taken over.
    Nothing that another cell sent is read before the walls are verified; they are tightened when the vCPUs are
    configured, before the guest runs. What goes wrong until it is welcomed is raised, for the supervisor to tell;
    afterwards no exception leaves this.
    """
    starting = Starting(seal, plan)
    try:
        return _run(plan, assignment, channel, kvm_fd, starting)
    except MemoryError:
        if not starting.over:
            raise
        _complain(assignment.worker, "its limit of memory is reached")
        return CELL_OUT_OF_MEMORY
    except Exception as error:
        if not starting.over:
            raise
        expected = isinstance(error, CellblockError)
        text = str(error) if expected else f"internal error: {type(error).__name__}: {error}"
        return _complain(assignment.worker, text)


class Starting:
    """The seal of a worker, and whether its start is over: what goes wrong later is not a start that failed."""

    def __init__(self, seal: Seal, plan: LaunchPlan) -> None:
        self.seal = seal
        self.over = False
        self._plan = plan

    def tighten(self) -> None:
        """The vCPUs are configured."""
        self.seal.tighten()
        _run_drills(self._plan, ROLE_RUNNING_VCPU)


def _complain(worker: int, text: str) -> int:
    os.write(2, f"{text}\n".encode())
    return GENERIC_ERROR


def _run(
    plan: LaunchPlan,
    assignment: Assignment,
    channel: socket.socket,
    kvm_fd: int,
    starting: Starting,
) -> int:
    install_kick_handler()
    system = KvmSystem(kvm_fd)
    hello = Hello(
        assignment.worker,
        os.getpid(),
        system.api_version(),
        system.vcpu_mmap_size(),
        system.max_vcpus(),
        system.max_memslots(),
    )
    completions = Completions()

    made = _prepare(system, plan, assignment, completions, starting)
    os.close(kvm_fd)
    context = zmq.Context(io_threads=1)
    with MadeByLibrary(ZEROMQ_THREADS):
        control_channel = Channel(context, WORKER, plan.epoch)
    starting.seal.await_verified()
    await_endpoint(channel)
    control_channel.connect(endpoint(plan.worker_ipc_directory, ROLE_VCPU, assignment.worker))
    faults.visit("vcpu.hello")
    control_channel.send(hello)
    await_welcome(control_channel, Welcome)
    starting.over = True
    _run_drills(plan, ROLE_VCPU)
    descriptors = DescriptorSet(PairChannel(channel, DESCRIPTORS, plan.epoch))
    commands = made(control_channel.send, descriptors)
    code = serve(commands, control_channel, descriptors, completions, channel.fileno())
    control_channel.close(_LINGER_MS)
    context.term()
    return code


def _prepare(
    system: KvmSystem,
    plan: LaunchPlan,
    assignment: Assignment,
    completions: Completions,
    starting: Starting,
) -> Callable[[Callable[[Any], object], DescriptorSet], Commands]:
    """Do what takes time and needs /dev/kvm, while the controller starts; return what makes the worker's commands.

    What goes wrong here is told when the controller asks for the VM.
    """
    try:
        # Hosts without second-stage paging run the guest's kernel in ways that single-stepping does not survive.
        machine = Machine(system, assignment, single_step=plan.placement == PLACEMENT_SPLIT)
        # The calling thread, and hence those that it makes, may use the host CPUs of all vCPUs.
        if assignment.affinity:
            affinity.bind(sorted({cpu for cpus in assignment.affinity for cpu in cpus}), assignment.vcpus)
        threads = _start_threads(assignment, completions)
        _touch_vcpus(machine, assignment, threads, completions)
    except WorkerError as error:
        refusal = Refusal(error)
        return lambda send, descriptors: refusal
    return lambda send, descriptors: Control(
        send,
        descriptors,
        completions,
        machine,
        threads,
        tighten=starting.tighten,
        await_tightened=starting.seal.await_tightened,
    )


def _start_threads(assignment: Assignment, completions: Completions) -> list[VcpuThread]:
    names = [*(f"fc_vcpu {index}" for index in assignment.vcpus), *(f"ghost {index}" for index in assignment.ghosts)]
    threads = [VcpuThread(name, completions) for name in names]
    for thread in threads:
        thread.start()
    return threads


def _binding(cpus: tuple[int, ...], vcpu: int) -> Job:
    return lambda: affinity.bind(cpus, (vcpu,))


def _touch_vcpus(machine: Machine, assignment: Assignment, threads: list[VcpuThread], completions: Completions) -> None:
    """Let every vCPU enter KVM_RUN once, in its own thread on its own host CPUs, and ghosts be watched.

    Raises the first WorkerError of any of them.
    """
    results: list[object] = []
    jobs: list[tuple[VcpuThread, Job]] = []
    for thread, cpus, vcpu in zip(threads, assignment.affinity, assignment.vcpus, strict=False):
        jobs.append((thread, _binding(cpus, vcpu)))
    kvms = [*(vcpu.kvm for vcpu in machine.vcpus), *machine.ghost_vcpus]
    jobs += [(thread, kvm.touch) for kvm, thread in zip(kvms, threads, strict=True)]
    jobs += [(thread, watch.start) for thread in threads[len(machine.vcpus) :]]
    for thread, job in jobs:
        thread.submit(job, results.append)
    poll = select.poll()
    poll.register(completions.eventfd, select.POLLIN)
    while len(results) < len(jobs):
        poll.poll()
        completions.deliver()
    for result in results:
        if isinstance(result, WorkerError):
            raise result


def _run_drills(plan: LaunchPlan, role: str) -> None:
    """Attack our own walls if the jailer armed a drill (ipc.drills, imported by the template only then)."""
    drills = sys.modules.get("ipc.drills")
    if drills is not None:
        drills.run(plan.drills, role)
