"""A machine of several workers without a process: the product's tables, a bad network, and a seeded schedule.

Messages are lost, late and doubled; workers stop (SIGSTOP), go on, die and refuse at any time; a client pauses, resumes
and replaces. What is not simulated: KVM, and how a message looks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush

from vcpu_worker import lifecycle as worker_side
from vcpu_worker.errors import StateError as Refused
from vcpu_worker.lifecycle import Event, State
from vmm.cells.lifecycle import ALIVE, SECOND_NS, WorkerEvent, WorkerState, next_state
from vmm.errors import StateError
from vmm.operations.run import (
    NOBODY,
    Action,
    Await,
    Command,
    Commit,
    Dismiss,
    MachineLifecycle,
    Member,
    Outcome,
    Settle,
)
from vmm.operations.tables import PAUSE, REPLACE, RESUME, MachineState, Procedure, StepName

BEAT = 60 * SECOND_NS
#: The one command that is no step.
PING = None
#: No operation may take longer: the deadlines of all of its steps, and of those that roll it back.
LONGEST = 400 * SECOND_NS
_COMMANDS = {
    StepName.CONFIGURE: Event.CONFIGURE,
    StepName.PARK: Event.PAUSE,
    StepName.PARK_GHOSTS: Event.PARK_GHOSTS,
    StepName.VERIFY: Event.PARK_GHOSTS,
    StepName.HAND_OVER: Event.HAND_OVER,
    StepName.SAVE: Event.SAVE,
    StepName.LOAD: Event.LOAD,
    StepName.TAKE_OVER: Event.TAKE_OVER,
    StepName.ROLL_BACK: Event.ROLL_BACK,
    StepName.RESUME: Event.RESUME,
}
#: What the controller notes when a step was confirmed, and when it is told.
_CONFIRMED = {
    StepName.CONFIGURE: WorkerEvent.CONFIGURED,
    StepName.PARK: WorkerEvent.PAUSED,
    StepName.SAVE: WorkerEvent.SAVED,
    StepName.ROLL_BACK: WorkerEvent.PAUSED,
    StepName.TAKE_OVER: WorkerEvent.LOADED,
    StepName.RESUME: WorkerEvent.RESUMED,
}
RUNS = (State.RUNNING, State.PAUSING)


class Disagreement(AssertionError):
    """The machine broke a promise."""


class Worker:
    """A worker process as the tables have it, and the controller's note of it."""

    def __init__(self, world: World, index: int, note: WorkerState, state: State) -> None:
        self.world = world
        self.index = index
        self.note = note
        self.state = state
        self.alive = True
        self.dismissed = False
        self.has_irqfds = state is State.PAUSED
        self.stopped_until = 0
        self.last_sent = self.last_received = 0
        self.back_sent = self.back_received = 0
        self.ping_pause = BEAT
        self._when_parked: list[Callable[[], None]] = []
        self._runs_on = False

    def move(self, event: WorkerEvent) -> None:
        """The controller notes something."""
        self.note = next_state(self.note, event)

    def obey(self, command: StepName, reply: Callable[[str], None]) -> None:
        """A command arrives."""
        event = _COMMANDS[command]
        try:
            before, after = self.state, worker_side.next_state(self.state, event)
        except Refused as error:
            reply(str(error))
            return
        self._become(after)
        if event in (Event.TAKE_OVER, Event.ROLL_BACK):
            self.world.assigns(self)
        self.has_irqfds = event is not Event.HAND_OVER and (self.has_irqfds or event is Event.TAKE_OVER)
        if event is Event.CONFIGURE:
            self._become(worker_side.next_state(self.state, Event.CONFIGURED_TO_GO_ON))
            reply("")
        elif event is Event.PAUSE and after is State.PAUSING:
            self._when_parked.append((lambda: self.obey(command, reply)) if self._runs_on else lambda: reply(""))
            if before is State.RUNNING:
                self.world.later(self.world.pause(self.world.slow_parks), self.parked)
        elif event is Event.RESUME and after is State.PAUSING:
            self._runs_on = True
            self._when_parked.append(lambda: self.obey(command, reply))
        else:
            reply("")

    def parked(self) -> None:
        """Its vCPUs have left the guest."""
        if not self.alive:
            return
        if self.world.now < self.stopped_until:
            self.world.at(self.stopped_until, self.parked)
            return
        self._become(worker_side.next_state(self.state, Event.PARKED))
        waiting, self._when_parked, self._runs_on = self._when_parked, [], False
        for each in waiting:
            each()

    def end(self) -> None:
        """Its process is gone."""
        self.alive = False

    def _become(self, state: State) -> None:
        if state is State.RUNNING and self.state is not State.RUNNING:
            self.world.starts(self)
        self.state = state


