"""Starts the lab, runs commands in it, brings files back, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from devtool.project import ROOT, DevError
from lab.image import LabImage, ensure
from lab.monitor import Monitor
from lab.tsc import host_tsc_khz

#: Where the exchange folder is inside. Commands find it as $LAB_EXCHANGE.
EXCHANGE = "/run/lab/exchange"
_BOOT_SECONDS = 180.0
#: A processor that has not come by for so long will not come any more.
_STALL_SECONDS = 60
_CONSOLE_TAIL_LINES = 30
_CHUNK = 65536
#: Folders of the host that the lab hides under fresh ones (see init.sh).
_HIDDEN = ("/tmp", "/run", "/var/tmp", "/srv/jailer", "/dev", "/proc", "/sys")
#: Variables of the caller that hold inside as well.
_PASSED_ON = ("PATH", "HOME", "TERM", "LANG", "CI", "PYTHONPATH", "CELLBLOCK_CACHE", "CELLBLOCK_SOAK", "CELLBLOCK_SEED")


class LabError(DevError):
    """The lab did not start, ended early, or took too long. The text says which, and what to do."""


class LabTimeoutError(LabError):
    """The time limit passed; the lab was switched off."""


class Machine(NamedTuple):
    """Size of the emulated machine; ``cpus`` for commands, one more for the kernel alone; ``cpu_model``: QEMU's -cpu.

    ``touched``: the host gives all memory at the start, for measurements: else it comes while they run.
    """

    cpus: int = 2
    memory_mib: int = 6144
    cpu_model: str = "max"
    touched: bool = False


def qemu_command(machine: Machine, image: LabImage, exchange: Path, ports: Mapping[str, int]) -> list[str]:
    """Return QEMU's command line. `ports` maps the names of the agent's ports to inherited sockets."""
    tsc_khz = host_tsc_khz()
    append = (
        "console=ttyS0 quiet panic=-1 oops=panic cgroup_no_v1=all mitigations=off "
        f"no_timer_check tsc=reliable tsc_early_khz={tsc_khz} nokaslr random.trust_cpu=on "
        # The other processors come when KVM has changed the kernel's code for its first VM: lab/agent.sh.
        # Each would measure its speed then (lpj: loops per jiffy, of which Debian's kernel has 250 a second).
        f"maxcpus=1 lpj={tsc_khz * 1000 // 250} "
        # A machine that stands still is asked by an NMI (lab.monitor), and says what all its processors do.
        "rcupdate.rcu_expedited=1 audit=0 unknown_nmi_panic panic_print=0x40 "
        # One of whose processors takes no interrupt any more ends by itself.
        f"rcupdate.rcu_cpu_stall_timeout={_STALL_SECONDS} sysctl.kernel.panic_on_rcu_stall=1"
    )
    touched = "on" if machine.touched else "off"
    # fmt: off
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-object", f"memory-backend-ram,id=ram,size={machine.memory_mib}M,prealloc={touched}",
        "-machine", "q35,hpet=off,memory-backend=ram", "-accel", "tcg,thread=multi,tb-size=1024",
        # Commands run on all processors but the first: see agent.sh.
        "-cpu", machine.cpu_model, "-smp", str(machine.cpus + 1), "-m", f"{machine.memory_mib}M",
        "-kernel", str(image.vmlinux), "-initrd", str(image.initramfs), "-append", append,
        "-serial", f"file:{exchange / '.lab' / 'console.log'}",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=exchange,path={_escape(exchange)},security_model=none",
        "-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
    ]
    # fmt: on
    for name, descriptor in ports.items():
        if name == "monitor":
            command += ["-chardev", f"socket,id={name},fd={descriptor}", "-mon", f"chardev={name},mode=control"]
            continue
        device = "virtconsole" if name == "console" else "virtserialport"
        command += ["-chardev", f"socket,id={name},fd={descriptor}"]
        command += ["-device", f"{device},chardev={name},name=cellblock.{name}"]
    return command


def _escape(path: Path) -> str:
    """Commas separate QEMU's options; a doubled one stands for itself."""
    return str(path).replace(",", ",,")


