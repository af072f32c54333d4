"""What every virtio device keeps to: its life in two verbs, its state, and what becomes of a hostile driver."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devtool.project import ROOT
from tests.harness.records import values_of
from tests.harness.virtio_devices import Bench
from tests.harness.virtio_makers import MAKERS
from tests.harness.virtqueues import guest_memory
from virtio.abi import VIRTIO_F_VERSION_1
from virtio.device import Activation, VirtioDevice
from virtio.vhost_user.block import VhostUserBlock

DEVICES = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture
def made(name):
    with ExitStack() as stack:
        device = stack.enter_context(MAKERS[name]())
        bench = Bench(device, stack.enter_context(guest_memory()))
        yield bench
        bench.close()


def subclasses(base: type[Any]) -> set[type[Any]]:
    return {found for each in base.__subclasses__() for found in (each, *subclasses(each))}


def test_no_device_is_left_out():
    for path in sorted((ROOT / "virtio").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    made = set()
    for maker in MAKERS.values():
        with maker() as device:
            made.add(type(device))
            device.close()
    ours = {found for found in subclasses(VirtioDevice) if found.__module__.startswith("virtio.")}
    # Whose queues another program serves: it sees no request, and has no state (tests/unit/virtio/vhost_user/).
    assert made == ours - {VhostUserBlock}


@DEVICES
def test_it_says_what_it_is(name, made):
    device = made.device
    assert device.kind > 0
    assert device.features() & VIRTIO_F_VERSION_1
    assert all(0 < size <= 256 and size & size - 1 == 0 for size in device.queue_sizes)
    config = device.config()
    for offset in (0, 1, len(config), 1 << 20):
        device.write_config(offset, b"\xff" * 8)
    assert device.config() == config


@DEVICES
def test_stop_is_harmless_twice_and_before_the_first_activation(name, made):
    made.stop()
    made.stop()
    made.activate()
    made.stop()
    made.stop()
    made.device.reset()
    made.device.notified(0)  # late, and not listened to
    assert not made.notify.resets


@DEVICES
def test_it_goes_on_after_a_stop(name, made):
    made.activate()
    for _ in range(3):
        made.restart()
    made.stop()
    made.device.reset()
    made.activate()
    assert not made.notify.resets
    assert made.notify.used_count == 0


@DEVICES
def test_queues_that_the_driver_does_not_use_are_none(name, made):
    queues = tuple(None for _ in made.queues)
    made.device.activate(Activation(made.memory, queues, made.features, made.notify))


@DEVICES
def test_saving_changes_nothing_and_leads_back(name, made):
    made.activate()
    made.stop()
    state = made.device.save()
    assert without_clock(made.device.save()) == without_clock(state)
    assert made.device.SECTION.fields.check(state, name) == state
    assert len(made.device.instance) <= 64
    with MAKERS[name](state=state) as again:
        assert without_clock(again.save()) == without_clock(state)
        again.close()


def without_clock(state: Any) -> Any:
    """Return a state without its times: between two savings they go on."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        names = [field for field in state._fields if field != "elapsed_ns"]
        return tuple(without_clock(getattr(state, field)) for field in names)
    return state


@DEVICES
@settings(max_examples=50)
@given(data=st.data())
def test_a_device_that_is_made_from_any_state_saves_that_state(name, data):
    with MAKERS[name]() as device:
        section = device.SECTION
        device.close()
    state = data.draw(values_of(section.fields))
    with MAKERS[name](state=state) as again:
        assert without_clock(again.save()) == without_clock(state)
        again.close()


@DEVICES
def test_sections_are_described(name, made):
    page = (ROOT / "docs" / "formats" / "virtio-state.md").read_text()
    section = made.device.SECTION
    row = page.partition(f"| `{section.name}` | {section.version} |")[2].partition("\n")[0]
    assert row
    assert all(field in row for field, _ in section.fields.fields)


@DEVICES
def test_a_ring_that_breaks_the_rules_needs_a_reset_and_nothing_else(name, made):
    made.activate()
    made.driver.available[1] = 0x4000
    for _ in range(3):
        made.device.notified(0)
    assert len(made.notify.resets) == 1
    made.driver.available[1] = 0
    made.device.notified(0)
    made.stop()
    made.device.reset()
    made.activate()
    assert len(made.notify.resets) == 1