class World:
    """One schedule: what goes wrong in it, and how often, is drawn from its seed."""

    def __init__(self, seed: int, workers: int = 8) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        chance = self.random.choice
        self.loss = chance((0.0, 0.0, 0.01, 0.1))
        self.doubles = chance((0.0, 0.05))
        self.slow = chance((0.0, 0.01, 0.1))
        self.slow_parks = chance((0.0, 0.05))
        self.refusals = chance((0.0, 0.0, 0.02))
        self.stops = chance((0, 0, 1, 3))
        self.deaths = chance((0, 0, 0, 1, 2))
        self.now = 1
        self.order = 0
        self.heap: list[tuple[int, int, Callable[[], None]]] = []
        self.machine = MachineLifecycle(list(range(workers)))
        self.workers = [Worker(self, index, WorkerState.CONFIGURED, State.PAUSED) for index in range(workers)]
        self.successor: Worker | None = None
        self.everyone = list(self.workers)
        self.healed = False
        self.outcomes: list[Outcome] = []
        self.settled = True
        self.messages = 0

    # ------------------------------------------------------------ time

    def at(self, when: int, what: Callable[[], None]) -> None:
        self.order += 1
        heappush(self.heap, (max(when, self.now), self.order, what))

    def later(self, pause: int, what: Callable[[], None]) -> None:
        self.at(self.now + pause, what)

    def pause(self, slow: float | None = None) -> int:
        """How long something takes: mostly a little, sometimes longer than anyone waits."""
        if not self.healed and self.random.random() < (self.slow if slow is None else slow):
            return self.random.randrange(120 * SECOND_NS)
        return self.random.randrange(5_000_000)

    def run(self, until: Callable[[], bool], limit: int) -> bool:
        end = self.now + limit
        while not until():
            if not self.heap or self.heap[0][0] > end:
                self.now = end
                return until()
            self.now, _, what = heappop(self.heap)
            what()
        return True

    # ------------------------------------------------------------ the network

    def _pass(self, deliver: Callable[[], None]) -> None:
        self.messages += 1
        if not self.healed and self.random.random() < self.loss:
            return
        self.later(self.pause(), deliver)
        if not self.healed and self.random.random() < self.doubles:
            self.later(self.pause(), deliver)

    def send(self, worker: Worker, command: StepName | None, deadline: int, answered: Callable[[str], None]) -> None:
        """Controller → worker; the channel refuses what is double or was overtaken, the worker what is too late."""
        worker.last_sent += 1
        number = worker.last_sent

        def arrive() -> None:
            if not worker.alive:
                return
            if self.now < worker.stopped_until:
                self.at(worker.stopped_until, arrive)
                return
            if number <= worker.last_received:
                return
            worker.last_received = number
            if deadline and self.now > deadline:
                return
            if command is None:
                reply(worker.state.value)
            elif not self.healed and command is not StepName.RESUME and self.random.random() < self.refusals:
                reply("cannot")
            else:
                worker.obey(command, reply)

        def reply(text: str) -> None:
            worker.back_sent += 1
            back = worker.back_sent

            def back_arrives() -> None:
                if back > worker.back_received:
                    worker.back_received = back
                    answered(text)

            self._pass(back_arrives)

        self._pass(arrive)

    # ------------------------------------------------------------ the shell

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Command):
                self.command(action)
            elif isinstance(action, Await):
                turn = action.turn
                self.later(action.nanoseconds, lambda turn=turn: self.act(self.machine.expired(turn)))  # type: ignore[misc]
            elif isinstance(action, Commit):
                assert self.successor is not None
                self.workers[action.worker].move(WorkerEvent.REPLACED)
                self.predecessor, self.workers[action.worker], self.successor = (
                    self.workers[action.worker],
                    self.successor,
                    None,
                )
            elif isinstance(action, Dismiss):
                self.dismiss(action.member)
            else:
                assert isinstance(action, Settle)
                self.outcomes.append(action.outcome)
                self.settled = True

    def command(self, action: Command) -> None:
        member, step, turn = action
        if step.name is StepName.AWAIT_END:
            self.await_end(member, turn)
            return
        if member == NOBODY:
            self.later(self.pause(), lambda: self.act(self.machine.answered(member, turn)))
            return
        if step.name is StepName.FORK:
            worker = self.successor = Worker(self, member.worker, WorkerState.SPAWNED, State.CREATED)
            self.everyone.append(worker)

            def greets() -> None:
                if worker.alive and worker.note is WorkerState.SPAWNED:
                    worker.move(WorkerEvent.HELLO)
                    self.act(self.machine.answered(member, turn))

            self.later(self.pause(), greets)
            return
        found = self._find(member)
        if step.name is StepName.RESUME and found in self.workers:
            found.move(WorkerEvent.START)
        deadline = 0 if step.name is StepName.RESUME else self.now + step.deadline_ns

        def answered(refusal: str) -> None:
            event = _CONFIRMED.get(step.name)
            if found.note not in ALIVE or found.dismissed:
                return
            if not refusal and event is not None:
                found.move(event)
            self.act(self.machine.answered(member, turn, refusal))

        self.send(found, step.name, deadline, answered)

    def _find(self, member: Member) -> Worker:
        run = self.machine.current
        if run is not None and run.committed and member == Member(run.predecessor):
            return self.predecessor
        return self.successor if member.successor and self.successor is not None else self.workers[member.worker]

    def await_end(self, member: Member, turn: int) -> None:
        """Wait until the successor, which was dismissed, is gone."""
        if self.everyone[-1].alive:
            self.later(10_000_000, lambda: self.await_end(member, turn))
        else:
            self.act(self.machine.answered(member, turn))

    def dismiss(self, member: Member) -> None:
        worker = self.successor if member.successor else self.predecessor
        if member.successor:
            self.successor = None
        if worker is not None:
            worker.dismissed = True
            self.later(self.random.randrange(400_000_000), worker.end)  # asked to finish, then killed

    def beat(self, worker: Worker) -> None:
        """Ask for a sign of life; less and less often while there is none."""
        if not worker.alive or worker.note not in ALIVE:
            return

        def pong(text: str) -> None:
            worker.ping_pause = BEAT
            if worker in self.workers and self.machine.must_resume(text):
                self.send(worker, StepName.RESUME, 0, lambda refusal: None)

        self.send(worker, PING, 0, pong)
        self.later(worker.ping_pause, lambda: self.beat(worker))
        worker.ping_pause = min(2 * worker.ping_pause, 4 * BEAT)

    # ------------------------------------------------------------ what happens to workers

    def starts(self, worker: Worker) -> None:
        """A worker runs its vCPUs: nobody else may, and nobody may have been told that it does not any more."""
        others = [each for each in self.everyone if each is not worker and each.index == worker.index]
        if any(each.alive and each.state in RUNS for each in others):
            raise Disagreement(f"seed {self.seed}: two workers run the vCPUs of index {worker.index}")
        if self.workers[worker.index] is not worker:
            raise Disagreement(
                f"seed {self.seed}: a worker runs that does not run the vCPUs of index {worker.index} any more"
            )
        if self.machine.state is MachineState.PAUSED and self.machine.current is None:
            raise Disagreement(f"seed {self.seed}: a vCPU runs although the machine is paused")

    def assigns(self, worker: Worker) -> None:
        """A worker binds its place's eventfds, each of which serves one VM."""
        worker.has_irqfds = True
        for each in self.everyone:
            if each is not worker and each.index == worker.index and each.alive and each.has_irqfds:
                raise Disagreement(f"seed {self.seed}: two VMs have the irqfds of index {worker.index}")

    def stop(self) -> None:
        worker = self.random.choice(self.everyone)
        if not self.healed:
            worker.stopped_until = self.now + self.random.randrange(90 * SECOND_NS)

    def die(self) -> None:
        worker = self.random.choice(self.everyone)
        if self.healed or not worker.alive:
            return
        worker.alive = False
        self.later(self.random.randrange(2_000_000), lambda: self.reaped(worker))

    def reaped(self, worker: Worker) -> None:
        """The supervisor says that it has ended: such a notice is never lost."""
        if worker.note in ALIVE:
            worker.move(WorkerEvent.DIED)
        if worker is self.successor:
            self.act(self.machine.lost(Member(worker.index, successor=True), "died"))
        elif worker is self.workers[worker.index]:
            run = self.machine.current
            took_over = run is not None and run.committed and run.predecessor == worker.index
            self.act(self.machine.lost(Member(worker.index, successor=took_over), "died"))
            if self.machine.current is None and self.machine.state is not MachineState.ENDED:
                raise Disagreement(f"seed {self.seed}: the machine goes on without a worker")

    # ------------------------------------------------------------ the client

    def operate(self, procedure: Procedure, predecessor: int = -1) -> None:
        before = self.machine.state
        try:
            actions = self.machine.begin(procedure, predecessor)
        except StateError:
            if self.machine.state is not before:
                raise Disagreement(f"seed {self.seed}: an operation that was refused has changed something") from None
            return
        self.settled = False
        self.act(actions)
        if not self.run(lambda: self.settled, LONGEST):
            raise Disagreement(f"seed {self.seed}: {procedure.name} neither succeeds nor fails: deadlock")
        if self.outcomes[-1] is Outcome.UNDONE and self.machine.state is not before:
            raise Disagreement(f"seed {self.seed}: {procedure.name} was rolled back and has changed something")

    def simulate(self, operations: int = 5) -> None:
        """Run the schedule. Raises Disagreement."""
        for worker in self.workers:
            self.later(self.random.randrange(BEAT), lambda worker=worker: self.beat(worker))  # type: ignore[misc]
        span = 60 * SECOND_NS
        for _ in range(self.stops):
            self.at(self.random.randrange(span), self.stop)
        for _ in range(self.deaths):
            self.at(self.random.randrange(span), self.die)
        self.operate(RESUME)
        for _ in range(operations):
            self.run(lambda: False, self.random.randrange(2 * SECOND_NS))
            procedure = self.random.choice((PAUSE, RESUME, REPLACE, REPLACE))
            self.operate(procedure, self.random.randrange(len(self.workers)) if procedure is REPLACE else -1)
        self.healed = True
        for worker in self.everyone:
            worker.stopped_until = min(worker.stopped_until, self.now)
        for worker in self.workers:  # one that had replaced another has no heart beat of its own yet
            worker.ping_pause = BEAT
            self.beat(worker)
        self.run(lambda: False, 125 * SECOND_NS)
        self.check()

    def check(self) -> None:
        """At the end all agree."""
        if self.machine.state is MachineState.ENDED:
            return  # the shell ends everybody
        if self.machine.current is not None:
            raise Disagreement(f"seed {self.seed}: an operation is still going on")
        wanted = State.RUNNING if self.machine.state is MachineState.RUNNING else State.PAUSED
        for worker in self.workers:
            if not worker.alive or worker.state is not wanted:
                raise Disagreement(
                    f"seed {self.seed}: the machine is {self.machine.state.value}, worker {worker.index} "
                    f"{worker.state.value if worker.alive else 'dead'}"
                )
        for worker in self.everyone:
            if worker.alive and worker not in self.workers:
                raise Disagreement(f"seed {self.seed}: a worker of index {worker.index} was left behind")


def run(seed: int, **knobs: float) -> World:
    """Run one schedule; return its world. ``knobs`` are attributes of it that are set instead of drawn."""
    world = World(seed)
    for name, value in knobs.items():
        setattr(world, name, value)
    world.simulate()
    return world
