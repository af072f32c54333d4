"""A client of the API on one kept connection, which looks at every byte of an answer's head."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


class Client:
    """One kept connection; replies are compared byte for byte as far as they are the same for all."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(300)
        self._connection.connect(str(path))
        self._file = self._connection.makefile("rb")

    def send(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        """Return status and body (None without one); checks status line and headers."""
        data = b"" if body is None else body.encode()
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        self._connection.sendall(f"{method} {path} HTTP/1.1\r\n{length}\r\n".encode() + data)
        status_line = self._file.readline()
        assert status_line.startswith(b"HTTP/1.1 ")
        assert status_line.endswith(b" \r\n"), status_line
        names, length_of_body = [], 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            names.append(name)
            if name == "Content-Length":
                length_of_body = int(value)
        status = int(status_line.split()[1])
        content = [] if status == 204 else ["Content-Type", "Content-Length"]
        assert [name for name in names if name != "Deprecation"] == ["Server", "Connection", *content]
        text = self._file.read(length_of_body)
        return status, json.loads(text) if text else None

    def close(self) -> None:
        self._file.close()
        self._connection.close()
