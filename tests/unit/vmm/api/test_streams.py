"""GET /events on a real socket: order, history, slow clients, clients that misbehave; nothing else suffers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.api import Api
from tests.harness.api_server import GET, VERSION, Host, drain
from vmm.api.dispatch import Dispatcher
from vmm.api.streams import BUFFER_LIMIT, HEAD, LINGER_NS, MAX_STREAMS, EventStreams
from vmm.observe.event_log import HISTORY, EventLog, event_line

EVENTS = b"GET /events HTTP/1.1\r\n\r\n"


class StreamHost(Host):
    """A server with event streams."""

    def __init__(self, path: str, api: Api) -> None:
        self.log = EventLog()
        self.streams = EventStreams(self.log)
        super().__init__(path, Dispatcher(api.session, self.streams), api.logger)
        self.manager.add_subscriber(self.streams)

    def listen(self) -> socket.socket:
        client = self.client()
        client.sendall(EVENTS)
        self.pump()
        return client

    def close(self) -> None:
        self.streams.close()
        super().close()


@pytest.fixture
def host(api: Api, tmp_path) -> Iterator[StreamHost]:
    host = StreamHost(str(tmp_path / "api.socket"), api)
    yield host
    host.close()


def events(data: bytes) -> list[dict[str, Any]]:
    """Return the events after a head, or of a piece without one."""
    return [json.loads(line) for line in data.removeprefix(HEAD).removesuffix(b"<closed>").splitlines()]


def numbers(data: bytes) -> list[int]:
    return [event["number"] for event in events(data)]


# -- numbers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=20))
def test_listeners_get_every_event_from_when_they_come_to_when_they_leave(steps):
    log = EventLog()
    heard: list[list[bytes]] = []
    here: list[tuple[Any, list[bytes], int]] = []
    for step in steps:
        if step == 0:
            lines: list[bytes] = []
            heard.append(lines)
            here.append((lines.append, lines, log.number))
            log.listen(lines.append)
        elif step == 1 and here:
            listener, lines, since = here.pop(0)
            log.leave(listener)
            assert numbers(b"".join(lines)) == list(range(since + 1, log.number + 1))
        else:
            log.emit("x", step=step)
    assert numbers(b"".join(log.history())) == list(range(1, log.number + 1))


def test_history_keeps_the_last_events():
    log = EventLog()
    for _ in range(HISTORY + 5):
        log.emit("x")
    assert numbers(b"".join(log.history())) == list(range(6, HISTORY + 6))


def test_an_event_is_one_line_whatever_it_holds():
    line = event_line(3, "x", text='a\n"b"\u2028', number_of=1)
    assert line.count(b"\n") == 1
    assert list(json.loads(line)) == ["number", "utc_timestamp_ms", "event", "text", "number_of"]


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_tells_what_has_happened_and_what_happens(host):
    host.log.emit("first")
    client = host.listen()
    data = drain(client)
    assert data.startswith(HEAD)
    assert numbers(data) == [1]
    host.log.emit("microvm-state", state="Running")  # sent at once, without a turn of the loop
    (event,) = events(drain(client))
    assert (event["number"], event["event"], event["state"]) == (2, "microvm-state", "Running")


def test_streams_are_no_api_connections(host):
    streams = [host.listen() for _ in range(MAX_STREAMS)]
    assert host.connections == 0
    assert len(host.streams) == MAX_STREAMS
    assert host.exchange(host.client(), GET) == VERSION
    refused = host.exchange(host.client(), EVENTS)
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert b"There are 8 event streams already: close one of them first." in refused
    streams[0].close()
    host.pump()
    assert len(host.streams) == MAX_STREAMS - 1
    assert host.exchange(host.client(), EVENTS).startswith(HEAD)


def test_what_a_listener_sends_is_ignored(host):
    client = host.listen()
    client.setblocking(True)
    client.sendall(GET * 100)
    host.pump()
    client.shutdown(socket.SHUT_WR)
    host.pump()
    host.log.emit("x")
    assert numbers(drain(client)) == [1]
    client.close()
    host.pump()
    assert len(host.streams) == 0
    assert host.manager._handlers.keys() <= {host.server._listener.fileno()}


def test_pipelined_requests_after_events_are_dropped(host):
    client = host.client()
    client.sendall(EVENTS + GET)
    host.pump()
    assert drain(client) == HEAD


def test_a_slow_client_loses_its_stream_and_is_told(host, monkeypatch):
    slow, good = host.listen(), host.listen()
    drain(good)
    filler = "x" * 8000
    sent = 0
    heard: list[int] = []
    while not any(stream.ending for stream in host.streams._streams.values()):
        host.log.emit("filler", filler=filler)
        sent += 1
        heard += numbers(drain(good))
    host.log.emit("later")
    host.pump()
    heard += numbers(drain(good))
    assert heard == list(range(1, sent + 2))
    data = b""
    while not data.endswith(b"<closed>"):
        part = drain(slow)
        data += part
        host.pump()
    *lines, last = events(data)
    assert last["event"] == "stream-lost"
    assert last["reason"].startswith(f"The client is slow: more than {BUFFER_LIMIT} bytes wait for it.")
    # Nothing is missing before the last line, whose number is that of the first event that is.
    assert [line["number"] for line in [*lines, last]] == list(range(1, sent + 1))
    assert len(host.streams) == 1


def test_a_client_that_takes_nothing_is_closed_after_a_while(host, monkeypatch):
    host.listen()
    while not any(stream.ending for stream in host.streams._streams.values()):
        host.log.emit("filler", filler="x" * 8000)
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + LINGER_NS - 1_000_000_000)
    host.pump()
    assert len(host.streams) == 1
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + 2 * LINGER_NS)
    host.pump()
    assert len(host.streams) == 0


def test_a_client_that_is_gone_is_forgotten(host):
    for _ in range(20):
        host.listen().close()
        host.log.emit("x")
        host.pump()
    assert len(host.streams) == 0
    assert host.exchange(host.client(), GET) == VERSION


def test_the_end_reaches_the_client(host):
    client = host.listen()
    drain(client)
    host.log.emit("ended", exit_code=0)
    host.streams.close()
    data = drain(client)
    assert data.endswith(b"<closed>")
    assert [event["event"] for event in events(data)] == ["ended"]


def test_events_may_happen_while_a_request_is_executed(host, api, kernel):
    """As when pausing: the handler runs, things happen, a nested loop may deliver them."""
    client = host.listen()
    drain(client)

    class Vmm(type(api.vmm)):  # type: ignore[misc]
        def pause_vm(self) -> None:
            host.log.emit("before")
            host.manager.run_until(lambda: False, 0)
            host.log.emit("after")

    api.vmm = Vmm()
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
    api.send("PUT", "/actions", {"action_type": "InstanceStart"})
    body = b'{"state": "Paused"}'
    reply = host.exchange(host.client(), b"PATCH /vm HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert reply.startswith(b"HTTP/1.1 204 ")
    assert [event["event"] for event in events(drain(client))] == ["before", "after"]


def test_without_streams_there_are_no_events(api):
    assert api.fault("GET", "/events") == "There are no events here."
