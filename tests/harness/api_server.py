"""The API server on a real UNIX socket in the test's own thread."""

from __future__ import annotations

import socket
from typing import Any

from base.event_manager import EventManager
from vmm.api.http import render_response
from vmm.api.server import ApiServer, bind
from vmm.observe.logger import Logger

GET = b"GET /version HTTP/1.1\r\n\r\n"
VERSION = render_response(200, b'{"firecracker_version":"1.17.0-dev"}')
LIMIT = 250


class Host:
    """A server in this thread: nothing happens until ``pump`` is called, so that tests see every step."""

    def __init__(self, path: str, handle: Any, logger: Logger) -> None:
        self.path = path
        self.manager = EventManager()
        self.server = ApiServer(bind(path), handle, logger, LIMIT)
        self.number = self.manager.add_subscriber(self.server)
        self.clients: list[socket.socket] = []

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(self.path)
        self.clients.append(client)
        return client

    def pump(self) -> None:
        """Run the loop until nothing happens any more."""
        while self.manager.run(0):
            pass

    def exchange(self, client: socket.socket, data: bytes) -> bytes:
        """Send bytes, let the server work, and return what has come back."""
        client.sendall(data)
        self.pump()
        return drain(client)

    @property
    def connections(self) -> int:
        return len(self.server._connections)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.manager.remove_subscriber(self.number)
        self.server.close()
        self.manager.close()


def drain(client: socket.socket) -> bytes:
    """Return what can be received now; ends at the first lack of data, or with an end mark when the peer has closed."""
    data = b""
    client.setblocking(False)
    try:
        while True:
            part = client.recv(1 << 16)
            if not part:
                return data + b"<closed>"
            data += part
    except BlockingIOError:
        return data
    except ConnectionResetError:
        return data + b"<closed>"
    finally:
        client.settimeout(10)
