"""The processes of a launch on all hosts: start them, read their output, stop them, and find the one that failed."""

from __future__ import annotations

import queue
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import Failure
from ..utils import progress
from .agent_client import AgentClient

GATHER_S = 3.0  # wait after the first failure: its cause may be among those that follow
RECENT_LINES = 12
SERVER = "server"
DGL_MESSAGES = re.compile(r"\[[\d:]+\] \S*/dgl/|Client \[\d+\] waits on|Machine \(\d+\) group")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns of every address without a host name
    progress.EVENTS_VARIABLE: "1",
}
Worker = tuple[int, str]  # number of the machine; "server" or "trainer R"


class WorkerFailure(Exception):
    """Processes failed in a way that a restart may fix. servers: whether the servers have to start again too."""

    def __init__(self, cause: str, servers: bool = True) -> None:
        super().__init__(cause)
        self.servers = servers


class Problem(NamedTuple):
    """The end of a process; with an empty name the loss of a host."""

    machine: int
    name: str
    code: int

    def priority(self) -> int:
        """The lower, the closer to the cause: the other processes end because they lost a peer."""
        if self.code == 2:  # it printed an error that the user has to fix
            return 0
        if not self.name:
            return 1
        if self.name == SERVER:
            return 3
        return 2 if self.code < 0 else 4


def announce(text: str) -> None:
    """Print a line for the user at the terminal."""
    print(text, file=sys.stderr, flush=True)


class Workers:
    """All processes of a launch. stop_requested: whether the user wants the trainers to end after a checkpoint."""

    def __init__(self, clients: list[AgentClient], stop_requested: Callable[[], bool]) -> None:
        self.clients, self.events, self.stop_requested = clients, clients[0].events, stop_requested
        self.running: set[Worker] = set()
        self.recent: dict[Worker, deque[str]] = {}
        self.stopping = False  # whether the trainers were asked to end
        self.failed: Worker | None = None

    def start(self, machine: int, name: str, argv: list[str], text: str = "", shared: str = "") -> None:
        """Start a process. text: its standard input; shared: prefix of the files that it may leave in /dev/shm."""
        self.running.add((machine, name))
        self.recent[machine, name] = deque(maxlen=RECENT_LINES)
        self.clients[machine].call("start", name=name, argv=argv, env=ENVIRONMENT, text=text, shared=shared)

    def select(self, servers: bool) -> set[Worker]:
        """The running servers, or the running trainers."""
        return {worker for worker in self.running if (worker[1] == SERVER) == servers}

    def forget(self, machine: int) -> None:
        """Drop all processes of a host that is lost."""
        self.running = {worker for worker in self.running if worker[0] != machine}

    def _next_event(self) -> tuple[int, dict[str, Any]] | None:
        """The next event with the number of its machine; None if none comes for a while."""
        for client in self.clients:
            client.check_alive()
        try:
            client, message = self.events.get(timeout=0.2)
        except queue.Empty:
            return None
        if client not in self.clients:  # it was replaced since
            return None
        machine = self.clients.index(client)
        if "exit" in message:
            self.running.discard((machine, message["name"]))
        elif "lost" in message:
            self.forget(machine)
        return machine, message

    def lines(self, servers: bool, limit: float | None = None) -> Iterator[tuple[int, str]]:
        """(machine, line) of all that servers, or trainers, print until all of them have ended; prints the lines too.

        Raises Failure for an error that the user has to fix, WorkerFailure if one fails or ``limit`` seconds pass.
        """
        end = None if limit is None else time.monotonic() + limit
        problems: list[Problem] = []
        gather_until = None
        while self.select(servers) and (gather_until is None or time.monotonic() < gather_until):
            if self.stop_requested() and not self.stopping:
                self._request_stop()
            if end is not None and time.monotonic() > end:
                raise WorkerFailure(f"no {'server' if servers else 'trainer'} was ready within {limit:.0f} s")
            event = self._next_event()
            if event is None:
                continue
            machine, message = event
            if "line" in message:
                self._print_line(machine, message["name"], message["line"])
                if (message["name"] == SERVER) == servers:
                    yield machine, message["line"]
            elif "lost" in message:
                problems.append(Problem(machine, "", 0))
            elif message["exit"] or message["name"] == SERVER:
                problems.append(Problem(machine, message["name"], message["exit"]))
            if problems and gather_until is None:
                gather_until = time.monotonic() + GATHER_S
        if problems and not self.stopping:
            self._raise_cause(problems)

    def _print_line(self, machine: int, name: str, line: str) -> None:
        if not line.strip() or line.startswith(progress.EVENT_PREFIX):
            return
        self.recent[machine, name].append(line)
        from_library = name == SERVER and not line.startswith(("distegnn ", "error: "))
        if not from_library and not DGL_MESSAGES.match(line):
            announce(f"{self.clients[machine].host.name}| {line}")

    def _raise_cause(self, problems: list[Problem]) -> None:
        """Raise Failure or WorkerFailure for the process that failed first."""
        machine, name, code = min(problems, key=Problem.priority)
        host = f"host {self.clients[machine].host.name}"
        self.failed = machine, name
        if not name:
            raise WorkerFailure(f"{host}: does not answer any more")
        recent = self.recent[machine, name]
        if code == 2:
            error = next((line for line in reversed(recent) if line.startswith("error: ")), "error: stopped")
            raise Failure(f"{host}: {error.removeprefix('error: ')}")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}{f', {recent[-1]}' if recent else ''}"
        raise WorkerFailure(f"{host}: {name} ended ({how})", servers=any(p.name == SERVER for p in problems))

    def _send_stop(self, servers: bool, within: float | None) -> None:
        for machine, client in enumerate(self.clients):
            names = [name for number, name in self.select(servers) if number == machine]
            if names and client.alive:
                client.send("stop", names=names, within=within)

    def _request_stop(self) -> None:
        """Ask the trainers to write a checkpoint and end."""
        self.stopping = True
        self._send_stop(servers=False, within=None)

    def stop(self, servers: bool, within: float = 0) -> None:
        """End servers or trainers, by SIGKILL after ``within`` seconds, and wait until they are gone."""
        self._send_stop(servers, within)
        end = time.monotonic() + within + 10
        while self.select(servers) and time.monotonic() < end:
            event = self._next_event()
            if event and "line" in event[1]:
                self._print_line(event[0], event[1]["name"], event[1]["line"])

    def print_recent_lines(self) -> None:
        """Print the last lines of the process that failed."""
        if self.failed is None or self.failed not in self.recent:
            return
        machine, name = self.failed
        for line in self.recent[self.failed]:
            announce(f"  {self.clients[machine].host.name}, {name}, last output: {line}")
