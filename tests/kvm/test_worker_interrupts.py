"""A real worker process on /dev/kvm: timer, device interrupts by irqfd and MSI route, doorbells of the APIC."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ipc.messages.records import Route
from ipc.messages.vm import RoutesSet, SetRoutes
from tests.harness.run_options import Scale
from tests.harness.workers import DONE, FAILED, Controller

#: MSI to APIC id 0, fixed delivery.
MSI_ADDRESS = 0xFEE0_0000
VECTOR_A, VECTOR_B = 0x50, 0x51


class Deliveries:
    """The handlers of the guest report each interrupt: vector << 24 | how many of it so far."""

    def __init__(self) -> None:
        self.ready = False
        self.seen = {VECTOR_A: 0, VECTOR_B: 0}
        self.errors: list[int] = []

    def __call__(self, entry, string):
        if entry.address == DONE:
            self.ready = True
        elif entry.address == FAILED:
            self.errors.append(entry.data)
        else:
            vector, number = entry.data >> 24, entry.data & 0xFFFFFF
            self.seen[vector] += 1
            if number != self.seen[vector]:
                self.errors.append(entry.data)
        return 0

    def total(self, vector: int) -> int:
        return self.seen[vector]


def start(worker: Controller, device: Deliveries) -> None:
    worker.configure()
    worker.resume()
    worker.wait(lambda: device.ready)


def set_routes(worker: Controller, *routes: Route) -> None:
    assert worker.request(SetRoutes(routes), RoutesSet) == RoutesSet()


def expect(worker: Controller, device: Deliveries, vector: int, total: int) -> None:
    worker.wait(lambda: device.seen[vector] >= total)
    assert device.seen[vector] == total
    assert device.errors == []


def test_timer_interrupt_wakes_a_halted_vcpu(tmp_path: Path, scale: Scale):
    rounds = scale(20, 2_000)
    woken: list[int] = []
    done: list[int] = []

    def device(entry, string):
        (done if entry.address in (DONE, FAILED) else woken).append(entry.data)
        return 0

    with Controller(tmp_path, device, mode="ticks", number=rounds) as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: bool(done))
        assert (woken, done) == (list(range(1, rounds + 1)), [rounds])


def test_irqfd_and_msi_route_deliver(tmp_path: Path, scale: Scale):
    device = Deliveries()
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4, 5)) as worker:
        start(worker, device)
        set_routes(worker, Route(4, MSI_ADDRESS, VECTOR_A, False), Route(5, MSI_ADDRESS, VECTOR_B, False))
        for number in range(1, scale(50, 5_000) + 1):
            os.eventfd_write(worker.interrupts[4], 1)
            os.eventfd_write(worker.interrupts[5], 1)
            expect(worker, device, VECTOR_A, number)
            expect(worker, device, VECTOR_B, number)


def test_a_moved_route_leads_to_its_new_vector(tmp_path: Path):
    device = Deliveries()
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4,)) as worker:
        start(worker, device)
        for number in range(1, 20):
            for vector in (VECTOR_A, VECTOR_B):
                set_routes(worker, Route(4, MSI_ADDRESS, vector, False))
                os.eventfd_write(worker.interrupts[4], 1)
                expect(worker, device, vector, number)


def test_what_is_signalled_while_masked_is_delivered_when_unmasked(tmp_path: Path):
    device = Deliveries()
    route = Route(4, MSI_ADDRESS, VECTOR_A, False)
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4,)) as worker:
        start(worker, device)
        os.eventfd_write(worker.interrupts[4], 1)  # before there is any route
        set_routes(worker, route)
        expect(worker, device, VECTOR_A, 1)
        for total in range(2, 30):
            set_routes(worker, route._replace(masked=True))
            os.eventfd_write(worker.interrupts[4], 1)
            set_routes(worker, route._replace(masked=True))
            assert device.seen[VECTOR_A] == total - 1
            set_routes(worker, route)
            expect(worker, device, VECTOR_A, total)


def test_a_route_can_be_moved_while_it_fires(tmp_path: Path, scale: Scale, seed: int):
    """Every signal is delivered exactly once, to the old vector or to the new one."""
    choose = random.Random(seed)
    device = Deliveries()
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4,)) as worker:
        start(worker, device)
        set_routes(worker, Route(4, MSI_ADDRESS, VECTOR_A, False))
        for total in range(1, scale(100, 10_000) + 1):
            if choose.random() < 0.5:
                vector = choose.choice((VECTOR_A, VECTOR_B))
                request = worker.submit(SetRoutes((Route(4, MSI_ADDRESS, vector, choose.random() < 0.3),)))
                os.eventfd_write(worker.interrupts[4], 1)
                worker.collect(request)
                set_routes(worker, Route(4, MSI_ADDRESS, vector, False))
            else:
                os.eventfd_write(worker.interrupts[4], 1)
            worker.wait(lambda total=total: sum(device.seen.values()) >= total)  # type: ignore[misc]
            assert sum(device.seen.values()) == total
            assert device.errors == []


def test_interrupts_that_came_while_paused_are_delivered_after_resume(tmp_path: Path):
    device = Deliveries()
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4,)) as worker:
        start(worker, device)
        set_routes(worker, Route(4, MSI_ADDRESS, VECTOR_A, False))
        for total in range(1, 30):
            worker.pause()
            os.eventfd_write(worker.interrupts[4], 1)
            assert worker.serve() == 0
            worker.resume()
            expect(worker, device, VECTOR_A, total)


@pytest.mark.parametrize("gsi", [6, 4095])
def test_a_route_without_eventfd_is_refused_and_changes_nothing(tmp_path: Path, gsi: int):
    device = Deliveries()
    with Controller(tmp_path, device, mode="sleeper", interrupts=(4,)) as worker:
        start(worker, device)
        good = Route(4, MSI_ADDRESS, VECTOR_A, False)
        assert worker.refused(SetRoutes((good, good._replace(gsi=gsi)))).code == "worker.configuration"
        os.eventfd_write(worker.interrupts[4], 1)
        set_routes(worker, good)
        expect(worker, device, VECTOR_A, 1)
