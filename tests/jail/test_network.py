"""The cells' network: one empty namespace for all of them, TAPs of the caller's through descriptors, attacks on it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ipc.drills.network import FRAME, FRAME_TYPE, MESSAGE
from ipc.launch_plan import MAX_DEVICES
from jailer import landlock, syscalls
from tests.harness.jail import (
    UID,
    JailedMicrovm,
    count_tun,
    id_of,
    microvm,
    namespace,
    wait_for,
)
from tests.harness.taps import listening, tap

ALL = ("supervisor", "vmm", "vcpu 0")


def _without(*walls: str) -> list[str]:
    return [word for wall in walls for word in ("--without", wall)]


def _outcome(jailed: JailedMicrovm, drill: str) -> str:
    """Return what the attacker reported."""
    pattern = re.compile(rf"^drill {re.escape(drill)}: (.*)$", re.MULTILINE)
    return str(wait_for(lambda: pattern.search(jailed.output()), lambda: f"the drill: {jailed.describe()}")[1])


# ---------------------------------------------------------------- the namespace


def test_all_cells_share_one_empty_network(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        own = {namespace(pid, "net") for pid in cells.values()}
        assert len(own) == 1
        assert namespace("self", "net") not in own
        interfaces = Path(f"/proc/{cells['vmm']}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        for name, record in jailed.wall_records().items():
            assert record["asked"]["namespaces"]["net"] == record["found"]["namespaces"]["net"] == "own", name


def test_without_the_wall_the_cells_are_in_the_callers_network(base: Path) -> None:
    with microvm(base, *_without("network-namespace")) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        assert {namespace(pid, "net") for pid in cells.values()} == {namespace("self", "net")}


# ---------------------------------------------------------------- TAPs


def test_the_controller_holds_tun_descriptors_until_the_guest_runs(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.start().wait_up()
        cells = jailed.wait_cells(*ALL)
        assert {name: count_tun(pid) for name, pid in cells.items()} == {
            "supervisor": 0,
            "vmm": MAX_DEVICES,
            "vcpu 0": 0,
        }
    with microvm(base, microvm_id=id_of(base, "running")) as jailed:
        jailed.boot()
        assert not any(map(count_tun, jailed.wait_cells(*ALL).values()))


@pytest.mark.parametrize(("limit", "count"), [(64, 0), (100, 9), (188, 31)])
def test_few_files_leave_fewer_tun_descriptors(base: Path, limit: int, count: int) -> None:
    with microvm(base, "--resource-limit", f"no-file={limit}") as jailed:
        jailed.start().wait_up()
        assert count_tun(jailed.wait_cells(*ALL)["vmm"]) == count


def test_a_sealed_controller_sends_a_frame_through_a_tap_of_the_callers_network(base: Path) -> None:
    with (
        tap(UID) as name,
        listening(name, FRAME_TYPE) as packets,
        microvm(base, "--drill", f"vmm:tap={name}") as jailed,
    ):
        jailed.start()
        assert _outcome(jailed, f"tap={name}") == f"succeeded (a frame to {name})"
        assert packets.recv(2048) == FRAME
        jailed.wait_up()


@pytest.fixture
def network(base: Path) -> Iterator[Path]:
    """Return the path of a new network namespace."""
    path = base / "netns"
    path.touch()
    subprocess.run(["unshare", f"--net={path}", "true"], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@contextmanager
def _inside(path: Path) -> Iterator[None]:
    """Be in a network namespace, with this thread and what it makes."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    inside = os.open(path, os.O_RDONLY)
    try:
        syscalls.setns(inside, syscalls.CLONE_NEWNET)
        yield
    finally:
        syscalls.setns(before, syscalls.CLONE_NEWNET)
        os.close(inside)
        os.close(before)


def test_taps_are_those_of_the_namespace_of_netns(base: Path, network: Path) -> None:
    with ExitStack() as stack:
        with _inside(network):
            name = stack.enter_context(tap(UID))
            packets = stack.enter_context(listening(name, FRAME_TYPE))
        options = ("--drill", f"vmm:tap={name}")
        jailed = stack.enter_context(microvm(base, *options, microvm_id=id_of(base, "out")))
        jailed.start()
        assert _outcome(jailed, f"tap={name}") == "refused: Operation not permitted (1)"  # there it would be a new one
        jailed = stack.enter_context(microvm(base, *options, "--netns", str(network), microvm_id=id_of(base, "in")))
        jailed.start()
        assert _outcome(jailed, f"tap={name}") == f"succeeded (a frame to {name})"
        assert packets.recv(2048) == FRAME


def test_netns_may_name_the_callers_own_namespace(base: Path) -> None:
    with microvm(base, "--netns", "/proc/self/ns/net") as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        assert namespace(cells["vmm"], "net") == namespace("self", "net")
        assert namespace(cells["vcpu 0"], "net") == namespace(cells["supervisor"], "net") != namespace("self", "net")


