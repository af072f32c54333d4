"""The console: output that never blocks the guest, input that waits for the UART, terminals left as they were found."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import struct
import termios
import time
import tty

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.event_manager import EventManager
from tests.harness.devices import CountingLine
from vmm.devices.legacy import console
from vmm.devices.legacy.console import MAX_PENDING_OUTPUT, ConsoleInput, ConsoleOutput, TokenBucket
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

SECOND_NS = 1_000_000_000
PATIENCE_NS = 10 * SECOND_NS


@pytest.fixture
def events():
    manager = EventManager()
    yield manager
    manager.close()


@pytest.fixture
def serial():
    line = CountingLine()
    yield Serial(line, lambda byte: None)
    line.close()


def pipe() -> tuple[int, int]:
    """A pipe of one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def send(output: ConsoleOutput, data: bytes) -> None:
    for byte in data:
        output.transmit(byte)
    output.flush()


def run_until(events: EventManager, done) -> None:
    """Run the loop until ``done()``, which may itself do what the other side does."""
    deadline = time.monotonic_ns() + PATIENCE_NS
    while not done():
        assert time.monotonic_ns() < deadline, "did not happen"
        events.run(1)


def is_idle(events: EventManager, turns: int = 3) -> bool:
    """Tell whether the loop has nothing to do: a registration that reports for ever would keep it spinning."""
    return [events.run(0) for _ in range(turns)][-1] == 0


# ---------------------------------------------------------------- token bucket


@given(
    size=st.integers(1, 1000),
    refill_time=st.integers(1, 2000),
    burst=st.integers(0, 200),
    steps=st.lists(st.tuples(st.integers(0, 400_000_000), st.integers(1, 300)), max_size=60),
)
@settings(max_examples=300)
def test_a_bucket_never_gives_more_than_size_and_rate_over_any_window(size, refill_time, burst, steps):
    now = 0
    bucket = TokenBucket(size, refill_time, burst, lambda: now)
    taken: list[tuple[int, int]] = []
    for pause, tries in steps:
        now += pause
        taken.append((now, sum(bucket.take(1) for _ in range(tries))))
    burst_used = 0
    without_burst = []
    for when, count in taken:
        from_burst = min(count, burst - burst_used)
        burst_used += from_burst
        without_burst.append((when, count - from_burst))
    for first, last in itertools.combinations_with_replacement(range(len(taken)), 2):
        window = without_burst[last][0] - without_burst[first][0]
        allowed = size + window * size // (refill_time * 1_000_000) + 1
        assert sum(count for _, count in without_burst[first : last + 1]) <= allowed


@pytest.mark.parametrize("pause", [1, 700_000, 1_000_000, 1_900_000, 3_333_333])
def test_a_bucket_gives_its_whole_rate_however_often_it_is_asked(pause):
    now = 0
    bucket = TokenBucket(1000, 1000, 0, lambda: now)  # a token per ms
    while bucket.take(1):
        pass
    taken = 0
    for _ in range(500):
        now += pause
        while bucket.take(1):
            taken += 1
    assert taken == 500 * pause // 1_000_000


def test_the_burst_is_used_first_and_once():
    now = 0
    bucket = TokenBucket(10, 100, 5, lambda: now)
    assert sum(bucket.take(1) for _ in range(100)) == 15
    now += PATIENCE_NS
    assert sum(bucket.take(1) for _ in range(100)) == 10


@pytest.mark.parametrize(("size", "refill_time"), [(0, 100), (100, 0), (0, 0)])
def test_zero_means_no_limit(size, refill_time):
    bucket = TokenBucket(size, refill_time, 0, lambda: 0)
    assert all(bucket.take(1) for _ in range(10_000))


def test_the_largest_bucket_that_the_api_takes():
    largest = (1 << 64) - 1
    now = 0
    bucket = TokenBucket(largest, largest, largest, lambda: now)
    now += PATIENCE_NS
    assert bucket.take(1)


# ---------------------------------------------------------------- output


def test_output_reaches_a_pipe_in_order(events):
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True)
    events.add_subscriber(output)
    send(output, b"hello ")
    send(output, b"world\n")
    assert os.read(reader, 100) == b"hello world\n"
    assert output.flush_count == 2
    output.close()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_reader_that_never_reads_costs_bytes_not_time(events, monkeypatch):
    monkeypatch.setattr(console, "CLOSE_GRACE_NS", 0)
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True)
    events.add_subscriber(output)
    data = bytes(range(256)) * 1200  # more than pipe and buffer hold together
    for start in range(0, len(data), 1000):
        send(output, data[start : start + 1000])
    lost = output.lost_bytes
    assert is_idle(events)
    output.close()
    in_pipe = len(os.read(reader, 1 << 20))
    assert lost == len(data) - MAX_PENDING_OUTPUT - in_pipe
    assert output.lost_bytes == len(data) - in_pipe
    os.close(reader)


