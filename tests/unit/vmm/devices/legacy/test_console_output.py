"""The console's output never blocks the guest."""

from __future__ import annotations

import fcntl
import os
import pty
import time
import tty

import pytest

from base.token_bucket import TokenBucket
from tests.harness.event_loop import PATIENCE_NS, is_idle, run_until
from vmm.devices.legacy import console
from vmm.devices.legacy.console import MAX_PENDING_OUTPUT, ConsoleOutput

SECOND_NS = 1_000_000_000


def pipe() -> tuple[int, int]:
    """A pipe of one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def send(output: ConsoleOutput, data: bytes) -> None:
    for byte in data:
        output.transmit(byte)
    output.flush()


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
