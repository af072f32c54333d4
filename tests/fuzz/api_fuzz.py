"""Fuzzes the HTTP parser, the API and the configuration file, under a limit of address space and of time per example.

    python -m tests.fuzz.api_fuzz TARGET SEED COUNT

Prints one JSON object with the number of examples and what became of them. Ends with a traceback when anything but a
documented error comes out, or an example takes longer than a second of CPU time.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

from tests.harness import conforming_client
from tests.harness.api import Api, parse_response
from tests.harness.fuzzing import example, limit
from vmm.api.http import LINE_LIMIT, ProtocolError, Request, RequestParser, render_protocol_error
from vmm.config import file as config_file
from vmm.errors import VmmError
from vmm.json.decoder import JsonError, decode
from vmm.observe.logger import OFF, LoggerConfig

PAYLOAD_LIMIT = 2048

outcomes: Counter[str] = Counter()


# ---------------------------------------------------------------- material

#: Requests that are proper: method, path, body.
PROPER = (
    (b"GET", b"/", b""),
    (b"GET", b"/version", b""),
    (b"GET", b"/machine-config", b""),
    (b"GET", b"/vm/config", b""),
    (b"PUT", b"/machine-config",
     b'{"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": true, "huge_pages": "None"}'),
    (b"PATCH", b"/machine-config", b'{"mem_size_mib": 256, "cpu_template": "T2", "smt": null}'),
    (b"PUT", b"/boot-source",
     b'{"kernel_image_path": "KERNEL", "initrd_path": "KERNEL", "boot_args": "console=ttyS0 reboot=k"}'),
    (b"PUT", b"/boot-source", b'{"kernel_image_path": "KERNEL", "initrd_path": null}'),
    (b"PUT", b"/actions", b'{"action_type": "InstanceStart"}'),
    (b"PUT", b"/actions", b'{"action_type": "SendCtrlAltDel"}'),
    (b"PUT", b"/actions", b'{"action_type": "FlushMetrics"}'),
    (b"PATCH", b"/vm", b'{"state": "Paused"}'),
    (b"PATCH", b"/vm", b'{"state": {"Resumed": null}}'),
    (b"PUT", b"/serial",
     b'{"serial_out_path": "/console", "rate_limiter": {"size": 1, "refill_time": 2, "one_time_burst": 3, "x": []}}'),
    (b"PUT", b"/logger", b'{"log_path": "log2", "level": "Info", "show_level": true, "module": "vmm"}'),
)  # fmt: skip
BODIES = tuple(body for _, _, body in PROPER if body)
PATHS = (
    b"/", b"/version", b"/vm/config", b"/vm", b"/machine-config", b"/boot-source", b"/actions", b"/serial", b"/logger",
    b"/drives/a", b"/mmds", b"//x/", b"http://localhost/version", b"", b"a",
)  # fmt: skip
METHODS = (b"GET", b"PUT", b"PATCH", b"DELETE", b"POST", b"get")
HEADERS = (
    b"Host: localhost", b"Accept: application/json", b"Content-Type: application/json", b"Expect: 100-continue",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Accept-Encoding: identity", b"no colon",
    b"Accept-Encoding: identity;q=0",
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999", b"Content-Length: 4294967296", b"X: \xff",
)  # fmt: skip
CONFIG = (
    b'{"boot-source": {"kernel_image_path": "KERNEL", "boot_args": "quiet"}, "drives": [], "machine-config": '
    b'{"vcpu_count": 1, "mem_size_mib": 128}, "network-interfaces": [], "logger": {"level": "Info"}, "vsock": null}'
)
#: Pieces that break or bend JSON.
PIECES = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00", b"null", b"true", b"false", b"-",
    b"0", b"-0", b"1e999", b"1E5", b"1.5", b"18446744073709551616", b"256", b"4294967296", b"\n", b"\r\n", b" ", b"\t",
    b"\0", b"\xff", b"\xc3", "é".encode(), b"[" * 200, b'{"a":' * 130, b"x" * 300, b"9" * 400, b'"boot_args": "\x7f"',
    b'"vcpu_count": 33', b'"mem_size_mib": 0', b"/*", b"NaN", b"Infinity",
)  # fmt: skip


def mutated(source: random.Random, data: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """Return ``data`` with some bytes changed, taken out, doubled, or replaced by pieces."""
    changed = bytearray(data)
    for _ in range(source.choice((0, 1, 1, 1, 2, 3, 8))):
        position = source.randrange(len(changed) + 1)
        end = min(len(changed), position + source.choice((0, 0, 1, 2, 5, 20)))
        kind = source.randrange(8)
        if kind < 4:
            changed[position:end] = source.choice(pieces)
        elif kind < 5:
            del changed[position:end]
        elif kind < 6:
            changed[position:position] = changed[position:end] * source.choice((1, 2, 30))
        elif kind < 7 and changed:
            changed[position % len(changed)] = source.randrange(256)
        elif source.random() < 0.3:
            del changed[position:]
    return bytes(changed)


def http_stream(source: random.Random, kernel: bytes) -> bytes:
    """Return the bytes of a few requests, some of them proper."""
    parts = []
    for _ in range(source.choice((1, 1, 2, 4))):
        method, path, body = source.choice(PROPER)
        version = 1
        if source.random() < 0.2:
            method, path, version = source.choice(METHODS), source.choice(PATHS), source.randrange(3)
        body = body.replace(b"KERNEL", kernel)
        if source.random() < 0.5:
            body = mutated(source, body, PIECES)
        headers = source.choices(HEADERS[:3] if source.random() < 0.8 else HEADERS, k=source.randrange(4))
        if body and source.random() < 0.2:
            headers.insert(source.randrange(len(headers) + 1), b"Transfer-Encoding: chunked")
            body = conforming_client.chunked(source, body)
            if source.random() < 0.3:
                body = mutated(source, body, (b"\r\n", b"\n", b";", b"0", b"f" * 9, b"-1", b"0x1", b" ", b"e" * 1100))
        elif body:
            length = len(body) if source.random() < 0.95 else source.randrange(5000)
            headers.insert(source.randrange(len(headers) + 1), b"Content-Length: %d" % length)
        line = b"%s %s HTTP/1.%d" % (method, path, version)
        request = b"\r\n".join([line, *headers, b"", b""]) + body
        parts.append(mutated(source, request, (*HEADERS, *PIECES, b"\r\n\r\n")) if source.random() < 0.3 else request)
    if source.random() < 0.05:
        parts.append(source.choice((b"x", b"a: ")) * source.choice((300, LINE_LIMIT, 5000)))
    return b"".join(parts)


# ---------------------------------------------------------------- targets


def found_in(chunks: list[bytes]) -> list[tuple[str, object]]:
    """Return the events of a stream in a comparable form."""
    parser = RequestParser(PAYLOAD_LIMIT)
    found: list[tuple[str, object]] = []
    for chunk in chunks:
        parser.receive(chunk)
        while (event := parser.next_event()) is not None:
            text = event if isinstance(event, Request) else repr(event)
            found.append((type(event).__name__, text))
            if isinstance(event, ProtocolError):
                assert render_protocol_error(event.text).startswith(b"HTTP/1.1 400 \r\n")
        assert parser.buffered <= max(LINE_LIMIT, PAYLOAD_LIMIT) + len(chunk)
    found.append(("closed", parser.closed))
    return found


def http(source: random.Random) -> None:
    """The parser: no exception, bounded buffer, the same events however the stream is cut up."""
    data = http_stream(source, b"/kernel")
    with example(outcomes):
        whole = found_in([data])
        step = source.choice((1, 2, 3, 7, 100, 1000))
        assert found_in([data[start : start + step] for start in range(0, len(data), step)]) == whole, data
    for name, _ in whole[:-1]:
        outcomes[name] += 1


def in_step(source: random.Random) -> None:
    """A client that follows the rules gets at most one answer per request, in order, wherever the stream is cut off."""
    sent = conforming_client.requests(source)
    data = b"".join(request.data for request in sent)
    data = data[: len(data) if source.random() < 0.7 else source.randrange(len(data) + 1)]
    ends = list(accumulate(len(request.data) for request in sent))
    begun = sum(start < len(data) for start in (0, *ends[:-1]))
    complete = sum(end <= len(data) for end in ends)
    step = source.choice((1, 3, 1000, 4096, 1 << 30)) if len(data) < 20_000 else source.choice((4096, 1 << 30))
    with example(outcomes):
        found = found_in([data[start : start + step] for start in range(0, len(data), step)])
    answers = [event for name, event in found[:-1] if name != "Continue"]
    assert len(answers) <= begun, data
    for request, answer in zip(sent, answers, strict=False):
        if isinstance(answer, Request):
            assert answer == Request(request.method, request.uri, "HTTP/1.1", request.body or None), data
        else:
            outcomes["refused"] += 1
    assert found[-1][1] or len(answers) >= complete, data
    outcomes["answers"] += len(answers)
    outcomes["closed"] += bool(found[-1][1])


class ApiTarget:
    """The whole way of a request, on a controller that lives through many of them."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="cellblock-fuzz-")
        os.chdir(self.directory)  # relative paths of mutated bodies must not meet files that matter
        self.kernel = os.path.join(self.directory, "kernel")
        with open(self.kernel, "wb"):
            pass
        self.api: Api | None = None

    def fresh(self) -> Api:
        """Return an API before the start; only answers are looked at, so the log is off."""
        if self.api is not None:
            self.api.close()
        self.api = Api(os.path.join(self.directory, "log"))
        self.api.logger.configure(LoggerConfig(level=OFF))
        return self.api

    def __call__(self, source: random.Random) -> None:
        """Every request gets one response of the documented shapes, whatever came before it."""
        api = self.api if self.api is not None and source.random() < 0.9 else self.fresh()
        data = http_stream(source, self.kernel.encode())
        parser = RequestParser(PAYLOAD_LIMIT)
        parser.receive(data)
        with example(outcomes):
            while (event := parser.next_event()) is not None:
                if not isinstance(event, Request):
                    continue
                answer = api.dispatcher(event)
                assert isinstance(answer, bytes)
                status, body, headers = parse_response(answer)
                outcomes[str(status)] += 1
                if status == 400:
                    assert list(body) == ["fault_message"]
                    assert "Internal VMM error: unexpected" not in body["fault_message"], body
                elif headers.get("Content-Type", "application/json") == "application/json":
                    assert status in (200, 204)
        api.logger.configure(LoggerConfig(level=OFF))  # a mutated body may have changed it


