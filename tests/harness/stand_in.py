"""The program ``jailer`` with stand-in roles, for tests of the supervisor: ``stand_in.py ROOT JAILER-ARGUMENTS``.

The first argument after ``--`` names the behaviour of the controller, the second (if any) that of the workers.
Both report on standard error in lines that begin with "stand-in:".
"""

from __future__ import annotations

import os
import sys

ROOT = sys.argv.pop(1)
sys.path[:0] = [ROOT, os.path.join(ROOT, ".venv/lib/python3.11/site-packages")]

import ctypes  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from base.errors import ThreadError  # noqa: E402
from base.threads import MadeByLibrary  # noqa: E402
from ipc.channel import PairChannel  # noqa: E402
from ipc.launch_plan import (  # noqa: E402
    ENDPOINT_BOUND,
    FORKED_AHEAD,
    MAX_DEVICE_CELLS,
    ROLE_DEVICE,
    ROLE_VCPU,
    Assignment,
    LaunchPlan,
    Seal,
)
from ipc.messages.supervisor import SUPERVISOR, CellEnded, CreateMemory, Shutdown, SignalCell, Spawn  # noqa: E402
from jailer import cell, cli, launch, main, plan, settings, template  # noqa: E402


def say(text: str) -> None:
    os.write(2, f"stand-in: {text}\n".encode())


class Client:
    """A minimal controller: requests one after the other, notices collected."""

    def __init__(self, channel: socket.socket, plan: LaunchPlan) -> None:
        self.pair = PairChannel(channel, SUPERVISOR, plan.epoch)
        self.notices: list[Any] = []
        self.descriptors: list[int] = []

    def ask(self, message: Any) -> Any:
        sequence = self.pair.send(message)
        while True:
            envelope, owned = self.pair.receive(4)
            assert envelope is not None
            while len(owned):
                self.descriptors.append(owned.take())
            if envelope.reply_to == sequence:
                return envelope.message
            self.notices.append(envelope.message)

    def notice(self) -> Any:
        if self.notices:
            return self.notices.pop(0)
        envelope, owned = self.pair.receive(4)
        owned.close()
        assert envelope is not None
        return envelope.message


# ---------------------------------------------------------------- controllers


def idle(plan: LaunchPlan, client: Client) -> int:
    """Spawn a worker, then wait for the end."""
    say(f"spawned {client.ask(Spawn(0, (0,), ())).worker}")
    while True:
        message = client.notice()
        if isinstance(message, Shutdown):
            say(f"shutdown {message.code} {message.text}")
            return message.code
        if isinstance(message, CellEnded):
            say(f"ended {message.worker} status={message.status} signal={message.signal} wall={message.wall!r}")


def one_worker(plan: LaunchPlan, client: Client) -> int:
    """Spawn a worker, report how it ends, end."""
    client.ask(Spawn(0, (0,), ()))
    message = client.notice()
    say(f"ended {message.worker} status={message.status} signal={message.signal} wall={message.wall!r}")
    say(f"text {message.text}")
    return 0


def greedy(plan: LaunchPlan, client: Client) -> int:
    """Ask for more than the plan allows."""
    # The schema refuses what no plan could allow, so the plan's own bounds are asked for one below.
    first = client.ask(Spawn(0, (0,), ()))
    say(f"first -> {type(first).__name__}")
    for request in (
        Spawn(0, (0, 1), ()),
        Spawn(0, (0,), (1,)),
        Spawn(0, (0,), ()),  # it is to replace the first one
        Spawn(0, (0,), ()),
        Spawn(plan.max_workers - 1, (0,), ()),
        SignalCell(0, first.pid, signal.SIGUSR1),
        SignalCell(7, first.pid, 9),
        SignalCell(0, os.getpid(), 9),
    ):
        reply = client.ask(request)
        say(f"{type(request).__name__} {request[0]} -> {type(reply).__name__} {getattr(reply, 'code', '')}")
    for size in (4096, plan.max_memory_bytes):
        reply = client.ask(CreateMemory(size))
        say(f"CreateMemory {size} -> {type(reply).__name__}")
    return 0


def memory(plan: LaunchPlan, client: Client) -> int:
    """Make guest memory and try to resize it."""
    for _ in range(3):
        client.descriptors.clear()
        client.ask(CreateMemory(8 << 20))
        descriptor = client.descriptors[0]
        for size in (4096, 16 << 20):
            try:
                os.ftruncate(descriptor, size)
                say("memory was resized")
            except OSError as error:
                say(f"resize refused: {error.strerror}")
        say(f"memory of {os.fstat(descriptor).st_size}")
    return 0


