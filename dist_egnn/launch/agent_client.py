"""The launcher's end of an agent: messages there, answers and events back."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any

from ..errors import Failure
from .agent import GREETING
from .hostfile import Host

PING_EVERY_S = 2.0


class Lost(Failure):
    """A host does not answer any more."""


class Link:
    """An agent on a host. Events (a line of a process, its end, the agent's own end) go to ``events`` as (link, message)."""

    def __init__(self, host: Host, events: queue.Queue[tuple[Link, dict[str, Any]]], patience: float) -> None:
        self.host, self.events, self.patience = host, events, patience
        self.alive, self.heard, self.said = True, time.monotonic(), ""
        self._answers: dict[int, queue.Queue[Any]] = {}
        self._count, self._lock = 0, threading.Lock()
        self._greeted = threading.Event()
        try:
            self.process = subprocess.Popen(
                host.command(host.python, "-P", "-m", "dist_egnn.launch.agent"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launcher alone
            )
        except OSError as error:
            raise Lost(
                f"host {host.name}: {host.reach[0]} does not start ({error.strerror}); is it installed?"
            ) from error
        works = (self._read, self._read_errors, self._ping)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
                assert isinstance(message, dict)
            except (ValueError, AssertionError):  # what a login script prints
                continue
            self.heard = time.monotonic()
            if message.get("greeting") == GREETING:
                self._greeted.set()
            elif "id" in message:
                if waiting := self._answers.pop(message["id"], None):
                    waiting.put(message["answer"])
            else:
                self.events.put((self, message))
        self.alive = False
        self._greeted.set()
        for waiting in list(self._answers.values()):
            waiting.put({"lost": True})
        self.events.put((self, {"lost": True}))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said = line.decode(errors="replace").strip() or self.said

    def _ping(self) -> None:
        """Let the agent hear something now and then, whatever the launcher is busy with."""
        while self.alive:
            time.sleep(PING_EVERY_S)
            if self._greeted.is_set():
                self.send("ping")

    def greet(self, wait: float) -> None:
        """Wait for the agent's first word. Raises Lost where none comes."""
        if not self._greeted.wait(wait) or not self.alive:
            self.close()
            self._threads[1].join(1)  # what went wrong is said there
            said = f" ({self.said})" if self.said else ""
            raise Lost(
                f"host {self.host.name}: no agent answers{said}; check that `{self.host.reach[0]}` reaches it without a "
                f"password and that {self.host.python} there has dist_egnn"
            )
        self.send("greet", patience=self.patience)

    def send(self, what: str, **message: Any) -> queue.Queue[Any]:
        """Ask for something; the answer will be in the queue."""
        answer: queue.Queue[Any] = queue.Queue()
        assert self.process.stdin is not None
        try:
            with self._lock:
                self._count += 1
                self._answers[self._count] = answer
                self.process.stdin.write(json.dumps({"id": self._count, "do": what, **message}).encode() + b"\n")
                self.process.stdin.flush()
        except (OSError, ValueError):  # the pipe is broken, or closed
            answer.put({"lost": True})
        return answer

    def answer(self, waiting: queue.Queue[Any], wait: float | None = None) -> Any:
        """What came back. Raises Lost for a host that does not answer, Failure for a problem there."""
        try:
            found = waiting.get(timeout=self.patience if wait is None else wait)
        except queue.Empty:
            found = {"lost": True}
        if isinstance(found, dict) and found.get("lost"):
            raise Lost(f"host {self.host.name}: does not answer any more{f' ({self.said})' if self.said else ''}")
        if isinstance(found, dict) and "problem" in found:
            raise Failure(f"host {self.host.name}: {found['problem']}")
        return found

    def ask(self, what: str, wait: float | None = None, **message: Any) -> Any:
        """Send, and wait for the answer."""
        return self.answer(self.send(what, **message), wait)

    def listen(self) -> None:
        """Notice that the agent has fallen silent."""
        if self.alive and time.monotonic() - self.heard > self.patience:
            self.alive = False
            self.events.put((self, {"lost": True}))

    def close(self) -> None:
        """End the agent, and with it all that it started there."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(15 if self.alive else 1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.alive = False
