"""The console's input waits for the UART; terminals are left as they were found."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import time

import pytest

from base.event_manager import EventManager
from tests.harness.devices import CountingLine
from tests.harness.event_loop import is_idle, run_until
from vmm.devices.legacy import console
from vmm.devices.legacy.console import ConsoleInput
from vmm.devices.legacy.serial import (
    FCR_CLEAR_RECEIVE,
    FCR_ENABLE,
    IIR_FCR,
    MCR,
    MCR_LOOP,
    RBR_THR,
    RECEIVE_FIFO_SIZE,
    Serial,
)


def take(serial: Serial) -> bytes:
    """Read what the UART has, as the guest."""
    got = bytearray()
    while serial.read(5, 1) & 1:
        got.append(serial.read(RBR_THR, 1))
    return bytes(got)


def test_input_flows_as_the_uart_has_room(events, serial):
    reader, writer = os.pipe()
    source = ConsoleInput(reader, serial)
    events.add_subscriber(source)
    data = os.urandom(20_000)
    os.set_blocking(writer, False)
    sent = os.write(writer, data)
    assert sent == len(data)
    run_until(events, lambda: serial.room() == 0)
    assert is_idle(events), "the source must not be watched while the UART is full"
    got = bytearray()

    def taken() -> bool:
        got.extend(take(serial))
        return len(got) == len(data)

    run_until(events, taken)
    assert got == data
    source.close()
    os.close(reader)
    os.close(writer)


def test_end_of_file_ends_the_input_after_the_last_byte(events, serial):
    reader, writer = os.pipe()
    os.write(writer, bytes(200))
    os.close(writer)
    source = ConsoleInput(reader, serial)
    events.add_subscriber(source)
    got = bytearray()

    def taken() -> bool:
        got.extend(take(serial))
        return len(got) == 200

    run_until(events, taken)
    assert is_idle(events)
    # What the guest throws away after the end of the input comes again all the same.
    source.close()
    os.close(reader)


@pytest.mark.parametrize("kind", ["null", "file"])
def test_input_that_cannot_be_polled_is_no_input_and_no_error(events, serial, tmp_path, kind):
    path = tmp_path / "input"
    path.write_bytes(b"never read")
    descriptor = os.open("/dev/null" if kind == "null" else path, os.O_RDONLY)
    source = ConsoleInput(descriptor, serial)
    source.set_raw()
    events.add_subscriber(source)
    # A driver that sets up the UART; the controller once died of it.
    serial.write(IIR_FCR, 1, FCR_ENABLE)
    serial.write(IIR_FCR, 1, FCR_ENABLE | FCR_CLEAR_RECEIVE)
    serial.write(MCR, 1, MCR_LOOP)
    serial.write(RBR_THR, 1, 0x55)
    assert serial.read(RBR_THR, 1) == 0x55
    serial.write(MCR, 1, 0)
    assert is_idle(events)
    assert os.get_blocking(descriptor)
    source.close()
    os.close(descriptor)


def test_what_was_typed_ahead_survives_a_driver_that_probes(events, serial, monkeypatch):
    monkeypatch.setattr(console, "SETTLE_NS", 1_000_000)
    reader, writer = os.pipe()
    source = ConsoleInput(reader, serial)
    events.add_subscriber(source)
    text = b"typed before the driver was there; longer than the FIFO of the UART is, by a good deal\n"
    assert len(text) > RECEIVE_FIFO_SIZE
    os.write(writer, text)
    os.close(writer)
    run_until(events, lambda: serial.room() == 0)
    for _ in range(3):
        serial.write(IIR_FCR, 1, FCR_ENABLE)
        serial.write(IIR_FCR, 1, FCR_ENABLE | FCR_CLEAR_RECEIVE)
        serial.write(MCR, 1, MCR_LOOP)
        assert serial.room() == 0
        events.run(2)
        serial.write(MCR, 1, 0)
        serial.write(IIR_FCR, 1, 0)
    got = bytearray()

    def taken() -> bool:
        got.extend(take(serial))
        return len(got) >= len(text)

    run_until(events, taken)
    assert got == text
    assert is_idle(events)
    source.close()
    os.close(reader)


def test_a_guest_that_resets_its_uart_all_the_time_costs_one_timer(events, serial):
    reader, writer = os.pipe()
    source = ConsoleInput(reader, serial)
    events.add_subscriber(source)
    os.write(writer, bytes(100))
    run_until(events, lambda: serial.room() == 0)
    for _ in range(5000):  # more than the event loop has timers
        serial.write(IIR_FCR, 1, FCR_ENABLE)
        serial.write(IIR_FCR, 1, 0)
    source.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("blocking", [True, False])
def test_the_mode_of_standard_input_is_restored(events, serial, blocking):
    reader, writer = os.pipe()
    os.set_blocking(reader, blocking)
    source = ConsoleInput(reader, serial)
    number = events.add_subscriber(source)
    assert not os.get_blocking(reader)
    events.remove_subscriber(number)
    source.close()
    assert os.get_blocking(reader) is blocking
    os.close(reader)
    os.close(writer)


def test_input_from_a_pseudo_terminal_survives_its_other_side(events, serial, monkeypatch):
    monkeypatch.setattr(console, "RETRY_NS", 1_000_000)
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    os.close(slave)
    source = ConsoleInput(master, serial)
    source.set_raw()
    events.add_subscriber(source)
    for text in (b"first", b"second"):
        for _ in range(5):  # nobody there
            events.run(1)
        slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
        assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON)
        os.write(slave, text)
        got = bytearray()

        def taken(got: bytearray = got, text: bytes = text) -> bool:
            got.extend(take(serial))
            return bytes(got) == text

        run_until(events, taken)
        os.close(slave)
    source.close()
    os.close(master)


class Session:
    """A child that is a session leader with a pseudo-terminal as its controlling terminal, and a pipe to report."""

    def __init__(self, body) -> None:
        self.master, slave = pty.openpty()
        self.report, report = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
                body(slave, report)
                status = 0
            finally:
                os._exit(status)
        os.close(slave)
        os.close(report)

    def end(self) -> tuple[int, bytes]:
        _, status = os.waitpid(self.pid, 0)
        text = os.read(self.report, 1000)
        os.close(self.report)
        os.close(self.master)
        return status, text


def test_a_terminal_is_raw_for_input_only_and_restored():
    def body(slave: int, report: int) -> None:
        before = termios.tcgetattr(slave)
        source = ConsoleInput(slave, Serial(CountingLine(), lambda byte: None))
        source.set_raw()
        raw = termios.tcgetattr(slave)
        assert not raw[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        assert raw[1] == before[1], "log lines need the translation of line feeds"
        source.close()
        assert termios.tcgetattr(slave) == before
        os.write(report, b"ok")

    assert Session(body).end() == (0, b"ok")


def test_in_the_background_the_terminal_is_left_alone():
    """Changing or reading it there would stop the process (SIGTTOU, SIGTTIN), and with it the microVM."""

    def body(slave: int, report: int) -> None:
        events = EventManager()
        before = termios.tcgetattr(slave)
        foreground = os.fork()
        if foreground == 0:
            os.setpgid(0, 0)
            time.sleep(60)
            os._exit(0)
        os.setpgid(foreground, foreground)
        fcntl.ioctl(slave, termios.TIOCSPGRP, struct.pack("i", foreground))
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # a group whose parent is in the session: not orphaned, so it would be stopped
            source = ConsoleInput(slave, Serial(CountingLine(), lambda byte: None))
            source.set_raw()
            events.add_subscriber(source)
            for _ in range(3):
                events.run(10)
            source.close()
            assert termios.tcgetattr(slave) == before
            os.write(report, b"ok")
            os._exit(0)
        os.setpgid(child, child)
        _, status = os.waitpid(child, os.WUNTRACED)
        for pid in (foreground, child):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0

    session = Session(body)
    os.write(session.master, b"typed for another process\n")
    assert session.end() == (0, b"ok")
