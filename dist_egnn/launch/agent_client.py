"""The launcher's side of an agent: sends it messages, and receives answers and events."""

from __future__ import annotations

import json
import queue
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any

from ..errors import Failure
from .agent import GREETING
from .hostfile import Host

PING_EVERY_S = 2.0
Events = queue.Queue[tuple["AgentClient", dict[str, Any]]]


class HostLost(Failure):
    """A host no longer answers, or does not reach another one."""


class AgentClient:
    """An agent on a host. Its events go to the queue ``events`` as (client, message).

    {"name", "line"}: a process printed a line; {"name", "exit"}: it ended; {"lost": True}: the agent ended, or was
    silent for ``patience`` seconds.
    """

    def __init__(self, host: Host, events: Events, patience: float) -> None:
        self.host, self.events, self.patience = host, events, patience
        self.alive, self.last_message, self.last_error = True, time.monotonic(), ""
        self.folder = ""  # of the agent's files
        self._pending: dict[int, Future[Any]] = {}
        self._count, self._lock = 0, threading.Lock()
        self._greeted = threading.Event()
        command = host.command(*host.module("launch.agent", str(patience)))
        try:  # in a session of its own: Ctrl-C is for the launcher alone
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
        except OSError as error:
            raise HostLost(f"host {host.name}: cannot start {host.reach[0]} ({error.strerror}); install it") from error
        functions = (self._read_messages, self._read_errors, self._ping)
        self._threads = [threading.Thread(target=function, daemon=True) for function in functions]
        for thread in self._threads:
            thread.start()

    def _read_messages(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # the output of a login script
                continue
            if not isinstance(message, dict):
                continue
            self.last_message = time.monotonic()
            if message.get("greeting") == GREETING:
                self.folder = message["folder"]
                self._greeted.set()
            elif "id" not in message:
                self.events.put((self, message))
            elif pending := self._pending.pop(message["id"], None):
                pending.set_result(message["answer"])
        self.alive = False
        self._greeted.set()
        for number in list(self._pending):
            self._fail(number)
        self.events.put((self, {"lost": True}))

    def _fail(self, number: int) -> None:
        if pending := self._pending.pop(number, None):
            pending.set_exception(ConnectionError())

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := line.decode(errors="replace").strip():
                self.last_error = f" ({text})"

    def _ping(self) -> None:
        """Show the agent regularly that the launcher is alive, whatever else it does."""
        while self.alive:
            time.sleep(PING_EVERY_S)
            if self._greeted.is_set():
                self.send("ping")

    def wait_for_greeting(self, timeout: float) -> None:
        """Wait until the agent runs. Raises HostLost if it does not."""
        if self._greeted.wait(timeout) and self.alive:
            return
        self.close()
        self._threads[1].join(1)  # read the last error
        host = self.host
        remedy = (
            f"check that `{host.reach[0]}` reaches it without a password and that {host.python} there has dist_egnn"
        )
        raise HostLost(f"host {host.name}: no agent answers{self.last_error}; {remedy}")

    def send(self, command: str, **arguments: Any) -> Future[Any]:
        """Send a message. `result` waits for the answer."""
        answer: Future[Any] = Future()
        assert self.process.stdin is not None
        with self._lock:
            self._count += 1
            self._pending[self._count] = answer
            try:
                self.process.stdin.write(json.dumps({"id": self._count, "do": command, **arguments}).encode() + b"\n")
                self.process.stdin.flush()
            except (OSError, ValueError):  # the pipe is broken, or closed
                self._fail(self._count)
        return answer

    def result(self, answer: Future[Any], timeout: float | None = None) -> Any:
        """Wait for an answer. Raises HostLost if the host does not give one, Failure for a problem that it reports."""
        try:
            content = answer.result(self.patience if timeout is None else timeout)
        except (TimeoutError, ConnectionError):
            raise HostLost(f"host {self.host.name}: does not answer any more{self.last_error}") from None
        if isinstance(content, dict) and "problem" in content:
            raise Failure(f"host {self.host.name}: {content['problem']}")
        return content

    def call(self, command: str, **arguments: Any) -> Any:
        """Send a message and wait for its answer."""
        return self.result(self.send(command, **arguments))

    def close(self) -> None:
        """End the agent, and with it all that it started on its host."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(15 if self.alive else 1)
        except TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.alive = False
