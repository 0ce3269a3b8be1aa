"""`distegnn` and `python` without the seconds that imports of torch and DGL take: a server has them and forks for each.

Each command has its own arguments, folder, environment and streams, and imports its other modules itself. The fork
server of its ranks is forked from it, and so are the runs of a sweep. Other processes that it starts are new ones.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = f"""#!{sys.executable} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(PATH)
for number in (1, 2, 15):  # SIGHUP, SIGINT, SIGTERM
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
words = [sys.argv, os.getcwd(), dict(os.environ)]
socket.send_fds(server, [json.dumps(words).encode()], [0, 1, 2])
sys.exit((server.recv(1) or b"\\1")[0])
"""
_spawn = util.spawnv_passfds


def start(folder: Path) -> tuple[subprocess.Popen, Path]:
    """The server, which ends when its standard input closes, and programs `distegnn` and `python` that ask it."""
    path = folder / "socket"
    for name in ("python", "distegnn"):
        program = folder / name
        program.write_text(PROGRAM.replace("PATH", repr(str(path))))
        program.chmod(0o755)
    env = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", **os.environ}  # as cli.console
    server = subprocess.Popen([sys.executable, __file__, path], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    server.stdout.read(1)  # it listens
    return server, program


def _serve(path: str) -> None:
    import dist_egnn.train.trainer  # noqa: F401

    gc.freeze()  # a collection in a command would copy every page
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
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    if command := os.fork():
        _wait(command, connection)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv, folder, environment = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    util.spawnv_passfds = _fork
    code: Any = 0
    try:
        _run(*sys.argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)  # a second less than an exit that clears all modules


def _wait(command: int, connection: socket.socket) -> None:
    """Pass signals on until the command ends, kill it if its program was killed, and tell its exit code."""
    end = os.pidfd_open(command)
    while connection in select.select([connection, end], [], [])[0]:
        number = connection.recv(1)
        os.kill(command, number[0] if number else signal.SIGKILL)
        if not number:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):  # it is gone
        connection.send(bytes([code if code >= 0 else 128 - code]))  # as a shell counts signals
    os._exit(0)


def _run(program: str, *words: str) -> None:
    if Path(program).name == "distegnn":
        from dist_egnn import cli

        cli.main()
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [*words], str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _fork(path: Any, args: Sequence[str], kept: Sequence[int]) -> int:
    """In place of a Python that multiprocessing starts for a fork server or a sweep's run: a fork has its modules."""
    modules = ["multiprocessing.forkserver", *["multiprocessing.spawn"] * (sys.argv[1:2] == ["sweep"])]
    code = next((word for word in args[1:] for module in modules if module in word), None)
    if code is None:
        return _spawn(path, args, kept)
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    low = 3
    for number in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(low, number)
        low = number + 1
    forkserver._forkserver.__init__()  # type: ignore[misc]  # its lock is held
    sys.argv = ["-c", *args[args.index(code) + 1 :]]
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
