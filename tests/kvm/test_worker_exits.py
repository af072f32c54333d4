"""A real worker process on /dev/kvm: every kind of exit, answered locally, posted and synchronously."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipc.messages.worker import Ping, Pong
from tests.harness.run_options import Scale
from tests.harness.workers import ChecksCounts, Controller
from vcpu_worker import reporting

#: Exits of one round of the guest's `exits` mode, by counter (see worker.S). KVM cuts string I/O as it likes.
PER_ROUND = {
    "mmio_read": 1 + 4 + 2,
    "mmio_write": 1 + 9,
    "local": 3 + 2,
    "posted": 4 + 5,
}
NO_DEVICE_PER_ROUND = 2 + 2


def test_every_exit_kind_in_order_without_gap_or_repeat(tmp_path: Path, scale: Scale):
    rounds = scale(25, 2_000)
    device = ChecksCounts()
    with Controller(tmp_path, device, mode="exits", number=rounds) as worker:
        assert worker.configure().tsc_khz > 0
        worker.resume()
        worker.wait(lambda: bool(device.done or device.failures or worker.events))
        assert (device.failures, device.errors, worker.events) == ([], [], [])
        assert device.count == 16 * rounds
        assert device.done == [device.count]
        worker.pause()
        counters = worker.counters()
        expected = {name: value * rounds for name, value in PER_ROUND.items()}
        assert {name: counters[name] for name in expected} == expected
        assert counters["synchronous"] + counters["posted"] == worker.entries
        strings_to_nobody = counters["no_device"] - NO_DEVICE_PER_ROUND * rounds
        assert 2 * rounds <= strings_to_nobody <= 2 * 16 * rounds
        strings = len(device.strings) + strings_to_nobody
        assert counters["io_in"] + counters["io_out"] == (8 + 7) * rounds + strings + 1  # and DONE
        kinds = counters["io_in"] + counters["io_out"] + counters["mmio_read"] + counters["mmio_write"]
        assert counters["exits"] == kinds
        assert worker.finish() == 0


def test_accesses_across_pages_arrive_in_pieces_of_legal_size(tmp_path: Path):
    pieces: list[tuple[int, int, int]] = []

    def device(entry, string):
        pieces.append((entry.address, entry.size, entry.data))
        return (1 << 64) - 1

    with Controller(tmp_path, device, mode="crossing") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: bool(pieces and pieces[-1][0] in (0x6F0, 0x6F4)))
        assert pieces == [
            (0x2000_0FFD, 2, 0x7788),
            (0x2000_0FFF, 1, 0x66),
            (0x2000_1000, 4, 0x2233_4455),
            (0x2000_1004, 1, 0x11),
            (0x2000_2FFA, 4, 0),
            (0x2000_2FFE, 2, 0),
            (0x6F4, 4, 0),
        ]


@pytest.mark.parametrize(
    ("mode", "reasons"),
    [
        ("triple_fault", {reporting.REASON_SHUTDOWN}),
        ("run_device_memory", {reporting.REASON_INTERNAL_ERROR, reporting.REASON_SHUTDOWN}),
    ],
)
def test_final_exits_are_reported_with_cause(tmp_path: Path, mode: str, reasons: set[str]):
    with Controller(tmp_path, ChecksCounts(), mode=mode) as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: bool(worker.events))
        (event,) = worker.events
        assert event.reason in reasons
        assert (event.vcpu, event.code) == (0, 1)
        assert "at rip 0x" in event.text
        # The worker lives on: it can be asked, but its vCPU cannot run any more.
        assert worker.request(Ping(), Pong)
        worker.pause()
        assert worker.finish() == 0