def signals(plan: LaunchPlan, client: Client) -> int:
    """Stop, continue and kill a worker."""
    pid = client.ask(Spawn(0, (0,), ())).pid
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL):
        say(f"{number.name} -> {type(client.ask(SignalCell(0, pid, number))).__name__}")
    message = client.notice()
    say(f"ended signal={message.signal}")
    again = client.ask(Spawn(0, (0,), ()))
    say(f"again -> {type(again).__name__}")
    return 0


def garbage(plan: LaunchPlan, client: Client) -> int:
    """Send frames that break the protocol until the supervisor has had enough."""
    for _ in range(1000):
        client.pair.socket.send(b"\xc1garbage")
    time.sleep(60)
    return 0


def hang_up(plan: LaunchPlan, client: Client) -> int:
    """Close the channel and go on living."""
    client.pair.close()
    time.sleep(60)
    return 0


def late(plan: LaunchPlan, client: Client) -> int:
    """Ask for a worker when the test has looked."""
    while not os.path.exists("/go"):
        time.sleep(0.005)
    spawned = client.ask(Spawn(0, (0,), ()))
    say(f"spawned pid {spawned.pid}")
    return idle_on(client)


DEVICE_CELL = Spawn(0, (), (), (), ROLE_DEVICE)


def device_cells(plan: LaunchPlan, client: Client) -> int:
    """Ask for device cells beside a worker, within and beyond the plan; end one, and ask again."""
    worker = client.ask(Spawn(0, (0,), ()))
    first = client.ask(DEVICE_CELL)
    say(f"first -> {type(first).__name__} {first.role} {first.worker}")
    for request in (
        DEVICE_CELL._replace(worker=MAX_DEVICE_CELLS - 1),
        DEVICE_CELL._replace(worker=MAX_DEVICE_CELLS),
        DEVICE_CELL._replace(vcpus=(0,)),
        DEVICE_CELL._replace(affinity=((0,),)),
        DEVICE_CELL._replace(role="vmm"),
        DEVICE_CELL,  # it is to replace the first one
        DEVICE_CELL,
        SignalCell(0, first.pid, signal.SIGKILL),
        SignalCell(0, worker.pid, signal.SIGKILL, ROLE_DEVICE),
        SignalCell(0, first.pid, signal.SIGKILL, ROLE_DEVICE),
    ):
        reply = client.ask(request)
        answer = f"{type(reply).__name__} {getattr(reply, 'code', '')}".rstrip()
        say(f"{type(request).__name__} {request.role} {request.worker} -> {answer}")
    message = client.notice()
    say(f"ended {message.role} {message.worker} signal={message.signal} first={message.pid == first.pid}")
    return 0


def one_device_cell(plan: LaunchPlan, client: Client) -> int:
    """Ask for a device cell, report how it ends, end."""
    client.ask(DEVICE_CELL)
    message = client.notice()
    say(f"ended {message.role} status={message.status} signal={message.signal} wall={message.wall!r}")
    say(f"text {message.text}")
    return 0


def worker_and_device_cell(plan: LaunchPlan, client: Client) -> int:
    """Ask for one of both, then wait for the end."""
    client.ask(DEVICE_CELL)
    return idle(plan, client)


def choosy(plan: LaunchPlan, client: Client) -> int:
    """Ask for a worker other than the one that was forked ahead, then for that one."""
    other = client.ask(Spawn(0, (0, 1), ()))
    say(f"other {getattr(other, 'code', 'spawned')}")
    spawned = client.ask(Spawn(0, (0,), ()))
    say(f"spawned pid {spawned.pid}")
    return 0


def idle_on(client: Client) -> int:
    """Report what ends until the end."""
    while True:
        message = client.notice()
        if isinstance(message, Shutdown):
            return message.code
        say(f"ended {message.worker} signal={message.signal}")


def deaf(plan: LaunchPlan, client: Client) -> int:
    """Never read the channel, so that a shutdown goes unheard."""
    say("deaf")
    time.sleep(60)
    return 0


def flood(plan: LaunchPlan, client: Client) -> int:
    """Ask without ever reading the answers."""
    client.pair.socket.settimeout(10)
    for _ in range(100000):
        client.pair.send(SignalCell(9, 9, 9))
    return 0


def exit_3(plan: LaunchPlan, client: Client) -> int:
    return 3


def segfault(plan: LaunchPlan, client: Client) -> int:
    return ctypes.string_at(0)[0]


def crash(plan: LaunchPlan, client: Client) -> int:
    raise RuntimeError("a defect of the controller")


# ---------------------------------------------------------------- workers


