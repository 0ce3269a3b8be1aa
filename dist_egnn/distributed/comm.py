"""Sums over partitions, and rows sent from each to each. A layer never asks how many processes there are.

This module holds every collective of the package and makes the process group; which rows travel is halo.py's.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Failure


class Comm(Protocol):
    """What a step may ask of the other partitions."""

    rank: int
    size: int

    @property
    def world(self) -> Comm:
        """All processes of the run: more than these where several groups train one model, each on snapshots of its own."""

    def split(self, groups: int) -> Comm:
        """Part into ``groups`` groups of size / groups consecutive ranks; the one of this rank, whose ``world`` is this one."""

    def sum(self, t: Tensor) -> Tensor:
        """The sum of t over all partitions, on every one of them; differentiable."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        """Replace every gradient by its sum over the partitions (parameters without one get zeros).

        beside (n,): a few numbers that travel along; returns their sum.
        """

    def max(self, value: float) -> float:
        """The largest value over the partitions."""

    def share(self, content: bytes) -> bytes:
        """Rank 0's content, on every rank; what others pass is ignored."""

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
    _world: Comm | None = None

    @property
    def world(self) -> Comm:
        return self._world or self

    def split(self, groups: int) -> Comm:
        assert groups == 1
        return self

    def sum(self, t: Tensor) -> Tensor:
        return t

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        _fill(parameters)
        return beside

    def max(self, value: float) -> float:
        return value

    def share(self, content: bytes) -> bytes:
        return content

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


ONE_TRIP_BYTES = 1 << 18  # up to so many bytes leave a process in one go; more in two, each as large as it must be


def trips(nbytes: int, size: int) -> int:
    """How many exchanges a sum of nbytes takes among ``size`` processes: see `_total`."""
    return 1 if size == 2 or nbytes * (size - 1) <= ONE_TRIP_BYTES else 2


def sent_bytes(nbytes: int, size: int) -> float:
    """Bytes that a process sends for it."""
    return nbytes * (size - 1) * (1.0 if trips(nbytes, size) == 1 else 2 / size)


def _total(t: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Σ_p t_p, added in the order of ranks: the same bits on every one.

    gloo's all-reduce passes pieces round a ring, 2(P − 1) messages one after the other. Here everybody sends to everybody at
    once, which waits for one: all of it, (P − 1) n numbers, if that is little; else two: pieces to their owners, their sums back.
    """
    size = dist.get_world_size(group)
    flat = t.detach().reshape(-1).cpu()  # gloo exchanges what the host holds
    n = len(flat)
    if trips(n * flat.element_size(), size) == 1:
        total = _ordered(_exchanged(flat.expand(size, n), group))
    else:
        pieces = flat.new_zeros(size, -(-n // size))
        pieces.view(-1)[:n] = flat
        own = _ordered(_exchanged(pieces, group))
        total = _exchanged(own.expand(size, len(own)), group).view(-1)[:n]
    return total.to(t.device).view(t.shape)


def _exchanged(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row r goes to rank r; the rows that came, in the order of ranks, one's own among them."""
    rank, splits = dist.get_rank(group), [1] * len(rows)
    splits[rank] = 0
    sent, own = torch.cat([rows[:rank], rows[rank + 1 :]]), rows[rank : rank + 1]
    taken = torch.empty_like(sent)
    with _counted():
        dist.all_to_all_single(taken, sent, splits, splits, group=group)
    return torch.cat([taken[:rank], own, taken[rank:]])


def _ordered(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:  # torch's own sum may take another order on another processor
        total += row
    return total


class _Sum(torch.autograd.Function):
    """y = Σ_p x_p. Every rank's loss depends on y, so ∂L/∂x_p = Σ_r ∂L_r/∂y: the backward pass is a sum as well."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _total(t, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _total(grad, ctx.group), None


class Group:
    """The processes of one of torch's groups, by default all."""

    def __init__(self, timeout_s: float, group: dist.ProcessGroup | None = None, world: Comm | None = None) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout_s, self._group, self._world = timeout_s, group, world

    @property
    def world(self) -> Comm:
        return self._world or self

    def split(self, groups: int) -> Comm:
        assert self._group is None
        assert self.size % groups == 0
        if groups == 1:
            return self
        if groups == self.size:
            alone = Alone()
            alone._world = self
            return alone
        # a DeviceMesh would also make groups across these, which nothing uses, and none with our patience
        patience = datetime.timedelta(seconds=self._timeout_s)
        own, _ = dist.new_subgroups(self.size // groups, timeout=patience)
        return Group(self._timeout_s, own, self)

    def sum(self, t: Tensor) -> Tensor:
        return _Sum.apply(t, self._group)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], beside: Tensor | None = None) -> Tensor | None:
        grads = _fill(parameters)
        more = [] if beside is None else [beside.to(grads[0])]
        bucket = torch.cat([g.reshape(-1) for g in (*grads, *more)])
        totals = _total(bucket, self._group).split([g.numel() for g in (*grads, *more)])
        for grad, total in zip(grads, totals, strict=False):
            grad.copy_(total.view_as(grad))
        return totals[-1] if more else None

    def max(self, value: float) -> float:
        mine = torch.tensor([value], dtype=torch.float64, device="cpu")
        return float(_exchanged(mine.expand(self.size, 1), self._group).max())

    def share(self, content: bytes) -> bytes:
        size = torch.tensor(len(content), device="cpu")
        dist.broadcast(size, group=self._group, group_src=0)
        t = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        if self.rank == 0:
            t.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else t)
        dist.broadcast(t, group=self._group, group_src=0)
        return t.numpy().tobytes()

    def exchange(self, rows: Tensor, give: Sequence[int], take: Sequence[int]) -> Callable[[], Tensor]:
        sent, taken = rows.contiguous(), rows.new_empty(sum(take), *rows.shape[1:])
        with _counted():
            work = dist.all_to_all_single(taken, sent, list(take), list(give), group=self._group, async_op=True)

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
    return Group(timeout_s)


def meet(rank: int, size: int, address: str, port: int, interface: str, timeout_s: float) -> Comm:
    """Join the group of ``size`` processes of any hosts that meet at rank 0's address and port, which it listens on there only.

    interface: name of the one that reaches the others. Raises Failure where they do not meet within timeout_s.
    """
    if size == 1:
        return Alone()
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    if interface not in (name for _, name in socket.if_nameindex()):
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise Failure(f"{interface}: no network interface of this host, which has {known}; name one of them")
    timeout, listening = datetime.timedelta(seconds=timeout_s), None
    if rank == 0:
        try:  # a store that opens its own socket listens on every interface
            listening = socket.create_server((address, port), backlog=size).detach()
        except OSError as error:
            raise Failure(
                f"{address}:{port}: rank 0 cannot listen there ({error.strerror}); name another port"
            ) from error
    try:
        store = dist.TCPStore(address, port, size, rank == 0, timeout, master_listen_fd=listening)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        line = str(error).splitlines()[0][:200]
        raise Failure(f"{address}:{port}: rank {rank} did not meet the other {size - 1} there ({line})") from error
    return Group(timeout_s)


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
