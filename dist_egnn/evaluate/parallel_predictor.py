"""A trained model on several processes as a function of arrays: what ``dist_egnn.load(run, processes=P)`` returns."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..data import graphs, halo
from ..data.edges import edges_of
from ..data.graphs import Edges
from ..distributed import spawn
from ..distributed.comm import Comm
from ..errors import Failure
from ..partition import assign
from .predictor import Predictor
from .repartition import in_edges, part_graph


class ParallelPredictor(Predictor):
    """As `Predictor`, on processes of its own, each with a part of the nodes and the halo of its edges.

    The processes end with `close`, a ``with`` block, the object or this process. Raises Failure for a model that cannot
    exchange halos, and in a call if a process has ended.
    """

    def __init__(self, path: str | Path, processes: int, device: str = "cpu", *, double: bool = False) -> None:
        super().__init__(path, device, double=double)
        given = self.config, str(path), device, double
        ends = [multiprocessing.Pipe() for _ in range(processes)]
        self._channels, theirs = [own for own, _ in ends], [other for _, other in ends]
        stack = ExitStack()
        self._close = weakref.finalize(self, stack.close)  # also when the interpreter exits
        args = [(*given, channel) for channel in theirs]
        started = spawn.started_ranks(serve, args, max(300.0, self.config.train.timeout_s))
        self._pipes, self._processes, _ = stack.enter_context(started)
        for channel in self._channels:
            stack.callback(_stop, channel)
        for channel in theirs:
            channel.close()
        self._receive()  # the model is loaded

    def predict(
        self, fields: Mapping[str, np.ndarray], side: np.ndarray | None, given: Edges | None
    ) -> tuple[Tensor, Tensor]:
        if not self._close.alive:
            raise Failure("the predictor is closed; load the run again")
        assign.check_size(len(fields["x"]), len(self._channels))
        request = pickle.dumps((fields, side, given), protocol=5)
        with suppress(OSError):  # a process has ended; `_receive` says why
            for channel in self._channels:
                channel.send_bytes(request)
        parts = self._receive()
        predicted = torch.zeros(fields["x"].shape, dtype=parts[0][1].dtype)
        for own, rows, _ in parts:
            predicted[own] = rows
        return predicted, parts[0][2]

    def _receive(self) -> list[Any]:
        """The answer of each process. Raises the error of the first that failed, after ending all."""
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(self._channels):
                waiting = [channel for rank, channel in enumerate(self._channels) if rank not in answers]
                ready: list[Any] = wait([*waiting, *self._pipes])
                if any(pipe in ready for pipe in self._pipes):
                    spawn.collect(self._pipes, self._processes)  # raises the error
                for channel in ready:
                    answers[self._channels.index(channel)] = channel.recv()
        except EOFError:  # a process has ended
            with self:
                spawn.collect(self._pipes, self._processes)
        except BaseException:
            self.close()
            raise
        return [answers[rank] for rank in range(len(answers))]

    def close(self) -> None:
        self._close()


def serve(comm: Comm, config: Config, path: str, device: str, double: bool, channel: Connection) -> None:
    """A process of a `ParallelPredictor`: answer requests until an empty one. config: names the user's model."""
    predictor = Predictor(path, device, comm, double=double)
    channel.send(None)
    try:
        while request := channel.recv_bytes():
            channel.send(_predict(comm, predictor, *pickle.loads(request)))
    except EOFError:  # the calling process was killed: `spawn.exit_with_parent` cleans up
        threading.Event().wait()


def _stop(channel: Connection) -> None:
    with suppress(OSError):  # its process may have ended
        channel.send_bytes(b"")
    channel.close()


@torch.no_grad()
def _predict(
    comm: Comm, predictor: Predictor, fields: dict[str, np.ndarray], side: np.ndarray | None, given: Edges | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of this process's nodes (n,), their positions (n, 3), and the virtual nodes (C, 3)."""
    x, rule = fields["x"], predictor.spec.rule
    none = np.zeros(0, np.int64)  # bisection needs no edges, and every process finds the same parts
    part = assign.assign("bisection", x if side is None else graphs.wrap(x, side), none, none, comm.size)
    own = np.flatnonzero(part == comm.rank)
    src, dst = edges_of(x, rule, side, given) if rule.edge_drop else in_edges(x, own, rule, side, given)
    about: dict[str, Any] = {"number": 0, "where": "positions", "longest": rule.longest, "side": side}
    local = halo.extract_part(src, dst, part, comm.rank, comm.size, **about)
    predicted, z = predictor.model(part_graph(local, fields, side))
    return torch.from_numpy(local[0]), predicted.cpu(), z[0].cpu()
