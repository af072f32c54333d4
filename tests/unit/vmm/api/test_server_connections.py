"""How many clients the server takes at once, and who counts: clients that have hung up do not."""

from __future__ import annotations

import socket
import time

import pytest

from tests.harness.api_server import GET, VERSION, Host, drain
from vmm.api import server as module
from vmm.api.http import SERVER_FULL, Request, render_response
from vmm.api.server import MAX_CONNECTIONS
from vmm.observe.logger import Logger, LoggerConfig


def test_the_eleventh_connection_is_turned_away(host):
    clients = [host.client() for _ in range(MAX_CONNECTIONS)]
    for client in clients:
        assert host.exchange(client, GET) == VERSION
    extra = host.client()
    assert host.exchange(extra, GET) in (SERVER_FULL + b"<closed>", SERVER_FULL)
    assert host.server.refused_connections == 1
    assert host.exchange(clients[0], GET) == VERSION
    clients[1].close()
    host.pump()
    assert host.exchange(host.client(), GET) == VERSION


def test_many_clients_at_once(host):
    clients = [host.client() for _ in range(100)]
    host.pump()
    assert host.connections == MAX_CONNECTIONS
    assert host.server.refused_connections == 100 - MAX_CONNECTIONS
    assert sum(drain(client).startswith(SERVER_FULL) for client in clients) == 100 - MAX_CONNECTIONS


@pytest.mark.parametrize("sent", [b"", GET, GET[:5]])
def test_who_has_hung_up_does_not_count(host, sent):
    """The newcomer is seen first: what the others did is still to be read."""
    clients = [host.client() for _ in range(MAX_CONNECTIONS)]
    host.pump()
    new = host.client()
    new.sendall(GET)
    for client in clients[:3]:
        client.sendall(sent)
        client.close()
    served = host.server.requests
    host.pump()
    assert drain(new) == VERSION
    assert host.server.refused_connections == 0
    assert host.connections == MAX_CONNECTIONS - 2
    assert host.server.requests == served + 1 + 3 * (len(sent) // len(GET))  # what they asked for is done
    for _ in range(2):
        assert host.exchange(host.client(), GET) == VERSION
    assert host.exchange(host.client(), GET).startswith(SERVER_FULL)


def test_a_half_closed_client_counts_until_it_has_its_answers(host):
    clients = [host.client() for _ in range(MAX_CONNECTIONS)]
    host.pump()
    extra = host.client()
    for client in clients:
        client.sendall(GET * 2)
        client.shutdown(socket.SHUT_WR)
    host.pump()
    assert drain(extra).startswith(SERVER_FULL)
    assert [drain(client) for client in clients] == [VERSION * 2 + b"<closed>"] * MAX_CONNECTIONS
    assert host.exchange(host.client(), GET) == VERSION


def test_while_a_request_is_executed_who_has_hung_up_does_not_count(tmp_path):
    logger = Logger("test")
    logger.configure(LoggerConfig(str(tmp_path / "log")))
    log: list[str] = []

    def come_and_go(count: int) -> None:
        for number in range(count):
            client = host.client()
            client.sendall(b"PUT /gone%d HTTP/1.1\r\n\r\n" % number)
            client.close()
            host.manager.run_until(lambda: False, time.monotonic_ns())

    def handle(request: Request) -> bytes:
        log.append(request.uri)
        if request.uri == "/slow":
            come_and_go(3 * MAX_CONNECTIONS)
            new.connect(host.path)
            new.sendall(b"GET /new HTTP/1.1\r\n\r\n")
            host.manager.run_until(lambda: host.connections > 3 * MAX_CONNECTIONS, time.monotonic_ns() + 10**10)
        return render_response(204)

    host = Host(str(tmp_path / "api.socket"), handle, logger)
    new = socket.socket(socket.AF_UNIX)
    slow = host.client()
    assert host.exchange(slow, b"GET /slow HTTP/1.1\r\n\r\n") == render_response(204)
    assert drain(new) == render_response(204)
    assert host.server.refused_connections == 0
    assert sorted(log) == sorted(["/slow", "/new", *(f"/gone{number}" for number in range(3 * MAX_CONNECTIONS))])
    assert host.connections == 2
    new.close()
    host.close()
    logger.close()


def test_what_clients_leave_behind_is_bounded(host, monkeypatch):
    monkeypatch.setattr(module, "MAX_GONE", 5)
    with_content = [host.client() for _ in range(40)]
    for client in with_content:
        client.sendall(GET)
        client.close()
    largest = 0
    while host.manager.run(0):
        largest = max(largest, host.connections)
    assert largest == MAX_CONNECTIONS + 5
    assert host.connections == 0
    assert host.server.refused_connections + host.server.requests == 40
    assert host.exchange(host.client(), GET) == VERSION


def test_one_connection_for_each_request(host):
    """Six clients, none of which waits for the server to notice that it has gone."""
    clients = [host.client() for _ in range(6)]
    for number in range(200):
        turn = number % len(clients)
        clients[turn].sendall(GET)
        while not (answer := drain(clients[turn])):
            host.manager.run(0)
        assert answer == VERSION
        clients[turn].close()
        clients[turn] = host.client()
        if number % 7 == 0:
            for other in range(6):
                clients[other].close()
                clients[other] = host.client()
    host.pump()
    assert host.server.refused_connections == 0
    assert host.connections == 6
