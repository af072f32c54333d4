"""Attacks from inside a cell, after its seal: each succeeds without its walls and is stopped by each wall alone.

The drills are in ipc/drills/; what each comes to in every cell is in test_attack_table.py. A worker is forked right at
the start of the controller, so no guest is needed.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from jailer import landlock
from lab.client import Reply
from tests.harness.jail import GID, UID, JailedMicrovm, id_of, microvm, wait_for

#: attack → the walls that stop it, each by itself: (wall, what the attacker sees; None: the cell is ended).
ATTACKS: dict[str, dict[str, str | None]] = {
    "execve": {"seccomp": None},
    "open": {"seccomp": "refused: Permission denied (13)"},
    "fork": {"seccomp": None, "process-limit": "refused: Resource temporarily unavailable (11)"},
    "socket": {"seccomp": None},
    "executable-mapping": {"seccomp": None},
    "ioctl": {"seccomp": None},
    "ptrace": {
        "seccomp": None,
        "dumpable": "refused: Operation not permitted (1)",
        "cell-identity": "refused: Operation not permitted (1)",
    },
    "blocking": {"seccomp": None},
    "file-status": {"seccomp": None},
}
if landlock.abi():
    ATTACKS["open"]["landlock"] = "refused: Permission denied (13)"
    ATTACKS["ptrace"]["landlock"] = "refused: Operation not permitted (1)"
CASES = [(attack, wall) for attack, walls in ATTACKS.items() for wall in walls]
#: System calls as the report names them.
CALLS = {
    "execve": "memfd_create",
    "fork": "clone",
    "socket": "socket",
    "executable-mapping": "mmap",
    "ioctl": "ioctl",
    "ptrace": "ptrace",
    "blocking": "ioctl",
    "file-status": "fcntl",
}


def _without(*walls: str) -> list[str]:
    return [word for wall in walls for word in ("--without", wall)]


def _outcome(jailed: JailedMicrovm, attack: str) -> str:
    """Return what the attacker reported."""
    pattern = re.compile(rf"^drill {attack}: (.*)$", re.MULTILINE)
    match = wait_for(lambda: pattern.search(jailed.output()), lambda: f"the drill: {jailed.describe()}")
    return str(match[1])


def _ended_by_seccomp(jailed: JailedMicrovm, cell: str) -> str:
    """Return the report's line on the end of a cell."""
    pattern = re.compile(rf"^.*{cell} \(pid \d+\): wall seccomp: .*$", re.MULTILINE)
    match = wait_for(lambda: pattern.search(jailed.log()), lambda: f"the report: {jailed.describe()}")
    return str(match[0])


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_succeeds_without_its_walls(base: Path, attack: str) -> None:
    # A program that took the cell's place is dumpable: whoever still reads the cell's walls then ends it.
    read_back = _without("verify") if attack == "execve" else []
    with microvm(base, "--drill", attack, *_without(*ATTACKS[attack]), *read_back) as jailed:
        jailed.start()
        assert _outcome(jailed, attack).startswith("succeeded")
        assert "switched off: " in jailed.log()


@pytest.mark.parametrize(("attack", "wall"), CASES)
def test_each_wall_alone_stops_the_attack(base: Path, attack: str, wall: str) -> None:
    others = [each for each in ATTACKS[attack] if each != wall]
    with microvm(base, "--drill", attack, *_without(*others)) as jailed:
        jailed.start()
        expected = ATTACKS[attack][wall]
        if expected is not None:
            assert _outcome(jailed, attack) == expected
        else:
            line = _ended_by_seccomp(jailed, "vcpu 0")
            assert "ended by the filter for a forbidden system call" in line
            assert f"drill {attack}: succeeded" not in jailed.output()


@pytest.mark.parametrize("attack", CALLS)
def test_report_mode_names_the_system_call(base: Path, attack: str) -> None:
    with microvm(base, "--drill", attack, "--seccomp-mode", "report") as jailed:
        jailed.start()
        line = _ended_by_seccomp(jailed, "vcpu 0")
        assert re.search(rf"wall seccomp: forbidden system call {CALLS[attack]}\d?\(", line), line
        assert f"drill {attack}: succeeded" not in jailed.output()


