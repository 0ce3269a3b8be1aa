"""The agent that `distegnn launch` runs on every host: it starts processes, forwards their output, and stops them.

Launcher and agent exchange JSON messages, one per line, by the agent's standard input and output. Its processes end
when its input ends, when the launcher is silent for ``patience`` seconds, or when it is killed. It removes what its
servers left in /dev/shm; where it was killed, the launcher's next agent does. It imports neither torch nor DGL.
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
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from . import host_info

GREETING = "dist_egnn agent"
FOLDER = "dist_egnn-launch-"  # how the name of an agent's folder begins
SHARED_MEMORY = Path("/dev/shm")
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _own_session() -> None:
    os.setsid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def remove_shared(prefix: str) -> None:
    for file in SHARED_MEMORY.glob(f"{prefix}*") if prefix else ():
        file.unlink(missing_ok=True)


class Child:
    """A process. text: its standard input; shared: prefix of the files that it may leave in /dev/shm."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], text: str, shared: str) -> None:
        self.name, self.shared = name, shared
        self.kill_at = float("inf")
        self.buffer = b""
        self.process = Popen(
            argv, env=os.environ | env, stdin=PIPE, stdout=PIPE, stderr=STDOUT, preexec_fn=_own_session
        )
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError), self.process.stdin as file:
            file.write(text.encode())
        self.output = self.process.stdout

    def signal(self, number: int) -> None:
        """Send a signal to the process and to its own children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the process and its own children, and remove the shared memory that it left."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        remove_shared(self.shared)


class Agent:
    """Handles the launcher's messages: {"id": 1, "do": "ping"} calls `do_ping`, whose result is the answer."""

    def __init__(self, patience: float) -> None:
        self.patience, self.last_message = patience, time.monotonic()
        self.children: dict[str, Child] = {}
        self.sockets: list[socket.socket] = []
        self.folder = tempfile.mkdtemp(prefix=FOLDER)
        self.buffer = b""
        self.connected = True
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self._handle_input)

    def send(self, **message: Any) -> None:
        try:
            print(json.dumps(message), flush=True)
        except OSError:  # the launcher is gone
            self.connected = False

    def run(self) -> None:
        """Handle messages and output until the launcher closes the connection or is silent for too long."""
        self.send(greeting=GREETING, folder=self.folder)
        try:
            while self.connected and time.monotonic() - self.last_message < self.patience:
                for key, _ in self.selector.select(0.2):
                    key.data()
                self._report_exits()
        finally:
            for child in self.children.values():
                child.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _handle_input(self) -> None:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            self.connected = False
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            number, command = message.pop("id"), message.pop("do")
            try:
                answer = getattr(self, f"do_{command}")(**message)
            except OSError as error:
                answer = {"problem": str(error)}
            self.send(id=number, answer=answer)
        self.last_message = time.monotonic()  # after the answers, which may take some time

    def _forward_output(self, child: Child) -> None:
        chunk = os.read(child.output.fileno(), 1 << 16)
        *lines, child.buffer = (child.buffer + chunk).split(b"\n")
        if not chunk:
            lines = [child.buffer] if child.buffer else []
            self.selector.unregister(child.output)
            child.output.close()
        for line in lines:
            self.send(name=child.name, line=line.decode(errors="replace").rstrip("\r"))

    def _report_exits(self) -> None:
        for child in list(self.children.values()):
            code, now = child.process.poll(), time.monotonic()
            if code is None:
                if now > child.kill_at:
                    child.signal(signal.SIGKILL)
                continue
            child.kill_at = min(child.kill_at, now + 1)
            if not child.output.closed:  # forward its last lines first; a child of its own may keep the pipe open
                if now < child.kill_at:
                    continue
                self.selector.unregister(child.output)
                child.output.close()
            del self.children[child.name]
            child.kill()
            self.send(name=child.name, exit=code)

    # the commands of the launcher

    def do_ping(self) -> None:
        """Show that the launcher is alive."""

    def do_inspect(self, store: str, run: str) -> dict[str, Any]:
        return host_info.inspect_host(Path(store), Path(run))

    def do_listen(self, address: str, ports: list[int]) -> dict[str, Any]:
        """Listen on ports (0: any free one) of an address until `close`, which frees them for a server."""
        for port in ports:
            try:
                self.sockets.append(socket.create_server((address, port)))
            except OSError as error:
                reason = os.strerror(error.errno or 0) + host_info.port_owner(port)
                return {"problem": f"port {port} of {address}: {reason}"}
        return {"ports": [listener.getsockname()[1] for listener in self.sockets[-len(ports) :]]}

    def do_reach(self, targets: list[tuple[str, int]], limit: float) -> list[str]:
        """Connect to each address; returns those that cannot be reached within ``limit`` seconds, and why."""
        missed = []
        for address, port in targets:
            try:
                socket.create_connection((address, port), limit).close()
            except OSError as error:
                missed.append(f"{address} port {port} ({error.strerror or error})")
        return missed

    def do_close(self) -> None:
        while self.sockets:
            self.sockets.pop().close()

    def do_write(self, name: str, content: str) -> str:
        """Write a file for the processes and return its path. It is removed when the agent ends."""
        path = Path(self.folder) / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    def do_clear(self, folder: str, shared: list[str]) -> None:
        """Remove what a killed agent left: its folder, and the shared memory of its servers, which ended with it."""
        if Path(folder).name.startswith(FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        for prefix in shared:
            remove_shared(prefix)

    def do_start(self, name: str, argv: list[str], env: dict[str, str], text: str, shared: str) -> dict[str, Any]:
        child = self.children[name] = Child(name, argv, env, text, shared)
        self.selector.register(child.output, selectors.EVENT_READ, partial(self._forward_output, child))
        return {"pid": child.process.pid}

    def do_stop(self, name: str, within: float | None) -> None:
        """Send SIGTERM, and SIGKILL after ``within`` seconds; 0: SIGKILL at once, None: no SIGKILL."""
        if child := self.children.get(name):
            child.signal(signal.SIGKILL if within == 0 else signal.SIGTERM)
            if within:
                child.kill_at = time.monotonic() + within


if __name__ == "__main__":
    agent = Agent(patience=float(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: setattr(agent, "connected", False))
    agent.run()
