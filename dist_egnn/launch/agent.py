"""What `distegnn launch` runs on every host: it looks around, starts processes, passes on what they print, and stops them.

The launcher and an agent speak JSON, one message a line, over the agent's standard input and output. An agent needs nothing but
the standard library. When its input ends, or the launcher is silent for ``patience`` seconds, or it is itself
killed, all that it started ends with it, and the memory its servers shared is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import host_info

GREETING = "dist_egnn agent"
SHARED = Path("/dev/shm")
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Child:
    """A process with a name. What it prints comes out of one pipe; shared: how the files it may leave in /dev/shm begin."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], text: str, shared: str) -> None:
        self.name, self.shared = name, shared
        self.kill_at: float | None = None
        self.rest = b""
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(text.encode())
            self.process.stdin.close()
        self.out = self.process.stdout
        self.open = True

    def send(self, number: int) -> None:
        """A signal to the process and to what it may have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def clean(self) -> None:
        """Give back the memory that it shared, now that it has ended."""
        for file in SHARED.glob(f"{self.shared}*") if self.shared else ():
            file.unlink(missing_ok=True)


class Agent:
    """The loop of an agent."""

    def __init__(self) -> None:
        self.patience, self.heard = 60.0, time.monotonic()
        self.children: dict[str, Child] = {}
        self.listening: list[socket.socket] = []
        self.folder = tempfile.mkdtemp(prefix="dist_egnn-launch-")
        self.rest = b""
        self.going = True
        self.events = selectors.DefaultSelector()
        self.events.register(0, selectors.EVENT_READ)
        os.set_blocking(0, False)

    def say(self, **message: Any) -> None:
        try:
            sys.__stdout__.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            sys.__stdout__.flush()  # type: ignore[union-attr]
        except OSError:  # nobody listens any more
            self.going = False

    def run(self) -> None:
        """Until the launcher is gone or says so."""
        self.say(greeting=GREETING, pid=os.getpid())
        try:
            while self.going and time.monotonic() - self.heard < self.patience:
                for key, _ in self.events.select(0.2):
                    if key.fd == 0:
                        self._hear()
                    else:
                        self._pass_on(key.data)
                self._reap()
        finally:
            self._end()

    def _hear(self) -> None:
        try:
            more = os.read(0, 1 << 16)
        except BlockingIOError:
            return
        if not more:
            self.going = False
            return
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + more).split(b"\n")
        for line in lines:
            message = json.loads(line)
            number, what = message.pop("id"), message.pop("do")
            try:
                answer = getattr(self, f"do_{what}")(**message)
            except OSError as error:
                answer = {"problem": str(error)}
            self.say(id=number, answer=answer)
        self.heard = time.monotonic()  # some answers take their time

    def _pass_on(self, child: Child) -> None:
        more = os.read(child.out.fileno(), 1 << 16)
        *lines, child.rest = (child.rest + more).split(b"\n")
        if not more:
            lines, child.rest = ([child.rest] if child.rest else []), b""
            self.events.unregister(child.out)
            child.out.close()
            child.open = False
        for line in lines:
            self.say(name=child.name, line=line.decode(errors="replace").rstrip("\r"))

    def _reap(self) -> None:
        for child in list(self.children.values()):
            code = child.process.poll()
            if code is None:
                if child.kill_at is not None and time.monotonic() > child.kill_at:
                    child.send(signal.SIGKILL)
                continue
            if child.open and child.kill_at is None:  # its last lines first; a grandchild may keep the pipe open
                child.kill_at = time.monotonic() + 1
            if child.open and time.monotonic() < (child.kill_at or 0.0):
                continue
            child.send(signal.SIGKILL)
            if child.open:
                self.events.unregister(child.out)
                child.out.close()
            del self.children[child.name]
            child.clean()
            self.say(name=child.name, exit=code)

    def _end(self) -> None:
        for child in self.children.values():
            child.send(signal.SIGKILL)
            child.process.wait()
            child.clean()
        shutil.rmtree(self.folder, ignore_errors=True)

    # what the launcher may ask

    def do_ping(self) -> None:
        """Only that something was heard."""

    def do_greet(self, patience: float) -> None:
        self.patience = patience

    def do_look(self, **asked: Any) -> dict[str, Any]:
        return host_info.around(**asked)

    def do_listen(self, address: str, ports: list[int]) -> dict[str, Any]:
        """Take ports (0: any free one) of an address until `close`; they are then free for a server."""
        for port in ports:
            taken = socket.socket()
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind((address, port))
                taken.listen()
            except OSError as error:
                taken.close()
                return {"problem": f"port {port} of {address}: {error.strerror}{host_info.holder_of(port)}"}
            self.listening.append(taken)
        return {"ports": [one.getsockname()[1] for one in self.listening[-len(ports) :]]}

    def do_reach(self, targets: list[tuple[str, int]], limit: float) -> list[str]:
        """Which of these listening addresses cannot be reached from here, and why."""
        missed = []
        for address, port in targets:
            try:
                socket.create_connection((address, port), limit).close()
            except OSError as error:
                missed.append(f"{address} port {port} ({error.strerror or error})")
        return missed

    def do_close(self) -> None:
        while self.listening:
            self.listening.pop().close()

    def do_write(self, name: str, content: str) -> str:
        """Keep a file for the processes; its path. It goes when the agent does."""
        path = Path(self.folder) / name
        path.write_text(content)
        return str(path)

    def do_start(self, name: str, argv: list[str], env: dict[str, str], text: str, shared: str) -> dict[str, Any]:
        """Start a process; text: its standard input; shared: how its files in /dev/shm begin."""
        child = Child(name, argv, env, text, shared)
        self.children[name] = child
        self.events.register(child.out, selectors.EVENT_READ, child)
        return {"pid": child.process.pid}

    def do_stop(self, names: list[str], within: float | None) -> None:
        """Ask processes to end (SIGTERM) and kill those that have not within so many seconds; 0: at once, None: never."""
        for name in names:
            if name in self.children:
                self.children[name].send(signal.SIGKILL if within == 0 else signal.SIGTERM)
                if within:
                    self.children[name].kill_at = time.monotonic() + within


if __name__ == "__main__":
    # Ctrl-C is the launcher's business; a hang-up or a request to end is ours: then everything below ends in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent = Agent()

    def _leave(*_: Any) -> None:
        agent.going = False

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    agent.run()
