"""Run a function in several processes of this machine, one thread each, and leave none behind."""

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


def watch(pid: int, folder: Path | None = None) -> None:
    """End this process when the one that launched it is gone: a killed run leaves no trainers, and no folder of theirs."""

    def look() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=look, daemon=True).start()


def _word(rendezvous: str) -> Path:
    """Where the launcher says that its processes shall stop."""
    return Path(rendezvous).with_name("stop")


def _worker(
    function: Callable[..., Any],
    rank: int,
    size: int,
    rendezvous: str,
    timeout_s: float,
    launcher: int,
    out: Connection,
    args: tuple,
) -> None:
    import torch

    from . import comm

    signals.heed(_word(rendezvous))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    watch(launcher, Path(rendezvous).parent)
    torch.set_num_threads(1)
    try:
        result = function(comm.join(rank, size, rendezvous, timeout_s), *args)
        out.send(("done", result))
        comm.leave()
    except BaseException as error:
        # a peer that lost us raises an error of its own; the parent reports the first that is a Failure
        with suppress(OSError):  # a parent that is gone does not listen
            out.send(("failure" if isinstance(error, Failure) else "error", str(error), traceback.format_exc()))
            out.close()
        os._exit(1)  # leaving in order would wait for the peers


def _serve() -> None:
    """Start what ranks are forked from, where torch and DGL are imported once, not once a rank.

    It begins as ``python -c`` does, which looks into the working folder first: a user's dgl.py there would be taken for DGL.
    """
    forkserver.set_forkserver_preload(["dist_egnn.train.trainer"])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def run(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 300.0, apart: str = "") -> list[Any]:
    """function(comm, *args) on ``size`` ranks; what each returned.

    One rank runs in this process, or in one of its own that ``apart`` starts: "forkserver" as ranks of a group are, "spawn" as a
    program is, with 0.1 GB of libraries that forked ranks do not map.

    Raises Failure with the first rank's own line if one raised it, or naming the rank that died.
    """
    if size == 1 and not apart:
        from . import comm

        return [function(comm.Alone(), *args)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context: Any = multiprocessing.get_context(apart or "forkserver")
    if context.get_start_method() == "forkserver":
        _serve()
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        pipes, processes = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker,
                args=(function, rank, size, rendezvous, timeout_s, os.getpid(), there, args),
                daemon=True,
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            with signals.passing_on(_word(rendezvous)):
                return _collect(pipes, processes)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], processes: list[Any]) -> list[Any]:
    """Every rank's result, or the failure of the first that failed; then the others are ended."""
    results: dict[int, Any] = {}
    problems: list[tuple[int, tuple[Any, ...]]] = []
    waiting = dict(enumerate(pipes))
    give_up = None
    try:
        while waiting and (give_up is None or time.monotonic() < give_up):
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
                    problems.append((rank, message))
                    # the others notice within a second; the cause may be among their messages
                    give_up = give_up or time.monotonic() + 3
    finally:
        if problems or waiting:
            for process in processes:
                if process.is_alive():
                    process.kill()
    if not problems:
        return [results[rank] for rank in range(len(pipes))]
    order = {"failure": 0, "died": 1, "error": 2}
    rank, (kind, text, trace) = min(problems, key=lambda p: order[p[1][0]])
    if kind == "failure":
        raise Failure(text)
    if kind == "died":
        raise Failure(f"process {rank} of {len(pipes)} died ({text}); was it killed, or short of memory?")
    raise RuntimeError(f"process {rank} of {len(pipes)}: {text}\n{trace}")
