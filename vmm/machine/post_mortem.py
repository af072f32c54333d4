"""What is known of a failure: a typed cause, the black boxes of the vCPUs, the console's last words."""

from __future__ import annotations

from base import exit_codes
from base.lean_std import signal_name
from base.lean_typing import TYPE_CHECKING, Enum, NamedTuple
from ipc.messages.supervisor import CellEnded
from ipc.messages.worker import VcpuExited
from vmm.machine.black_box import describe_run_page
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG

if TYPE_CHECKING:
    from vmm.cells.worker import Worker
    from vmm.json.text import JsonValue

#: How much of the console goes into a report.
TAIL_LENGTH = 1024


#: The wall that ends a cell which gets no more memory; the supervisor names it.
WALL_MEMORY = "memory"


class Cause(Enum):
    """Why a microVM failed."""

    SIGNAL = "signal"  # a worker was ended by a signal
    WALL = "wall"  # a worker was ended by one of its walls
    EXITED = "exited"  # a worker exited that nobody had asked to
    PROTOCOL = "protocol"  # a worker broke the protocol
    VCPU = "vcpu"  # a vCPU left its run loop and cannot go on
    OPERATION = "operation"  # an operation could be neither completed nor rolled back
    INTERRUPT = "interrupt"  # an interrupt between vCPUs was lost


class Failure(NamedTuple):
    """``detail`` is for programs (a signal's name, a wall, an exit status, a vCPU's reason), ``text`` for people."""

    cause: Cause
    detail: str
    text: str
    exit_code: int


def of_end(worker: Worker, notice: CellEnded) -> Failure:
    """A worker's process ended unasked."""
    name = f"Worker vcpu {worker.index} (pid {notice.pid})"
    if not notice.signal:
        text = f"{name} exited with status {notice.status}"
        failure = Failure(Cause.EXITED, str(notice.status), text, notice.status or exit_codes.GENERIC_ERROR)
    else:
        number = signal_name(notice.signal)
        text = f"{name} was ended by signal {number}"
        failure = Failure(Cause.SIGNAL, number, text, exit_codes.of_signal(notice.signal))
    if notice.wall:
        failure = failure._replace(cause=Cause.WALL, detail=notice.wall, text=f"{text}, by its {notice.wall} wall")
    if notice.wall == WALL_MEMORY:
        failure = failure._replace(exit_code=exit_codes.GENERIC_ERROR)
    if notice.text:
        failure = failure._replace(text=f"{name} could not start: {notice.text}")
    return failure._replace(text=f"{failure.text}.")


def of_vcpu(worker: Worker, event: VcpuExited) -> Failure:
    """A vCPU left its run loop."""
    text = f"vCPU {event.vcpu} (worker pid {worker.pid}) left its run loop: {event.reason}. {event.text}"
    return Failure(Cause.VCPU, event.reason, text, event.code)


def report(failure: Failure, worker: Worker | None, console_tail: str) -> None:
    """Put everything into the log and into the stream of events."""
    LOG.error(failure.text)
    boxes: dict[str, JsonValue] = {}
    for vcpu in worker.assignment.vcpus if worker is not None else ():
        page = worker.run_page(vcpu) if worker is not None else None
        if page is not None:
            boxes[str(vcpu)] = describe_run_page(page)
            LOG.error(f"vCPU {vcpu}: {boxes[str(vcpu)]}")
    if console_tail:
        LOG.error(f"The console's last words: {console_tail!r}")
    EVENTS.emit(
        "worker-failed" if worker is not None else "microvm-failed",
        **({"worker": worker.index, "pid": worker.pid} if worker is not None else {}),
        **as_json(failure),
        black_box=boxes,
        console_tail=console_tail,
    )


def as_json(failure: Failure) -> dict[str, JsonValue]:
    """Return the fields that events carry."""
    return {"cause": failure.cause.value, "detail": failure.detail, "text": failure.text}