def receive(channel: socket.socket) -> bytes:
    """Wait for a frame on a channel that does not block, and that a worker cannot let block."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.poll()
    return channel.recv(16)


def wait(channel: socket.socket) -> int:
    receive(channel)  # until the controller is gone
    return 0


def exit_5(channel: socket.socket) -> int:
    return 5


def sigsys(channel: socket.socket) -> int:
    os.getpriority(os.PRIO_PROCESS, 0)
    return 0


CONTROLLERS: dict[str, Callable[[LaunchPlan, Client], int]] = {
    name.replace("_", "-"): function
    for name, function in list(globals().items())
    if callable(function) and getattr(function, "__annotations__", {}).get("client") == "Client"
}
WORKERS: dict[str, Callable[[socket.socket], int]] = {
    name.replace("_", "-"): function for name, function in (("wait", wait), ("exit-5", exit_5), ("sigsys", sigsys))
}


def fail_early() -> int:
    say("failing early")
    return 7


def lower_limit() -> None:
    """Have another limit than was asked for."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def abort() -> int:
    with MadeByLibrary(0):
        os.write(2, b"Too many open files (src/signaler.cpp:345)\n")
        os.abort()


def abort_without_a_thread() -> int:
    with MadeByLibrary(0):
        os.write(2, b"Resource temporarily unavailable (src/thread.cpp:241)\n")
        os.abort()


def no_thread() -> int:
    raise ThreadError("no thread can be made")


#: What happens instead of, or before, the seal.
BEFORE_SEAL: dict[str, Callable[[], int | None]] = {
    "fail-early": fail_early,
    "exit-unsealed": lambda: 0,
    "never-seal": lambda: time.sleep(60),
    "lower-limit": lower_limit,
    "extra-group": lambda: None,
    "abort": abort,
    "abort-without-a-thread": abort_without_a_thread,
    "no-thread": no_thread,
}


def say_on_seal_channel(frame: bytes, seal: cell.Seal) -> None:
    seal._open_channel().send(frame)
    time.sleep(60)


def lie_about_the_filter(seal: cell.Seal) -> None:
    say_on_seal_channel(cell.FILTERED, seal)


#: What a worker does between the two stages of its seal.
WHILE_HIDDEN: dict[str, Callable[[Any], None]] = {
    "nonsense": lambda seal: say_on_seal_channel(b"nonsense", seal),
    "hidden-twice": lambda seal: say_on_seal_channel(cell.HIDDEN, seal),
    "tightening": lambda seal: say_on_seal_channel(cell.TIGHTENING, seal),
    "no-second-filter": lie_about_the_filter,
}


def _behaviours(plan: LaunchPlan) -> list[str]:
    return [*plan.arguments[plan.arguments.index("--parent-cpu-time-us") + 2 :], "idle", "wait"]


def vmm(plan: LaunchPlan, channel: socket.socket, seal: Seal) -> int:
    name = _behaviours(plan)[0]
    if name in BEFORE_SEAL:
        code = BEFORE_SEAL[name]()
        if code is not None:
            return code
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # what cannot be written is to fail here
    seal.tighten()
    seal.await_tightened()
    say("sealed")
    return CONTROLLERS.get(name, idle)(plan, Client(channel, plan))


def vcpu(plan: LaunchPlan, assignment: Assignment, channel: socket.socket, kvm_fd: int, seal: Seal) -> int:
    return worker(plan, assignment, channel, seal)


def drill(plan: LaunchPlan, role: str) -> None:
    """Attack our own walls, if that is armed."""
    drills = sys.modules.get("ipc.drills")
    if drills is not None and role.startswith(ROLE_DEVICE):
        drills.run(plan.drills, role)


def worker(plan: LaunchPlan, assignment: Assignment, channel: socket.socket, seal: Seal) -> int:
    """Be a worker, or a device cell."""
    name = _behaviours(plan)[1]
    if name in BEFORE_SEAL:
        code = BEFORE_SEAL[name]()
        if code is not None:
            return code
    seal.await_verified()
    if name in WHILE_HIDDEN:
        WHILE_HIDDEN[name](seal)
    frame = receive(channel)
    drill(plan, assignment.role)
    if frame != ENDPOINT_BOUND:
        say(f"{_kind(assignment)} {assignment.worker} was told {frame!r}")
        return 98
    seal.tighten()
    seal.await_tightened()
    drill(plan, f"{assignment.role}-running")
    say(f"{_kind(assignment)} {assignment.worker} sealed")
    return WORKERS.get(name, wait)(channel)


def _kind(assignment: Assignment) -> str:
    return "worker" if assignment.role == ROLE_VCPU else assignment.role


def launch_stand_ins() -> int:
    main.close_descriptors()
    main.clear_environment()
    options = cli.parse(sys.argv[1:])
    resolved = settings.resolve(options)
    ahead = FORKED_AHEAD if "ahead" in options.arguments else None
    roles = template.Roles(vmm, vcpu, ahead, worker)
    return launch.JailedLaunch(options, resolved, plan.started_now()).run(lambda: roles)


def run() -> int:
    return main.guarded(launch_stand_ins)


if __name__ == "__main__":
    sys.exit(run())
