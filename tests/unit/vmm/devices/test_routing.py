"""Device interrupts follow their vCPU: never in two VMs at once, one change after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from ipc.messages.records import Route
from vmm.devices.routing import InterruptRouter


class Target:
    """A worker that answers when it is told to; `assigned` is what its VM has."""

    def __init__(self, everyone: list[Target]) -> None:
        self.assigned: set[int] = set()
        self.pending: list[tuple[Sequence[Route], Callable[[], None]]] = []
        self.everyone = everyone
        everyone.append(self)

    def set_routes(self, routes, done):
        self.pending.append((routes, done))

    def answer(self):
        routes, done = self.pending.pop(0)
        for route in routes:
            if route.masked:
                self.assigned.discard(route.gsi)
            else:
                self.assigned.add(route.gsi)
                holders = [each for each in self.everyone if route.gsi in each.assigned]
                assert holders == [self], "an eventfd is the irqfd of two VMs"
        done()


def route(gsi: int, vcpu: int, *, masked: bool = False, logical: bool = False) -> Route:
    return Route(gsi, 0xFEE0_0000 | vcpu << 12 | (4 if logical else 0), 0x30 + gsi, masked)


def make(count: int) -> tuple[InterruptRouter, list[Target]]:
    targets: list[Target] = []
    for _ in range(count):
        Target(targets)
    return InterruptRouter(targets, lambda vcpu: vcpu if vcpu < count else -1, {}), targets


def settle(targets: list[Target], chance: random.Random) -> None:
    while busy := [each for each in targets if each.pending]:
        chance.choice(busy).answer()


def test_a_route_moves_with_its_destination(seed):
    chance = random.Random(seed)
    router, targets = make(3)
    done: list[int] = []
    for number, vcpu in enumerate((0, 2, 2, 1)):
        router.set_routes((route(4, vcpu),), partial(done.append, number))
        settle(targets, chance)
        assert [each.assigned for each in targets] == [{4} if index == vcpu else set() for index in range(3)]
    router.set_routes((route(4, 0, masked=True),), lambda: done.append(4))
    settle(targets, chance)
    assert not any(each.assigned for each in targets)
    assert done == [0, 1, 2, 3, 4]


def test_where_nobody_lives_it_goes_to_the_first_worker(seed):
    router, targets = make(2)
    for each in (route(4, 77), route(5, 1, logical=True)):
        router.set_routes((each,), lambda: None)
    settle(targets, random.Random(seed))
    assert targets[0].assigned == {4, 5}


def test_any_schedule_keeps_one_holder_and_the_last_word(seed):
    chance = random.Random(seed)
    for _ in range(200):
        router, targets = make(4)
        done: list[int] = []
        last: dict[int, Route] = {}
        for number in range(40):
            changes = [
                route(gsi, chance.randrange(4), masked=chance.random() < 0.2) for gsi in chance.sample(range(5), 2)
            ]
            last.update({each.gsi: each for each in changes})
            router.set_routes(changes, partial(done.append, number))
            for _ in range(chance.randrange(4)):
                if busy := [each for each in targets if each.pending]:
                    chance.choice(busy).answer()
        settle(targets, chance)
        assert done == list(range(40))
        for gsi, wanted in last.items():
            holders = [index for index, each in enumerate(targets) if gsi in each.assigned]
            assert holders == ([] if wanted.masked else [wanted.address >> 12 & 0xFF])
