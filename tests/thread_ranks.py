"""P ranks as threads of one process, with an in-memory group that fails if the ranks make different calls."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from dgl import DGLGraph
from torch import Tensor

from dist_egnn.distributed.comm import Comm, Counts
from dist_egnn.evaluate.parallel_check import relative_difference


class Board:
    """All-gather between threads: each rank contributes a value and receives the values of all."""

    def __init__(self, size: int) -> None:
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=300)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return add(t.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.add(grad), None


class ThreadRank(Comm):
    """A rank of a group of threads. calls: name and number of elements of each collective."""

    def __init__(self, rank: int, board: Board) -> None:
        super().__init__(rank, len(board.slots))
        self.board, self.calls = board, list[tuple[str, int]]()

    def _gather(self, name: str, t: Tensor, counts: Any = None) -> list[Any]:
        self.calls.append((name, t.numel()))
        values = self.board.gather(self.rank, (name, t, counts))
        assert {other for other, *_ in values} == {name}, "the ranks make different calls"
        return values

    def _add(self, t: Tensor) -> Tensor:
        return torch.stack([t for _, t, _ in self._gather("sum", t)]).sum(0)

    def sum(self, t: Tensor) -> Tensor:
        return _Sum.apply(t, self._add)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        for parameter in parameters:
            parameter.grad = self._add(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        return extra

    def all_to_all(self, rows: Tensor, send_counts: Counts, receive_counts: Counts) -> Callable[[], Tensor]:
        assert len(rows) == sum(send_counts)
        assert len(send_counts) == len(receive_counts) == self.size

        def wait() -> Tensor:
            sent = self._gather("exchange", rows, send_counts)
            received = [t.split(list(counts))[self.rank] for _, t, counts in sent]
            assert [len(t) for t in received] == list(receive_counts), "the counts of the ranks differ"
            return torch.cat(received).clone()

        return wait


def run_ranks(size: int, function: Callable[..., Any], *models: torch.nn.Module) -> list[Any]:
    """function(comm, *copies of the models) on all ranks at once; raises the first error that no other one caused."""
    board = Board(size)
    copies = [copy.deepcopy(models) for _ in range(size)]  # e3nn's models cannot be copied in threads

    def run(rank: int) -> Any:
        try:
            return function(ThreadRank(rank, board), *copies[rank])
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


class StepResult(NamedTuple):
    """Predictions, virtual nodes, and gradients by name."""

    predicted: Tensor
    z: Tensor
    gradients: dict[str, Tensor]


def step(model: torch.nn.Module, graph: DGLGraph, comm: Comm) -> StepResult:
    """Forward and backward of a rank's share of a loss that weights every prediction and virtual node differently."""
    model.comm = comm
    model.zero_grad()
    predicted, z = model(graph)
    weight = torch.sin(1 + graph.ndata["gid"]).unsqueeze(1).to(predicted)
    loss = (weight * (predicted - graph.ndata["y"].to(predicted)).square()).sum()
    (loss + 0.3 * (z - 0.1).square().sum() / comm.size).backward()
    comm.sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return StepResult(predicted.detach(), z.detach(), gradients)


def differences(one: StepResult, many: Sequence[StepResult], rows: Sequence[Tensor]) -> dict[str, float]:
    """Relative differences between the ranks and one process; rows: global number of each node of each rank."""
    predicted = torch.cat([m.predicted for m in many])[torch.cat(list(rows)).argsort()]
    errors = {"x": relative_difference(predicted, one.predicted)}
    errors["z"] = max(relative_difference(m.z, one.z) for m in many)
    least = 1e-3 * max((float(g.abs().max()) for g in one.gradients.values()), default=0.0)
    for name, gradient in one.gradients.items():
        errors[name] = max(relative_difference(m.gradients[name], gradient, least) for m in many)
    return errors
