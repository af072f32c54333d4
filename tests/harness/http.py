"""An HTTP client that is not ours, on a UNIX socket: requests, with the transport of requests-unixsocket."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from requests_unixsocket.adapters import UnixAdapter, UnixHTTPConnectionPool

#: The host of every URL; what it is does not matter.
BASE_URL = "http://localhost"


class _Adapter(UnixAdapter):  # type: ignore[misc]
    """Keeps one connection to one socket. (The original keeps one per URL, and a server of ours takes ten.)"""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__(timeout=timeout)
        self._pool = UnixHTTPConnectionPool(f"http+unix://{quote(str(path), safe='')}", timeout)

    def get_connection(self, url: str, proxies: Any = None) -> Any:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


def session(path: Path, timeout: float = 60.0) -> requests.Session:
    """Return a session whose requests to ``BASE_URL`` go to a socket."""
    made = requests.Session()
    made.trust_env = False
    made.mount(BASE_URL, _Adapter(path, timeout))
    return made
