"""Run a function on several ranks of this machine: one process per rank, one thread per process."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import Config
from ..errors import Failure
from ..utils import console, signals

SOCKET_FOLDER_LENGTH = 107 - len("/pymp-12345678/listener-12345678")  # of a UNIX socket's path, what is left for TMPDIR
_starting = threading.RLock()  # starting a process changes what all threads share


def exit_with_parent(pid: int, *folders: str | Path) -> None:
    """End this process when process ``pid`` has ended, and remove ``folders``: a killed run leaves nothing behind."""

    def poll() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=poll, daemon=True).start()


def _rank_main(
    function: Callable[..., Any],
    args: tuple,
    rank: int,
    size: int,
    folder: Path,
    server: str,
    timeout_s: float,
    pipe: Connection,
) -> None:
    """The main function of a rank. folder: where the ranks meet and the parent creates the file ``stop``.

    server: the fork server's own folder.
    """
    import torch

    from . import comm

    console.guard_streams()
    signals.watch_stop_file(folder / "stop")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops the ranks
    parent: Any = multiprocessing.parent_process()  # the process that called run_ranks, not the fork server
    exit_with_parent(parent.pid, folder, server)
    torch.set_num_threads(1)
    try:
        result = function(comm.join_local(rank, size, folder / "rendezvous", timeout_s), *args)
        pipe.send((result, None))
        comm.leave_group()
    except BaseException as error:
        trace = RuntimeError(f"process {rank} of {size}: {error}\n{traceback.format_exc()}")
        with suppress(OSError):  # the parent may be gone
            pipe.send((None, Failure(str(error)) if isinstance(error, Failure) else trace))
            pipe.close()
        os._exit(1)  # a regular exit would wait for the other ranks


def start_forkserver(*preload: str) -> str:
    """Start the server that processes are forked from, which imports modules once for all; returns its own folder.

    Its socket is in TMPDIR, or in another temporary folder if the path would be too long for a socket.
    """
    with _starting:
        if preload:
            forkserver.set_forkserver_preload([*preload])
        temporary, environment = tempfile.tempdir, dict(os.environ)
        os.environ["PYTHONSAFEPATH"] = "1"  # `python -c` would import a dgl.py in the working folder as DGL
        tempfile.tempdir = _socket_folder()
        try:
            forkserver.ensure_running()
            return util.get_temp_dir()
        finally:
            tempfile.tempdir = temporary
            del os.environ["PYTHONSAFEPATH"]
            os.environ.update(environment)


def _socket_folder() -> str:
    first = tempfile.gettempdir()
    for folder in (first, f"/run/user/{os.getuid()}", "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= SOCKET_FOLDER_LENGTH and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise Failure(f"TMPDIR={first}: too long; set it to a folder of at most {SOCKET_FOLDER_LENGTH} characters")


@contextmanager
def without_script(*sent: Any) -> Iterator[None]:
    """Processes started in the block do not import the user's script, which may have no main guard or be no file.

    sent: what they are sent. If it comes from the script, they must import it.
    """
    names = [getattr(item, "__module__", "") or "" for item in sent]
    names += [name for item in sent if isinstance(item, Config) for name in (item.model.name, *item.train.callbacks)]
    with _starting:
        script = sys.modules["__main__"]
        if not any(name.split(":")[0] == "__main__" for name in names):
            sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 300.0, start_method: str = ""
) -> list[Any]:
    """The results of function(comm, *args) on ``size`` ranks, in the order of ranks.

    start_method: "forkserver", or "spawn", which maps 0.1 GB of libraries more; by default a single rank runs in this
    process. Raises Failure with the message of the first rank that raised one, or the number of a rank that died.
    """
    if size == 1 and not start_method:
        from . import comm

        return [function(comm.SingleProcess(), *args)]
    started = started_ranks(function, [args] * size, timeout_s, start_method)
    with started as (pipes, processes, folder), signals.forward_stop(folder / "stop"):
        return collect(pipes, processes)


@contextmanager
def started_ranks(
    function: Callable[..., Any], rank_args: Sequence[tuple], timeout_s: float = 300.0, start_method: str = ""
) -> Iterator[tuple[list[Connection], list[Any], Path]]:
    """Start function(comm, *rank_args[rank]) on as many ranks; all have ended after the block, an error kills them.

    Yields the pipes with their results, for `collect`, the processes, and the folder in which they meet.
    """
    size = len(rank_args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context: Any = multiprocessing.get_context(start_method or "forkserver")
    server = start_forkserver("dist_egnn.train.trainer") if context.get_start_method() == "forkserver" else ""
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder, pipes, processes = Path(name), [], []
        try:
            for rank, args in enumerate(rank_args):
                receiver, sender = context.Pipe(duplex=False)
                about = (function, args, rank, size, folder, server, timeout_s, sender)
                processes.append(context.Process(target=_rank_main, args=about, daemon=True))
                with without_script(function, *args):
                    processes[-1].start()
                sender.close()
                pipes.append(receiver)
            yield pipes, processes, folder
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def collect(pipes: list[Connection], processes: list[Any]) -> list[Any]:
    """The results of all ranks. Raises the cause: a Failure if there is one, else a rank that died, else another error."""
    results: dict[int, Any] = {}
    errors: list[Exception] = []
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = math.inf
    while waiting and time.monotonic() < deadline:
        ready: list[Any] = wait([*waiting], timeout=0.2)
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                results[rank], error = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                code = processes[rank].exitcode
                why = "was it killed, or short of memory?"
                if code == 1:  # `_rank_main` reports its errors: this was before it
                    why = "a script that trains a class of its own does so under `if __name__ == '__main__':`"
                reason = f"died (exit code {code}); {why}"
                error = ChildProcessError(f"process {rank} of {len(pipes)} {reason}")
            if error:
                errors.append(error)
                deadline = min(deadline, time.monotonic() + 3)  # the others fail in a second; one may tell the cause
    if errors:
        cause = min(errors, key=lambda error: (Failure, ChildProcessError, RuntimeError).index(type(error)))
        raise Failure(str(cause)) if isinstance(cause, ChildProcessError) else cause
    return [results[rank] for rank in range(len(pipes))]