def _start(jailed: JailedMicrovm) -> Reply:
    """Start a tiny guest; return the answer to InstanceStart."""
    jailed.add_guest("spin")
    jailed.start().wait_up()
    jailed.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    jailed.api("PUT", "/boot-source", {"kernel_image_path": "/kernel", "boot_args": "0"})
    return jailed.api("PUT", "/actions", {"action_type": "InstanceStart"})


@pytest.mark.parametrize("attack", [*(each for each in ATTACKS if each != "open"), "kick=supervisor", "kick=1"])
def test_a_worker_that_is_configured_cannot_either(base: Path, attack: str) -> None:
    with microvm(base, "--drill", f"vcpu-running:{attack}") as jailed:
        assert "was ended by its seccomp wall" in _start(jailed).body["fault_message"]
        _ended_by_seccomp(jailed, "vcpu 0")
        assert f"drill {attack}: succeeded" not in jailed.output()


def test_a_worker_that_is_configured_can_without_its_filter(base: Path) -> None:
    with microvm(base, "--drill", "vcpu-running:socket", *_without("seccomp")) as jailed:
        assert _start(jailed).status == 204
        assert _outcome(jailed, "socket").startswith("succeeded")


def test_report_mode_names_what_a_configured_worker_has_called(base: Path) -> None:
    with microvm(base, "--drill", "vcpu-running:ptrace", "--seccomp-mode", "report") as jailed:
        assert _start(jailed).status == 400
        assert "forbidden system call ptrace(" in _ended_by_seccomp(jailed, "vcpu 0")


def test_root_wall_empties_the_file_system(base: Path) -> None:
    with microvm(base, "--drill", "open", *_without("seccomp", "landlock")) as jailed:
        jailed.start()
        assert _outcome(jailed, "open") == "succeeded (/ with ['ipc'])"
    arguments = ("--api-sock", "api.socket")  # relative: without the wall, the host's /run is the cell's
    options = ("--drill", "open", *_without("seccomp", "landlock", "root"))
    with microvm(base, *options, microvm_id=id_of(base, "open"), arguments=arguments) as jailed:
        jailed.start()
        assert _outcome(jailed, "open") == "succeeded (/etc/passwd)"


@pytest.mark.parametrize("attack", ["execve", "fork", "executable-mapping", "ptrace"])
def test_the_controller_cannot_either(base: Path, attack: str) -> None:
    with microvm(base, "--drill", f"vmm:{attack}") as jailed:
        assert jailed.run() == 148
        _ended_by_seccomp(jailed, "vmm")
        assert jailed.log().splitlines()[-1].endswith("Firecracker exiting with error. exit_code=148")
    options = ("--drill", f"vmm:{attack}", "--seccomp-mode", "report")
    with microvm(base, *options, microvm_id=id_of(base, "report")) as jailed:
        assert jailed.run() == 148
        assert "forbidden system call" in _ended_by_seccomp(jailed, "vmm")


def test_the_controller_sees_only_its_jail_root(base: Path) -> None:
    with microvm(base, "--drill", "vmm:open") as jailed:
        jailed.start()
        assert _outcome(jailed, "open") == "succeeded (/ with ['dev', 'firecracker', 'firecracker.pid', 'run'])"


def test_unknown_drill(base: Path) -> None:
    with microvm(base, "--drill", "nonsense") as jailed:
        assert jailed.run() == 1
        assert jailed.output().startswith("--drill nonsense: a drill is one of execve, ")


# ---------------------------------------------------------------- signals to other processes

#: The drills that send a signal: the one that a worker's own kick is, and the one that nobody survives.
SIGNALS = {"kick": 34, "kill": int(signal.SIGKILL)}


def _logged(jailed: JailedMicrovm, line: str) -> bool:
    return line in jailed.log()


