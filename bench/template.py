"""A warm template: a process that has made every import of the product and warmed up, and waits to become a microVM.

This is the product's own path (jailer.main or jailer.firecracker, unchanged) with the interpreter's start and the
imports already behind it, and the filters loaded. Each template is used for one microVM, as a parked template will be
(cells of one template share their address space layout: docs/threat-model.md), and becomes its visible process; it
runs isolated (`python -IS`), as the programs do. What it does not do ahead: anything that needs the command line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from base import timeline
from bench.measure import BenchError, CpuAccount, Pipes, Started
from devtool.project import PYTHON, ROOT, VENV

_MAX_REQUEST = 65536
_READY = b"ready"


def serve(requests: int, ready: int) -> None:
    """Be the template: import, warm up, say so, and run the program whose name and arguments come."""
    from jailer import hot

    hot.intern_names()
    from base import lean_msgpack, lean_zmq

    lean_zmq.install()
    lean_msgpack.install()
    from ipc.launch_plan import SECCOMP_KILL
    from jailer import direct, filters, firecracker, launch, main, settings, template  # noqa: F401
    from vmm import cli  # noqa: F401

    filters.load_filters(SECCOMP_KILL)
    template.load_roles()
    template.warm()
    os.write(ready, _READY)
    os.close(ready)
    name, *arguments = os.read(requests, _MAX_REQUEST).decode().split("\0")
    os.close(requests)
    program = main.main if name == "jailer" else firecracker.main
    sys.exit(program([name, *arguments]))


def start(program: str, arguments: Sequence[str], account: CpuAccount, *, traced: bool = False) -> Started:
    """Make a template, then launch ``firecracker`` or ``jailer`` from it. The clock starts before the request."""
    pipes = Pipes()
    requests, request_end = os.pipe()
    ready, ready_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _execute(account, pipes, requests, ready_end, traced)
    pipes.started()
    os.close(requests)
    os.close(ready_end)
    if os.read(ready, len(_READY)) != _READY:
        raise BenchError(f"the template ended:\n{pipes.tail()}")
    os.close(ready)
    time.sleep(0.01)  # until it waits
    cpu = account.read()
    moment = time.monotonic()
    os.write(request_end, "\0".join([program, *arguments]).encode())
    os.close(request_end)
    return Started(pid, pipes, moment, cpu, account)


def _execute(account: CpuAccount, pipes: Pipes, requests: int, ready: int, traced: bool) -> None:
    try:
        account.join()
        for number, descriptor in enumerate(pipes.theirs):
            os.dup2(descriptor, number)
        for descriptor in (requests, ready):
            os.set_inheritable(descriptor, True)
        site_packages = next((VENV / "lib").glob("python3.*/site-packages"))
        code = (
            f"import sys; sys.path[:0] = {[str(ROOT), str(site_packages)]!r}\n"
            f"from bench.template import serve; serve({requests}, {ready})"
        )
        environment = {**os.environ, timeline.VARIABLE: "1" if traced else ""}
        os.execve(str(PYTHON), [str(PYTHON), "-IS", "-c", code], environment)
    finally:
        os._exit(127)