def test_a_slow_reader_gets_everything_through_the_event_loop(events):
    reader, writer = pipe()
    os.set_blocking(reader, False)
    output = ConsoleOutput(writer, owned=True)
    events.add_subscriber(output)
    data = os.urandom(100_000)
    send(output, data)
    got = bytearray()

    def read_some() -> bool:
        try:
            got.extend(os.read(reader, 777))
        except BlockingIOError:
            pass
        return len(got) == len(data)

    run_until(events, read_some)
    assert got == data
    assert output.lost_bytes == 0
    assert is_idle(events)
    output.close()
    os.close(reader)


def test_close_gives_a_slow_reader_a_moment(events, monkeypatch):
    monkeypatch.setattr(console, "CLOSE_GRACE_NS", PATIENCE_NS)
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True)
    data = os.urandom(50_000)
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        got = b""
        while part := os.read(reader, 1000):
            got += part
        os._exit(0 if got == data else 1)
    os.close(reader)
    send(output, data)
    output.close()
    assert os.waitpid(pid, 0)[1] == 0
    assert output.lost_bytes == 0


def test_close_does_not_wait_for_a_reader_that_is_gone(events, monkeypatch):
    monkeypatch.setattr(console, "CLOSE_GRACE_NS", 1000 * PATIENCE_NS)
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True)
    send(output, bytes(10_000))
    os.close(reader)
    output.close()
    assert output.lost_bytes == 10_000 - 4096


def test_a_reader_that_is_gone_is_no_error(events):
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True)
    events.add_subscriber(output)
    send(output, bytes(10_000))
    os.close(reader)
    run_until(events, lambda: output.lost_bytes == 10_000 - 4096)
    send(output, b"more")
    assert output.lost_bytes == 10_000 - 4096 + 4
    assert is_idle(events)
    output.close()


def test_a_full_file_system_is_no_error(events):
    output = ConsoleOutput(os.open("/dev/full", os.O_WRONLY), owned=True)
    events.add_subscriber(output)
    send(output, b"into the void")
    assert output.lost_bytes == 13
    output.close()


def test_output_to_a_file(events, tmp_path):
    path = tmp_path / "serial.log"
    output = ConsoleOutput(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), owned=True)
    events.add_subscriber(output)
    send(output, b"x" * 300_000)
    assert path.stat().st_size == MAX_PENDING_OUTPUT
    assert output.lost_bytes == 300_000 - MAX_PENDING_OUTPUT
    send(output, b"y")
    output.close()
    assert path.read_bytes()[-1:] == b"y"


def test_what_the_rate_limiter_refuses_is_counted(events):
    reader, writer = pipe()
    output = ConsoleOutput(writer, owned=True, bucket=TokenBucket(10, 1000, 3, lambda: 0))
    send(output, b"0123456789abcdefghij")
    assert os.read(reader, 100) == b"0123456789abc"
    assert (output.rate_limiter_dropped_bytes, output.lost_bytes) == (7, 0)
    output.close()
    os.close(reader)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_descriptor_of_others_keeps_its_mode(blocking):
    reader, writer = pipe()
    os.set_blocking(writer, blocking)
    output = ConsoleOutput(writer, owned=False)
    assert not os.get_blocking(writer)
    output.close()
    assert os.get_blocking(writer) is blocking
    os.close(writer)
    os.close(reader)


def test_a_pseudo_terminal_that_nobody_holds_open_does_not_keep_the_loop_busy(events, monkeypatch):
    monkeypatch.setattr(console, "RETRY_NS", 1_000_000)
    master, slave = pty.openpty()
    tty.setraw(slave)
    name = os.ttyname(slave)
    os.close(slave)
    output = ConsoleOutput(master, owned=True)
    events.add_subscriber(output)
    send(output, b"x" * 100_000)
    deliveries = 0
    deadline = time.monotonic_ns() + 50_000_000
    while time.monotonic_ns() < deadline:
        deliveries += events.run(5)
    assert deliveries <= 200, "the hang-up is reported again and again"
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    got = bytearray()

    def all_came() -> bool:
        try:
            got.extend(os.read(slave, 4096))
        except BlockingIOError:
            pass
        return len(got) == 100_000

    run_until(events, all_came)
    assert output.lost_bytes == 0
    output.close()
    os.close(slave)


def test_close_does_not_wait_for_a_terminal_that_nobody_holds_open(monkeypatch):
    monkeypatch.setattr(console, "CLOSE_GRACE_NS", 1000 * PATIENCE_NS)
    master, slave = pty.openpty()
    os.close(slave)
    output = ConsoleOutput(master, owned=True)
    send(output, b"x" * 100_000)
    output.close()
    assert output.lost_bytes


# ---------------------------------------------------------------- input


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
