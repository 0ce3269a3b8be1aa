"""`distegnn` without the seconds that imports of torch and DGL take: a server that imported them forks for each command.

Each command has its own arguments, folder, environment and streams, and imports its other modules itself. What it
starts are new processes, as always.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = f"""#!{sys.executable} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(PATH)
words = [sys.argv, os.getcwd(), dict(os.environ)]
socket.send_fds(server, [json.dumps(words).encode()], [0, 1, 2])
sys.exit((server.recv(1) or b"\\1")[0])
"""


def start(folder: Path) -> tuple[subprocess.Popen, Path]:
    """The server, which ends when its standard input closes, and a program `distegnn` that asks it."""
    program, path = folder / "distegnn", folder / "socket"
    program.write_text(PROGRAM.replace("PATH", repr(str(path))))
    program.chmod(0o755)
    env = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", **os.environ}  # as cli.console
    server = subprocess.Popen([sys.executable, __file__, path], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    server.stdout.read(1)  # it listens
    return server, program


def _serve(path: str) -> None:
    import dist_egnn.train.trainer  # noqa: F401

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen()
        os.write(1, b"\n")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes below
        while server in select.select([0, server], [], [])[0]:
            connection = server.accept()[0]
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                return _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    if command := os.fork():
        connection.send(bytes([os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]) & 255]))
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv, folder, environment = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from dist_egnn import cli

    cli.main()


if __name__ == "__main__":
    _serve(sys.argv[1])