class Lab:
    """A running lab; a context manager. Several commands can be run one after the other.

    The machine cannot outlive this process, however it ends: the kernel kills QEMU with the thread that made the Lab.
    """

    def __init__(self, machine: Machine | None = None, *, keep: Sequence[Path] = ()) -> None:
        """Boot. `keep`: folders that must be seen inside even below /tmp and the like; the checkout always is."""
        self._jobs = 0
        self._qemu: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, socket.socket] = {}
        self._control = b""
        self._exchange = Path(tempfile.mkdtemp(prefix="cellblock-lab-"))
        try:
            self._lock = os.open(self._exchange, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # tells remove_abandoned that we live
            remove_abandoned()
            image = ensure()
            self._write_orders(image, [ROOT, image.modules, *keep])
            self._start(machine or Machine(), image)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def exchange(self) -> Path:
        """The host's side of the folder that both see; inside it is EXCHANGE."""
        return self._exchange

    def run(
        self,
        command: Sequence[str],
        *,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
    ) -> int:
        """Run a command in the lab; returns its exit status (128 + N for signal N, as a shell says it).

        Output is passed on while it comes, to this process's own stdout and stderr unless given.
        Raises LabTimeoutError after `timeout` seconds, LabError if the machine goes away; both end the lab.
        """
        outputs = {"stdout": stdout or sys.stdout.buffer, "stderr": stderr or sys.stderr.buffer}
        job = self._job(command, directory or Path.cwd(), environment or {})
        self._send(f"run {job}")
        return self._wait_for(job, outputs, timeout)

    def shell(self, terminal: int) -> int:
        """Give the terminal a shell in the lab; returns its exit status. The caller has set the terminal to raw."""
        columns, lines = os.get_terminal_size(terminal)
        script = f"stty rows {lines} cols {columns} 2>/dev/null; exec bash -i"
        job = self._job(["/bin/sh", "-c", script], Path.cwd(), {})
        self._send(f"shell {job}")
        return self._wait_for(job, {}, None, terminal)

    def fetch(self, inside: str, target: Path) -> None:
        """Bring a file or folder of the lab to `target`, which must not be a folder yet. Raises LabError."""
        name = f"fetched-{self._jobs}"
        copy = ["cp", "-a", "--no-preserve=ownership", "--", inside, f"{EXCHANGE}/.lab/{name}"]
        with tempfile.TemporaryFile() as message:
            if self.run(copy, directory=Path("/"), timeout=600, stderr=message) != 0:
                message.seek(0)
                raise LabError(f"cannot bring {inside} back: {message.read().decode(errors='replace').strip()}")
        shutil.move(self._exchange / ".lab" / name, target)

    def close(self) -> None:
        """Switch off and remove the exchange folder. May be called again."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        for port in self._ports.values():
            port.close()
        self._ports = {}
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        shutil.rmtree(self._exchange, ignore_errors=True)

    _lock = -1

    def _write_orders(self, image: LabImage, keep: Sequence[Path]) -> None:
        orders = self._exchange / ".lab"
        orders.mkdir()
        hidden = sorted({str(path) for path in keep if any(path.is_relative_to(place) for place in _HIDDEN)})
        (orders / "keep").write_text("".join(f"{path}\n" for path in hidden))
        (orders / "modules").write_text(f"{image.modules}\n")

    def _start(self, machine: Machine, image: LabImage) -> None:
        far_ends: dict[str, socket.socket] = {}
        try:
            for name in ("control", "stdout", "stderr", "console", "monitor"):
                self._ports[name], far_ends[name] = socket.socketpair()
            descriptors = {name: end.fileno() for name, end in far_ends.items()}
            command = qemu_command(machine, image, self._exchange, descriptors)
            with (self._exchange / ".lab" / "qemu.log").open("wb") as log:
                # Its own session: Ctrl-C is for us, and we end it. --pdeathsig: it ends even if we are killed.
                self._qemu = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=list(descriptors.values()),
                    start_new_session=True,
                )
        except OSError as error:
            raise LabError(f"QEMU does not start: {error}. Run ./dev setup.") from error
        finally:
            for end in far_ends.values():
                end.close()

    def _wait_until_ready(self) -> None:
        try:
            self._await(b"ready", time.monotonic() + _BOOT_SECONDS)
        except LabTimeoutError as error:  # the machine's failure, not that of something it was to do
            where = self._diagnose()
            raise LabError(f"the lab did not come up within {_BOOT_SECONDS:g} s\n{where}") from error

    def _job(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> int:
        """Write a job's script; returns its number."""
        self._jobs += 1
        variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        variables.update(environment)
        variables.update({"CELLBLOCK_LAB": "1", "LAB_EXCHANGE": EXCHANGE, "PYTHONDONTWRITEBYTECODE": "1"})
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
        lines.append(f"cd {shlex.quote(str(directory))} || exit 127\n")
        lines.append(f"exec {shlex.join(command)}\n")
        folder = self._exchange / ".lab" / str(self._jobs)
        folder.mkdir()
        (folder / "script").write_text("".join(lines))
        return self._jobs

    def _send(self, order: str) -> None:
        try:
            self._ports["control"].sendall(order.encode() + b"\n")
        except OSError as error:
            raise self._gone() from error

    def _wait_for(self, job: int, outputs: Mapping[str, BinaryIO], timeout: float | None, terminal: int = -1) -> int:
        """Pass output on until the job ended; returns its status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            answer = self._await(b"exit %d " % job, deadline, outputs, terminal)
            self._pump(0.0, outputs, terminal)  # the agent answers after the output went out: it is all here
            return int(answer.split()[2])
        except LabTimeoutError as error:
            where = self._diagnose()
            self.close()
            text = f"the command did not end within {timeout:g} s; the lab was switched off"
            raise LabTimeoutError(f"{text}\n{where}") from error
        except BaseException:
            self.close()
            raise

    def _await(
        self, prefix: bytes, deadline: float | None, outputs: Mapping[str, BinaryIO] | None = None, terminal: int = -1
    ) -> bytes:
        """Return the next line of the agent that begins with `prefix`."""
        while True:
            while b"\n" in self._control:
                line, _, self._control = self._control.partition(b"\n")
                if line.startswith(prefix):
                    return line
            rest = 3600.0 if deadline is None else deadline - time.monotonic()
            if rest <= 0:
                raise LabTimeoutError("it takes too long")
            self._pump(rest, outputs or {}, terminal)

    def _pump(self, wait: float, outputs: Mapping[str, BinaryIO], terminal: int) -> None:
        """Move what is there, after waiting for something at most `wait` seconds; go on until nothing is left."""
        with selectors.DefaultSelector() as selector:
            for name, port in self._ports.items():
                if name == "control" or name in outputs or (name == "console" and terminal >= 0):
                    selector.register(port, selectors.EVENT_READ, name)
            if terminal >= 0:
                selector.register(terminal, selectors.EVENT_READ, "terminal")
            events = selector.select(wait)
            while events:
                for key, _ in events:
                    self._move(key.data, outputs, terminal)
                events = selector.select(0)

    def _move(self, name: str, outputs: Mapping[str, BinaryIO], terminal: int) -> None:
        if name == "terminal":
            self._ports["console"].sendall(os.read(terminal, _CHUNK))
            return
        data = self._ports[name].recv(_CHUNK)
        if not data:
            raise self._gone()
        if name == "control":
            self._control += data
        elif name == "console":
            os.write(terminal, data)
        else:
            outputs[name].write(data)
            outputs[name].flush()

    def _diagnose(self) -> str:
        """Return where the machine's processors are and what its kernel says of it; the machine ends by that."""
        qemu = self._qemu
        if qemu is None:
            return ""

        def wait(seconds: float) -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(seconds)

        where = Monitor(self._ports["monitor"]).diagnose(wait)
        return f"{where}\n{self._console_tail()}"

    def _gone(self) -> LabError:
        status = self._qemu.wait() if self._qemu is not None else None
        return LabError(f"the lab's machine went away (QEMU ended with status {status})\n{self._console_tail()}")

    def _console_tail(self) -> str:
        """Return the end of what QEMU and the machine's console said, from its kernel's panic on, for an error text."""
        lines: list[str] = []
        for name in ("qemu.log", "console.log"):
            try:
                lines += (self._exchange / ".lab" / name).read_text(errors="replace").splitlines()
            except OSError:
                continue
        first = max(0, len(lines) - _CONSOLE_TAIL_LINES)
        first = next((number for number, line in enumerate(lines[:first]) if "Kernel panic" in line), first)
        return "\n".join(f"    {line}" for line in lines[first:])


def remove_abandoned() -> None:
    """Remove exchange folders whose process was killed: nobody holds their lock."""
    for path in Path(tempfile.gettempdir()).glob("cellblock-lab-*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            old = time.time() - path.stat().st_mtime > 60  # a younger one may be about to be locked
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if old and path.stat().st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)
