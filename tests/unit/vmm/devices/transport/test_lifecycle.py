"""Activation, reset and failure of a device as its transport carries them out, at once and later."""

from __future__ import annotations

import pytest

from base.deferral import Deferral
from tests.harness.virtio_transport import DEVICE_STATUS, TestDevice, attached
from virtio.errors import RequestError

NEEDS_RESET, FAILED = 64, 128


def test_a_device_is_activated_with_its_queues_and_reset():
    with attached(TestDevice(2)) as made:
        assert made.start() is None
        activation = made.device.activation
        assert activation is not None
        assert [queue.size for queue in activation.queues] == [8, 8]
        assert activation.features == 1 << 32
        made.transport.notified(1)
        assert made.device.served == [1]
        assert made.write(DEVICE_STATUS, 0) is None
        assert made.device.calls[-2:] == ["stop", "reset"]
        assert made.read(DEVICE_STATUS) == made.read(0x60) == made.read(0x44) == 0
        made.transport.notified(0)
        assert made.device.served == [1]
        made.start()
        assert made.device.calls.count("activate") == 2


def test_a_queue_that_was_not_made_ready_is_none():
    with attached(TestDevice(2)) as made:
        made.negotiate()
        made.set_queue(1)
        made.write(DEVICE_STATUS, 15)
        first, second = made.device.activation.queues
        assert first is None
        assert second is not None


@pytest.mark.parametrize(("register", "value"), [(0x38, 3), (0x38, 512), (0x80, 8), (0xA4, 0xFFFF_FFFF)])
def test_a_queue_that_cannot_be_needs_a_reset(register, value):
    with attached() as made:
        made.negotiate()
        made.set_queue()
        made.write(register, value)
        made.write(DEVICE_STATUS, 15)
        assert made.read(DEVICE_STATUS) == 15 | NEEDS_RESET
        assert made.read(0x60) == 3
        assert made.edges() >= 1
        assert "activate" not in made.device.calls
        assert len(made.log) == 1
        made.start()
        assert made.read(DEVICE_STATUS) == 15


def test_whoever_writes_meanwhile_waits_in_order():
    with attached() as made:
        activated = made.device.later["activate"] = Deferral()
        stopped = made.device.later["stop"] = Deferral()
        first = made.start()
        second = made.write(DEVICE_STATUS, 0)
        third = made.write(DEVICE_STATUS, 1)
        assert first is not None and second is not None and third is not None
        activated.complete()
        assert (first.done, second.done, third.done) == (True, False, False)
        assert made.read(DEVICE_STATUS) == 15
        assert made.device.calls[-1] == "stop"
        stopped.complete()
        assert (second.done, third.done) == (True, True)
        assert made.read(DEVICE_STATUS) == 1


@pytest.mark.parametrize("error", [RequestError("no request"), RuntimeError("a fault")])
@pytest.mark.parametrize("call", ["activate", "serve", "write_config"])
def test_an_error_in_a_device_ends_there(call, error):
    with attached(TestDevice(1, bytes(8))) as made:
        made.device.fails[call] = error
        made.start()
        made.write(0x100, 1)
        made.transport.notified(0)
        assert made.read(DEVICE_STATUS) == 15 | NEEDS_RESET
        assert made.transport.needs_reset_count == 1
        told = [text for text in made.log if "needs a reset" in text]
        assert len(told) == 1
        of_type = [text for text in made.log if "RuntimeError: a fault" in text and "virtio_transport.py:" in text]
        assert len(of_type) == (0 if isinstance(error, RequestError) else 1)
        made.device.fails.clear()
        made.start()
        assert made.read(DEVICE_STATUS) == 15


@pytest.mark.parametrize("call", ["stop", "reset"])
def test_a_device_that_cannot_be_reset_is_not_said_to_be(call):
    with attached() as made:
        made.start()
        made.device.fails[call] = RuntimeError("a fault")
        assert made.write(DEVICE_STATUS, 0) is None
        assert made.read(DEVICE_STATUS) == 15 | NEEDS_RESET | FAILED


def test_a_change_before_there_was_a_driver_interrupts_it_then():
    with attached(TestDevice(1, bytes(8))) as made:
        made.negotiate()
        made.transport.config_changed()
        assert made.edges() == 0
        made.set_queue()
        made.write(DEVICE_STATUS, 15)
        assert made.edges() == 1
        assert made.read(0x60) == 3


def test_pause_and_resume_keep_the_queues():
    with attached() as made:
        assert made.transport.resume() is None  # there is nothing to go on with
        made.start()
        queues = made.device.activation.queues
        made.transport.pause()
        assert made.device.calls[-1] == "stop"
        made.transport.pause()
        made.transport.resume()
        made.transport.resume()
        assert made.device.activation.queues is queues
        assert made.device.calls.count("activate") == 2
