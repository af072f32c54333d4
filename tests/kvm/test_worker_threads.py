"""Which thread may do what: ioctls of a vCPU belong to its thread, and one that waits must not hold the interpreter."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ipc.messages.worker import DumpCpuConfig, DumpedCpuConfig, SavedState, SaveState
from tests.harness.workers import ChecksCounts, Controller
from vcpu_worker import reporting, run_loop
from vcpu_worker.errors import KvmError
from vcpu_worker.kvm import abi
from vcpu_worker.kvm import vcpu as vcpu_module
from vcpu_worker.kvm.system import KvmSystem
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.kvm.vm import KvmVm
from vcpu_worker.vcpu_thread import KICK_SIGNAL, install_kick_handler

JUMP_TO_ITSELF = b"\xeb\xfe"
RESET_VECTOR_PAGE = 0xFFFF_F000


class FcntlVcpu(KvmVcpu):
    """What must not be done: a buffer above 1024 bytes through fcntl.ioctl."""

    def get_xsave(self) -> bytes:
        buffer = bytearray(abi.XSAVE_SIZE)
        fcntl.ioctl(self.descriptor, abi.KVM_GET_XSAVE, buffer, True)
        return bytes(buffer)


def spin_and_read_state(kind: type[KvmVcpu], progress: Callable[[], object]) -> None:
    """One thread runs a vCPU that never exits, one reads its XSAVE area (and waits), this one must go on."""
    install_kick_handler()
    system = KvmSystem(os.open("/dev/kvm", os.O_RDWR))
    vm = KvmVm(system)
    page = mmap.mmap(-1, 4096)
    page[0xFF0:0xFF2] = JUMP_TO_ITSELF
    vm.set_memory_region(0, RESET_VECTOR_PAGE, 4096, ctypes.addressof(ctypes.c_char.from_buffer(page)))
    vcpu = kind(vm, 0, system.vcpu_mmap_size())
    running, reading = threading.Event(), threading.Event()

    def run() -> None:
        running.set()
        while not vcpu.run8[abi.RUN_IMMEDIATE_EXIT]:
            try:
                fcntl.ioctl(vcpu.descriptor, abi.KVM_RUN)
            except InterruptedError:
                pass

    def read() -> None:
        reading.set()
        try:
            vcpu.get_xsave()
        except KvmError:
            pass

    runner = threading.Thread(target=run)
    runner.start()
    running.wait()
    time.sleep(0.05)  # lets it enter the guest; too early only makes the test weaker
    reader = threading.Thread(target=read)
    reader.start()
    reading.wait()
    for _ in range(20):
        progress()
        time.sleep(0.005)
    vcpu.run8[abi.RUN_IMMEDIATE_EXIT] = 1
    assert runner.ident is not None
    signal.pthread_kill(runner.ident, KICK_SIGNAL)
    runner.join()
    reader.join()


def progress_of(kind: type[KvmVcpu], patience: float) -> tuple[int, bool]:
    """Run it in a process of its own; return (steps made, ended by itself)."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            spin_and_read_state(kind, lambda: os.write(write_end, b"."))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    deadline = time.monotonic() + patience
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        time.sleep(0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    steps = len(os.read(read_end, 4096))
    os.close(read_end)
    return steps, ended


def test_a_large_ioctl_that_waits_does_not_stop_the_other_threads():
    assert progress_of(KvmVcpu, 30.0) == (20, True)


def test_the_same_through_fcntl_freezes_the_process():
    """Why there is a rule at all. If this ever fails, CPython has changed and the rule may go."""
    steps, ended = progress_of(FcntlVcpu, 1.5)
    assert (steps < 20, ended) == (True, False)


def test_only_its_own_thread_issues_ioctls_of_a_vcpu(tmp_path: Path):
    record = tmp_path / "ioctls"

    def seal() -> None:
        """Runs in the worker before any vCPU ioctl: note who calls."""
        file = record.open("a", buffering=1)

        def watched(function: Callable[..., int]) -> Callable[..., int]:
            def call(descriptor: int, request: int, *rest: object) -> int:
                print(threading.get_native_id(), abi.request_name(request), file=file)
                return function(descriptor, request, *rest)

            return call

        for name in ("ioctl_buffer", "ioctl_integer"):
            setattr(vcpu_module, name, watched(getattr(vcpu_module, name)))

    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm", seal=seal) as worker:
        worker.configure()
        tasks = Path(f"/proc/{worker.pid}/task").iterdir()
        (own,) = [task.name for task in tasks if (task / "comm").read_text().strip() == "fc_vcpu 0"]
        worker.resume()
        worker.wait(lambda: device.count > 5)
        worker.pause()
        worker.request(SaveState(0), SavedState)
        worker.request(DumpCpuConfig(0), DumpedCpuConfig)
        assert worker.finish() == 0
    calls = [line.split() for line in record.read_text().splitlines()]
    assert {"KVM_SET_CPUID2", "KVM_SET_SREGS", "KVM_GET_XSAVE", "KVM_KVMCLOCK_CTRL"} <= {name for _, name in calls}
    assert {thread for thread, _ in calls} == {own}


def test_a_worker_that_may_make_no_thread_runs_its_vcpu(tmp_path: Path):
    """KVM makes a thread of the process at the first KVM_RUN (Linux 6.13): that must have happened before seal()."""

    def seal() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm", tighten=seal) as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: device.count > 10 or bool(worker.events))
        assert worker.events == []


@pytest.mark.parametrize("errno", [11, 14, 38])
def test_a_kvm_run_that_never_succeeds_is_reported(tmp_path: Path, errno: int):
    """EAGAIN is no reason to try for ever; other errors end the vCPU at once."""

    def seal() -> None:
        class Fcntl:
            @staticmethod
            def ioctl(*_: object) -> int:
                raise OSError(errno, "made up")

        vars(run_loop)["fcntl"] = Fcntl

    with Controller(tmp_path, ChecksCounts(), mode="storm", seal=seal) as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: bool(worker.events))
        (event,) = worker.events
        assert (event.reason, event.detail, event.code) == (reporting.REASON_RUN_FAILED, (errno,), 1)
        assert worker.finish() == 0


@pytest.mark.parametrize("size", [1024, 1025, 4096])
def test_buffers_of_any_size_reach_the_kernel(size: int):
    """The limit of fcntl's own buffer is respected on both sides of it."""
    from vcpu_worker.kvm.ioctl import ioctl_buffer

    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x" * 77)
        buffer = bytearray(size)
        ioctl_buffer(read_end, 0x541B, buffer)  # FIONREAD
        assert buffer[0] == 77
        with pytest.raises(KvmError, match="Inappropriate ioctl"):
            ioctl_buffer(read_end, abi.KVM_GET_REGS, buffer)
    finally:
        os.close(read_end)
        os.close(write_end)
