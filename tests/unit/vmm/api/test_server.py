"""The server on a real UNIX socket: raw bytes, slow and broken clients, limits, one request at a time."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import requests_unixsocket

from tests.harness.api import parse_response
from tests.harness.api_server import GET, VERSION, Host, drain
from vmm.api import server as module
from vmm.api.http import Request, render_response
from vmm.api.server import ApiSocketError, bind
from vmm.observe.logger import Logger, LoggerConfig

SECOND = 1_000_000_000


# -- requests and connections -----------------------------------------------------------------------------------------


def test_keep_alive(host):
    client = host.client()
    for _ in range(3):
        assert host.exchange(client, GET) == VERSION
    assert host.connections == 1
    assert host.server.requests == 3


def test_pipelined_requests_are_answered_in_order(host):
    client = host.client()
    data = host.exchange(client, GET + b"GET /foo HTTP/1.1\r\n\r\n" + GET * 2)
    assert data.count(VERSION) == 3
    assert data.startswith(VERSION)
    assert data.endswith(VERSION)
    assert data.count(b"HTTP/1.1 400 ") == 1


def test_pipelining_connections_take_turns(host, monkeypatch):
    order: list[str] = []
    handle = host.server._handle

    def note(request):
        order.append(request.uri)
        return handle(request)

    host.server._handle = note
    first, second = host.client(), host.client()
    first.sendall(b"".join(b"GET /a%d HTTP/1.1\r\n\r\n" % number for number in range(3)))
    second.sendall(b"".join(b"GET /b%d HTTP/1.1\r\n\r\n" % number for number in range(3)))
    host.pump()
    assert order == ["/a0", "/b0", "/a1", "/b1", "/a2", "/b2"]
    assert drain(first).count(b"HTTP/1.1 400 ") == drain(second).count(b"HTTP/1.1 400 ") == 3


def test_a_connection_with_half_a_request_does_not_keep_others_from_their_turn(host):
    first, second = host.client(), host.client()
    first.sendall(GET + GET[:5])
    second.sendall(GET * 3)
    host.pump()
    assert drain(first) == VERSION
    assert drain(second) == VERSION * 3


def test_one_request_per_turn_of_the_loop(host):
    """What else happens (exits of the guest) is not kept waiting by a client with many requests at once."""
    client = host.client()
    client.sendall(GET * 20)
    host.manager.run(0)  # accept
    answered = []
    while host.manager.run(0):
        answered.append(host.server.requests)
    assert answered[:20] == list(range(1, 21))


def test_a_slow_sender_is_served_when_its_request_is_complete(host):
    slow, other = host.client(), host.client()
    data = b'PUT /actions HTTP/1.1\r\nContent-Length: 8\r\n\r\n{"a": 1}'
    for position in range(len(data)):
        assert host.exchange(slow, data[position : position + 1])[:13] in (b"", b"HTTP/1.1 400 ")
        if position % 20 == 0:
            assert host.exchange(other, GET) == VERSION
    assert host.server.requests == 1 + (len(data) + 19) // 20


def test_a_half_closed_client_gets_its_answers(host):
    client = host.client()
    client.sendall(GET * 2 + b"GET / HT")
    client.shutdown(socket.SHUT_WR)
    host.pump()
    assert drain(client) == VERSION * 2 + b"<closed>"
    assert host.connections == 0


def test_clients_that_vanish_are_forgotten(host):
    for data in (b"", GET[:5], GET, b"PUT /a HTTP/1.1\r\nContent-Length: 100\r\n\r\nx"):
        client = host.client()
        client.sendall(data)
        client.close()
    host.pump()
    assert host.connections == 0


def test_expect_continue(host):
    client = host.client()
    head = b"PUT /actions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n"
    assert host.exchange(client, head) == render_response(100)
    status, body, _ = parse_response(host.exchange(client, b'{"a": 1}'))
    assert status == 400
    assert "unknown field `a`, expected `action_type`" in body["fault_message"]


def test_a_protocol_error_leaves_the_connection_open(host):
    client = host.client()
    reply = host.exchange(client, b"PUT /a HTTP/1.1\r\nContent-Length: 260\r\n\r\n")
    assert reply == (
        b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
        b"Content-Length: 145\r\n\r\n"
        b'{ "error": "Request payload with size 260 is larger than the limit of 250 allowed by server.\n'
        b'All previous unanswered requests will be dropped." }'
    )
    assert host.exchange(client, b"x" * 260 + GET) == VERSION
    assert host.exchange(client, b"GARBAGE\r\n").startswith(b"HTTP/1.1 400 \r\n")
    assert host.exchange(client, GET) == VERSION


@pytest.mark.parametrize("rest", [b"Content-Length: x\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nx\r\n"])
def test_a_request_that_cannot_be_delimited_ends_the_connection(host, rest):
    client = host.client()
    reply = host.exchange(client, b"PUT /a HTTP/1.1\r\n" + rest + GET)
    assert reply.startswith(b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: close\r\n")
    assert reply.count(b"HTTP/1.1 ") == 1
    assert reply.endswith(b"<closed>")
    assert host.connections == 0


def test_what_a_client_sends_is_bounded_while_it_does_not_take_its_responses(host):
    client = host.client()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.setblocking(False)
    requests = GET * 4000
    sent = 0
    for _ in range(200):
        try:
            sent += client.send(requests[sent : sent + 65536])
        except BlockingIOError:
            pass
        host.pump()
    [connection] = host.server._connections.values()
    assert connection.output  # the client takes nothing: the responses fill its socket
    assert len(connection.output) <= len(VERSION)
    assert connection.parser.buffered <= module.READ_SIZE
    received = b""
    while received.count(b"HTTP/1.1 200 ") < 4000:
        received += drain(client)
        client.setblocking(False)
        if sent < len(requests):
            try:
                sent += client.send(requests[sent : sent + 65536])
            except BlockingIOError:
                pass
        host.pump()
    assert received == VERSION * 4000


def test_when_descriptors_run_out_the_server_tries_again(host, monkeypatch):
    class Listener:
        def __init__(self, listener):
            self.listener = listener
            self.failures = 2
            self.calls = 0

        def __getattr__(self, name):
            return getattr(self.listener, name)

        def accept(self):
            self.calls += 1
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "no descriptors")
            return self.listener.accept()

    listener = Listener(host.server._listener)
    host.server._listener = listener
    client = host.client()
    client.sendall(GET)
    host.pump()
    host.pump()
    assert listener.calls == 1  # the socket is left alone: it would keep the loop awake
    _let_time_pass(host, monkeypatch, module.ACCEPT_RETRY_NS)
    assert listener.calls == 2
    _let_time_pass(host, monkeypatch, 2 * module.ACCEPT_RETRY_NS)
    assert drain(client) == VERSION
    _let_time_pass(host, monkeypatch, 9 * module.ACCEPT_RETRY_NS)
    assert host.exchange(host.client(), GET) == VERSION


# -- time limits ------------------------------------------------------------------------------------------------------


_REAL_CLOCK = time.monotonic_ns


def _let_time_pass(host, monkeypatch, nanoseconds):
    """Set the clock to so much after the real time, and let timers fire."""
    monkeypatch.setattr(time, "monotonic_ns", lambda: _REAL_CLOCK() + nanoseconds)
    host.pump()


def test_a_client_that_does_not_finish_its_request_loses_its_connection(host, monkeypatch, api):
    idle, slow = host.client(), host.client()
    host.exchange(slow, GET[:10])
    _let_time_pass(host, monkeypatch, module.CLIENT_TIMEOUT_NS + SECOND)
    assert drain(slow) == b"<closed>"
    assert "An API client was too slow" in api.log()
    assert host.exchange(idle, GET) == VERSION  # between requests there is no limit


def test_each_request_has_its_own_time(host, monkeypatch):
    client = host.client()
    host.exchange(client, GET[:10])
    _let_time_pass(host, monkeypatch, module.CLIENT_TIMEOUT_NS - SECOND)
    assert host.exchange(client, GET[10:] + GET[:10]) == VERSION
    _let_time_pass(host, monkeypatch, 2 * module.CLIENT_TIMEOUT_NS - 3 * SECOND)
    assert host.exchange(client, GET[10:]) == VERSION
    _let_time_pass(host, monkeypatch, 9 * module.CLIENT_TIMEOUT_NS)
    assert host.exchange(client, GET) == VERSION


def test_a_response_has_its_own_time(host, monkeypatch):
    """The client was slow to ask, and is slow to take a response that does not fit into its socket."""
    host.server._handle = lambda request: b"x" * (8 << 20)
    client = host.client()
    host.exchange(client, GET[:10])
    _let_time_pass(host, monkeypatch, module.CLIENT_TIMEOUT_NS - SECOND)
    client.sendall(GET[10:])
    host.pump()
    _let_time_pass(host, monkeypatch, module.CLIENT_TIMEOUT_NS + SECOND)
    assert host.connections == 1
    _let_time_pass(host, monkeypatch, 2 * module.CLIENT_TIMEOUT_NS)
    assert host.connections == 0


def test_a_client_that_does_not_take_its_response_loses_its_connection(host, monkeypatch):
    client = host.client()
    client.setblocking(False)
    requests = GET * 4000
    sent = 0
    while not any(connection.output for connection in host.server._connections.values()):
        try:
            sent += client.send(requests[sent : sent + 65536])
        except BlockingIOError:
            pass
        host.pump()
    _let_time_pass(host, monkeypatch, module.CLIENT_TIMEOUT_NS + SECOND)
    assert host.connections == 0


# -- one request at a time --------------------------------------------------------------------------------------------


def test_while_a_request_is_executed_no_other_is_parsed_or_executed(tmp_path):
    """The handler runs the loop, as a pause does; other clients, known and new, wait for its end."""
    logger = Logger("test")
    logger.configure(LoggerConfig(str(tmp_path / "log")))
    log: list[str] = []

    def handle(request: Request) -> bytes:
        log.append(f"begin {request.uri}")
        if request.uri == "/slow":
            same.sendall(b"GET /same HTTP/1.1\r\n\r\n")
            known.sendall(b"GET /known HTTP/1.1\r\n\r\n")
            new = host.client()
            new.sendall(b"GET /new HTTP/1.1\r\n\r\n")
            deadline = time.monotonic_ns() + SECOND // 20
            assert not host.manager.run_until(lambda: False, deadline)
            assert host.connections == 4  # accepted, but not read
        log.append(f"end {request.uri}")
        return render_response(204)

    host = Host(str(tmp_path / "api.socket"), handle, logger)
    same, known, ready = host.client(), host.client(), host.client()
    # One connection has a second request in its buffer when the slow one begins.
    ready.sendall(b"GET /ready1 HTTP/1.1\r\n\r\nGET /ready2 HTTP/1.1\r\n\r\n")
    known.sendall(b"GET /")
    same.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
    known.sendall(b" HTTP/1.1\r\n\r\n")
    host.pump()
    assert [entry for entry in log if entry.startswith("begin")] == [
        entry.replace("end", "begin") for entry in log if entry.startswith("end")
    ]
    begun = [log[position : position + 2] for position in range(0, len(log), 2)]
    assert all(begin.split()[1] == end.split()[1] for begin, end in begun)
    assert {begin.split()[1] for begin, _ in begun} >= {"/slow", "/same", "/known", "/new", "/ready1", "/ready2"}
    host.close()
    logger.close()


def test_a_connection_that_waits_for_its_turn_waits_on_while_a_request_is_executed(tmp_path):
    logger = Logger("test")
    logger.configure(LoggerConfig(str(tmp_path / "log")))
    log: list[str] = []

    def handle(request: Request) -> bytes:
        log.append(request.uri)
        if request.uri == "/slow":
            own.manager.run_until(lambda: False, time.monotonic_ns() + SECOND // 50)
            log.append("end of /slow")
        return render_response(204)

    own = Host(str(tmp_path / "api.socket"), handle, logger)
    ready, slow = own.client(), own.client()
    own.pump()
    ready.sendall(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n")
    slow.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
    own.pump()
    assert log == ["/1", "/slow", "end of /slow", "/2"]
    own.close()
    logger.close()


def test_a_handler_that_raises_leaves_the_server_usable(host):
    handle = host.server._handle

    def fail(request):
        raise RuntimeError("bug")

    client, other = host.client(), host.client()
    host.server._handle = fail
    client.sendall(GET)
    with pytest.raises(RuntimeError):
        host.pump()
    host.server._handle = handle
    assert host.exchange(other, GET) == VERSION


# -- socket -----------------------------------------------------------------------------------------------------------


def test_the_socket_follows_the_umask_and_is_not_inherited(host):
    umask = os.umask(0o022)
    os.umask(umask)
    mode = os.stat(host.path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o777 & ~umask
    host.client()
    host.pump()
    assert not os.get_inheritable(host.server._listener.fileno())
    assert not any(os.get_inheritable(connection.socket.fileno()) for connection in host.server._connections.values())


def test_a_path_that_is_taken_is_refused(host):
    message = f"Failed to open the API socket at: {host.path}. Check that it is not already used."
    with pytest.raises(ApiSocketError) as error:
        bind(host.path)
    assert str(error.value) == message
    for path in ("/nix/api.socket", "/tmp/" + "x" * 200):
        with pytest.raises(ApiSocketError):
            bind(path)


def test_no_descriptor_is_left(api, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    host = Host(str(tmp_path / "api.socket"), api.dispatcher, api.logger)
    for _ in range(20):
        host.client().sendall(GET)
    host.pump()
    host.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- other people's clients -------------------------------------------------------------------------------------------


@pytest.fixture
def served(host) -> Iterator[str]:
    """The path of a socket that is served by a thread."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            host.manager.run(20)

    thread = threading.Thread(target=serve)
    thread.start()
    yield host.path
    stop.set()
    thread.join()


