"""The guest's agent, run on this host: over pipes, over a terminal, with a log that comes between its letters."""

from __future__ import annotations

import base64
import os
import pty
import random
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.client import ClientError
from lab.guest_agent import Agent, AgentError, build


class Descriptors:
    """A stream over two descriptors."""

    def __init__(self, to_agent: int, from_agent: int) -> None:
        self.to_agent, self.from_agent = to_agent, from_agent

    def send(self, text: str) -> None:
        os.write(self.to_agent, text.encode())

    def receive(self, seconds: float) -> str:
        if not select.select([self.from_agent], [], [], seconds)[0]:
            return ""
        data = os.read(self.from_agent, 65536)
        if not data:
            raise ClientError("the agent ended")
        return data.decode("latin-1")


class WithLog(Descriptors):
    """A log line may come anywhere between two letters, as on a microVM's output."""

    def __init__(self, to_agent: int, from_agent: int, seed: int) -> None:
        super().__init__(to_agent, from_agent)
        self._random = random.Random(seed)

    def receive(self, seconds: float) -> str:
        text = super().receive(seconds)
        for at in sorted((self._random.randrange(len(text) + 1) for _ in range(3)), reverse=True):
            line = self._random.choice(["2026-12-01T10:11:12.123456789 [a:main] said\n", '{"walls": "vmm"}\n'])
            text = text[:at] + line + text[at:]
        return text


@contextmanager
def agent_process(stream=Descriptors, *arguments) -> Iterator[Agent]:
    with subprocess.Popen([build()], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Agent(stream(process.stdin.fileno(), process.stdout.fileno(), *arguments))
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(30)


def test_output_and_status_come_back_apart():
    with agent_process() as agent:
        result = agent.run("echo out; echo err >&2; exit 7")
        assert result == (7, "out\n", "err\n")
        assert agent.must("printf 'no line end, ä'") == "no line end, ä"
        assert agent.run("kill -9 $$").status == 137
        assert agent.run("cat").status == 0  # standard input is empty
        with pytest.raises(AgentError, match="ended with 1 in the guest"):
            agent.must("false")


def test_commands_run_beside_each_other():
    with agent_process() as agent:
        waiting = agent.start("sleep 300; true")
        first, second = (agent.start(f"echo {word}") for word in ("first", "second"))
        assert agent.wait(second).stdout == "second\n"
        assert agent.wait(first).stdout == "first\n"
        agent.kill(waiting, 9)
        assert agent.wait(waiting).status == 137


def test_much_output_comes_whole():
    with agent_process() as agent:
        assert agent.must("yes 0123456789 | head -c 300000") == ("0123456789\n" * 30000)[:300000]


def test_what_a_command_left_running_holds_nothing_up():
    with agent_process() as agent:
        result = agent.run("sleep 300 & echo $!; yes & echo $!")
        left = [int(line) for line in result.stdout.splitlines() if line != "y"]
        for pid in left:
            os.kill(pid, 9)
        assert len(left) == 2
        assert agent.run("true").status == 0


def test_nothing_runs_on_when_the_host_has_gone():
    with agent_process() as agent:
        number = agent.start("echo $$; exec sleep 300")
        while not (said := agent.output_so_far(number)):
            pass
        shell = int(said)
    while os.path.exists(f"/proc/{shell}"):  # it is init that reaps it
        time.sleep(0.01)


def test_more_commands_than_it_holds_are_refused():
    with agent_process() as agent:
        held = [agent.start("sleep 300") for _ in range(16)]
        with pytest.raises(AgentError, match="too many commands run"):
            agent.run("true")
        for number in held:
            agent.kill(number, 9)
        assert {agent.wait(number).status for number in held} == {137}
        assert agent.run("true").status == 0


BAD_ORDERS = ["run 0 aGk=", "run 5 %%%", "nonsense", "kill 77 9", "run x aGk=", "x" * 70000]


@pytest.mark.parametrize("order", BAD_ORDERS, ids=[order[:12] for order in BAD_ORDERS])
def test_bad_orders_are_refused_and_harm_nothing(order):
    with subprocess.Popen([build()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        good = base64.b64encode(b"echo good").decode()
        process.stdin.write(f"{order}\nrun 9 {good}\nquit\n")
        process.stdin.flush()
        lines = process.stdout.read().splitlines()
        assert process.wait(30) == 0
    assert len([line for line in lines if line.startswith("CELLBLOCK-AGENT refused ")]) == 1, lines
    assert "CELLBLOCK-AGENT exit 9 0 5 0" in lines


@pytest.mark.parametrize("seed", range(20))
def test_a_log_between_its_letters(seed):
    with agent_process(WithLog, seed) as agent:
        for count in (1, 100, 5000):
            expected = "".join(f"{number}\n" for number in range(count))
            assert agent.must(f"seq 0 {count - 1}") == expected


def test_lost_output_is_noticed():
    class Lossy(Descriptors):
        def receive(self, seconds: float) -> str:
            lines = super().receive(seconds).splitlines(keepends=True)
            return "".join(line for line in lines if " out " not in line)

    with agent_process(Lossy) as agent, pytest.raises(AgentError, match="lost some"):
        agent.run("echo something")


def test_an_agent_of_another_version_is_told():
    class Old(Descriptors):
        def receive(self, seconds: float) -> str:
            return super().receive(seconds).replace("ready 1", "ready 0")

    with pytest.raises(AgentError, match="make its disk anew"), agent_process(Old):
        pass


def test_on_a_terminal_nothing_is_echoed_and_its_settings_come_back():
    ours, its = pty.openpty()
    before = subprocess.run(["stty", "-g"], stdin=its, capture_output=True, check=True).stdout
    with subprocess.Popen([build()], stdin=its, stdout=its) as process:
        stream = Descriptors(ours, ours)
        agent = Agent(stream)
        assert agent.run("printf 'a\\nb\\r\\n'; exit 2") == (2, "a\nb\r\n", "")
        agent.quit()
        assert process.wait(30) == 0
    assert subprocess.run(["stty", "-g"], stdin=its, capture_output=True, check=True).stdout == before
    os.close(its)
    os.close(ours)