class ConfigTarget(ApiTarget):
    """The configuration file."""

    def __call__(self, source: random.Random) -> None:
        """Parsing and applying raise nothing but ConfigFileError."""
        api = self.fresh()
        text = mutated(source, CONFIG.replace(b"KERNEL", self.kernel.encode()), PIECES)
        with example(outcomes):
            error = _refusal(lambda: api.dispatcher.apply(config_file.parse(text)))
        if error is not None:
            assert isinstance(error, config_file.ConfigFileError)
            assert str(error).startswith("Configuration for VMM from one single json failed: ")


def _refusal(call: Callable[[], object]) -> VmmError | None:
    """Make a call and return the error of ours that it ends with, if it does."""
    try:
        call()
    except VmmError as error:
        outcomes["refused"] += 1
        return error
    outcomes["accepted"] += 1
    return None


def json_text(source: random.Random) -> None:
    """The JSON reader agrees with the standard library's, but where it is stricter."""
    text = mutated(source, source.choice((*BODIES, CONFIG)), PIECES)
    try:
        expected: object = json.loads(
            text.decode(), parse_constant=_refuse, parse_int=whole_number, parse_float=AboutAsLarge
        )
    except (ValueError, RecursionError):
        expected = _REFUSED
    values: list[object] = []
    with example(outcomes):
        error = _refusal(lambda: values.append(decode(text)))
    if error is None:
        assert values == [expected], text
    else:
        assert isinstance(error, JsonError)
        stricter = ("surrogate", "hex escape", "out of range", "recursion limit")
        assert expected is _REFUSED or any(word in error.reason for word in stricter), (text, error)