@contextmanager
def _bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the cells' uid that has nothing to do with them."""
    with subprocess.Popen(["sleep", "1000"], user=UID, group=GID, extra_groups=[], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _ended_for_tgkill(jailed: JailedMicrovm, name: str) -> None:
    line = _ended_by_seccomp(jailed, "vcpu 0")
    assert "ended by the filter for a forbidden system call" in line
    assert f"drill {name}: " not in jailed.output()


#: The walls that stop a signal to a process outside the microVM, and what the attacker sees (None: it is ended).
SIGNAL_WALLS: dict[str, str | None] = {
    "seccomp": None,
    "pid-namespace": "refused: No such process (3)",
    "landlock": "refused: Operation not permitted (1)",
    "cell-identity": "refused: Operation not permitted (1)",
}


@pytest.mark.parametrize("attack", SIGNALS)
def test_a_worker_signals_any_process_of_its_user_without_its_walls(base: Path, attack: str) -> None:
    with _bystander() as bystander:
        name = f"{attack}={bystander.pid}"
        with microvm(base, "--drill", name, *_without(*SIGNAL_WALLS)) as jailed:
            jailed.start()
            assert _outcome(jailed, name) == f"succeeded (signal {SIGNALS[attack]} to process {bystander.pid})"
            assert bystander.wait(30) == -SIGNALS[attack]


@pytest.mark.parametrize("attack", SIGNALS)
def test_a_worker_signals_another_microvm_without_its_walls(base: Path, attack: str) -> None:
    """The other one has no pid namespace either: its controller would survive what ends a process by default."""
    for victim in ("vmm", "vcpu 0"):
        name = victim.replace(" ", "-")
        options = _without("pid-namespace", "cell-identity")
        with microvm(base, *options, microvm_id=id_of(base, f"{name}-other")) as other:
            cells = other.start().wait_up().wait_cells("vmm", "vcpu 0")
            drill = ("--drill", f"{attack}={cells[victim]}", *_without(*SIGNAL_WALLS))
            with microvm(base, *drill, microvm_id=id_of(base, f"{name}-attacker")) as jailed:
                jailed.start()
                # A worker that gets the kick goes on: it is its own signal.
                if (attack, victim) == ("kick", "vcpu 0"):
                    assert _outcome(jailed, f"{attack}={cells[victim]}").startswith("succeeded")
                else:
                    line = f"{victim} (pid {cells[victim]}) was ended by signal {SIGNALS[attack]} "
                    wait_for(partial(_logged, other, line), other.describe)


@pytest.mark.parametrize("attack", SIGNALS)
def test_a_worker_signals_its_own_microvm_without_its_walls(base: Path, attack: str) -> None:
    number = SIGNALS[attack]
    options = ("--drill", f"{attack}=controller", *_without(*SIGNAL_WALLS))
    with microvm(base, *options, microvm_id=id_of(base, "controller")) as jailed:
        jailed.start()
        wait_for(lambda: re.search(rf"vmm .*was ended by signal {number} ", jailed.log()), jailed.describe)
    options = ("--drill", f"{attack}=supervisor", *_without(*SIGNAL_WALLS))
    with microvm(base, *options, microvm_id=id_of(base, "supervisor")) as jailed:
        assert jailed.start().process.wait(30) == -number  # the client's process is the supervisor


@pytest.mark.parametrize("attack", SIGNALS)
@pytest.mark.parametrize("options", [(), ("--new-pid-ns",)], ids=["", "new-pid-ns"])
def test_the_pid_namespace_alone_stops_signals_to_everything_outside(
    base: Path, attack: str, options: tuple[str, ...]
) -> None:
    with _bystander() as bystander, microvm(base, microvm_id=id_of(base, "other")) as other:
        cells = other.start().wait_up().wait_cells("vmm", "vcpu 0")
        others = [wall for wall in SIGNAL_WALLS if wall != "pid-namespace"]
        targets = [str(bystander.pid), *map(str, cells.values()), "supervisor"]
        if options:  # whose number is 1: in the cells' namespace that is the controller
            targets.remove("supervisor")
        for index, target in enumerate(targets):
            name = f"{attack}={target}"
            drill = ("--drill", name, *options, *_without(*others))
            with microvm(base, *drill, microvm_id=id_of(base, f"attacker-{index}")) as jailed:
                jailed.start()
                assert _outcome(jailed, name) == SIGNAL_WALLS["pid-namespace"]
                jailed.wait_up()
        # Process 1 of its namespace ignores what comes from inside and would end it.
        name = f"{attack}=controller"
        drill = ("--drill", name, *options, *_without(*others))
        with microvm(base, *drill, microvm_id=id_of(base, "own")) as jailed:
            jailed.start()
            assert _outcome(jailed, name).startswith("succeeded")
            jailed.wait_up()
        assert bystander.poll() is None
        assert other.api("GET", "/").status == 200


@pytest.mark.parametrize("attack", SIGNALS)
def test_its_user_alone_stops_a_workers_signals_to_every_other_process(base: Path, attack: str) -> None:
    """Also to workers of another microVM of the same --uid, each of whom is another user."""
    off = _without(*(wall for wall in SIGNAL_WALLS if wall != "cell-identity"), "dumpable")
    with _bystander() as bystander, microvm(base, *off, microvm_id=id_of(base, "other")) as other:
        cells = other.start().wait_up().wait_cells("vmm", "vcpu 0")
        targets = (str(bystander.pid), *map(str, cells.values()), "controller", "supervisor")
        for index, target in enumerate(targets):
            name = f"{attack}={target}"
            with microvm(base, "--drill", name, *off, microvm_id=id_of(base, f"attacker-{index}")) as jailed:
                jailed.start()
                assert _outcome(jailed, name) == SIGNAL_WALLS["cell-identity"]
                jailed.wait_up()
        assert bystander.poll() is None
        assert other.api("GET", "/").status == 200


@pytest.mark.parametrize("attack", SIGNALS)
def test_the_filter_stops_signals_to_others(base: Path, attack: str) -> None:
    with _bystander() as bystander, microvm(base, microvm_id=id_of(base, "other")) as other:
        other.start().wait_up()
        targets = (str(bystander.pid), str(other.cells()["vmm"]), "controller", "supervisor", "1")
        for index, target in enumerate(targets):
            name = f"{attack}={target}"
            with microvm(base, "--drill", name, microvm_id=id_of(base, f"attacker-{index}")) as jailed:
                jailed.start()
                _ended_for_tgkill(jailed, name)
                jailed.wait_up()
                assert jailed.process.poll() is None  # the supervisor
        assert bystander.poll() is None
        assert other.api("GET", "/").status == 200


@pytest.mark.parametrize("options", [(), ("--new-pid-ns",)], ids=["host", "new-pid-ns"])
def test_a_worker_may_kick_its_own_threads_and_only_kick(base: Path, options: tuple[str, ...]) -> None:
    with microvm(base, "--drill", "kick=self", *options, microvm_id=id_of(base, "kick")) as jailed:
        jailed.start()
        assert _outcome(jailed, "kick=self").startswith("succeeded (signal 34 to process ")
        jailed.wait_up()
    with microvm(base, "--drill", "kill=self", *options, microvm_id=id_of(base, "kill")) as jailed:
        jailed.start()
        _ended_for_tgkill(jailed, "kill=self")


@pytest.mark.parametrize("attack", SIGNALS)
def test_a_controller_signals_nobody(base: Path, attack: str) -> None:
    with _bystander() as bystander:
        for index, target in enumerate((str(bystander.pid), "supervisor", "self")):
            with microvm(base, "--drill", f"vmm:{attack}={target}", microvm_id=id_of(base, str(index))) as jailed:
                assert jailed.run() == 148
                _ended_by_seccomp(jailed, "vmm")
        assert bystander.poll() is None
