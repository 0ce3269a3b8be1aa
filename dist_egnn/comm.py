"""Sums over partitions, and rows sent from each to each. A layer never asks how many processes there are.

This module holds every collective of the package and makes the process group; which rows travel is halo.py's.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Comm(Protocol):
    """What a step may ask of the other partitions."""

    rank: int
    size: int

    def sum(self, t: Tensor) -> Tensor:
        """The sum of t over all partitions, on every one of them; differentiable."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        """Replace every gradient by its sum over the partitions (parameters without one get zeros).

        beside (n,): a few numbers that travel along; returns their sum.
        """

    def max(self, value: float) -> float:
        """The largest value over the partitions."""

    def exchange(self, rows: Tensor, give: Sequence[int], take: Sequence[int]) -> Callable[[], Tensor]:
        """Start to send rows (Σ give, …), give[r] of them to rank r, in order of rank.

        Returns what waits for the rows (Σ take, …) from the others, take[r] of rank r, in order of rank. Not differentiable.
        """


def _fill(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    # A parameter that nothing used has no gradient; zeros make the optimiser treat it alike for any number of parts.
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    return grads


class Alone:
    """One process: every sum is its own operand."""

    rank, size = 0, 1

    def sum(self, t: Tensor) -> Tensor:
        return t

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        _fill(parameters)
        return beside

    def max(self, value: float) -> float:
        return value

    def exchange(self, rows: Tensor, give: Sequence[int], take: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: rows


_spent = 0.0


def seconds() -> float:
    """Seconds this process has spent in collectives, waiting for the others included."""
    return _spent


@contextmanager
def _counted() -> Iterator[None]:
    global _spent
    started = time.perf_counter()
    yield
    _spent += time.perf_counter() - started


def _all_reduce(t: Tensor, **options: Any) -> None:
    with _counted():
        dist.all_reduce(t, **options)


class _Sum(torch.autograd.Function):
    """y = Σ_p x_p. Every rank's loss depends on y, so ∂L/∂x_p = Σ_r ∂L_r/∂y: the backward pass is a sum as well."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.detach().clone(memory_format=torch.contiguous_format)
        _all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        _all_reduce(grad)
        return grad


class Group:
    """The processes of torch's default group, one partition each."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, t: Tensor) -> Tensor:
        return _Sum.apply(t)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        grads = _fill(parameters)
        more = [] if beside is None else [beside.to(grads[0])]
        bucket = torch.cat([g.reshape(-1) for g in (*grads, *more)])
        _all_reduce(bucket)
        totals = bucket.split([g.numel() for g in (*grads, *more)])
        for grad, total in zip(grads, totals, strict=False):
            grad.copy_(total.view_as(grad))
        return totals[-1] if more else None

    def max(self, value: float) -> float:
        t = torch.tensor(value, dtype=torch.float64)
        _all_reduce(t, op=dist.ReduceOp.MAX)
        return float(t)

    def exchange(self, rows: Tensor, give: Sequence[int], take: Sequence[int]) -> Callable[[], Tensor]:
        sent, taken = rows.contiguous(), rows.new_empty(sum(take), *rows.shape[1:])
        with _counted():
            work = dist.all_to_all_single(taken, sent, list(take), list(give), async_op=True)

        def wait() -> Tensor:
            with _counted():
                work.wait()
            assert len(sent) == sum(give)  # it must live until now
            return taken

        return wait


def join(rank: int, size: int, rendezvous: str, timeout_s: float) -> Comm:
    """Join the group of ``size`` local processes that meet at ``rendezvous`` (a file that none of them has made yet).

    gloo on any device: it sums CUDA tensors by way of the host, also where processes share a device, which NCCL refuses.
    """
    if size == 1:
        return Alone()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Group()


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
