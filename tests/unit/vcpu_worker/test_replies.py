"""What a failure says, and how a call waits for its result."""

from __future__ import annotations

from ipc.messages.records import MAX_TEXT, WORKER, Failed
from ipc.schema import Envelope, decode, encode
from vcpu_worker.errors import ConfigurationError
from vcpu_worker.replies import bind, failed


def test_a_failure_is_cut_to_what_a_message_holds() -> None:
    assert failed(ConfigurationError("x" * 5000)) == Failed("worker.configuration", "x" * MAX_TEXT)
    assert decode(WORKER, encode(WORKER, Envelope(1, 1, 0, 0, failed(ConfigurationError("ä" * 5000))))).message
    assert failed(ValueError()) == Failed("worker.internal", "ValueError")


def test_bind_gives_the_first_arguments() -> None:
    assert bind(divmod, 17)(5) == (3, 2)
