"""The processes of a launch on all hosts: started, listened to, stopped; and which of them is to blame when some end."""

from __future__ import annotations

import queue
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Failure
from ..utils import progress
from .agent_client import Link

GATHER_S = 3.0  # after a first process has gone wrong: the cause may be among those that follow
KEPT_LINES = 12
SERVER = "server"
CHATTER = re.compile(
    r"\[[\d:]+\] \S*/dgl/|Client \[\d+\] waits on|Machine \(\d+\) group"
)  # DGL's; kept for `last_words`


class Broken(Exception):
    """Something has failed in a way that a restart may mend. servers: whether they have to start again as well."""

    def __init__(self, cause: str, servers: bool = True) -> None:
        super().__init__(cause)
        self.servers = servers


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


class Crew:
    """Processes by (machine, name): "server", or "trainer R". asked: whether a person wants them to end in order."""

    def __init__(
        self, links: list[Link], events: queue.Queue[tuple[Link, dict[str, Any]]], asked: Callable[[], bool]
    ) -> None:
        self.links, self.events, self.asked = links, events, asked
        self.running: set[tuple[int, str]] = set()
        self.said: dict[tuple[int, str], deque[str]] = {}
        self.told = False  # that a person asked
        self.blamed: tuple[int, str] | None = None

    def start(self, machine: int, name: str, argv: list[str], text: str = "", shared: str = "") -> None:
        """text: its standard input; shared: how the files begin that it may leave in /dev/shm."""
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch warns of each address without a name
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", progress.EVENTS_VARIABLE: "1", **quiet}
        self.running.add((machine, name))
        self.said[machine, name] = deque(maxlen=KEPT_LINES)
        self.links[machine].ask("start", name=name, argv=argv, env=env, text=text, shared=shared)

    def of(self, servers: bool) -> set[tuple[int, str]]:
        """Those that run: servers, or trainers."""
        return {one for one in self.running if (one[1] == SERVER) == servers}

    def forget(self, machine: int) -> None:
        """A host is gone, and all that ran on it."""
        self.running = {one for one in self.running if one[0] != machine}

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        """The next event and its machine, None if there is none just now."""
        for link in self.links:
            link.listen()
        try:
            link, message = self.events.get(timeout=0.2)
        except queue.Empty:
            return None
        if link not in self.links:  # of an agent that was given up since
            return None
        machine = self.links.index(link)
        if "exit" in message:
            self.running.discard((machine, message["name"]))
        elif "lost" in message:
            self.forget(machine)
        return machine, message

    def lines(self, servers: bool, limit: float | None = None) -> Iterator[tuple[int, str]]:
        """(machine, line) of all that servers, or trainers, print, until none of them runs; each line is shown as well.

        Raises Failure where a process said what the user has to mend, Broken where one was lost or ``limit`` seconds went by.
        """
        until = None if limit is None else time.monotonic() + limit
        problems: list[tuple[int, str, int]] = []
        give_up = None
        while self.of(servers) and (give_up is None or time.monotonic() < give_up):
            if self.asked() and not self.told:
                self._tell()
            if until is not None and time.monotonic() > until:
                raise Broken(f"no {'server' if servers else 'trainer'} was ready within {limit:.0f} s")
            event = self._next()
            if event is None:
                continue
            machine, message = event
            if "line" in message:
                self._show(machine, message["name"], message["line"])
                if (message["name"] == SERVER) == servers:
                    yield machine, message["line"]
            elif "lost" in message:
                problems.append((machine, "", 0))
            elif message["exit"] or message["name"] == SERVER:
                problems.append((machine, message["name"], message["exit"]))
            if problems and give_up is None:
                give_up = time.monotonic() + GATHER_S
        if problems and not self.told:
            self._blame(problems)

    def _show(self, machine: int, name: str, line: str) -> None:
        if line.strip() and not line.startswith(progress.EVENT_PREFIX):
            self.said[machine, name].append(line)
            if not (CHATTER.match(line) or (name == SERVER and not line.startswith(("distegnn ", "error: ")))):
                say(f"{self.links[machine].host.name}| {line}")

    def _blame(self, problems: list[tuple[int, str, int]]) -> None:
        """Raise for the one that went wrong of itself: the others follow because they lost it."""

        def order(problem: tuple[int, str, int]) -> int:
            _, name, code = problem
            return (
                0 if code == 2 else 1 if not name else 2 if code < 0 and name != SERVER else 3 if name == SERVER else 4
            )

        machine, name, code = min(problems, key=order)
        host = f"host {self.links[machine].host.name}"
        self.blamed = machine, name
        if not name:
            raise Broken(f"{host}: does not answer any more")
        said = self.said[machine, name]
        if code == 2:
            error = next((line for line in reversed(said) if line.startswith("error: ")), "error: stopped")
            raise Failure(f"{host}: {error.removeprefix('error: ')}")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}{f', {said[-1]}' if said else ''}"
        raise Broken(f"{host}: {name} ended ({how})", servers=any(one == SERVER for _, one, _ in problems))

    def _tell(self) -> None:
        """Ask the trainers to write a checkpoint and leave."""
        self.told = True
        for machine, link in enumerate(self.links):
            link.send("stop", names=[name for m, name in self.of(servers=False) if m == machine], within=None)

    def stop(self, servers: bool, within: float = 0) -> None:
        """End processes everywhere, by force after ``within`` seconds, and wait until they are gone."""
        for machine, link in enumerate(self.links):
            names = [name for m, name in self.of(servers) if m == machine]
            if names and link.alive:
                link.send("stop", names=names, within=within)
        until = time.monotonic() + within + 10
        while self.of(servers) and time.monotonic() < until:
            event = self._next()
            if event and "line" in event[1]:
                self._show(event[0], event[1]["name"], event[1]["line"])

    def last_words(self) -> None:
        """What the one to blame said last."""
        if self.blamed is None or self.blamed not in self.said:
            return
        machine, name = self.blamed
        for line in self.said[self.blamed]:
            say(f"  {self.links[machine].host.name}, {name}, at last: {line}")
