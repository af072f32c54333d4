"""Bounds that are in force without a flag: what a cell takes of its own, what a worker makes the controller take."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

from ipc.bounds import MIB
from lab.client import ClientError
from tests.harness.jail import JailedMicrovm, id_of, is_alive, limits, microvm, status, wait_for
from tests.harness.run_options import Scale

#: Beside the guest's memory: what a cell has of its own, and maps.
_SHARED = 64 * MIB
_GUEST = 64 * MIB
_CONTROLLER = 67 * MIB
_FLOODED = 10 << 30


def test_every_cell_is_bounded(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        for name, pid in jailed.wait_cells("supervisor", "vmm", "vcpu 0").items():
            found = limits(pid)
            data, space = int(found["Max data size"][1]), int(found["Max address space"][1])
            # The supervisor's are those of the largest cell that it could be asked for: one with 31 devices.
            most = (256 if name == "supervisor" else 100) * MIB
            assert int(status(pid)["VmData"].split()[0]) << 10 < data < most, name
            if name != "supervisor":  # it has no guest
                assert space == data + _GUEST + _SHARED, name
            for limit in ("msgqueue size", "nice priority", "realtime priority"):
                assert found[f"Max {limit}"] == ["0", "0"], (name, limit)
            assert found["Max locked memory"] == [str(8 * MIB if name == "supervisor" else 0)] * 2, name
            assert found["Max stack size"] == [str(8 * MIB)] * 2, name


def test_a_machine_that_starts_anew_may_unpack_its_kernel_again(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot(reboot_action="Restart")
        soft, hard = map(int, limits(jailed.wait_cells("vmm")["vmm"])["Max data size"])
        assert hard - soft == 160 * MIB


@pytest.mark.parametrize("cell", ["vcpu", "vcpu-running", "vmm"])
@pytest.mark.parametrize(
    ("off", "outcome"), [("memory-limit", "succeeded (512 MiB)"), ("", "refused: Cannot allocate memory")]
)
def test_memory_of_its_own(base: Path, cell: str, off: str, outcome: str) -> None:
    options = ("--without", off) if off else ()
    with microvm(base, "--drill", f"{cell}:memory-bomb=512", *options) as jailed:
        jailed.boot()
        wait_for(lambda: outcome in jailed.output(), jailed.describe)


def _prepared(jailed: JailedMicrovm) -> JailedMicrovm:
    """Configure a guest; it is for the caller to start it."""
    jailed.add_guest("spin")
    jailed.start().wait_up()
    assert jailed.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}).status == 204
    assert jailed.api("PUT", "/boot-source", {"kernel_image_path": "/kernel"}).status == 204
    return jailed


def _ended(jailed: JailedMicrovm) -> bool:
    return jailed.process.poll() is not None


def test_a_worker_that_meets_its_limit_ends_the_microvm_with_its_cause(base: Path) -> None:
    with microvm(base, "--drill", "vcpu-running:exhaust=512") as jailed:
        _prepared(jailed).api("PUT", "/actions", {"action_type": "InstanceStart"})
        wait_for(lambda: re.search(r"Worker vcpu 0 .*, by its memory wall\.", jailed.output()), jailed.describe)
        assert re.search(r"vcpu 0 \(pid \d+\): wall memory: it has met its limit of memory", jailed.log())


def test_a_controller_that_meets_its_limit_says_so(base: Path) -> None:
    with microvm(base, "--drill", "vmm:exhaust=512") as jailed:
        assert jailed.run() == 1
        assert "The controller's limit of memory is reached (67 MiB)." in jailed.output()


# ---------------------------------------------------------------- what a worker sends


#: Who notices first depends on what asks for memory next, and on where a flood meets an answer of the worker: ZeroMQ's
#: thread, which gives up; the one that serves the API; the worker, which is cut off; the controller, which cannot send
#: to it, or gets a message that is none.
_TOLD = re.compile(
    r"wall memory: .*OUT OF MEMORY|limit of memory is reached|exited with status 1|broke the protocol: the peer"
)


def _controller(jailed: JailedMicrovm) -> int:
    """Wait for it; the pid file is made first, and written then."""

    def there() -> int | None:
        return jailed.cells().get("vmm") if jailed.pid_file.exists() and jailed.pid_file.read_text() else None

    return int(wait_for(there, jailed.describe))


def _flood(jailed: JailedMicrovm, other: JailedMicrovm) -> int:
    """Start a guest, whose worker floods the controller; it has to be told, and the machine ended.

    Look at the controller's memory meanwhile, and at the neighbour; return the most that it had.
    """
    controller = _controller(_prepared(jailed))
    largest = 0
    with suppress(OSError, ClientError):  # it may end before it answers
        jailed.api("PUT", "/actions", {"action_type": "InstanceStart"})

    def over() -> bool:
        nonlocal largest
        with suppress(FileNotFoundError, ProcessLookupError, KeyError):
            largest = max(largest, int(status(controller)["VmData"].split()[0]) << 10)
        assert other.api("GET", "/").status == 200
        return bool(_TOLD.search(jailed.describe()))

    wait_for(over, jailed.describe)
    wait_for(lambda: "vcpu 0" not in jailed.cells(), jailed.describe)
    assert is_alive(other.cells()["vcpu 0"])
    return largest


@pytest.mark.soak("flood")
@pytest.mark.parametrize(("part", "full"), [(0, 1), (1000, 1), (262144, _FLOODED // _CONTROLLER)])
def test_parts_without_end(base: Path, scale: Scale, part: int, full: int) -> None:
    """A million frames and more of nothing in one message; with large parts, 10 GiB in all."""
    with microvm(base, microvm_id=id_of(base, "other")) as other:
        other.boot()
        for number in range(scale(1, full)):
            name = id_of(base, f"flooded-{number}")
            with microvm(base, "--drill", f"vcpu-running:flood={part}", microvm_id=name) as jailed:
                assert _flood(jailed, other) <= _CONTROLLER + MIB


def test_without_the_limit_the_controller_takes_what_it_is_sent(base: Path) -> None:
    with microvm(base, "--drill", "flood=1000", "--without", "memory-limit") as jailed:
        jailed.start()
        pid = _controller(jailed)
        wait_for(lambda: int(status(pid)["VmData"].split()[0]) << 10 > 4 * _CONTROLLER, jailed.describe)


# ---------------------------------------------------------------- eventfds that a worker shares


@pytest.mark.parametrize("what", ["ring", "interrupts"])
def test_a_worker_without_its_filter_stops_the_controller_for_seconds_only(base: Path, what: str) -> None:
    """It makes eventfds blocking and full: the controller's next write to one waits until it is interrupted."""
    with microvm(base, "--drill", f"vcpu-running:block-events={what}", "--without", "seccomp") as jailed:
        _prepared(jailed)
        with suppress(OSError, ClientError):
            jailed.api("PUT", "/actions", {"action_type": "InstanceStart"})
            wait_for(lambda: f"drill block-events={what}: succeeded" in jailed.output(), jailed.describe)
            if what == "interrupts":
                assert jailed.api("GET", "/").status == 200
                jailed.api("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
        wait_for(lambda: _ended(jailed), jailed.describe)
        assert jailed.process.returncode == 1
        assert "a worker made an eventfd blocking that it shares, and filled it" in jailed.output()


@pytest.mark.parametrize("what", ["ring", "interrupts"])
def test_the_filter_keeps_shared_eventfds_as_they_are(base: Path, what: str) -> None:
    with microvm(base, "--drill", f"vcpu-running:block-events={what}") as jailed:
        _prepared(jailed)
        jailed.api("PUT", "/actions", {"action_type": "InstanceStart"})
        wait_for(lambda: re.search(r"vcpu 0 .*: wall seccomp: ", jailed.log()), jailed.describe)