def test_a_tap_of_another_user_is_refused(base: Path) -> None:
    with tap(UID + 1) as name, microvm(base, "--drill", f"vmm:tap={name}") as jailed:
        jailed.start()
        assert _outcome(jailed, f"tap={name}") == "refused: Operation not permitted (1)"


def test_no_tap_can_be_made(base: Path) -> None:
    name = f"tap{secrets.token_hex(4)}"
    with microvm(base, "--drill", f"vmm:tap={name}") as jailed:
        jailed.start()
        assert _outcome(jailed, f"tap={name}") == "refused: Operation not permitted (1)"


@pytest.mark.parametrize("request_code", ["0x400454cb", "0x400454cc", "0x800454d2", "0x8906"])
def test_other_requests_of_tun_are_forbidden(base: Path, request_code: str) -> None:
    """TUNSETPERSIST, TUNSETOWNER, TUNGETIFF, SIOCGSTAMP: what no network device asks for."""
    with microvm(base, "--drill", f"vmm:tun-ioctl={request_code}") as jailed:
        assert jailed.run() == 148


# ---------------------------------------------------------------- attacks

#: Attacks of the controller on names of the host; the walls that stop each, by itself: what the attacker sees.
ATTACKS: dict[str, dict[str, str | None]] = {
    "abstract-connect": {"network-namespace": "refused: Connection refused (111)", "seccomp": None},
    "abstract-send": {"network-namespace": "refused: Connection refused (111)"},
    "abstract-send-message": {"network-namespace": "refused: Connection refused (111)"},
    "tcp": {"network-namespace": "refused: Network is unreachable (101)", "seccomp": None},
}
if landlock.abi() >= 4:
    ATTACKS["tcp"]["landlock"] = "refused: Permission denied (13)"
if landlock.abi() >= landlock.SCOPE_ABI:
    for _attack in ("abstract-connect", "abstract-send", "abstract-send-message"):
        ATTACKS[_attack]["landlock"] = "refused: Operation not permitted (1)"
#: What stands between a controller and the host's names.
ALL_WALLS = ("network-namespace", "seccomp", "landlock")
CASES = [(attack, wall) for attack, walls in ATTACKS.items() for wall in walls]


@contextmanager
def _service(attack: str) -> Iterator[tuple[str, socket.socket]]:
    """Something of the host that waits for the attack; return what the drill is aimed at."""
    family = socket.AF_INET if attack == "tcp" else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_DGRAM if "send" in attack else socket.SOCK_STREAM) as service:
        service.bind(("127.0.0.1", 0) if attack == "tcp" else f"\0drill-{secrets.token_hex(8)}")
        if "send" not in attack:
            service.listen()
        service.settimeout(30)
        name = service.getsockname()
        yield str(name[1]) if attack == "tcp" else name[1:].decode(), service


def _received(attack: str, service: socket.socket) -> tuple[bytes, int]:
    """Return what came, and how many descriptors with it."""
    if "send" in attack:
        return service.recv(100), 0
    with service.accept()[0] as connection:
        message, ancillary, _, _ = connection.recvmsg(100, socket.CMSG_SPACE(16))
        for _level, _kind, data in ancillary:
            for each in memoryview(data).cast("i").tolist():
                os.close(each)
        return message, len(ancillary)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_succeeds_without_its_walls(base: Path, attack: str) -> None:
    with _service(attack) as (name, service):
        drill = f"{attack}={name}"
        with microvm(base, "--drill", f"vmm:{drill}", *_without(*ALL_WALLS)) as jailed:
            jailed.start()
            assert _outcome(jailed, drill).startswith("succeeded")
            assert _received(attack, service) == (MESSAGE, int(attack == "abstract-connect"))


@pytest.mark.parametrize(("attack", "wall"), CASES)
def test_each_wall_alone_stops_the_attack(base: Path, attack: str, wall: str) -> None:
    with _service(attack) as (name, _service_socket):
        drill = f"{attack}={name}"
        with microvm(
            base, "--drill", f"vmm:{drill}", *_without(*(each for each in ALL_WALLS if each != wall))
        ) as jailed:
            expected = ATTACKS[attack][wall]
            if expected is None:
                assert jailed.run() == 148
                assert f"drill {drill}: " not in jailed.output()
            else:
                jailed.start()
                assert _outcome(jailed, drill) == expected


@pytest.mark.parametrize(("off", "reached"), [((), False), (("network-namespace",), True)])
def test_a_name_that_a_controller_takes_is_not_the_hosts(base: Path, off: tuple[str, ...], reached: bool) -> None:
    name = f"drill-{secrets.token_hex(8)}"
    with microvm(base, "--drill", f"vmm:abstract-bind={name}", *_without(*off)) as jailed:
        jailed.start()
        assert _outcome(jailed, f"abstract-bind={name}").startswith("succeeded")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            result = client.connect_ex(f"\0{name}")
        assert (result == 0) is reached
