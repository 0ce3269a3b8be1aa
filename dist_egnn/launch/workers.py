"""The processes of a launch on all hosts: start them, read their output, stop them, and find the one that failed."""

from __future__ import annotations

import queue
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from math import inf
from typing import Any

from ..errors import Failure
from ..utils import progress, signals
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
Problem = tuple[int, str, int]  # number of the machine; process, empty if the whole host is lost; exit code


class WorkerFailure(Exception):
    """Processes failed in a way that a restart may fix. servers: whether the servers have to start again too."""

    def __init__(self, cause: str, servers: bool = True) -> None:
        super().__init__(cause)
        self.servers = servers


def announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Workers:
    """All processes of a launch."""

    def __init__(self, clients: list[AgentClient]) -> None:
        self.clients, self.events = clients, clients[0].events
        self.running: set[Worker] = set()
        self.recent: dict[Worker, deque[str]] = {}
        self.shared: dict[int, set[str]] = {}  # machine → prefixes of what its servers may have left in /dev/shm
        self.stopping = False  # whether the trainers were asked to end
        self.failed: Worker = 0, ""

    def start(self, machine: int, name: str, argv: list[str], text: str = "", shared: str = "") -> None:
        """Start a process. text: its standard input; shared: prefix of the files that it may leave in /dev/shm."""
        self.running.add((machine, name))
        self.recent[machine, name] = deque(maxlen=RECENT_LINES)
        self.shared.setdefault(machine, set()).update({shared} - {""})
        self.clients[machine].call("start", name=name, argv=argv, env=ENVIRONMENT, text=text, shared=shared)

    def select(self, servers: bool) -> set[Worker]:
        return {worker for worker in self.running if (worker[1] == SERVER) == servers}

    def forget(self, machine: int) -> None:
        self.running = {worker for worker in self.running if worker[0] != machine}

    def _next_event(self) -> tuple[int, dict[str, Any]] | None:
        """Wait a while for an event and process it. Returns it with the number of its machine, or None."""
        for client in self.clients:
            if client.alive and time.monotonic() - client.last_message > client.patience:
                client.alive = False
                self.events.put((client, {"lost": True}))
        try:
            client, message = self.events.get(timeout=0.2)
            machine = self.clients.index(client)
        except (queue.Empty, ValueError):  # no event, or one of a client that was replaced since
            return None
        if "line" in message:
            self._print_line(machine, message["name"], message["line"])
        elif "exit" in message:
            self.running.discard((machine, message["name"]))
            if message["name"] == SERVER:
                self.shared.pop(machine, None)  # the agent has removed it
        elif "lost" in message:
            self.forget(machine)
        return machine, message

    def lines(self, servers: bool, limit: float = inf) -> Iterator[tuple[int, str]]:
        """(machine, line) of all that servers, or trainers, print until all of them have ended; prints the lines too.

        Raises Failure for an error that the user has to fix, WorkerFailure if one fails or ``limit`` seconds pass.
        """
        end, gather_until = time.monotonic() + limit, inf
        problems: list[Problem] = []
        while self.select(servers) and time.monotonic() < gather_until:
            if signals.stop_requested() and not self.stopping:
                self.stopping = True
                self.stop(servers=False, within=None, wait=False)  # they write a checkpoint and end
            if time.monotonic() > end:
                raise WorkerFailure(f"no {'server' if servers else 'trainer'} was ready within {limit:.0f} s")
            event = self._next_event()
            if event is None:
                continue
            machine, message = event
            if "line" in message:
                if (message["name"] == SERVER) == servers:
                    yield machine, message["line"]
            elif "lost" in message or message["exit"] or message["name"] == SERVER:
                problems.append((machine, message.get("name", ""), message.get("exit", 0)))
                gather_until = min(gather_until, time.monotonic() + GATHER_S)
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
        """Raise Failure or WorkerFailure for the cause: most processes end because they lost a peer."""

        def rank(problem: Problem) -> int:
            _, name, code = problem
            user_error, host_lost, server = code == 2, not name, name == SERVER
            return [user_error, host_lost, code < 0 and not server, server, True].index(True)

        machine, name, code = min(problems, key=rank)
        host = f"host {self.clients[machine].host.name}"
        self.failed = machine, name
        if not name:
            raise WorkerFailure(f"{host}: does not answer any more")
        recent = self.recent[machine, name]
        if code == 2:
            error = next((line for line in reversed(recent) if line.startswith("error: ")), "error: stopped")
            raise Failure(f"{host}: {error.removeprefix('error: ')}")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}{f', {recent[-1]}' if recent else ''}"
        raise WorkerFailure(f"{host}: {name} ended ({how})", servers=any(name == SERVER for _, name, _ in problems))

    def stop(self, servers: bool, within: float | None = 0, wait: bool = True) -> None:
        """End servers or trainers, by SIGKILL after ``within`` seconds (None: never), and wait until they are gone."""
        for machine, name in self.select(servers):
            if self.clients[machine].alive:
                self.clients[machine].send("stop", name=name, within=within)
        end = time.monotonic() + (within or 0) + 10
        while wait and self.select(servers) and time.monotonic() < end:
            self._next_event()

    def print_recent_lines(self) -> None:
        machine, name = self.failed
        for line in self.recent.get(self.failed, ()):
            announce(f"  {self.clients[machine].host.name}, {name}, last output: {line}")