_REFUSED = object()


class AboutAsLarge(float):
    """serde_json does not always take the nearest floating point number (tests/unit/vmm/json/test_number.py)."""

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-14, abs_tol=5e-324)


def whole_number(text: str) -> int | float:
    """Whole numbers beyond 64 bits are floating point numbers to serde, and so is -0."""
    value = int(text) if len(text) < 30 else None
    if value is None or not -(1 << 63) <= value < 1 << 64 or text == "-0":
        return AboutAsLarge(text)
    return value


def _refuse(name: str) -> None:
    raise ValueError(name)


TARGETS: dict[str, Callable[[], Callable[[random.Random], None]]] = {
    "http": lambda: http,
    "in-step": lambda: in_step,
    "api": ApiTarget,
    "config": ConfigTarget,
    "json": lambda: json_text,
}


def main(arguments: list[str]) -> int:
    """Run COUNT examples of a target."""
    target, seed, count = arguments[0], int(arguments[1]), int(arguments[2])
    limit()
    source = random.Random(seed)
    run = TARGETS[target]()
    try:
        for _ in range(count):
            run(source)
    finally:
        if isinstance(run, ApiTarget):
            _remove(run.directory)
    print(json.dumps(outcomes))
    return 0


def _remove(directory: str) -> None:
    os.chdir("/")
    for folder, folders, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        for name in folders:
            os.rmdir(os.path.join(folder, name))
    os.rmdir(directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
