"""Run a function on several ranks of this machine: one process per rank, one thread per process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import Failure
from ..utils import signals


def exit_with_parent(pid: int, folder: Path | None = None) -> None:
    """End this process when process ``pid`` has ended, and remove ``folder``: a killed run leaves nothing behind."""

    def poll() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=poll, daemon=True).start()


def _stop_file(rendezvous: str) -> Path:
    return Path(rendezvous).with_name("stop")


def _rank_main(
    function: Callable[..., Any], args: tuple, rank: int, size: int, rendezvous: str, timeout_s: float, pipe: Connection
) -> None:
    import torch

    from . import comm

    signals.watch_stop_file(_stop_file(rendezvous))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops the ranks
    parent = multiprocessing.parent_process()  # the process that called run_ranks, not the fork server
    assert parent is not None
    assert parent.pid is not None
    exit_with_parent(parent.pid, Path(rendezvous).parent)
    torch.set_num_threads(1)
    try:
        result = function(comm.join_local(rank, size, rendezvous, timeout_s), *args)
        pipe.send(("done", result))
        comm.leave_group()
    except BaseException as error:
        # the other ranks fail as a consequence; the parent reports the first Failure among all errors
        with suppress(OSError):  # the parent may be gone
            pipe.send(("failure" if isinstance(error, Failure) else "error", str(error), traceback.format_exc()))
            pipe.close()
        os._exit(1)  # a regular exit would wait for the other ranks


def _start_forkserver() -> None:
    """Start the server that ranks are forked from; it imports torch and DGL once for all of them.

    It starts as ``python -c``, which searches the working folder first: a dgl.py there would be imported as DGL.
    """
    forkserver.set_forkserver_preload(["dist_egnn.train.trainer"])
    previous = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if previous is not None:
            os.environ["PYTHONSAFEPATH"] = previous


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 300.0, start_method: str = ""
) -> list[Any]:
    """Call function(comm, *args) on ``size`` ranks and return their results in the order of ranks.

    A single rank runs in this process unless ``start_method`` names how to start one: "forkserver", as for several
    ranks, or "spawn", as a program, which maps 0.1 GB of libraries more.

    Raises Failure with the message of the first rank that raised a Failure, or with the number of a rank that died.
    """
    if size == 1 and not start_method:
        from . import comm

        return [function(comm.SingleProcess(), *args)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context: Any = multiprocessing.get_context(start_method or "forkserver")
    if context.get_start_method() == "forkserver":
        _start_forkserver()
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        pipes, processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            rank_args = (function, args, rank, size, rendezvous, timeout_s, sender)
            processes.append(context.Process(target=_rank_main, args=rank_args, daemon=True))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        try:
            with signals.forward_stop(_stop_file(rendezvous)):
                return _collect(pipes, processes)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], processes: list[Any]) -> list[Any]:
    """The results of all ranks. After an error all ranks are killed and the most informative error is raised."""
    results: dict[int, Any] = {}
    errors: list[tuple[int, tuple[Any, ...]]] = []
    waiting = dict(enumerate(pipes))
    deadline = None
    try:
        while waiting and (deadline is None or time.monotonic() < deadline):
            for pipe in wait(list(waiting.values()), timeout=0.2):
                rank = next(r for r, p in waiting.items() if p is pipe)
                try:
                    message = waiting.pop(rank).recv()
                except EOFError:
                    processes[rank].join(5)
                    message = ("died", f"exit code {processes[rank].exitcode}", "")
                if message[0] == "done":
                    results[rank] = message[1]
                else:
                    errors.append((rank, message))
                    # the other ranks fail within a second, and one of them may report the cause
                    deadline = deadline or time.monotonic() + 3
    finally:
        if errors or waiting:
            for process in processes:
                if process.is_alive():
                    process.kill()
    if not errors:
        return [results[rank] for rank in range(len(pipes))]
    order = {"failure": 0, "died": 1, "error": 2}
    rank, (kind, text, trace) = min(errors, key=lambda error: order[error[1][0]])
    if kind == "failure":
        raise Failure(text)
    if kind == "died":
        raise Failure(f"process {rank} of {len(pipes)} died ({text}); was it killed, or short of memory?")
    raise RuntimeError(f"process {rank} of {len(pipes)}: {text}\n{trace}")