def curl(path: str, *arguments: str) -> bytes:
    command = ["curl", "-sS", "-i", "--max-time", "20", "--unix-socket", path, *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_curl(served, kernel):
    status, body, _ = parse_response(curl(served, "http://localhost/version"))
    assert (status, body) == (200, {"firecracker_version": "1.17.0-dev"})
    body_text = f'{{"kernel_image_path": "{kernel}"}}'
    assert curl(served, "-X", "PUT", "-d", body_text, "http://localhost/boot-source") == render_response(204)
    chunked = ("-X", "PUT", "-H", "Transfer-Encoding: chunked", "-d", body_text)
    assert curl(served, *chunked, "http://localhost/boot-source") == render_response(204)
    two = curl(served, *chunked, "http://localhost/boot-source", "http://localhost/boot-source")
    assert two == render_response(204) * 2
    # Larger than the limit, and larger than what curl sends without asking for leave.
    large = curl(served, "-X", "PUT", "-H", "Expect: 100-continue", "-d", "x" * 2000, "http://localhost/boot-source")
    assert b"Request payload with size 2000 is larger than the limit of 250 allowed by server." in large


def test_requests_unixsocket(served):
    url = f"http+unix://{served.replace('/', '%2F')}"
    with requests_unixsocket.Session() as session:
        assert session.get(f"{url}/").json()["app_name"] == "Firecracker"
        assert session.patch(f"{url}/machine-config", json={"mem_size_mib": 64}).status_code == 204
        for size in (65, 66):
            pieces = iter([b'{"mem_size', b'_mib": %d}' % size])  # sent in chunks
            assert session.patch(f"{url}/machine-config", data=pieces).status_code == 204
            assert session.get(f"{url}/machine-config").json()["mem_size_mib"] == size
        assert session.patch(f"{url}/machine-config", json={"mem_size_mib": 64}).status_code == 204
        response = session.put(f"{url}/machine-config", json={"mem_size_mib": 128})
        assert response.status_code == 400
        assert "missing field `vcpu_count` at line 1 column 21" in response.json()["fault_message"]
        assert session.get(f"{url}/machine-config").json()["mem_size_mib"] == 64
