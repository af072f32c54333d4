"""The handshake of a worker or device cell: its endpoint and channels, spawn, HELLO and WELCOME, what ends the talk."""

from __future__ import annotations

import select
import time

import zmq

from base.event_manager import EventManager, EventOps, Events
from base.lean_std import socket
from base.lean_typing import Any, Callable
from ipc.channel import Channel, PairChannel
from ipc.errors import IpcError
from ipc.launch_plan import Assignment, LaunchPlan, endpoint
from ipc.schema import Schema
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.process import CellProcess
from vmm.cells.replies import Replies
from vmm.cells.supervisor import SupervisorClient
from vmm.errors import StateError, SupervisorError, VmmError


class CellHandshake(CellProcess):
    """A process that one can talk with."""

    #: Messages of its control channel, of its descriptor channel, and what its HELLO is answered with.
    SCHEMA: Schema
    DESCRIPTORS: Schema
    WELCOME: Any
    #: What is raised when it does not do what it should.
    ERROR: type[VmmError]

    def __init__(
        self,
        index: int,
        plan: LaunchPlan,
        context: zmq.Context[Any],
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        super().__init__(index, events, supervisor)
        #: Called with the cell and why it failed, before its process has ended.
        self.on_failed: Callable[[Any, str], None]
        self._plan = plan
        self._context = context
        self._channel: Channel | None = None
        self._descriptors: PairChannel | None = None
        self._subscription = 0
        #: What came is being read, further up on the stack.
        self._receiving = False
        self._replies = Replies()

    # ------------------------------------------------------------ spawn and handshake

    def bind(self) -> None:
        """Make the endpoint that the cell will connect to. Raises ``ERROR``."""
        self._release()
        path = endpoint(self._plan.controller_ipc_directory, self.ROLE, self.index)
        self._channel = Channel(self._context, self.SCHEMA, self._plan.epoch)
        try:
            self._channel.bind(path, self._plan.peers(self.ROLE, self.index))
        except IpcError as error:
            self._release()
            raise self.ERROR(f"{self.title} cannot be started: {error}") from None
        self._subscription = self._events.add_subscriber(self)

    def spawn(self, assignment: Assignment | None = None) -> None:
        """Ask the supervisor for the process; does not wait, a refusal shows in :meth:`wait_greeted`.

        Raises ``ERROR`` or SupervisorError when it cannot even be asked.
        """
        if self._channel is None:
            self.bind()
        self.assignment = assignment or self.assignment
        self._submit_spawn()

    def _take_descriptor_channel(self, pair: socket.socket) -> None:
        pair.setblocking(False)  # a worker that does not read must not stop us
        self._descriptors = PairChannel(pair, self.DESCRIPTORS, self._plan.epoch)

    def handshake_is_over(self) -> bool:
        """Look whether the worker has said HELLO by now, or never will (:meth:`handshake_refusal`)."""
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()
            except SupervisorError:
                return True
        if self.state is WorkerState.GREETED:
            return not self._spawn_request
        return self.state is not WorkerState.SPAWNED

    def handshake_refusal(self) -> str:
        """Say why the worker never will say HELLO, or nothing."""
        return "" if self.state is WorkerState.GREETED else str(self.error())

    def wait_greeted(self) -> None:
        """Wait until the cell has said HELLO. Raises ``ERROR`` or SupervisorError."""
        deadline = time.monotonic_ns() + DEADLINES[WorkerState.SPAWNED].nanoseconds
        self._events.run_until(self._spawn_answered, deadline)
        if self._spawn_request:
            self._collect_spawn()

        def settled() -> bool:
            return self.state is not WorkerState.SPAWNED or self._supervisor.closed

        self._events.run_until(settled, deadline)
        if self._supervisor.closed:
            raise SupervisorError("The supervisor is gone.")
        if self.state is WorkerState.SPAWNED:
            self.expire()
        if self.state is not WorkerState.GREETED:
            raise self.error()

    def _is_hello(self, message: Any) -> bool:
        """Tell whether a message is the HELLO of such a cell."""
        raise NotImplementedError

    def _refuse_hello(self, hello: Any) -> str:
        """Take in what HELLO says; return why such a cell cannot be used, or nothing."""
        raise NotImplementedError

    def _greet(self, hello: Any) -> None:
        assert self._channel is not None
        if hello[0] != self.index or self.state is not WorkerState.SPAWNED:
            self.breach("HELLO of another cell, or a second one")
            return
        if refusal := self._refuse_hello(hello):
            self._fail(refusal)
            return
        self._channel.unlink()
        self._move(WorkerEvent.HELLO)
        try:
            self._channel.send(self.WELCOME)
        except IpcError:
            pass  # it has died since, or will: the supervisor says how

    # ------------------------------------------------------------ event loop

    def init(self, ops: EventOps) -> None:
        """Subscriber: watch the control channel."""
        assert self._channel is not None
        # ZeroMQ's descriptor is edge-triggered by nature: it becomes readable when its state may have changed.
        ops.add(self._channel.fileno(), select.EPOLLIN)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: read everything that came on the control channel."""
        self._receive()

    def _receive(self) -> None:
        # What an honest worker sends is bounded by what it was asked; anything else is a breach, which closes the
        # channel: so this ends, however fast a worker sends.
        outer, self._receiving = self._receiving, True
        try:
            while self._channel is not None:
                envelope = self._channel.receive(time.monotonic_ns())
                if envelope is None:
                    return
                if not envelope.reply_to:
                    self._handle_event(envelope.message)
                elif not self._replies.arrive(envelope.reply_to, envelope.message):
                    self.breach(f"{type(envelope.message).__name__} in answer to nothing")
        except (IpcError, StateError) as error:
            self.breach(str(error))
        finally:
            self._receiving = outer

    def _handle_event(self, message: Any) -> None:
        if self._is_hello(message):
            self._greet(message)
        else:
            self.breach(f"{type(message).__name__} that nobody asked for")

    # ------------------------------------------------------------ failure

    def breach(self, text: str) -> None:
        """The worker broke the protocol: it is not believed any more, and killed."""
        self._fail(f"{self.title} broke the protocol: {text}.")

    def expire(self) -> None:
        """The deadline of its state is over: it is killed."""
        limit = DEADLINES[self.state]
        if self.state is WorkerState.SPAWNED:
            seconds = f"{limit.nanoseconds / SECOND_NS:g} s"
            self._fail(f"{self.title} {limit.text} within {seconds}.", WorkerEvent.EXPIRED)
        else:
            self._move(WorkerEvent.EXPIRED)
            self.kill()

    def _fail(self, text: str, event: WorkerEvent = WorkerEvent.BREACH) -> None:
        if self.failure or not self.alive:
            return
        self.failure = text
        self._move(event)
        self._close_channel()
        self.kill()
        self.on_failed(self, text)

    def error(self) -> VmmError:
        """Return what to raise where the worker cannot do what is asked, as precisely as we know."""
        return self.ERROR(self.failure or f"{self.name} {self.ended_how()}.")

    def _close_channel(self) -> None:
        if self._subscription:
            self._events.remove_subscriber(self._subscription)
            self._subscription = 0
        if self._channel is not None:
            self._channel.close()
            self._channel = None
