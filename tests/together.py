"""P ranks as threads of one process, with a group that exists in memory: cheap, and it notices ranks that do different things."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor

from dist_egnn.distributed import comm
from dist_egnn.evaluate import parallel_check


class Board:
    """Where ranks put something and see what all have put."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return add(t.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.add(grad), None


class Member(comm.SingleProcess):
    """A rank of the group on a board. calls: name and numbers sent of each call."""

    def __init__(self, rank: int, board: Board) -> None:
        self.rank, self.size, self.board = rank, board.size, board
        self.calls: list[tuple[str, int]] = []

    def _swap(self, name: str, t: Tensor, more: Any = None) -> list[Any]:
        self.calls.append((name, t.numel()))
        found = self.board.swap(self.rank, (name, t, more))
        assert {other for other, *_ in found} == {name}, "ranks at different calls"
        return found

    def _add(self, t: Tensor) -> Tensor:
        return torch.stack([t for _, t, _ in self._swap("sum", t)]).sum(0)

    def sum(self, t: Tensor) -> Tensor:
        return _Sum.apply(t, self._add)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._add(grad)
        return extra

    def all_to_all(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Callable[[], Tensor]:
        assert len(rows) == sum(send_counts)
        assert len(send_counts) == len(receive_counts) == self.size

        def wait() -> Tensor:
            found = self._swap("exchange", rows, send_counts)
            pieces = [t.split(list(counts))[self.rank] for _, t, counts in found]
            assert [len(piece) for piece in pieces] == list(receive_counts), "rows sent are not rows expected"
            return torch.cat(pieces).clone()

        return wait


def together(size: int, function: Callable[..., Any], *models: torch.nn.Module) -> list[Any]:
    """function(member, *copies of the models) on every rank at once, or the first error that is not another's consequence."""
    board = Board(size)
    copies = [copy.deepcopy(models) for _ in range(size)]  # here: in threads, e3nn's models cannot be copied

    def one(rank: int) -> Any:
        try:
            return function(Member(rank, board), *copies[rank])
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        errors = [done.exception() for done in futures]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [done.result() for done in futures]


@dataclass
class Found:
    """What a step gave: predictions, virtual nodes, gradients by name."""

    predicted: Tensor
    z: Tensor
    gradients: dict[str, Tensor]


def step(model: torch.nn.Module, graph: DGLGraph, group: comm.Comm) -> Found:
    """Forward and backward of this rank's share of a loss that every prediction and virtual node enters unevenly."""
    model.comm = group
    model.zero_grad()
    predicted, z = model(graph)
    weight = torch.sin(1 + graph.ndata["gid"]).unsqueeze(1).to(predicted)
    loss = (weight * (predicted - graph.ndata["y"].to(predicted)).square()).sum()
    (loss + 0.3 * (z - 0.1).square().sum() / group.size).backward()
    group.sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(predicted.detach(), z.detach(), gradients)


def differences(one: Found, many: Sequence[Found], rows: Sequence[Tensor]) -> dict[str, float]:
    """Relative differences of the ranks from one process; rows: which node of the whole each of a rank's nodes is."""
    found = {
        "x": parallel_check.relative_difference(
            torch.cat([m.predicted for m in many])[torch.cat(list(rows)).argsort()], one.predicted
        )
    }
    found["z"] = max(parallel_check.relative_difference(m.z, one.z) for m in many)
    least = 1e-3 * max((float(g.abs().max()) for g in one.gradients.values()), default=0.0)
    for name, gradient in one.gradients.items():
        found[name] = max(parallel_check.relative_difference(m.gradients[name], gradient, least) for m in many)
    return found
